"""Colours: maps whose equal steps look equally large, and a colour-blind-safe palette."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap, to_hex, to_rgb

RGB = tuple[float, float, float]

# Masataka Okabe and Kei Ito's palette (jfly.uni-koeln.de/color, 2008), told apart with any of the
# common colour deficiencies.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"

# Who speaks.  A role that is not listed here is grey.  Okabe and Ito's purple is too near to both
# blue and grey for some eyes; this one is Paul Tol's ("Colour schemes", 2021).
ROLES = {"system": "#882255", "user": BLUE, "model": ORANGE}
OTHER = "#8A9099"  # such as the template's own tokens
# Local layers are those with a sliding window.
LOCAL, GLOBAL = GREEN, VERMILION

INK = "#1F2933"  # text
FAINT = "#C9CED6"  # hatching, rules
HIDDEN = "#ECEEF1"  # what was taken out of a picture on request

_STEPS = 256
# Paths through Oklab, as (lightness, a, b) at their ends: L from 0 (black) to 1 (white).
_PAPER = (0.985, 0.0, 0.0)
_NAVY = (0.27, -0.016, -0.083)
_RUST = (0.47, 0.110, 0.088)
_COBALT = (0.47, -0.035, -0.155)


def _oklab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """(..., 3) Oklab to sRGB in 0 to 1.

    Source: Björn Ottosson, "A perceptual color space for image processing" (2020).
    """
    to_lms = np.array(
        [
            [1.0, 0.3963377774, 0.2158037573],
            [1.0, -0.1055613458, -0.0638541728],
            [1.0, -0.0894841775, -1.2914855480],
        ]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(((lab @ to_lms.T) ** 3) @ to_linear.T, 0.0, 1.0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _arc(start: tuple[float, ...], end: tuple[float, ...], bulge: float, count: int) -> np.ndarray:
    """(count, 3) Oklab points from `start` to `end`, evenly spaced along the way.

    Chroma is raised by `bulge` half-way, in the direction of the darker end, so that the middle of
    the map is a colour and no grey.
    """
    t = np.linspace(0.0, 1.0, 1024)[:, None]
    path = (1 - t) * np.array(start) + t * np.array(end)
    away = np.array([0.0, end[1], end[2]]) / np.hypot(end[1], end[2])
    path = path + bulge * np.sin(np.pi * t) * away
    length = np.r_[0.0, np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))]
    even = np.linspace(0.0, length[-1], count)
    return np.column_stack([np.interp(even, length, column) for column in path.T])


@functools.cache
def sequential() -> ListedColormap:
    """From paper white to dark blue: more is darker."""
    return ListedColormap(_oklab_to_srgb(_arc(_PAPER, _NAVY, 0.085, _STEPS)), name="gnb_blue")


@functools.cache
def diverging() -> ListedColormap:
    """From blue (negative) over white (zero) to rust (positive), equally dark at both ends."""
    negative = _arc(_PAPER, _COBALT, 0.02, _STEPS // 2)[::-1]
    positive = _arc(_PAPER, _RUST, 0.02, _STEPS // 2)
    return ListedColormap(_oklab_to_srgb(np.vstack([negative, positive])), name="gnb_blue_rust")


def luminance(rgba: np.ndarray | tuple[float, ...] | str) -> float:
    """Relative luminance, from 0 (black) to 1 (white); alpha is ignored.  Source: WCAG 2.2."""
    rgb = np.array(to_rgb(rgba) if isinstance(rgba, str) else rgba[:3], float)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one: Any, other: Any) -> float:
    """Contrast ratio of two colours, from 1 (none) to 21.  Source: WCAG 2.2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def over(rgba: tuple[float, ...], behind: RGB) -> RGB:
    """A colour as it looks on an opaque one."""
    alpha = rgba[3]
    mixed = [alpha * a + (1 - alpha) * b for a, b in zip(rgba[:3], behind, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def text_on(rgba: np.ndarray | tuple[float, ...] | str) -> str:
    """Black or white, whichever has the higher contrast on a background."""
    return "black" if (luminance(rgba) + 0.05) ** 2 > 1.05 * 0.05 else "white"


def legible(color: str, face: Any, least: float = 3.0) -> str:
    """`color`, moved towards black or white until its contrast with `face` is `least`."""
    start, end = np.array(to_rgb(color)), np.array(to_rgb(text_on(face)))
    steps = (start + (end - start) * part for part in np.linspace(0.0, 1.0, 41))
    found: Any = next((c for c in steps if contrast(c, face) >= least), end)
    return to_hex(found)


def kind_color(kind: str) -> str:
    """The colour of a layer by its kind: "global", "sliding 512"."""
    return GLOBAL if kind == "global" else LOCAL if kind.startswith("sliding") else INK


def role_color(role: str) -> str:
    """The colour of a role's turns."""
    return ROLES.get(role, OTHER)
