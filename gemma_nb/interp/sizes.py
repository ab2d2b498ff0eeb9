"""How much a request for capture sites takes, and what of it would fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from gemma_nb.config import TransformerConfig
from gemma_nb.sites import Site, check_heads, check_layers

# A request beyond this is refused before it is computed.
LIMIT_BYTES = 2 * 2**30

# Which layers, positions or heads a user asks for; None means all.
Indices = Iterable[int] | int | None


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What is asked for of a text, as ascending indices from 0 on; None means all.

    Attributes:
      layers: always listed.
      positions: of queries, on maps.
      heads: query heads.
    """

    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        config: TransformerConfig,
        length: int,
        layers: Indices = None,
        positions: Indices = None,
        heads: Indices = None,
    ) -> Chosen:
        """Resolves what a user asks for; negative indices count from the end.

        Raises:
          ValueError: an index that the model or the text does not have.
        """
        return cls(
            check_layers(layers, config.num_layers),
            check_positions(positions, length),
            None if heads is None else check_heads(heads, config.num_heads),
        )

    def bytes_of(
        self, s: Site, length: int, config: TransformerConfig, dtype: str = "float32"
    ) -> int:
        """How much one site of a text of `length` tokens takes."""
        c = config
        rows = length if self.positions is None else len(self.positions)
        heads = c.num_heads if self.heads is None else len(self.heads)
        sizes = {"T": rows, "S": length, "N": heads, "K": c.num_kv_heads, "H": c.head_dim}
        sizes |= {"D": c.embed_dim, "F": c.hidden_dim, "V": c.num_embed}
        one = int(np.prod([sizes[axis] for axis in s.dims[1:]])) * np.dtype(dtype).itemsize
        return one * (len(self.layers) if s.per_layer else 1)


def check_positions(positions: Indices, length: int) -> tuple[int, ...] | None:
    """`positions` as ascending indices into a text; None stays None.

    Raises:
      ValueError: a position that the text does not have.
    """
    if positions is None:
        return None
    wanted = list(positions) if isinstance(positions, Iterable) else [positions]
    if not wanted:
        raise ValueError("positions is empty: name at least one, or pass None for all")
    for p in map(int, wanted):
        if not -length <= p < length:
            raise ValueError(f"position {p} does not exist: the text has 0 to {length - 1}")
    return tuple(sorted({int(p) % length for p in wanted}))


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
