"""The logit lens as a table: what each layer would predict, at every position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.patches import Patch, Rectangle

from gemma_nb.interp import lens as lens_of
from gemma_nb.plots.cells import kind_handles, sheet
from gemma_nb.plots.colors import INK, VERMILION, text_on
from gemma_nb.plots.figure import SMALL, canvas, color_bar, footer, headline, inches, picture
from gemma_nb.plots.ink import Ink
from gemma_nb.plots.labels import drawable, families
from gemma_nb.plots.labels import inches as label_width
from gemma_nb.plots.maps import computed_under
from gemma_nb.plots.scale import color_scale
from gemma_nb.plots.sources import values_of
from gemma_nb.plots.tokens import MOST_LABELS, PITCH, Tokens, label_inches, role_handles

if TYPE_CHECKING:
    import xarray

    from gemma_nb.interp.trace import Trace

_CELL = 0.46  # inches across, of a cell with a token in it
_LETTERS = 8
# Nats, of log-probabilities and divergences: beyond it (one in 10 billion) all share a colour,
# or the first layers' hundreds would leave the others without any difference.
_FAR = 25.0
_MEASURES = {
    "probability": "probability of the token shown",
    "logprob": "log-probability of the token shown (nats)",
    "logit": "logit of the token shown",
    "entropy": "entropy of the prediction (nats)",
    "kl": "KL divergence of the output from the prediction (nats)",
}


@picture
def logit_lens(
    lens: xarray.Dataset | Trace,
    *,
    value: Literal["probability", "logprob", "logit", "entropy", "kl"] = "probability",
    rank: int = 0,
    watch: int | str | None = None,
    ax: Axes | None = None,
    start: int = 0,
    stop: int | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    norm: str | Normalize | None = None,
    cmap: str | Colormap | None = None,
) -> Axes:
    """Predictions of each layer: positions down, layers across, the output at the right.

    A row is named by the token that the model reads there; its cells show which token would follow.
    A frame marks where that is the token that does follow in the text.  Beyond 64 positions the
    cells are colours without tokens.  Log-probabilities below -25 nats and divergences beyond 25
    share a colour, unless `vmin` or `vmax` says otherwise; the colour bar is pointed there.

    Args:
      lens: of `gnb.logit_lens`; or the trace to look at.
      value: what the colours are.
      rank: which prediction is shown: 0 for the likeliest, up to k - 1.
      watch: a watched token, by id or text: colours are its log-probability, and cells show its
        rank (1: the likeliest) instead of a prediction.
      ax: where to draw; None makes a figure.
      start: first position shown, counted from the first one of the lens.
      stop: the one after the last; None for all.
      vmin: the least number with a colour of its own; None for zero where zero has a meaning.
      vmax: the largest one; None for the largest one possible, or else shown.
      norm: a matplotlib norm, or the name of a scale ("log"), in place of ours.
      cmap: a matplotlib colour map; None for one whose equal steps look equal.

    Returns:
      The figure; with `ax`, the axes.

    Raises:
      TypeError: another kind of source, axes, limit, norm or map.
      ValueError: an unknown value, a rank or watched token that the lens does not hold, or an empty
        range of positions.
    """
    if value not in _MEASURES:
        raise ValueError(f"value must be one of {', '.join(map(repr, _MEASURES))}, got {value!r}")
    lens = values_of(lens, lens_of.logit_lens, ("token", value))
    if not 0 <= rank < lens.sizes["rank"]:
        raise ValueError(
            f"rank {rank} is not here: the lens has ranks 0 to {lens.sizes['rank'] - 1}"
        )
    chosen = lens.isel(position=slice(start, stop))
    if not chosen.sizes["position"]:
        raise ValueError(
            f"no position lies in start={start} to stop={stop}: there are {lens.sizes['position']}"
        )
    if watch is None:
        numbers, words = chosen[value], chosen["token"].isel(rank=rank)
        if "rank" in numbers.dims:
            numbers = numbers.isel(rank=rank)
        label = _MEASURES[value]
        name = "Logit lens" if rank == 0 else f"Logit lens, prediction {rank + 1}"
    else:
        at = _watched(chosen, watch)
        numbers = chosen["watched_logprob"].isel(watched=at)
        words = (chosen["watched_rank"].isel(watched=at) + 1).astype(str)
        token = drawable(str(chosen["watched_token"].values[at]))
        label, value = f"log-probability of {token} (nats)", "logprob"
        name = f"Logit lens: log-probability and rank of {token}"

    values = numbers.transpose("position", "layer").values.astype(float)
    tokens = Tokens.along(chosen, "position")
    layers = [str(i) for i in chosen["layer"].values]
    kinds = [str(k) for k in chosen["layer_kind"].values]
    named = len(tokens) <= MOST_LABELS
    ax = canvas(
        ax,
        float(np.clip((_CELL if named else 0.2) * len(layers), 1.6, 12.0)),
        float(np.clip(PITCH * 1.1 * len(tokens), 1.7, PITCH * MOST_LABELS)),
        left=label_inches(tokens) + 0.25,
        top=0.75,
    )
    default = _default_norm(values, value)
    colors = color_scale(values, default, vmin=vmin, vmax=vmax, norm=norm, cmap=cmap)
    mesh, remark = sheet(ax, values, tokens, layers, colors, kinds=kinds)
    handles: list[Any] = []
    if named and inches(ax)[0] / len(layers) > 0.7 * _CELL:
        shown = words.transpose("position", "layer").values
        _write(ax, shown, values, tokens, mesh)
        if watch is None:
            handles = _frame_hits(ax, shown, tokens)
    ax.set_ylabel("position: the token read there", fontsize=SMALL)
    ax.set_xlabel("layer", fontsize=SMALL)
    headline(ax, name)
    color_bar(mesh, ax, label + remark, colors.extend)
    footer(ax, [*handles, *role_handles(tokens), *kind_handles(kinds)], computed_under(lens))
    return ax


def _watched(lens: xarray.Dataset, watch: int | str) -> int:
    """Index of a watched token, by id or text."""
    ids = [int(i) for i in lens["watched"].values] if "watched" in lens.dims else []
    texts = [str(t) for t in lens["watched_token"].values] if ids else []
    known: list[Any] = ids if isinstance(watch, int) else texts
    if watch not in known:
        raise ValueError(
            f"{watch!r} is not watched: make the lens with watch=[...]; here are {texts or 'none'}"
        )
    return known.index(watch)


def _default_norm(values: np.ndarray, value: str) -> Normalize:
    """The scale of the colours where none is asked for: from zero where zero has a meaning."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if value == "probability":
        return Normalize(0.0, 1.0)
    if value == "logit":
        return Normalize(low, high if high > low else low + 1.0)
    if value == "logprob":
        return Normalize(max(low, -_FAR) if low < 0 else -1.0, 0.0)
    return Normalize(0.0, min(high, _FAR) or 1.0)


def _write(
    ax: Axes, words: np.ndarray, values: np.ndarray, tokens: Tokens, mesh: ScalarMappable
) -> None:
    """Puts a token into each cell, in black or white."""
    labels = [[drawable(str(word), _LETTERS) for word in row] for row in words]
    family = families({label for row in labels for label in row})
    room = inches(ax)
    size = min(SMALL - 1.0, 72 * room[1] / len(tokens) * 0.8, 72 * room[0] / len(words[0]) / 5.2)
    # What is wider than its cell is written smaller.
    most = 0.9 * room[0] / len(words[0])
    ink = Ink.of(ax)
    wide = {label: label_width([label], size) for row in labels for label in row}
    sizes = {label: size * min(1.0, most / width) for label, width in wide.items() if width}
    for y, row, numbers in zip(tokens.positions, labels, values, strict=True):
        for x, (label, number) in enumerate(zip(row, numbers, strict=True)):
            cell = mesh.to_rgba(number)
            empty = cell[3] < 0.5  # the face of the axes shows
            text = ax.text(
                x,
                y,
                label,
                ha="center",
                va="center",
                fontsize=sizes.get(label, size),
                fontfamily=family,
                color=INK if empty else text_on(cell),
                clip_on=True,
            )
            if empty and ink is not None:
                ink.inside(text)


def _frame_hits(ax: Axes, words: np.ndarray, tokens: Tokens) -> list[Any]:
    """Frames the cells whose token is the next one of the text."""
    found = False
    for i, (position, row) in enumerate(zip(tokens.positions[:-1], words[:-1], strict=True)):
        if tokens.positions[i + 1] != position + 1:
            continue  # what follows in the text is not among the tokens
        following = tokens.labels[i + 1]
        for x in np.flatnonzero(row == following):
            frame = Rectangle((x - 0.47, position - 0.45), 0.94, 0.9)
            frame.set(fill=False, edgecolor=VERMILION, linewidth=0.9)
            ax.add_patch(frame)
            found = True
    label = "the token that follows in the text"
    return [Patch(fill=False, edgecolor=VERMILION, label=label)] if found else []
