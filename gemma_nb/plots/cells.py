"""Coloured cells: vectors while they are few, one image when they are many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from gemma_nb.plots.colors import INK, kind_color
from gemma_nb.plots.figure import SMALL, bare, inches
from gemma_nb.plots.ink import Ink, ink_around
from gemma_nb.plots.labels import families
from gemma_nb.plots.maps import badge_of
from gemma_nb.plots.scale import ColorScale
from gemma_nb.plots.tokens import MOST_LABELS, Tokens, label_axis

# A picture has about this many cells along an axis; more are drawn as blocks.
MOST_CELLS = 640
_CORNERS = ((0, 0), (1, 0), (1, 1), (0, 1))


def cells(
    ax: Axes,
    values: np.ma.MaskedArray,
    across: tuple[float, float],
    down: tuple[float, float],
    **kwargs: Any,
) -> ScalarMappable:
    """Draws (rows, columns) of values, masked ones left out: row 0 at down[1], the top.

    Few cells are vector rectangles with seams between them; many are one image, embedded in vector
    files cell by cell.
    """
    rows, columns = values.shape
    if max(rows, columns) > MOST_LABELS:
        extent = (*across, *down)
        return ax.imshow(
            values, extent=extent, origin="upper", interpolation="none", aspect="auto", **kwargs
        )
    x, y = np.linspace(*across, columns + 1), np.linspace(down[1], down[0], rows + 1)
    row, column = np.nonzero(~np.ma.getmaskarray(values))
    corners = np.stack([np.stack([x[column + i], y[row + j]], -1) for i, j in _CORNERS], 1)
    squares = PolyCollection(list(corners), edgecolors="white", linewidths=0.4, **kwargs)
    squares.set_array(values.compressed())
    ax.add_collection(squares, autolim=False)
    return squares


def blocks(
    values: np.ma.MaskedArray, height: int, width: int, center: float | None = None
) -> np.ma.MaskedArray:
    """The largest visible value of each block of `height` by `width` cells.

    With a `center`, the value that is farthest from it, on either side.
    """
    if height == width == 1:
        return values
    largest = _largest(values, height, width)
    if center is None:
        return largest
    least = -_largest(-values, height, width)
    return np.ma.where(largest - center >= center - least, largest, least)


def _largest(values: np.ma.MaskedArray, height: int, width: int) -> np.ma.MaskedArray:
    rows, columns = values.shape
    filled = np.full((-(-rows // height) * height, -(-columns // width) * width), -np.inf)
    filled[:rows, :columns] = values.filled(-np.inf)
    largest = filled.reshape(filled.shape[0] // height, height, -1, width).max((1, 3))
    empty = np.isneginf(largest)
    return np.ma.masked_array(np.where(empty, 0.0, largest), empty)


def sheet(
    ax: Axes,
    values: np.ndarray,
    tokens: Tokens,
    columns: Sequence[str],
    colors: ColorScale,
    *,
    kinds: Sequence[str] | None = None,
    center: float | None = None,
) -> tuple[ScalarMappable, str]:
    """A table in colours: tokens down, anything else across.

    Args:
      ax: where.
      values: (T, C); NaN leaves a cell empty.  Positions that are left out leave empty rows.
      tokens: of the rows.
      columns: names of the columns.
      colors: how values become colours.
      kinds: of columns that are layers; they tell the local from the global ones.
      center: the value from which both directions count, of signed values.

    Returns:
      What a colour bar needs, and the remark to append to its label where each colour stands for
      several tokens.
    """
    rows = np.arange(tokens.positions[0], tokens.positions[-1] + 1)
    if len(rows) != len(values):
        held, values = values, np.full((len(rows), values.shape[1]), np.nan)
        values[tokens.positions - rows[0]] = held
    block = -(-len(rows) // MOST_CELLS)
    shown = blocks(np.ma.masked_invalid(values), block, 1, center)
    down = (rows[-1] + 0.5, rows[0] - 0.5)
    across = (-0.5, len(columns) - 0.5)
    mesh = cells(ax, shown, across, down, norm=colors.norm, cmap=colors.cmap)
    ax.set_xlim(*across)
    ax.set_ylim(*down)
    ax.set_aspect("auto")
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    bare(ax)
    name_columns(ax, columns, kinds)
    label_axis(ax, "y", tokens)
    farthest = "largest" if center is None else "strongest"
    return mesh, f"\n(the {farthest} of each {block} tokens)" if block > 1 else ""


def name_columns(ax: Axes, columns: Sequence[str], kinds: Sequence[str] | None = None) -> None:
    """Names the columns 0, 1, ...; those of layers in the colours of local and global ones."""
    upright = max(map(len, columns), default=0) > 3
    ax.set_xticks(range(len(columns)), columns, rotation=90 if upright else 0, fontsize=SMALL - 0.5)
    for tick, kind in zip(ax.get_xticklabels(), kinds or (), strict=False):
        tick.set_color(kind_color(kind))


def name_heads(ax: Axes, heads: Sequence[int], groups: Sequence[int | None]) -> None:
    """Names columns 0, 1, ... that are heads, at the top; brackets join those of a KV group."""
    ax.xaxis.tick_top()
    ax.set_xticks(range(len(heads)), [f"head {h}" if len(heads) < 5 else str(h) for h in heads])
    ax.tick_params(axis="x", labelsize=SMALL, pad=1)
    above, ink = 1.0 + 0.22 / inches(ax)[1], Ink.of(ax)
    runs = [i for i in range(len(groups)) if i == 0 or groups[i] != groups[i - 1]]
    for begin, end in zip(runs, [*runs[1:], len(groups)], strict=True):
        if groups[begin] is None:
            continue
        ends = [begin - 0.4, end - 0.6]
        ax.plot(
            ends,
            [above, above],
            color=ink_around(ax),
            linewidth=0.8,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            scalex=False,
            scaley=False,
            gid=f"KV group {groups[begin]}",
        )
        wide = (end - begin) * inches(ax)[0] / len(heads) > 0.6
        name = ax.annotate(
            f"KV group {groups[begin]}" if wide else f"KV {groups[begin]}",
            (sum(ends) / 2, above),
            xytext=(0, 1.5),
            textcoords="offset points",
            xycoords=ax.get_xaxis_transform(),
            ha="center",
            fontsize=SMALL - 0.5,
            color=INK,
            annotation_clip=False,
        )
        if ink is not None:
            ink.around(name)


def kind_handles(kinds: Sequence[str]) -> list[Artist]:
    """Legend entries of the colours in which layers are named."""
    letter = _letter()
    return [
        Line2D(
            [], [], linestyle="none", marker=letter, color=kind_color(kind), label=badge_of(kind)
        )
        for kind in dict.fromkeys(kinds)
    ]


def _letter() -> Path:
    """An n to be a marker: a letter as matplotlib's markers know it would be mathematics."""
    path = TextPath((0.0, 0.0), "n", size=1.0, prop=FontProperties(family=families("n")))
    box = path.get_extents()
    return Path(path.vertices - ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2), path.codes)
