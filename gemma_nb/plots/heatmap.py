"""Attention heatmaps: one head, its queries down and its keys, or the turns, across."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.patches import Patch, Rectangle

from gemma_nb.plots.cells import MOST_CELLS, blocks, cells
from gemma_nb.plots.colors import FAINT, HIDDEN, ROLES, VERMILION, role_color
from gemma_nb.plots.figure import SMALL, bare, canvas, color_bar, footer, headline, picture
from gemma_nb.plots.maps import (
    HATCH,
    Pattern,
    frame_handle,
    hatch_unreachable,
    pattern,
    weight_norm,
)
from gemma_nb.plots.scale import color_scale
from gemma_nb.plots.tokens import (
    MOST_LABELS,
    PITCH,
    Tokens,
    label_axis,
    label_inches,
    role_handles,
)

if TYPE_CHECKING:
    import xarray

    from gemma_nb.interp.trace import Trace


class Group(NamedTuple):
    """The tokens of one turn, as a mask of the keys."""

    name: str
    role: str
    member: np.ndarray


@picture
def attention(
    source: Trace | xarray.DataArray,
    layer: int,
    head: int | None = None,
    *,
    ax: Axes | None = None,
    start: int = 0,
    stop: int | None = None,
    columns: Literal["tokens", "turns"] = "tokens",
    scale: Literal["linear", "sqrt"] = "linear",
    hide_bos: bool = False,
    highlight: int | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    norm: str | Normalize | None = None,
    cmap: str | Colormap | None = None,
) -> Axes:
    """One head's attention weights: queries down, keys across.

    Weights are shown as the model computed them.  Cells that the layer can never attend to (later
    positions, and positions that have left a sliding window) are hatched rather than zero, and the
    edge of the window is drawn.  Up to 64 tokens are named; a longer text shows positions, and
    turns where they are known.  Beyond 640 tokens a block of cells shows its largest weight; the
    colour bar says so.

    Args:
      source: a trace, or an array (layer, head, query, key) or (layer, query, key), such as
        value-weighted attention or attention rollout.
      layer: index of the layer.
      head: index of the query head; None only for an array without heads.
      ax: where to draw; None makes a figure of a size that fits the labels.
      start: first position shown, of both queries and keys; turns are summed from the beginning.
      stop: position after the last one shown; None shows all.
      columns: "tokens", or "turns": one column for each turn of the conversation, with the sum of
        the weights on its tokens, and one for the tokens of the template.
      scale: "linear", or "sqrt" to see small weights as well (the colour bar shows it).
      hide_bos: leave out position 0, where many heads park the weight that they have no use for
        (arXiv:2309.17453, "attention sinks"); the picture says so, and how much it held.  The
        other weights stay as they are.
      highlight: a query position whose row is framed.  The row that chose the token at position p
        is p - 1.
      vmin: the least number with a colour of its own; None for zero.
      vmax: the largest one; None for the largest one shown.
      norm: a matplotlib norm, or the name of a scale ("log"), in place of ours.
      cmap: a matplotlib colour map; None for one whose equal steps look equal.

    Returns:
      The figure; with `ax`, the axes.

    Raises:
      TypeError: another kind of source, axes, limit, norm or map.
      ValueError: a layer or head that the source does not hold, an empty range of positions, or
        turns that are not known.
    """
    if columns not in ("tokens", "turns"):
        raise ValueError(f"columns must be 'tokens' or 'turns', got {columns!r}")
    # A turn's sum is that of all its tokens, whichever rows are shown.
    p = pattern(source, layer, head, start=start, stop=stop, every_key=columns == "turns")
    what = _label(source)
    visible = p.reachable & (p.keys.positions > 0) if hide_bos else p.reachable
    groups = _groups(p.keys) if columns == "turns" else []
    ax = _canvas(ax, p, groups)
    if groups:
        shown, places, what = *_by_turn(p, visible, groups), f"{what}, summed over each turn"
    else:
        shown, places = np.ma.masked_array(p.weights, ~visible), p.keys.positions
    default = weight_norm(shown, scale, norm)
    colors = color_scale(shown, default, vmin=vmin, vmax=vmax, norm=norm, cmap=cmap)
    block = -(-len(p.queries) // MOST_CELLS)
    drawn = blocks(shown, block, 1 if groups else block)
    across = (places[0] - 0.5, places[-1] + 0.5)
    down = (p.queries.positions[-1] + 0.5, p.queries.positions[0] - 0.5)
    mesh = cells(ax, drawn, across, down, norm=colors.norm, cmap=colors.cmap)
    handles = _marks(ax, p, groups, hide_bos, highlight)
    _label_axes(ax, p, groups, highlight)
    headline(ax, p.name, p.badge)
    footer(ax, handles, _remarks(p))
    if block > 1:
        what += f"\n(the largest of each {block} × {1 if groups else block} cells)"
    remark = ", square-root scale" if scale == "sqrt" else ""
    color_bar(mesh, ax, what + remark, colors.extend)
    return ax


def _label(source: Trace | xarray.DataArray) -> str:
    """Name of the numbers of a source."""
    name = getattr(source, "name", None)
    return "attention weight" if name in (None, "attention") else str(name).replace("_", " ")


def _canvas(ax: Axes | None, p: Pattern, groups: list[Group]) -> Axes:
    """Axes that fit the cells, with room for the labels around them."""
    side = float(np.clip(PITCH * len(p.queries), 2.2, PITCH * MOST_LABELS))
    above = 0.55 if groups else label_inches(p.keys)
    return canvas(
        ax,
        max(2.2, 0.5 * len(groups)) if groups else side,
        side,
        left=label_inches(p.queries) + 0.25,
        top=above + 0.5,
    )


def _groups(tokens: Tokens) -> list[Group]:
    """The turns, in order, and after them what belongs to none: the template's own tokens."""
    spans = tokens.spans()
    if not spans:
        raise ValueError(
            "columns='turns' needs to know the turns: make the trace with chat.trace(...)"
        )
    found: dict[tuple[str, str], np.ndarray] = {}
    for span in sorted(spans, key=lambda span: span.role not in ROLES):
        member = found.setdefault((span.name, span.role), np.zeros(len(tokens), bool))
        member[span.first : span.last] = True
    return [Group(name, role, member) for (name, role), member in found.items()]


def _by_turn(
    p: Pattern, visible: np.ndarray, groups: list[Group]
) -> tuple[np.ma.MaskedArray, np.ndarray]:
    """(queries, turns) sums, masked where no token of the turn can be seen; places 0, 1, ..."""
    weights = np.where(visible, p.weights, 0.0)
    sums = np.stack([weights[:, g.member].sum(1) for g in groups], 1)
    seen = np.stack([visible[:, g.member].any(1) for g in groups], 1)
    return np.ma.masked_array(sums, ~seen), np.arange(len(groups))


def _marks(
    ax: Axes, p: Pattern, groups: list[Group], hide_bos: bool, highlight: int | None
) -> list[Artist]:
    """Hatching, the window's edge, what is hidden, the framed row; their legend entries."""
    rows = p.queries.positions
    handles: list[Artist] = []
    if groups:
        _hatch_turns(ax, p, groups)
        label = "no token of the turn can be attended to"
        handles.append(
            Patch(facecolor=ax.get_facecolor(), edgecolor=FAINT, hatch=HATCH, label=label)
        )
    else:
        handles += hatch_unreachable(ax, p)
    if hide_bos and p.keys.positions[0] == 0:
        rows_that_reach = p.weights[p.reachable[:, 0], 0]
        share = float(rows_that_reach.mean()) if rows_that_reach.size else 0.0
        label = f"position 0 left out: rows that reach it give it {share:.0%} of their weight"
        handles.append(Patch(facecolor=HIDDEN, label=label))
        # Its column, or that of a turn which is nothing else: the template's <bos>.
        alone = [i for i, group in enumerate(groups) if np.flatnonzero(group.member).max() == 0]
        for i in alone if groups else [0]:
            seen = int(p.reachable[:, 0].sum())
            corner = (i - 0.5, rows[0] - 0.5)
            ax.add_patch(Rectangle(corner, 1, seen, facecolor=HIDDEN, edgecolor="none"))
    if highlight is not None and rows[0] <= highlight <= rows[-1]:
        left, right = (-0.5, len(groups) - 0.5) if groups else (rows[0] - 0.5, rows[-1] + 0.5)
        frame = Rectangle(
            (left, highlight - 0.5), right - left, 1, fill=False, ec=VERMILION, lw=1.2
        )
        ax.add_patch(frame)
        handles.append(frame_handle(VERMILION, f"the row of position {highlight}"))
    return handles + role_handles(p.queries)


def _hatch_turns(ax: Axes, p: Pattern, groups: list[Group]) -> None:
    top = p.queries.positions[0] - 0.5
    for i, group in enumerate(groups):
        seen = np.r_[True, p.reachable[:, group.member].any(1), True]
        edges = np.flatnonzero(seen[1:] != seen[:-1])
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            box = Rectangle((i - 0.5, top + first), 1, last - first)
            box.set(fill=False, hatch=HATCH, edgecolor=FAINT, linewidth=0.0)
            ax.add_patch(box)


def _remarks(p: Pattern) -> list[str]:
    if p.window is not None and p.queries.positions[-1] < p.window:
        return ["every position shown lies inside the window", *p.remarks]
    return list(p.remarks)


def _label_axes(ax: Axes, p: Pattern, groups: list[Group], highlight: int | None) -> None:
    rows = p.queries.positions
    ax.set_ylim(rows[-1] + 0.5, rows[0] - 0.5)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    bare(ax)
    always = [] if highlight is None else [highlight]
    if groups:
        ax.set_aspect("auto")
        ax.set_xlim(-0.5, len(groups) - 0.5)
        ax.set_xticks(range(len(groups)), [s.name for s in groups], rotation=90, fontsize=SMALL)
        for tick, span in zip(ax.get_xticklabels(), groups, strict=True):
            tick.set_color(role_color(span.role))
        ax.set_xlabel("turn attended to", fontsize=SMALL)
    else:
        ax.set_xlim(rows[0] - 0.5, rows[-1] + 0.5)
        ax.set_aspect("equal")
        label_axis(ax, "x", p.keys)
        ax.set_xlabel("key: the position attended to", fontsize=SMALL)
    label_axis(ax, "y", p.queries, always=always)
    ax.set_ylabel("query: the position that attends", fontsize=SMALL)
