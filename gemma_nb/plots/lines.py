"""Attention as lines: from each query, at the left, to the keys that it attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from gemma_nb.indices import Indices, among
from gemma_nb.plots.colors import INK, LOCAL
from gemma_nb.plots.figure import SMALL, bare, canvas, footer, headline, inches, picture
from gemma_nb.plots.ink import Ink, ink_around, ink_inside
from gemma_nb.plots.labels import families
from gemma_nb.plots.maps import Pattern, pattern
from gemma_nb.plots.tokens import (
    LABEL,
    MOST_LABELS,
    PITCH,
    draw_strip,
    label_axis,
    label_inches,
    role_handles,
    ticks,
)

if TYPE_CHECKING:
    import xarray

    from gemma_nb.interp.trace import Trace

_WIDEST = 4.0  # points, of a line that stands for all of a row's weight
_WIDEST_BUNDLE = 1.6  # the same where lines are bundled: every block may have one to the sink
_OPACITY = 0.6
# More lines than this are one image in vector files.
_MOST_VECTOR = 4000


@picture
def attention_lines(
    source: Trace | xarray.DataArray,
    layer: int,
    head: int | None = None,
    *,
    queries: Indices = None,
    ax: Axes | None = None,
    start: int = 0,
    stop: int | None = None,
    least: float = 0.05,
    hide_bos: bool = False,
) -> Axes:
    """One head's attention weights as lines between tokens.

    The width of a line is proportional to its weight; the footer says what was left out.  Of a
    single query in a sliding layer, the keys that it can reach are bracketed.

    All lines of a long text would be one black sheet.  Of more than 64 queries, they are drawn in
    bundles: a line joins two blocks of neighbouring positions, and its weight is what a query of
    the one gives to all keys of the other together, on average.  The footer says so.

    Args:
      source: a trace, or an array (layer, head, query, key) or (layer, query, key).
      layer: index of the layer.
      head: index of the query head; None only for an array without heads.
      queries: the positions whose lines are drawn; None for all.
      ax: where to draw; None makes a figure of a size that fits the labels.
      start: first position shown, of both queries and keys.
      stop: position after the last one shown; None shows all.
      least: weights (of bundles, where lines are bundled) below it are not drawn.
      hide_bos: leave out position 0; the picture says so.  The other weights stay as they are.

    Returns:
      The figure; with `ax`, the axes.

    Raises:
      TypeError: another kind of source or axes.
      ValueError: a layer, head or query that is not there, or an empty range of positions.
    """
    p = pattern(source, layer, head, start=start, stop=stop)
    rows = p.queries.positions
    held = range(int(rows[0]), int(rows[-1]) + 1)
    missing = "query {given} is not among the positions {known}"
    chosen = among(queries, held, "position", argument="queries", missing=missing)
    block = -(-len(rows) // MOST_LABELS) if len(chosen) > MOST_LABELS else 1
    bundles = _bundles(p, chosen, block, hide_bos)
    widest = _WIDEST if block == 1 else _WIDEST_BUNDLE

    height = float(np.clip(PITCH * 1.15 * len(rows), 2.0, PITCH * MOST_LABELS))
    side = label_inches(p.queries) + 0.3
    ax = canvas(ax, 2.4, height, left=side, right=side)
    ax.set_xlim(0.0, 1.0)
    ax.set_ylim(rows[-1] + 0.5, rows[0] - 0.5)
    bare(ax)
    ax.set_xticks([])
    ax.add_collection(_lines(*bundles, least, widest, ink_inside(ax)), autolim=False)
    handles = _legend(widest, ink_around(ax))
    if len(chosen) == 1 and p.window is not None:
        handles.append(_bracket(ax, p, chosen[0]))
    label_axis(ax, "y", p.queries, always=chosen if len(chosen) < 8 else ())
    _label_right(ax, p)
    ax.set_ylabel("query: the position that attends", fontsize=SMALL)
    headline(ax, p.name, p.badge)
    footer(
        ax,
        handles + role_handles(p.queries),
        [*_left_out(p, chosen, bundles[0], block, least, hide_bos), *p.remarks],
    )
    return ax


def _bundles(
    p: Pattern, chosen: Sequence[int], block: int, hide_bos: bool
) -> tuple[np.ma.MaskedArray, np.ndarray, np.ndarray]:
    """Weights between blocks of positions, what cannot be masked, and the blocks' centres.

    A block of queries has the mean of its rows, a block of keys the sum of its columns.
    """
    rows, columns = p.queries.positions, p.keys.positions
    mine = np.isin(rows, chosen)
    shown = p.reachable & mine[:, None]
    if hide_bos:
        shown = shown & (columns != 0)
    if block == 1:
        return np.ma.masked_array(p.weights, ~shown), rows, columns
    down, across = np.arange(0, len(rows), block), np.arange(0, len(columns), block)
    sums = np.add.reduceat(np.where(shown, p.weights, 0.0), across, axis=1)
    sums = np.add.reduceat(sums, down, axis=0)
    counts = np.add.reduceat(mine.astype(int), down)
    means = sums / np.maximum(counts, 1)[:, None]
    within = np.logical_or.reduceat(np.logical_or.reduceat(shown, across, axis=1), down, axis=0)

    def centres(positions: np.ndarray, starts: np.ndarray) -> np.ndarray:
        ends = np.append(starts[1:], len(positions)) - 1
        return (positions[starts] + positions[ends]) / 2

    return np.ma.masked_array(means, ~within), centres(rows, down), centres(columns, across)


def _lines(
    bundles: np.ma.MaskedArray,
    queries: np.ndarray,
    keys: np.ndarray,
    least: float,
    widest: float,
    color: str,
) -> LineCollection:
    row, column = np.nonzero(bundles.filled(-1.0) >= least)
    weights = bundles.data[row, column].astype(float)
    order = np.argsort(weights)  # the strongest on top
    row, column, weights = row[order], column[order], np.clip(weights[order], 0.0, 1.0)
    ends = np.stack([queries[row], keys[column]], 1)
    points = np.stack([np.broadcast_to([0.0, 1.0], ends.shape), ends], 2)
    lines = LineCollection(
        list(points), colors=color, alpha=_OPACITY, linewidths=widest * weights, capstyle="butt"
    )
    lines.set_rasterized(len(row) > _MOST_VECTOR)
    lines.set_gid("weights")
    return lines


def _legend(widest: float, color: str) -> list[Artist]:
    return [
        Line2D([], [], color=color, alpha=_OPACITY, linewidth=widest * w, label=f"weight {w:g}")
        for w in (1.0, 0.5, 0.1)
    ]


def _bracket(ax: Axes, p: Pattern, query: int) -> Artist:
    assert p.window is not None
    low = max(query - p.window + 1, int(p.keys.positions[0])) - 0.5
    box = Rectangle((0.985, low), 0.015, query + 0.5 - low, facecolor=LOCAL, edgecolor="none")
    box.set_label(f"what position {query} can reach: {min(p.window, query + 1)} positions")
    ax.add_patch(box)
    return box


def _left_out(
    p: Pattern,
    chosen: Sequence[int],
    bundles: np.ma.MaskedArray,
    block: int,
    least: float,
    hide_bos: bool,
) -> list[str]:
    rows = p.weights[np.isin(p.queries.positions, chosen)]
    notes = []
    if block > 1:
        notes.append(
            f"each line joins blocks of {block} positions: what a query of the one gives to all "
            "keys of the other, on average"
        )
    if hide_bos and p.keys.positions[0] == 0:
        notes.append(
            f"position 0 left out: these rows give it {rows[:, 0].mean():.0%} of their weight"
        )
        rows = rows[:, 1:]
    if block > 1:
        rows = bundles.filled(0.0)
        rows = rows[rows.any(axis=1)]
    below = float(np.where(rows < least, rows, 0.0).sum(1).mean()) if len(rows) else 0.0
    notes.append(f"weights below {least:g} are not drawn: {below:.0%} of a row on average")
    return notes


def _label_right(ax: Axes, p: Pattern) -> None:
    """The keys' labels, in the manner of the queries'."""
    at, labels = ticks(p.keys, inches(ax)[1])
    draw_strip(ax, p.keys, "right")
    font: dict[str, Any] = {"fontfamily": families(labels), "fontsize": LABEL, "color": INK}
    shift, ink = 7.0 if p.keys.spans() else 2.0, Ink.of(ax)
    for position, label in zip(at, labels, strict=True):
        name = ax.annotate(
            label,
            (1.0, position),
            xycoords=ax.get_yaxis_transform(),
            xytext=(shift, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            **font,
        )
        if ink is not None:
            ink.around(name)
    place = 1.0 + (label_inches(p.keys) + 0.12) / inches(ax)[0]
    label = "key: the position attended to"
    title = ax.text(
        place, 0.5, label, transform=ax.transAxes, rotation=90, va="center", fontsize=SMALL
    )
    if ink is not None:
        ink.around(title)
