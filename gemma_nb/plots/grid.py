"""All heads at a glance: layers down, heads across, a small map in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path

from gemma_nb.indices import Indices, among
from gemma_nb.plots.cells import blocks, name_heads
from gemma_nb.plots.colors import FAINT, HIDDEN, kind_color
from gemma_nb.plots.figure import SMALL, bare, canvas, color_bar, footer, headline, picture
from gemma_nb.plots.maps import (
    HATCH,
    badge_of,
    computed_under,
    layers_and_heads,
    maps_of_layer,
    weight_norm,
    window_of,
)
from gemma_nb.plots.scale import color_scale
from gemma_nb.plots.tokens import MOST_LABELS

if TYPE_CHECKING:
    import xarray

    from gemma_nb.interp.trace import Trace

# Cells along the side of one small map.
_SIDE = MOST_LABELS
# Part of a grid cell that its map fills.
_FILLED = 0.9


@picture
def attention_grid(
    source: Trace | xarray.DataArray,
    *,
    layers: Indices = None,
    heads: Indices = None,
    ax: Axes | None = None,
    start: int = 0,
    stop: int | None = None,
    scale: Literal["linear", "sqrt"] = "linear",
    hide_bos: bool = False,
    vmin: float | None = None,
    vmax: float | None = None,
    norm: str | Normalize | None = None,
    cmap: str | Colormap | None = None,
) -> Axes:
    """The attention of many heads side by side, on one scale.

    In each small map queries go down and keys across, as in `attention`.  Longer texts are drawn
    in blocks of cells, each with its largest weight.  Brackets at the top join the heads that share
    keys and values; the layers' names tell local from global ones.

    Args:
      source: a trace, or an array (layer, head, query, key).
      layers: which, in this order; None for all.
      heads: which, in this order; None for all.
      ax: where to draw; None makes a figure.
      start: first position shown, of both queries and keys.
      stop: position after the last one shown; None shows all.
      scale: "linear", or "sqrt" to see small weights as well (the colour bar shows it).
      hide_bos: leave out position 0; the picture says so.  The other weights stay as they are.
      vmin: the least number with a colour of its own; None for zero.
      vmax: the largest one; None for the largest one shown in any map.
      norm: a matplotlib norm, or the name of a scale ("log"), in place of ours.
      cmap: a matplotlib colour map; None for one whose equal steps look equal.

    Returns:
      The figure; with `ax`, the axes.

    Raises:
      TypeError: another kind of source, axes, limit, norm or map.
      ValueError: a layer or head that the source does not hold, or an empty range of positions.
    """
    known_layers, known_heads, groups = layers_and_heads(source)
    layers = among(layers, known_layers, "layer")
    heads = among(heads, known_heads, "head")
    kinds, rows, block, remarks = [], [], 1, []
    for layer in layers:  # one at a time: all maps of a long text are larger than the picture
        maps = maps_of_layer(source, layer, heads, start, stop)
        kinds.append(str(maps["layer_kind"].item()))
        block = -(-maps.sizes["key"] // _SIDE)
        rows.append([_small(m, kinds[-1], hide_bos, block) for m in maps.transpose("head", ...)])
        remarks, query = computed_under(maps), maps["query"].values
        del maps  # before the next layer's are made
    sheet = np.ma.vstack([np.ma.hstack([_framed(m) for m in row]) for row in rows])
    default = weight_norm(sheet, scale, norm)
    colors = color_scale(sheet, default, vmin=vmin, vmax=vmax, norm=norm, cmap=cmap)

    cell = float(np.clip(9.0 / len(layers), 0.3, 0.9))
    ax = canvas(ax, cell * len(heads), cell * len(layers), left=1.45, top=0.8 if groups else 0.5)
    extent = (-0.5, len(heads) - 0.5, len(layers) - 0.5, -0.5)
    image = ax.imshow(
        sheet,
        extent=extent,
        norm=colors.norm,
        cmap=colors.cmap,
        interpolation="none",
        origin="upper",
        aspect="auto",
    )
    ax.add_patch(_hatched(kinds, len(heads), int(query[0]), int(query[-1])))
    bare(ax)
    _label(ax, layers, kinds, heads, [groups.get(h) for h in heads])
    headline(ax, f"Attention at positions {query[0]} to {query[-1]}", pad=31.0 if groups else None)
    label = "can never be attended to"
    handles = [Patch(facecolor=ax.get_facecolor(), edgecolor=FAINT, hatch=HATCH, label=label)]
    if hide_bos and query[0] == 0:
        ax.add_patch(_left_out(kinds, len(heads), len(query)))
        handles.append(Patch(facecolor=HIDDEN, label="position 0 is left out"))
    footer(ax, handles, ["in each map: queries down, keys across", *remarks])
    what = "attention weight" + (f"\n(the largest of each {block} × {block} cells)" * (block > 1))
    remark = ", square-root scale" if scale == "sqrt" else ""
    color_bar(image, ax, what + remark, colors.extend)
    return ax


def _small(weights: xarray.DataArray, kind: str, hide_bos: bool, block: int) -> np.ma.MaskedArray:
    """(side, side) of one head's map, unreachable and hidden cells masked."""
    query, key = weights["query"].values[:, None], weights["key"].values[None, :]
    visible = key <= query
    if (window := window_of(kind)) is not None:
        visible &= key > query - window
    if hide_bos:
        visible &= key > 0
    masked = np.ma.masked_array(weights.transpose("query", "key").values, ~visible)
    return blocks(masked, block, block)


def _framed(small: np.ma.MaskedArray) -> np.ma.MaskedArray:
    """The map as a grid cell: enlarged in whole steps, with an empty margin on all sides."""
    factor = -(-40 // len(small))
    large = np.ma.masked_array(
        np.kron(small.filled(0.0), np.ones((factor, factor))),
        np.kron(np.ma.getmaskarray(small), np.ones((factor, factor))) > 0,
    )
    side = len(large)
    margin = round(side * (1 / _FILLED - 1) / 2)
    wide = (side + 2 * margin, side + 2 * margin)
    cell = np.ma.masked_array(np.zeros(wide), np.ones(wide, bool))
    cell[margin : margin + side, margin : margin + side] = large
    return cell


def _hatched(kinds: Sequence[str], heads: int, first: int, last: int) -> PathPatch:
    """The unreachable triangles of every cell, with straight sides."""
    count, half = last - first + 1, _FILLED / 2
    paths = []
    for i, kind in enumerate(kinds):
        shapes = [_beyond(count, 0)]
        if (window := window_of(kind)) is not None and window < count:
            # The other side of the diagonal: queries and keys change places.
            shapes.append(_beyond(count, window - 1)[:, ::-1])
        for j in range(heads):
            for shape in shapes:
                corners = np.vstack([shape, shape[:1]]) * _FILLED + (j - half, i - half)
                paths.append(Path(corners, closed=True))
    path = Path.make_compound_path(*paths)
    return PathPatch(path, fill=False, hatch=HATCH, edgecolor=FAINT, linewidth=0.0)


def _left_out(kinds: Sequence[str], heads: int, count: int) -> PathPatch:
    """Column 0 of every cell, as far down as its layer reaches it."""
    half, paths = _FILLED / 2, []
    for i, kind in enumerate(kinds):
        down = min(window_of(kind) or count, count) / count
        box = np.array([(0, 0), (1 / count, 0), (1 / count, down), (0, down), (0, 0)]) * _FILLED
        starts = [np.array([j - half, i - half]) for j in range(heads)]
        paths += [Path(box + start, closed=True) for start in starts]
    return PathPatch(Path.make_compound_path(*paths), facecolor=HIDDEN, edgecolor="none")


def _beyond(count: int, offset: int) -> np.ndarray:
    """(corners, 2) in the unit square: the cells with x > y + offset, of `count` along a side.

    A staircase; where its steps would be finer than the picture, their straight line.
    """
    if count > _SIDE:
        part = offset / count
        return np.array([(part, 0.0), (1.0, 0.0), (1.0, 1.0 - part)])
    steps = np.arange(count - offset)
    x = np.repeat(steps + offset + 1, 2)
    y = np.repeat(np.arange(count - offset + 1), 2)[1:-1]
    return np.vstack([np.column_stack([x, y]), [(count, y[-1]), (count, 0)]]) / count


def _label(
    ax: Axes,
    layers: Sequence[int],
    kinds: Sequence[str],
    heads: Sequence[int],
    groups: Sequence[int | None],
) -> None:
    names = [f"{layer}  {badge_of(kind)}" for layer, kind in zip(layers, kinds, strict=True)]
    ax.set_yticks(range(len(layers)), names, fontsize=SMALL)
    for tick, kind in zip(ax.get_yticklabels(), kinds, strict=True):
        tick.set_color(kind_color(kind))
    ax.set_ylabel("layer", fontsize=SMALL)
    name_heads(ax, heads, groups)
