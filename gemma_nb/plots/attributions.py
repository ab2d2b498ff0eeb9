"""Attributions: what each component, head or token adds to a number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize

from gemma_nb.indices import one_among
from gemma_nb.plots.cells import sheet
from gemma_nb.plots.colors import FAINT, INK, OTHER, diverging
from gemma_nb.plots.figure import SMALL, bare, canvas, color_bar, footer, headline, picture
from gemma_nb.plots.ink import Ink, ink_inside
from gemma_nb.plots.labels import drawable, families, isolated, legible
from gemma_nb.plots.labels import inches as label_width
from gemma_nb.plots.maps import computed_under
from gemma_nb.plots.scale import color_scale
from gemma_nb.plots.sources import attributed, expect_array
from gemma_nb.plots.tokens import LABEL, MOST_LABELS, PITCH, Tokens, label_inches, role_handles

if TYPE_CHECKING:
    import xarray


@picture
def attribution_bars(
    attribution: xarray.DataArray,
    *,
    position: int | None = None,
    most: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """Contributions as bars from zero, in the order of the model or of the text.

    Args:
      attribution: (component), (position) or (component, position), such as
        `gnb.direct_logit_attribution` or `gnb.token_attribution`.
      position: of an array with both, the position that is shown; None for the last one.
      most: how many parts, the largest by magnitude, have a bar of their own; the sum of the rest
        is one more bar, so that all bars add up to the sum that the footer gives.
      ax: where to draw; None makes a figure.

    Returns:
      The figure; with `ax`, the axes.

    Raises:
      TypeError: no array, or other axes.
      ValueError: other dimensions, or a position that the array does not have.
    """
    expect_array(attribution, "attribution", "gnb.direct_logit_attribution gives one")
    chosen, at = _one_position(attribution, position)
    (dim,) = chosen.dims
    labels = _names(chosen, str(dim))
    values = chosen.values.astype(float)
    shown = np.sort(np.argsort(-np.abs(values), kind="stable")[:most])
    names = [labels[i] for i in shown]
    bars = values[shown]
    if rest := len(values) - len(shown):
        names.append(f"{rest} others together")
        bars = np.append(bars, values.sum() - bars.sum())
    colors: list[Any] = [diverging()(0.06 if b < 0 else 0.94) for b in bars]
    if rest:
        colors[-1] = OTHER

    left = label_width(names, LABEL) + 0.2
    ax = canvas(ax, 3.2, PITCH * 1.1 * len(bars) + 0.1, left=left, right=0.4, top=0.6, bottom=0.45)
    rows = np.arange(len(bars))
    ax.barh(rows, bars, color=colors, height=0.78)
    ax.axvline(0.0, color=ink_inside(ax), linewidth=0.6)
    bare(ax)
    ax.set_yticks(rows, names, fontfamily=families(names), fontsize=LABEL)
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.margins(x=0.12)
    ink = Ink.of(ax)
    for row, bar in zip(rows, bars, strict=True):
        number = ax.annotate(
            f"{bar:+#.2g}".rstrip("."),
            (bar, row),
            xytext=(2 if bar >= 0 else -2, 0),
            textcoords="offset points",
            ha="left" if bar >= 0 else "right",
            va="center",
            fontsize=LABEL - 1,
            color=INK,
        )
        if ink is not None:
            ink.inside(number)
    ax.grid(axis="x", color=FAINT, linewidth=0.4)
    ax.set_axisbelow(True)
    ax.set_xlabel(_unit(attribution), fontsize=SMALL)
    headline(ax, _title(attribution) + at)
    notes = [*attributed(attribution), f"all bars add up to {values.sum():.4g}"]
    footer(ax, [], [*notes, *computed_under(attribution)], below=0.35)
    return ax


@picture
def attribution_matrix(
    attribution: xarray.DataArray,
    *,
    ax: Axes | None = None,
    start: int = 0,
    stop: int | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    norm: str | Normalize | None = None,
    cmap: str | Colormap | None = None,
) -> Axes:
    """Contributions of each component at each position: tokens down, components across.

    White is zero, and equal colours on both sides stand for equal magnitudes.

    Args:
      attribution: (component, position), such as `gnb.direct_logit_attribution`.
      ax: where to draw; None makes a figure.
      start: first position shown, counted from the first one of the array.
      stop: the one after the last; None for all.
      vmin: the least number with a colour of its own; None for -vmax.
      vmax: the largest one; None for -vmin, or the largest magnitude shown.
      norm: a matplotlib norm, or the name of a scale, in place of ours; white is then its middle.
      cmap: a matplotlib colour map; None for one whose equal steps look equal.

    Returns:
      The figure; with `ax`, the axes.

    Raises:
      TypeError: no array, or other axes, or another kind of limit, norm or map.
      ValueError: other dimensions, or an empty range of positions.
    """
    expect_array(attribution, "attribution", "gnb.direct_logit_attribution gives one")
    if set(attribution.dims) != {"component", "position"}:
        raise ValueError(
            f"expected dims ('component', 'position'), got {attribution.dims}; attribution_bars "
            "draws one of them"
        )
    chosen = attribution.isel(position=slice(start, stop)).transpose("position", "component")
    if not chosen.size:
        raise ValueError(
            f"no position lies in start={start} to stop={stop} of "
            f"{attribution.sizes['position']} positions"
        )
    tokens = Tokens.along(chosen, "position")
    values = chosen.values.astype(float)
    names = [legible(str(name)) for name in chosen["component"].values]
    largest = float(np.abs(values).max()) or 1.0

    ax = canvas(
        ax,
        float(np.clip(0.14 * len(names), 1.6, 12.0)),
        float(np.clip(PITCH * len(tokens), 1.4, PITCH * MOST_LABELS)),
        left=label_inches(tokens) + 0.25,
        top=label_width(names, LABEL) + (0.7 if "query" in attribution.coords else 0.5),
    )
    default, limits = Normalize(-largest, largest), {"vmin": vmin, "vmax": vmax}
    colors = color_scale(values, default, **limits, norm=norm, cmap=cmap, center=0.0)
    mesh, remark = sheet(ax, values, tokens, names, colors, center=0.0)
    if "query" in attribution.coords:
        ax.set_ylabel("position that is read", fontsize=SMALL)
        at = f"\nafter position {int(attribution['query'])}"
    else:
        ax.set_ylabel("position: the prediction after it", fontsize=SMALL)
        at = ""
    headline(ax, _title(attribution) + at)
    color_bar(mesh, ax, _unit(attribution) + remark, colors.extend)
    footer(ax, role_handles(tokens), computed_under(attribution))
    return ax


def _one_position(
    attribution: xarray.DataArray, position: int | None
) -> tuple[xarray.DataArray, str]:
    """An array of one dimension, and which position that is, in words."""
    if attribution.dims in (("component",), ("position",)):
        return attribution, ""
    if set(attribution.dims) != {"component", "position"}:
        raise ValueError(
            "expected dims ('component',), ('position',) or ('component', 'position'), got "
            f"{attribution.dims}: select or sum over the others first"
        )
    positions = attribution["position"].values
    missing = f"position {{given}} is not among {positions[0]} to {positions[-1]}"
    last = int(positions[-1])
    named = last if position is None else position
    at = one_among(named, positions.tolist(), "position", missing=missing)
    chosen = attribution.sel(position=at)
    token = (
        f" ({isolated(drawable(str(chosen['token'].item())))})" if "token" in chosen.coords else ""
    )
    if "query" in attribution.coords:
        query = int(attribution["query"])
        return chosen, f"\nafter position {query}: what is read at position {at}{token}"
    return chosen, f"\nafter position {at}{token}"


def _names(chosen: xarray.DataArray, dim: str) -> list[str]:
    if dim == "component":
        return [legible(str(name)) for name in chosen["component"].values]
    tokens = Tokens.along(chosen, "position")
    return [
        f"{position}  {isolated(drawable(label))}"
        for position, label in zip(tokens.positions, tokens.labels, strict=True)
    ]


def _title(attribution: xarray.DataArray) -> str:
    """Title of an attribution: its token, and the one that it is against."""
    attrs = attribution.attrs
    token = attrs.get("token", attrs.get("target"))
    name = str(attribution.name or attrs.get("method", "attribution")).replace("_", " ")
    if "token_id" in attrs:
        name = "direct logit attribution"
    name = name.capitalize()
    if token is None:
        return name
    against = attrs.get("against")
    minus = f" minus {isolated(drawable(str(against)))}" if against else ""
    return f"{name}: {isolated(drawable(str(token)))}{minus}"


def _unit(attribution: xarray.DataArray) -> str:
    units = attribution.attrs.get("units")
    return f"contribution ({units})" if units else "contribution"
