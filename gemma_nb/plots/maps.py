"""Maps from queries to keys, and which of their cells a layer can reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon

from gemma_nb.edits import EDITED
from gemma_nb.expected import a
from gemma_nb.indices import one_among
from gemma_nb.interp.trace import Trace
from gemma_nb.plots.colors import FAINT, LOCAL
from gemma_nb.plots.tokens import Tokens

if TYPE_CHECKING:
    import xarray

HATCH = "/////"


@dataclasses.dataclass(frozen=True)
class Pattern:
    """One map, its axes, and the layer's reach.

    Attributes:
      weights: (queries, keys) as computed.
      queries: along the rows; their positions are consecutive.
      keys: along the columns; their positions are consecutive.
      kind: "global" or "sliding 512"; "" where the map is of no single layer.
      name: "Layer 5, head 2".
      remarks: its KV group, and the interventions that it was computed under.
    """

    weights: np.ndarray
    queries: Tokens
    keys: Tokens
    kind: str
    name: str
    remarks: tuple[str, ...]

    @property
    def window(self) -> int | None:
        """Number of positions that a query can see, itself included; None: all that came before."""
        return window_of(self.kind)

    @property
    def badge(self) -> str:
        """The layer's kind in words."""
        return badge_of(self.kind)

    @property
    def reachable(self) -> np.ndarray:
        """(queries, keys) bool: cells that the layer can attend to."""
        query, key = self.queries.positions[:, None], self.keys.positions[None, :]
        within = key <= query
        return within if self.window is None else within & (key > query - self.window)


def window_of(kind: str) -> int | None:
    """The window in a layer's label ("sliding 512"); None for "global" and ""."""
    return int(kind.removeprefix("sliding ")) if kind.startswith("sliding ") else None


def badge_of(kind: str) -> str:
    """ "sliding 512" as "local, window 512"; "global" as it is."""
    return kind.replace("sliding ", "local, window ")


def pattern(
    source: Trace | xarray.DataArray,
    layer: int,
    head: int | None,
    *,
    start: int = 0,
    stop: int | None = None,
    every_key: bool = False,
) -> Pattern:
    """The map of one head, cut to positions `start` to `stop` of queries and keys.

    Args:
      source: a trace, or an array (layer[, head], query, key) such as value-weighted attention.
      layer: index of the layer.
      head: index of the head; None for an array without heads.
      start: first position, negative from the end.
      stop: position after the last; None for all.
      every_key: leave the keys before `start` in.

    Raises:
      ValueError: a layer or head that the source does not have, or no position in the range.
    """
    layers, heads, groups = layers_and_heads(source)
    layer = one_among(layer, layers, "layer")
    name, remarks = f"Layer {layer}", []
    if heads:
        head = one_among(head, heads, "head")
        name += f", head {head}"
        sharing = [h for h in heads if groups[h] == groups[head]]
        if len(sharing) > 1:
            group = groups[head]
            remarks.append(f"KV group {group}: heads {_listed(sharing)} share keys and values")
    elif head is not None:
        raise ValueError(f"this array has no heads: leave out head={head}")
    maps = maps_of_layer(source, layer, [] if head is None else [head], start, stop, every_key)
    return Pattern(
        weights=maps.transpose(..., "query", "key").values.reshape(maps.sizes["query"], -1),
        queries=Tokens.along(maps, "query"),
        keys=Tokens.along(maps, "key"),
        # Reaching through several layers, a map without heads is bounded by no one window.
        kind=str(maps["layer_kind"].item()) if heads else "",
        name=name,
        remarks=(*remarks, *computed_under(maps)),
    )


def _listed(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return " and ".join(map(str, numbers))


def computed_under(array: xarray.DataArray | xarray.Dataset) -> list[str]:
    """Remarks that tell an edited model and interventions; none of a model as it was released."""
    interventions = str(array.attrs.get("interventions", "")).splitlines()
    model = str(array.attrs.get("model", ""))
    found = [f"computed with {model}"] if EDITED in model else []
    return [*found, f"computed under {', '.join(interventions)}"] if interventions else found


def weight_norm(
    weights: np.ma.MaskedArray, scale: Literal["linear", "sqrt"], norm: str | Normalize | None
) -> Normalize:
    """The norm of attention weights where no other is asked for: from zero to the largest one.

    Raises:
      ValueError: an unknown scale, or one beside a norm.
    """
    if scale not in ("linear", "sqrt"):
        raise ValueError(f"scale must be 'linear' or 'sqrt', got {scale!r}")
    if scale == "sqrt" and norm is not None:
        raise ValueError("scale='sqrt' is norm=matplotlib.colors.PowerNorm(0.5): pass one of them")
    largest = float(np.ma.filled(weights.max(), 0.0)) or 1.0
    return PowerNorm(0.5, 0.0, largest) if scale == "sqrt" else Normalize(0.0, largest)


def layers_and_heads(source: Any) -> tuple[Sequence[int], Sequence[int], dict[int, int]]:
    """The layers and heads of a trace or an array, and the KV group of each head.

    Raises:
      TypeError: neither of them.
    """
    if isinstance(source, Trace):
        c, groups = source.config, dict[int, int]()
        counts = {c.axis_sizes(spec)["K"] for spec in c.layers}
        # Heads of layers that differ in K are grouped differently in each.
        if len(counts) == 1:
            groups = {h: h * max(counts) // c.num_heads for h in range(c.num_heads)}
        return range(c.num_layers), range(c.num_heads), groups
    if not {"layer", "query", "key"} <= set(getattr(source, "dims", ())):
        came = f"dims {source.dims}" if hasattr(source, "dims") else a(source)
        raise TypeError(
            f"expected a Trace or an array (layer, head, query, key), got {came}: "
            "gnb.trace(model, text, tokenizer=tokenizer) makes a trace"
        )
    layers = [int(i) for i in source["layer"].values]
    if "head" not in source.dims:
        return layers, [], {}
    heads = [int(i) for i in source["head"].values]
    if "kv_group" not in source.coords:
        return layers, heads, {}
    return layers, heads, dict(zip(heads, map(int, source["kv_group"].values), strict=True))


def maps_of_layer(
    source: Any,
    layer: int,
    heads: Sequence[int],
    start: int,
    stop: int | None,
    every_key: bool = False,
) -> xarray.DataArray:
    """([head,] query, key) of one layer, cut to positions `start` to `stop`.

    A trace computes what it does not hold.

    Raises:
      ValueError: no position in the range.
    """
    maps = source
    if isinstance(source, Trace):
        maps = source.get("attention", layers=layer, heads=list(heads))
    chosen = maps.sel(layer=layer)
    if "head" in chosen.dims:
        chosen = chosen.sel(head=list(heads))
    length = int(maps["key"].values[-1]) + 1
    first, last, _ = slice(start, stop).indices(length)
    if last <= first:
        raise ValueError(
            f"no position lies in start={start} to stop={stop}; the positions are 0 to {length - 1}"
        )
    keys = slice(None if every_key else first, last - 1)
    cut = chosen.sel(query=slice(first, last - 1), key=keys)
    for dim in ("query", "key"):
        at = cut[dim].values
        if not len(at) or at[-1] - at[0] != len(at) - 1:
            raise ValueError(
                f"a map is drawn of neighbouring positions, and this array's {dim} positions from "
                f"{first} to {last - 1} are {at.tolist()!s:.60}: select a range that it holds whole"
            )
    return cut


def hatch_unreachable(ax: Axes, p: Pattern) -> list[Any]:
    """Hatches the cells that can never be attended to, and draws the edge of the window.

    Returns:
      Legend entries of what was drawn.
    """
    rows, columns = p.queries.positions, p.keys.positions
    # Staircases: the boundary goes down one cell, then across one.
    y = np.repeat(np.arange(rows[0], rows[-1] + 2), 2)[1:-1] - 0.5
    later = np.repeat(rows, 2) + 0.5
    low, high = columns[0] - 0.5, columns[-1] + 0.5
    top, bottom = rows[0] - 0.5, rows[-1] + 0.5
    _hatch(ax, np.clip(later, low, high), y, [(high, bottom), (high, top)])
    handles: list[Any] = [
        Patch(
            facecolor=ax.get_facecolor(),
            edgecolor=FAINT,
            hatch=HATCH,
            label="can never be attended to",
        )
    ]
    if p.window is not None and later[-1] - p.window > low:
        edge = later - p.window
        _hatch(ax, np.clip(edge, low, high), y, [(low, bottom), (low, top)])
        begins = int(np.argmax(edge > low))
        x, down = np.r_[low, edge[begins:]], np.r_[y[begins], y[begins:]]
        (line,) = ax.plot(x, down, color=LOCAL, linewidth=1.2, scalex=False, scaley=False)
        line.set_label(f"edge of the window: {p.window} positions")
        handles.append(line)
    return handles


def _hatch(ax: Axes, x: np.ndarray, y: np.ndarray, rest: list[tuple[float, float]]) -> None:
    corners = np.vstack([np.column_stack([x, y]), rest])
    ax.add_patch(Polygon(corners, fill=False, hatch=HATCH, edgecolor=FAINT, linewidth=0.0))


def frame_handle(color: str, label: str) -> Line2D:
    """A legend entry of a framed row."""
    return Line2D([], [], marker="s", markerfacecolor="none", color=color, label=label, ls="none")
