"""Attention heatmaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from gemma_nb.config import Sliding
from gemma_nb.plots.figure import NotebookFigure
from gemma_nb.plots.labels import drawable_all, families, tick_step

if TYPE_CHECKING:
    from gemma_nb.interp.trace import Trace

_HATCH = "#c9ced6"
_FRAME = "#c46800"


def attention(
    trace: Trace,
    layer: int,
    head: int,
    *,
    ax: Axes | None = None,
    start: int = 0,
    stop: int | None = None,
    scale: Literal["linear", "sqrt"] = "linear",
    hide_bos: bool = False,
    highlight: int | None = None,
    cmap: str = "Blues",
) -> Figure:
    """One head's attention weights: queries down, keys across.

    Weights are shown as the model computed them.  Cells that the layer can never attend to (later
    positions, and positions that have left a sliding window) are hatched rather than zero.

    Args:
      trace: with attention of `layer`.
      layer: index of the layer.
      head: index of the query head.
      ax: where to draw; None makes a figure of a size that fits the labels.
      start: first position shown, of both queries and keys.
      stop: position after the last one shown; None shows all.
      scale: "linear", or "sqrt" to see small weights as well (the colour bar shows it).
      hide_bos: leave out the column of position 0, where many heads park the weight that they have
        no use for (arXiv:2309.17453, "attention sinks"); the title says so.
      highlight: a query position whose row is framed.  The row that chose the token at position p
        is p - 1.
      cmap: a perceptually even matplotlib colour map.

    Returns:
      The figure, not yet shown or saved.

    Raises:
      ValueError: a layer or head that the trace does not hold, or an empty range of positions.
    """
    weights = _select(trace, layer, head)
    start, stop, _ = slice(start, stop).indices(len(trace.tokens))
    count = stop - start
    if count < 1:
        raise ValueError(
            f"no position lies in start={start} to stop={stop}; the trace has positions 0 to "
            f"{len(trace.tokens) - 1}"
        )
    shown = weights[start:stop, start:stop]
    if ax is None:
        side = float(np.clip(2.4 + 0.17 * count, 4.2, 13.0))
        ax = NotebookFigure(figsize=(side + 0.9, side), layout="constrained").add_subplot()
    figure = ax.get_figure(root=True)
    assert figure is not None

    allowed = _allowed(trace, layer, start, stop)
    visible = allowed & (np.arange(start, stop) > 0) if hide_bos else allowed
    top = float(shown.max(where=visible, initial=0.0)) or 1.0
    norm = PowerNorm(0.5, 0.0, top) if scale == "sqrt" else Normalize(0.0, top)
    edges = np.arange(start, stop + 1) - 0.5
    mesh = ax.pcolormesh(
        edges,
        edges,
        np.ma.masked_array(shown, ~visible),
        norm=norm,
        cmap=cmap,
        edgecolors="white" if count <= 64 else "none",
        linewidth=0.5 if count <= 64 else 0.0,
        rasterized=count > 200,
    )
    _hatch_unreachable(ax, trace, layer, start, stop)
    if highlight is not None:
        frame = Rectangle((start - 0.5, highlight - 0.5), count, 1, fill=False, ec=_FRAME, lw=1.4)
        ax.add_patch(frame)
    _label(ax, trace, start, stop)
    kind = trace.config.layers[layer].kind.label
    without = ", without the column of position 0" if hide_bos and start == 0 else ""
    ax.set_title(f"Layer {layer} ({kind}), head {head}{without}", fontsize=10, loc="left")
    bar = figure.colorbar(mesh, ax=ax, shrink=0.6, pad=0.02)
    bar.set_label(
        "attention weight" + (", square-root scale" if scale == "sqrt" else ""), fontsize=8
    )
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def _select(trace: Trace, layer: int, head: int) -> np.ndarray:
    """(T, T) weights of one head."""
    maps = trace.attention
    layers, heads = [int(i) for i in maps.layer.values], maps.sizes["head"]
    if layer not in layers:
        raise ValueError(f"layer {layer} is not in this trace, which holds layers {layers}")
    if not 0 <= head < heads:
        raise ValueError(f"head {head} does not exist: the model has heads 0 to {heads - 1}")
    return maps.sel(layer=layer, head=head).values


def _window(trace: Trace, layer: int) -> int:
    """How many positions, itself included, a query of this layer can see."""
    kind = trace.config.layers[layer].kind
    return kind.window if isinstance(kind, Sliding) else len(trace.tokens)


def _allowed(trace: Trace, layer: int, start: int, stop: int) -> np.ndarray:
    """(count, count) bool: which cells the layer can attend to."""
    query, key = np.ogrid[start:stop, start:stop]
    return (key <= query) & (key > query - _window(trace, layer))


def _hatch_unreachable(ax: Axes, trace: Trace, layer: int, start: int, stop: int) -> None:
    # Staircases: the boundary steps down by one cell per query row.
    rows = np.repeat(np.arange(start, stop + 1), 2)[1:-1] - 0.5
    later = np.repeat(np.arange(start, stop), 2) + 0.5
    right = np.column_stack([later, rows])
    corners = [(stop - 0.5, stop - 0.5), (stop - 0.5, start - 0.5)]
    left_edge = np.maximum(later - _window(trace, layer), start - 0.5)
    left = np.column_stack([left_edge, rows])
    outside = [(start - 0.5, stop - 0.5), (start - 0.5, start - 0.5)]
    for boundary, rest in ((right, corners), (left, outside)):
        ax.add_patch(
            Polygon(
                np.vstack([boundary, rest]),
                fill=False,
                hatch="/////",
                edgecolor=_HATCH,
                linewidth=0.0,
            )
        )


def _label(ax: Axes, trace: Trace, start: int, stop: int) -> None:
    ticks = np.arange(start, stop, tick_step(stop - start))
    labels = drawable_all([trace.labels[i] for i in ticks])
    if len(ticks) < stop - start:
        labels = [f"{label}  {i}" for label, i in zip(labels, ticks, strict=True)]
    font: dict[str, Any] = {"fontfamily": families(), "fontsize": 7}
    ax.set_xticks(ticks, labels, rotation=90, **font)
    ax.set_yticks(ticks, labels, **font)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.set_xlabel("key: the position attended to", fontsize=8)
    ax.set_ylabel("query: the position that attends", fontsize=8)
    ax.tick_params(length=0)
    ax.set_aspect("equal")
    ax.set_xlim(start - 0.5, stop - 0.5)
    ax.set_ylim(stop - 0.5, start - 0.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
