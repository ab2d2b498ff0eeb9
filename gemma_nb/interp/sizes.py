"""How much a request for capture sites takes, and what of it would fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemma_nb.config import TransformerConfig
from gemma_nb.indices import Index, Indices, ascending, one
from gemma_nb.sites import Site, check_heads, check_layers

# A request beyond this is refused before it is computed.
LIMIT_BYTES = 2 * 2**30

_TEXT = "the text has"


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What is asked for of a text, as ascending indices from 0 on; None means all.

    Attributes:
      layers: always listed.
      positions: of queries, on maps.
      heads: query heads, or the key-value heads of sites that have these.
    """

    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        wanted: Sequence[Site],
        config: TransformerConfig,
        length: int,
        layers: Indices = None,
        positions: Indices = None,
        heads: Indices = None,
    ) -> Chosen:
        """Resolves what a user asks for of some sites; negative indices count from the end.

        Raises:
          ValueError: an index that the model or the text does not have; heads or layers where none
            of the sites has any, or heads of sites that have different numbers of them; layers that
            differ in the shape of a site.
        """
        if wanted and layers is not None and not any(s.per_layer for s in wanted):
            raise ValueError(f"{_names(wanted)} exists once, not in each layer: leave out layers=")
        which = check_layers(layers, config.num_layers)
        at = check_positions(positions, length)
        some = None if heads is None else _chosen_heads(wanted, heads, config, which)
        for s in wanted:
            _refuse_unequal(s, which, config)
        return cls(which, at, some)

    def bytes_of(
        self, s: Site, length: int, config: TransformerConfig, dtype: str = "float32"
    ) -> int:
        """How much one site of a text of `length` tokens takes."""
        rows = length if self.positions is None else len(self.positions)
        sizes = config.axis_sizes(self.layers[0]) | {"T": rows, "S": length}
        if self.heads is not None:
            sizes |= {"N": len(self.heads), "K": len(self.heads)}
        one = int(np.prod([sizes[axis] for axis in s.dims[1:]])) * np.dtype(dtype).itemsize
        return one * (len(self.layers) if s.per_layer else 1)


def _refuse_unequal(s: Site, layers: Sequence[int], config: TransformerConfig) -> None:
    """Raises ValueError where a site is stacked over layers that differ in its shape."""
    if not s.per_layer:
        return
    for axis in s.dims:
        if axis in "KHF":
            try:
                config.shared_size(axis, layers)
            except ValueError as error:
                raise ValueError(f"{s.name} cannot be stacked: {error}") from None


def _chosen_heads(
    wanted: Sequence[Site], heads: Indices, config: TransformerConfig, layers: Sequence[int]
) -> tuple[int, ...]:
    """`heads` of those sites that have heads; raises ValueError as `Chosen.of` says."""
    axes = {axis for s in wanted for axis in s.dims if axis in "NK"}
    if wanted and not axes:
        raise ValueError(f"{_names(wanted)} has no heads: leave out heads=")
    if "K" not in axes:
        return check_heads(heads, config.num_heads)
    count = config.shared_size("K", layers)
    if axes == {"N", "K"} and config.num_heads != count:
        queries, keys = (_names([s for s in wanted if axis in s.dims]) for axis in "NK")
        raise ValueError(
            f"heads= would mean the {config.num_heads} query heads of {queries} and the "
            f"{count} key-value heads of {keys}: ask for them one after the other"
        )
    if axes == {"N", "K"}:
        return check_heads(heads, config.num_heads)
    owner = "each layer has key-value heads"
    return ascending(heads, count, "key-value head", owner=owner, argument="heads")


def _names(sites: Sequence[Site]) -> str:
    return " and ".join(s.name for s in sites)


def check_positions(positions: Indices, length: int) -> tuple[int, ...] | None:
    """`positions` as ascending indices into a text, each once; None stays None.

    Raises:
      ValueError: no index, or a position that the text does not have.
    """
    if positions is None:
        return None
    return ascending(positions, length, "position", owner=_TEXT)


def check_position(position: Index, length: int) -> int:
    """`position` as the index of one token.

    Raises:
      ValueError: as of `check_positions`, or several.
    """
    return one(position, length, "position", owner=_TEXT)


def refuse_too_large(
    wanted: Sequence[Site], chosen: Chosen, length: int, config: TransformerConfig, dtype: str
) -> None:
    """Raises ValueError, with what would fit, where a request exceeds the limit."""
    takes = {s: chosen.bytes_of(s, length, config, dtype) for s in wanted}
    total = sum(takes.values())
    if total <= LIMIT_BYTES:
        return
    once = sum(size for s, size in takes.items() if not s.per_layer)
    layers = len(chosen.layers) if any(s.per_layer for s in wanted) else 1
    rows = length if chosen.positions is None else len(chosen.positions)
    fit = int((LIMIT_BYTES - once) * layers // (total - once)) if total > once else 0
    if layers > 1 and fit >= 1:
        advice = f"layers=[...] with at most {fit} of them"
    else:
        of_one = once + (total - once) / layers
        advice = f"positions=[...] with at most {max(1, int(rows * LIMIT_BYTES / of_one))} of them"
        if layers > 1:
            advice = f"one layer, and {advice}"
    if any("N" in s.dims for s in wanted) and chosen.heads is None:
        advice += ", or heads=[...]"
    raise ValueError(
        f"{', '.join(s.name for s in wanted)} of {rows} positions in {layers} layers would take "
        f"{total / 2**30:.1f} GiB, and the limit is {LIMIT_BYTES / 2**30:.0f} GiB: pass {advice}, "
        'or dtype="float16"'
    )
