"""Colour scales: which number has which colour, by matplotlib's names norm, vmin, vmax and cmap."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.scale import get_scale_names

from gemma_nb.expected import a
from gemma_nb.plots.colors import diverging, sequential

# An end of a colour bar beyond which there are numbers is pointed; None: as the norm says.
Extend: TypeAlias = Literal["neither", "min", "max", "both"] | None


class ColorScale(NamedTuple):
    """A norm, a colour map, and the ends of the colour bar that are pointed."""

    norm: Normalize
    cmap: Colormap
    extend: Extend


def color_scale(
    values: Any,
    default: Normalize,
    *,
    vmin: float | None = None,
    vmax: float | None = None,
    norm: str | Normalize | None = None,
    cmap: str | Colormap | None = None,
    center: float | None = None,
) -> ColorScale:
    """The scale that a user asks for, and the rest of it from `default`.

    Args:
      values: the numbers that are drawn; masked ones and NaN do not count.
      default: the norm without any wishes; a limit that is given replaces its own.
      vmin: the least number with a colour of its own.
      vmax: the largest one.
      norm: a norm in place of `default`, taken as it is, or the name of a matplotlib scale.  What
        limits it leaves open become those of the values, in the norm itself, as in matplotlib.
      cmap: a colour map; None for one whose equal steps look equal.
      center: of signed numbers, the one in the middle of the colour map.  One limit then sets the
        other, as far on the other side; of two uneven ones, the map is cut rather than stretched,
        so that equal colours on both sides stay equal distances.

    Raises:
      TypeError: a limit that is no number, or a norm or map of another kind.
      ValueError: limits beside a norm that has its own, or in the wrong order; an unknown name.
    """
    shown = np.ma.masked_invalid(values)
    colors = matplotlib.colormaps.get_cmap(
        cmap or (sequential() if center is None else diverging())
    )
    low, high = _limit(vmin, "vmin"), _limit(vmax, "vmax")
    given = low is not None or high is not None
    if isinstance(norm, Normalize) and given:
        raise ValueError("norm= has limits of its own: pass either a norm or vmin= and vmax=")
    if isinstance(norm, str) and norm not in get_scale_names():
        known = ", ".join(map(repr, get_scale_names()))
        raise ValueError(f"norm must be a Normalize or one of {known}, got {norm!r}")
    wanted: Any = norm
    chosen: Any = default if norm is None else ScalarMappable(norm=wanted).norm
    if norm is None and center is not None:
        if low is None and high is not None:
            low = 2 * center - high
        elif high is None and low is not None:
            high = 2 * center - low
    chosen.vmin = chosen.vmin if low is None else low
    chosen.vmax = chosen.vmax if high is None else high
    chosen.autoscale_None(shown)
    low, high = chosen.vmin, chosen.vmax
    if low is None or high is None:  # nothing to take them from
        return ColorScale(chosen, colors, "neither")
    if given and low >= high:
        raise ValueError(f"vmin must be below vmax, got {low:g} and {high:g}")
    if norm is None and center is not None:
        colors = _cut(colors, low - center, high - center)
    return ColorScale(chosen, colors, _extend(shown, chosen, low, high))


def _limit(given: Any, argument: str) -> float | None:
    if given is None:
        return None
    try:
        limit = math.nan if isinstance(given, str) else float(given)
    except TypeError:
        limit = math.nan
    if not math.isfinite(limit):
        raise TypeError(f"{argument} must be a finite number, got {a(given)}: {given!r:.60}")
    return limit


def _cut(cmap: Colormap, low: float, high: float) -> Colormap:
    """The part of a map from `low` to `high`, where all of it spans the farther one on each side.

    Source: the `center` of seaborn's heatmaps.
    """
    reach = max(-low, high)
    if low == -high or reach <= 0:
        return cmap
    first, last = (low / reach + 1) / 2, (high / reach + 1) / 2
    part = ListedColormap(cmap(np.linspace(max(first, 0.0), last, 256)), name=cmap.name)
    return part.with_extremes(bad=tuple(cmap.get_bad()))


def _extend(shown: np.ma.MaskedArray, norm: Normalize, low: float, high: float) -> Extend:
    if hasattr(norm, "extend"):
        return None
    hair = 1e-6 * abs(high - low)  # limits are rounded
    below, above = bool(shown.min() < low - hair), bool(shown.max() > high + hair)
    return "both" if below and above else "min" if below else "max" if above else "neither"
