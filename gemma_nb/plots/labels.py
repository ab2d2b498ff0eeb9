"""Token strings as they can be drawn on an axis."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import matplotlib.font_manager
import matplotlib.ft2font

# Tried in this order for each character: the first is matplotlib's own, the others are what
# machines with CJK or emoji text usually have.
_FAMILIES = (
    "DejaVu Sans Mono",
    "DejaVu Sans",
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "Yu Gothic",
    "Microsoft YaHei",
    "Noto Sans",
    "Noto Emoji",
)
_VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})
_LONGEST = 14


@functools.cache
def _fonts() -> dict[str, matplotlib.ft2font.FT2Font]:
    manager = matplotlib.font_manager
    names = {font.name: font.fname for font in manager.fontManager.ttflist}
    return {name: manager.get_font(names[name]) for name in _FAMILIES if name in names}


def families() -> list[str]:
    """The installed font families to draw token labels with."""
    return list(_fonts())


def drawable(label: str) -> str:
    """`label` with white space made visible, cut to a readable length.

    A character that no installed font has is written as its code point, instead of as a box.
    Dollar signs are escaped: matplotlib would read them as mathematics.
    """
    shown = label.translate(_VISIBLE)
    shown = "".join(c if c.isprintable() and _has(c) else f"U+{ord(c):04X}" for c in shown)
    shown = shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
    return shown.replace("$", r"\$")


@functools.cache
def _has(character: str) -> bool:
    return any(font.get_char_index(ord(character)) for font in _fonts().values())


def tick_step(count: int, most: int = 64) -> int:
    """Label every how many tokens, so that at most `most` of `count` are labelled."""
    return -(-count // most)


def drawable_all(labels: Sequence[str]) -> list[str]:
    """`drawable` of each."""
    return [drawable(label) for label in labels]
