"""The settings of matplotlib that pictures follow, and those that they do not.

Taste is followed: faces, font families, the colour of text, resolution, how files are written.
Everything else is as matplotlib has it by default while a picture is made or drawn, because it
would change what the picture says (`image.origin`, `image.interpolation`, `text.parse_math`,
`axes.grid` over cells), hide part of it (`xtick.labelbottom`, `lines.marker`) or break a layout
that is measured for its own sizes (`font.size`, `figure.autolayout`).
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import matplotlib

from gemma_nb.plots.labels import chosen_families

_FOLLOWED = {
    *("axes.facecolor", "figure.facecolor", "figure.edgecolor", "figure.dpi", "text.color"),
    *("text.antialiased", "lines.antialiased", "patch.antialiased", "axes.unicode_minus"),
    *("font.style", "font.weight", "font.stretch", "font.variant"),
    *("font.family", "font.sans-serif", "font.serif", "font.monospace"),
    *("font.cursive", "font.fantasy"),
    # Not of the picture, but of where it is shown.
    *("backend", "backend_fallback", "interactive", "toolbar", "timezone", "docstring.hardcopy"),
    *("figure.max_open_warning", "figure.raise_window", "figure.hooks"),
}
_FOLLOWED_GROUPS = (
    *("savefig.", "svg.", "pdf.", "ps.", "pgf.", "agg.", "keymap.", "animation.", "webagg."),
    *("tk.", "macosx.", "date."),
)
# TrueType fonts, which printers take and which have every character.
_FILES = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "pdf.use14corefonts": False,
    "ps.useafm": False,
}


@functools.cache
def _pinned() -> dict[Any, Any]:
    """The settings that are not followed, at matplotlib's defaults; text is no markup."""
    default: dict[Any, Any] = {
        key: value
        for key, value in matplotlib.rcParamsDefault.items()
        if key not in _FOLLOWED and not key.startswith(_FOLLOWED_GROUPS)
    }
    return {**default, **_FILES, "text.parse_math": False}


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Within it, matplotlib has the settings of a picture; the user's are back afterwards."""
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():  # of settings that matplotlib is about to drop
            warnings.simplefilter("ignore", matplotlib.MatplotlibDeprecationWarning)
            settings = {**_pinned(), "font.family": chosen_families()}
            stack.enter_context(matplotlib.rc_context(settings))
        yield
