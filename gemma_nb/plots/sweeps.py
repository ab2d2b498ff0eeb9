"""Activation patching: the metric when one place takes its value from the other run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, Normalize

from gemma_nb.plots.cells import cells, kind_handles, name_heads, sheet
from gemma_nb.plots.colors import kind_color
from gemma_nb.plots.figure import SMALL, bare, canvas, color_bar, footer, headline, picture
from gemma_nb.plots.labels import drawable, isolated, legible
from gemma_nb.plots.maps import badge_of, computed_under
from gemma_nb.plots.scale import ColorScale, color_scale
from gemma_nb.plots.sources import expect_array
from gemma_nb.plots.tokens import MOST_LABELS, PITCH, Tokens, label_inches, role_handles

if TYPE_CHECKING:
    import xarray

_OF_LAYER = ("layer", "head")


@picture
def patching(
    sweep: xarray.DataArray,
    *,
    ax: Axes | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    norm: str | Normalize | None = None,
    cmap: str | Colormap | None = None,
) -> Axes:
    """The result of `gnb.activation_patching`: the metric itself, wherever one place was patched.

    White is the metric of the unpatched (corrupted) run: what is patched there changes nothing.
    The colour bar marks the values of both unpatched runs.

    Args:
      sweep: over (layer, position), (layer, head), (position, head), or one of them; of all three,
        one place of the third is selected with .sel(...), and the title says which.
      ax: where to draw; None makes a figure.
      vmin: the least number with a colour of its own; None for one as far below the corrupted run's
        metric as `vmax` is above.
      vmax: the largest one; None for as far as `vmin`, or the farthest value on either side, the
        clean run included.
      norm: a matplotlib norm, or the name of a scale, in place of ours; white is then its middle.
      cmap: a matplotlib colour map; None for one whose equal steps look equal.

    Returns:
      The figure; with `ax`, the axes.

    Raises:
      TypeError: no array, or other axes, or another kind of limit, norm or map.
      ValueError: a sweep over three dimensions: select one place of the third.
    """
    expect_array(sweep, "sweep", "gnb.activation_patching gives one")
    if not 1 <= len(sweep.dims) <= 2 or not set(sweep.dims) <= {"layer", "position", "head"}:
        raise ValueError(
            "expected a sweep over one or two of layer, position and head, got dims "
            f"{sweep.dims}: select one place of the others with .sel(...)"
        )
    mesh: ScalarMappable
    base = float(sweep.attrs.get("corrupted", 0.0))
    clean = float(sweep.attrs.get("clean", base))
    reach = float(max(np.nanmax(np.abs(sweep.values - base)), abs(clean - base))) or 1.0
    default, limits = Normalize(base - reach, base + reach), {"vmin": vmin, "vmax": vmax}
    colors = color_scale(sweep.values, default, **limits, norm=norm, cmap=cmap, center=base)
    remark = ""
    if "position" in sweep.dims:
        other = next((str(d) for d in sweep.dims if d != "position"), None)
        values = sweep.transpose("position", ...).values.reshape(sweep.sizes["position"], -1)
        tokens = _both_texts(sweep)
        names, kinds = _columns(sweep, other)
        ax = canvas(
            ax,
            float(np.clip(0.24 * len(names), 1.6, 9.0)),
            float(np.clip(PITCH * len(tokens), 1.4, PITCH * MOST_LABELS)),
            left=label_inches(tokens) + 0.25,
            top=1.0,
            right=1.7,
        )
        mesh, remark = sheet(ax, values, tokens, names, colors, kinds=kinds, center=base)
        ax.set_ylabel("position patched", fontsize=SMALL)
        if other == "head":
            name_heads(ax, [int(h) for h in sweep["head"].values], _groups(sweep))
        else:
            ax.set_xlabel(other or "", fontsize=SMALL)
        handles = [*role_handles(tokens), *kind_handles(kinds or ())]
        named = tokens.others is not None and len(tokens) <= MOST_LABELS
        notes = ["a ← b: a in the clean text, b in the corrupted one"] if named else []
    else:
        rows = sweep.transpose(*[d for d in _OF_LAYER if d in sweep.dims])
        rows = rows.expand_dims("layer") if "layer" not in rows.dims else rows
        values = rows.values.reshape(rows.sizes["layer"], -1)
        across = "head" if "head" in rows.dims else None
        ax = canvas(
            ax,
            max(1.4, 0.4 * values.shape[1]),
            max(0.7, 0.22 * len(values)),
            left=1.45,
            top=1.0,
            right=1.7,
        )
        mesh = _layers_by_heads(ax, rows, values, across, colors)
        handles, notes = [], []
    metric = legible(str(sweep.attrs.get("metric", "metric")))
    title = f"Activation patching of {sweep.attrs.get('site', 'activations')}{_elsewhere(sweep)}"
    headline(ax, title, pad=31.0 if "head" in sweep.dims else None)
    _mark_runs(color_bar(mesh, ax, metric + remark, colors.extend), base, clean)
    white = " (white)" if norm is None else ""
    unpatched = f"unpatched: {clean:.4g} in the clean run, {base:.4g} in the corrupted one{white}"
    footer(ax, handles, [unpatched, *notes, *computed_under(sweep)])
    return ax


def _mark_runs(bar: Colorbar, base: float, clean: float) -> None:
    """Ticks at both unpatched runs, by name, and at the ends, where they have room."""
    low, high = bar.ax.get_ylim()
    hair = 1e-6 * (high - low)  # the clean run may be the end, but for rounding
    marks: dict[float, str] = {}
    for value, name in ((base, "  corrupted"), (clean, "  clean"), (low, ""), (high, "")):
        if low - hair <= value <= high + hair and all(
            abs(value - m) > 0.03 * (high - low) for m in marks
        ):
            marks[value] = f"{value:.3g}{name}"
    bar.set_ticks(list(marks), labels=list(marks.values()))


def _both_texts(sweep: xarray.DataArray) -> Tokens:
    """The clean text; where the corrupted one differs, both."""
    tokens = Tokens.along(sweep, "position")
    clean = tuple(map(str, sweep["clean_token"].values)) if "clean_token" in sweep.coords else ()
    if clean in ((), tokens.labels):
        return tokens
    return dataclasses.replace(tokens, labels=clean, others=tokens.labels)


def _groups(sweep: xarray.DataArray) -> list[int | None]:
    """The KV group of each head; None where it is not known."""
    if "kv_group" not in sweep.coords:
        return [None] * sweep.sizes["head"]
    return [int(g) for g in sweep["kv_group"].values]


def _elsewhere(sweep: xarray.DataArray) -> str:
    """Place along the axes that are not drawn: the selected one, or all there are."""
    over = str(sweep.attrs.get("over", "layer, position, head")).split(", ")
    found = []
    for dim in ("layer", "position", "head"):
        if dim in sweep.dims or (dim == "head" and sweep.attrs.get("site") != "z"):
            continue
        if dim in sweep.coords:
            token = sweep.coords.get("token") if dim == "position" else None
            named = "" if token is None else f" ({isolated(drawable(str(token.item())))})"
            found.append(f"{dim} {int(sweep[dim])}{named}")
        elif dim not in over:
            found.append(f"all {dim}s at once")
    return f"\n{', '.join(found)}" if found else ""


def _columns(sweep: xarray.DataArray, dim: str | None) -> tuple[list[str], list[str] | None]:
    """Names of the columns, and the layers' kinds where they are layers."""
    if dim is None:
        return [""], None
    names = [str(i) for i in sweep[dim].values]
    kinds = [str(k) for k in sweep["layer_kind"].values] if dim == "layer" else None
    return names, kinds


def _layers_by_heads(
    ax: Axes,
    rows: xarray.DataArray,
    values: np.ndarray,
    across: str | None,
    colors: ColorScale,
) -> ScalarMappable:
    count, width = values.shape
    mesh = cells(
        ax,
        np.ma.masked_invalid(values),
        (-0.5, width - 0.5),
        (count - 0.5, -0.5),
        norm=colors.norm,
        cmap=colors.cmap,
    )
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(count - 0.5, -0.5)
    bare(ax)
    if across:
        name_heads(ax, [int(h) for h in rows[across].values], _groups(rows))
    else:
        ax.set_xticks([])
    if "layer_kind" in rows.coords:
        kinds = [str(k) for k in np.atleast_1d(rows["layer_kind"].values)]
        layers = [int(i) for i in np.atleast_1d(rows["layer"].values)]
        names = [f"{i}  {badge_of(k)}" for i, k in zip(layers, kinds, strict=True)]
        ax.set_yticks(range(count), names, fontsize=SMALL)
        for tick, kind in zip(ax.get_yticklabels(), kinds, strict=True):
            tick.set_color(kind_color(kind))
        ax.set_ylabel("layer", fontsize=SMALL)
    else:
        ax.set_yticks([])
    return mesh
