"""A text in the colours of a number per token: probability, entropy, an attribution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextToPath

from gemma_nb.interp.lens import token_statistics
from gemma_nb.plots.cells import cells
from gemma_nb.plots.colors import INK, text_on
from gemma_nb.plots.figure import (
    NORMAL,
    SMALL,
    bare,
    canvas,
    color_bar_below,
    footer,
    headline,
    inches,
    picture,
)
from gemma_nb.plots.ink import Ink, ink_inside
from gemma_nb.plots.labels import drawable, families, isolated
from gemma_nb.plots.maps import computed_under
from gemma_nb.plots.scale import ColorScale, color_scale
from gemma_nb.plots.sources import attributed, expect_array, values_of
from gemma_nb.plots.tokens import Tokens, nice_step

if TYPE_CHECKING:
    import xarray

    from gemma_nb.chat.turns import Turn
    from gemma_nb.interp.trace import Trace

# Longer texts are cells without letters.
MOST_WORDS = 500
_ACROSS = 100  # cells of a line of such a text
_WIDTH = 6.6  # inches
_LINE = 0.22  # inches from one line of text to the next
_LONGEST = 40  # characters of one token


@dataclasses.dataclass(frozen=True)
class _Measure:
    """A number per token.

    Attributes:
      label: what it is, with its unit.
      top: its largest possible value; None where there is none.
    """

    label: str
    top: float | None = None


_MEASURES = {
    "probability": _Measure("probability that the model gave the token", 1.0),
    "surprisal": _Measure("surprisal of the token, −log probability (nats)"),
    "entropy": _Measure("entropy of the prediction (nats)"),
    "rank": _Measure("rank of the token (1: the model's first choice)"),
}


@picture
def token_probabilities(
    source: Turn | xarray.Dataset | Trace,
    *,
    by: Literal["probability", "surprisal", "entropy", "rank"] = "probability",
    ax: Axes | None = None,
    start: int = 0,
    stop: int | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    norm: str | Normalize | None = None,
    cmap: str | Colormap | None = None,
) -> Axes:
    """A reply, or a whole text, each token in the colour of how the model expected it.

    Numbers are the model's own, before temperature and the sampler's other settings.  Darker is
    more: of a probability, the likelier token; of surprisal, entropy and rank, the less expected.

    Args:
      source: a reply of a chat; or a trace, or `gnb.token_statistics(trace)`, where the first token
        has no number, as nothing came before it.
      by: "probability"; "surprisal", its negative logarithm; "entropy" of the distribution that the
        token was chosen from, all in nats; or "rank", from 1.
      ax: where to draw; None makes a figure.
      start: first token shown, counted from the first one of `source`.
      stop: the one after the last; None for all.
      vmin: the least number with a colour of its own; None for zero, or rank 1.
      vmax: the largest one; None for 1 of probabilities, else the largest one shown.
      norm: a matplotlib norm, or the name of a scale ("log"), in place of ours.
      cmap: a matplotlib colour map; None for one whose equal steps look equal.

    Returns:
      The figure; with `ax`, the axes.

    Raises:
      TypeError: another kind of source, axes, limit, norm or map.
      ValueError: an unknown measure, no tokens (a user's turn has none), or an empty range.
    """
    if by not in _MEASURES:
        raise ValueError(f"by must be one of {', '.join(map(repr, _MEASURES))}, got {by!r}")
    labels, numbers, name, notes = _read(source, by)
    first, last, _ = slice(start, stop).indices(len(labels))
    if last <= first:
        raise ValueError(f"no token lies in start={start} to stop={stop} of {len(labels)} tokens")
    measure = _MEASURES[by]
    shown = numbers[first:last]
    bottom = 1.0 if by == "rank" else 0.0
    top = measure.top or float(np.nanmax(np.append(shown, bottom)))
    scale = LogNorm if by == "rank" else Normalize
    default = scale(bottom, top if top > bottom else bottom + 1.0)
    label = measure.label
    if by == "rank" and norm is None:
        label += ", logarithmic scale"
    return _strip(
        labels[first:last],
        shown,
        colors=color_scale(shown, default, vmin=vmin, vmax=vmax, norm=norm, cmap=cmap),
        label=label,
        title=f"{name} by {by}",
        notes=notes,
        first=first,
        ax=ax,
    )


@picture
def token_strip(
    values: xarray.DataArray,
    *,
    ax: Axes | None = None,
    start: int = 0,
    stop: int | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    norm: str | Normalize | None = None,
    cmap: str | Colormap | None = None,
) -> Axes:
    """A text in the colours of any number per token, such as `gnb.token_attribution`.

    Signed numbers are coloured in two directions from zero, which is white; others from zero up.

    Args:
      values: (position) with a `token` coordinate.
      ax: where to draw; None makes a figure.
      start: first position shown.
      stop: position after the last one shown; None shows all.
      vmin: the least number with a colour of its own; None for zero, or -vmax of signed numbers.
      vmax: the largest one; None for the largest magnitude shown, or -vmin of signed numbers.
      norm: a matplotlib norm, or the name of a scale ("log"), in place of ours.
      cmap: a matplotlib colour map; None for one whose equal steps look equal.

    Returns:
      The figure; with `ax`, the axes.

    Raises:
      TypeError: no array, or other axes, or another kind of limit, norm or map.
      ValueError: another shape, or an empty range of positions.
    """
    expect_array(values, "values", "gnb.token_attribution gives one")
    if values.dims != ("position",):
        raise ValueError(
            f"expected one number per token, dims ('position',), got {values.dims}: select or sum "
            "over the others first"
        )
    first, last, _ = slice(start, stop).indices(values.sizes["position"])
    if last <= first:
        raise ValueError(
            f"no position lies in start={start} to stop={stop} of {values.sizes['position']} tokens"
        )
    chosen = values.isel(position=slice(first, last))
    numbers = chosen.values.astype(float)
    signed = bool((numbers < 0).any())
    largest = float(np.nanmax(np.abs(numbers), initial=0.0)) or 1.0
    name = str(values.name or "value").replace("_", " ")
    units = values.attrs.get("units")
    default, limits = Normalize(-largest if signed else 0.0, largest), {"vmin": vmin, "vmax": vmax}
    center = 0.0 if signed else None
    return _strip(
        list(Tokens.along(chosen, "position").labels),
        numbers,
        colors=color_scale(numbers, default, **limits, norm=norm, cmap=cmap, center=center),
        label=f"{name} ({units})" if units else name,
        title=f"Text by {name}",
        notes=[*attributed(values), *computed_under(values)],
        first=int(chosen["position"].values[0]),
        ax=ax,
    )


def _read(source: Any, by: str) -> tuple[list[str], np.ndarray, str, list[str]]:
    """Labels and numbers of the tokens, what they make up, and remarks."""
    if hasattr(source, "finish_reason"):
        return *_of_turn(source, by), "Reply", []
    source = values_of(source, token_statistics, ("logprob",), others="a Turn, ")
    labels = list(Tokens.along(source, "position").labels)
    return labels, _of_statistics(source, by), "Text", computed_under(source)


def _of_turn(turn: Any, by: str) -> tuple[list[str], np.ndarray]:
    if not turn.tokens:
        raise ValueError(f"{turn!r} has no tokens with evidence: pass a reply of the model")
    tokens = turn.tokens
    values = {
        "probability": lambda: np.array([math.exp(x) for x in tokens.logprob.tolist()]),
        "surprisal": lambda: -tokens.logprob.astype(float),
        "entropy": lambda: tokens.entropy.astype(float),
        "rank": lambda: tokens.rank + 1.0,
    }[by]()
    return tokens.piece.tolist(), values


def _of_statistics(source: Any, by: str) -> np.ndarray:
    if by == "surprisal":
        return -source["logprob"].values.astype(float)
    if by == "rank":
        ranks = source["rank"].values
        return np.where(ranks < 0, np.nan, ranks + 1.0)
    return source[by].values.astype(float)


def _strip(
    labels: Sequence[str],
    values: np.ndarray,
    *,
    colors: ColorScale,
    label: str,
    title: str,
    notes: Sequence[str],
    first: int,
    ax: Axes | None,
) -> Axes:
    if len(labels) > MOST_WORDS:
        ax, mappable = _draw_cells(ax, values, colors, first)
        notes = [f"{_ACROSS} tokens on a line, in reading order", *notes]
    else:
        ax, mappable = _draw_words(ax, labels, values, colors)
    if np.isnan(values).any():
        notes = ["without colour: the first token, which nothing predicts", *notes]
    headline(ax, f"{title}, tokens {first} to {first + len(labels) - 1}")
    below = 0.2 if len(labels) > MOST_WORDS else 0.0
    below = color_bar_below(mappable, ax, label, colors.extend, below=below)
    footer(ax, [], notes, below=below)
    return ax


def _draw_words(
    ax: Axes | None, labels: Sequence[str], values: np.ndarray, scale: ColorScale
) -> tuple[Axes, ScalarMappable]:
    """Boxes with their tokens, wrapped like text; a line break begins a new line."""
    texts = [drawable(label, _LONGEST) for label in labels]
    font = FontProperties(family=families(texts), size=NORMAL)
    width = _WIDTH if ax is None else inches(ax)[0]
    boxes, lines = _wrap(labels, texts, font, width)
    if ax is None and lines == 1:  # no wider than a short text and the colour bar
        width = min(width, max(3.4, boxes[-1][1] + boxes[-1][2]))
    ax = canvas(ax, width, lines * _LINE, left=0.2, right=0.2)
    mappable = ScalarMappable(scale.norm, scale.cmap)
    patches, colors, ink = [], [], Ink.of(ax)
    for text, value, (line, x, wide) in zip(texts, values, boxes, strict=True):
        color = (1.0, 1.0, 1.0, 0.0) if np.isnan(value) else mappable.to_rgba(value)
        patches.append(Rectangle((x, line + 0.08), wide, 0.84))
        colors.append(color)
        word = ax.text(
            x + wide / 2, line + 0.52, isolated(text), ha="center", va="center_baseline",
            fontproperties=font, color=INK if np.isnan(value) else text_on(color), clip_on=True,
        )  # fmt: skip
        if np.isnan(value) and ink is not None:
            ink.inside(word)
    edges = [ink_inside(ax) if c[3] == 0 else "none" for c in colors]
    ax.add_collection(
        PatchCollection(patches, facecolors=colors, edgecolors=edges, linewidths=0.3), autolim=False
    )
    ax.set_xlim(0.0, width)
    # In axes of yours, lines keep their distance as long as they fit.
    ax.set_ylim(max(float(lines), inches(ax)[1] / _LINE), 0.0)
    ax.set_xticks([])
    ax.set_yticks([])
    bare(ax)
    return ax, mappable


def _wrap(
    labels: Sequence[str], texts: Sequence[str], font: FontProperties, width: float
) -> tuple[list[tuple[int, float, float]], int]:
    """(line, left, width) in inches of every token's box, and the number of lines."""
    measure = TextToPath().get_text_width_height_descent
    boxes, line, x = [], 0, 0.0
    for label, text in zip(labels, texts, strict=True):
        wide = measure(isolated(text), font, ismath=False)[0] / 72 + 0.05
        wide = min(wide, width)
        if x and x + wide > width:
            line, x = line + 1, 0.0
        boxes.append((line, x, wide))
        x += wide + 0.015
        if label.endswith("\n"):
            line, x = line + 1, 0.0
    return boxes, boxes[-1][0] + 1


def _draw_cells(
    ax: Axes | None, values: np.ndarray, colors: ColorScale, first: int
) -> tuple[Axes, ScalarMappable]:
    """A cell per token, line under line, without letters."""
    lines = -(-len(values) // _ACROSS)
    padded = np.full(lines * _ACROSS, np.nan)
    padded[: len(values)] = values
    ax = canvas(ax, _WIDTH, float(np.clip(0.12 * lines, 0.8, 8.0)), left=0.6, right=0.2)
    grid = np.ma.masked_invalid(padded.reshape(lines, _ACROSS))
    across, down = (-0.5, _ACROSS - 0.5), (lines - 0.5, -0.5)
    mappable = cells(ax, grid, across, down, norm=colors.norm, cmap=colors.cmap)
    ax.set_xlim(*across)
    ax.set_ylim(*down)
    ax.set_aspect("auto")
    bare(ax)
    step = nice_step(lines, max(2, int(inches(ax)[1] / 0.15)))
    rows = range(0, lines, step)
    ax.set_yticks(rows, [str(first + _ACROSS * row) for row in rows])
    ax.set_xticks(range(0, _ACROSS, 10), [f"+{i}" for i in range(0, _ACROSS, 10)])
    ax.set_ylabel("token", fontsize=SMALL)
    return ax, mappable
