"""Curves over the layers: norms of the residual stream, entropy of what it would predict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gemma_nb.indices import Indices, among
from gemma_nb.interp import lens as lens_of
from gemma_nb.plots.colors import BLUE, FAINT, GREEN, ORANGE, PURPLE, SKY, VERMILION
from gemma_nb.plots.figure import SMALL, Numbers, canvas, footer, headline, picture
from gemma_nb.plots.ink import ink_around, ink_inside
from gemma_nb.plots.labels import drawable, isolated
from gemma_nb.plots.maps import computed_under
from gemma_nb.plots.sources import values_of
from gemma_nb.plots.tokens import Tokens

if TYPE_CHECKING:
    import xarray

    from gemma_nb.interp.trace import Trace

_CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)  # and what is black on paper
_DASHES = ("-", "--", ":", "-.")
# More positions than this are shown by their median and spread.
_MOST_CURVES = 12
_NORMS = {
    "residual": "residual stream after the layer",
    "attn_out": "what attention adds",
    "mlp_out": "what the feed-forward adds",
}
_ENTROPIES = {
    "entropy": "entropy of the lens's prediction (nats)",
    "kl": "KL divergence of the output from the lens (nats)",
}


@picture
def residual_norms(
    norms: xarray.Dataset | Trace,
    *,
    ax: Axes | None = None,
    hide_bos: bool = False,
) -> Axes:
    """Norms of the residual stream after each layer, and of what the layer added to it.

    Lines are medians over the positions, bands hold the middle 80 % of them.  Position 0 has a line
    of its own (dotted): its norm is often many times that of the others.

    Args:
      norms: of `gnb.residual_norms`: residual, attn_out, mlp_out (layer, position), L2 norms; or
        the trace to take them of.
      ax: where to draw; None makes a figure.
      hide_bos: leave out the line of position 0; the picture says so.

    Returns:
      The figure, with a logarithmic axis; with `ax`, the axes.
    """
    norms = values_of(norms, lens_of.residual_norms, ("residual",))
    ax = canvas(ax, 4.4, 2.6, left=0.65, right=0.2, bottom=0.45)
    layers = norms["layer"].values
    handles: list[Line2D | Patch] = []
    first = int(norms["position"].values[0]) == 0 and norms.sizes["position"] > 1
    first_color = ink_inside(ax)
    for color, (name, label) in zip((first_color, BLUE, VERMILION), _NORMS.items(), strict=True):
        if name not in norms:
            continue
        values = norms[name].transpose("layer", "position").values
        _spread(ax, layers, values[:, 1:] if first else values, color)
        handles.append(Line2D([], [], color=color, label=label))
        if first and not hide_bos:
            ax.plot(layers, values[:, 0], color=color, linewidth=1.0, linestyle=":")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(Numbers())
    ax.yaxis.set_minor_formatter(Numbers())
    _decorate(ax, norms, "L2 norm")
    headline(ax, "Norms by layer")
    notes = [_spread_note(norms.sizes["position"] - first)]
    if first and hide_bos:
        notes.append("position 0 is left out")
    elif first:
        dotted: dict[str, Any] = {"color": ink_around(ax), "linestyle": ":"}
        handles.append(Line2D([], [], label="the same at position 0", **dotted))
    footer(ax, handles, [*notes, *computed_under(norms)], below=0.35)
    return ax


@picture
def entropy_curves(
    lens: xarray.Dataset | Trace,
    *,
    value: Literal["entropy", "kl"] = "entropy",
    positions: Indices = None,
    ax: Axes | None = None,
) -> Axes:
    """Entropy of the prediction after each layer, or its divergence from the output.

    Up to twelve positions have a curve each; of more, the line is the median, the band holds the
    middle 80 %.

    Args:
      lens: of `gnb.logit_lens`: entropy and kl (layer, position), in nats; or the trace to look at.
      value: "entropy" of the lens's distribution, or "kl", its divergence from the output.
      positions: which; None for all.
      ax: where to draw; None makes a figure.

    Returns:
      The figure; with `ax`, the axes.

    Raises:
      TypeError: another kind of source or axes.
      ValueError: an unknown value or position.
    """
    if value not in _ENTROPIES:
        raise ValueError(f"value must be one of {', '.join(map(repr, _ENTROPIES))}, got {value!r}")
    lens = values_of(lens, lens_of.logit_lens, (value,))
    chosen = lens[value].transpose("layer", "position")
    if positions is not None:
        known = chosen["position"].values.tolist()
        missing = f"positions [{{given}}] are not among {known[0]} to {known[-1]}"
        chosen = chosen.sel(position=among(positions, known, "position", missing=missing))
    ax = canvas(ax, 4.4, 2.6, left=0.55, right=0.2, bottom=0.45)
    layers, count = chosen["layer"].values, chosen.sizes["position"]
    handles: list[Line2D] = []
    notes: list[str] = []
    if count <= _MOST_CURVES:
        handles = _one_by_one(ax, chosen)
    else:
        _spread(ax, layers, chosen.values, BLUE)
        notes.append(_spread_note(count))
    ax.set_ylim(0.0, 1.05 * ax.dataLim.y1 or 1.0)
    _decorate(ax, lens, _ENTROPIES[value])
    headline(ax, "Logit lens by layer")
    footer(ax, handles, [*notes, *computed_under(lens)], below=0.35)
    return ax


def _one_by_one(ax: Axes, values: xarray.DataArray) -> list[Line2D]:
    handles, cycle = [], (*_CYCLE, ink_inside(ax))
    tokens = Tokens.along(values, "position")
    for i, (position, token) in enumerate(zip(tokens.positions, tokens.labels, strict=True)):
        style: dict[str, Any] = {
            "color": cycle[i % len(cycle)],
            "linestyle": _DASHES[i // len(cycle)],
        }
        curve = values.isel(position=i).values
        ax.plot(values["layer"].values, curve, linewidth=1.2, marker=".", markersize=3, **style)
        label = f"after {position} {isolated(drawable(token))}"
        handles.append(Line2D([], [], label=label, **style))
    return handles


def _spread(ax: Axes, layers: np.ndarray, values: np.ndarray, color: str) -> None:
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=1)
    ax.fill_between(layers, low, high, color=color, alpha=0.18, linewidth=0)
    ax.plot(layers, middle, color=color, linewidth=1.4, marker=".", markersize=3)


def _spread_note(count: int) -> str:
    if count == 1:
        return "lines: the one position there is"
    return f"lines: medians of {count} positions; bands: the middle 80% of them"


def _decorate(ax: Axes, data: xarray.Dataset, label: str) -> None:
    layers = data["layer"].values
    ax.set_xlabel("layer (triangles above: global layers)", fontsize=SMALL)
    ax.set_ylabel(label, fontsize=SMALL)
    ax.tick_params(which="both", labelsize=SMALL, length=2)
    ax.grid(color=FAINT, linewidth=0.4)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    step = max(1, -(-len(layers) // 18))
    ax.set_xticks(layers[::step])
    if "layer_kind" not in data.coords:
        ax.set_xlabel("layer", fontsize=SMALL)
        return
    kinds = [str(k) for k in data["layer_kind"].values]
    wide = [i for i, kind in zip(layers, kinds, strict=True) if kind == "global"]
    ax.plot(
        wide,
        [1.0] * len(wide),
        transform=ax.get_xaxis_transform(),
        linestyle="none",
        marker="v",
        markersize=4,
        color=VERMILION,
        clip_on=False,
        gid="global layers",
    )
