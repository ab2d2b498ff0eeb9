"""Token strings as they can be drawn: in any script, with the fonts that there are."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Sequence

import matplotlib.font_manager
import matplotlib.ft2font
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

# What comes with matplotlib has Latin, Greek, Cyrillic, Hebrew, Arabic, symbols and some emoji.
_OWN = ("DejaVu Sans", "DejaVu Sans Mono", "STIXGeneral")
# Then, for the characters that these lack, what machines usually have.  Not among them: colour
# emoji fonts made of bitmaps, which matplotlib cannot draw.
_ELSEWHERE = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR"),
    *("Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback"),
    *("PingFang SC", "Hiragino Sans", "Hiragino Sans GB", "Apple SD Gothic Neo", "Heiti TC"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "SimHei", "Arial Unicode MS"),
    *("Noto Emoji", "Segoe UI Emoji", "Segoe UI Symbol", "Symbola", "Apple Symbols"),
    *("Noto Sans", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil"),
    *("Noto Sans Telugu", "Noto Sans Thai", "Noto Sans Ethiopic", "Noto Sans Georgian"),
    *("Noto Sans Armenian", "Noto Sans Khmer", "Noto Sans Myanmar", "Noto Sans Sinhala"),
    *("Noto Sans Symbols", "Noto Sans Symbols 2", "Nirmala UI", "Leelawadee UI", "Ebrima"),
    *("FreeSans", "FreeSerif", "Unifont"),
)
_VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_LONGEST = 14
# Isolates: what is between them keeps its own direction and does not turn its neighbours around.
_ISOLATE, _END_ISOLATE = "\u2068", "\u2069"


@functools.cache
def _fonts() -> dict[str, matplotlib.ft2font.FT2Font]:
    """Installed families in the order in which they are tried, with a font of each."""
    manager = matplotlib.font_manager
    installed = {font.name for font in manager.fontManager.ttflist}
    names = [name for name in (*_OWN, *_ELSEWHERE) if name in installed]
    # The face that matplotlib would take: another of the family may have fewer characters.
    return {name: manager.get_font(manager.findfont(name)) for name in names}


@functools.cache
def _family(character: str) -> str | None:
    """The first installed family with a glyph for `character`."""
    found = (name for name, font in _fonts().items() if font.get_char_index(ord(character)))
    return next(found, None)


def families(texts: Iterable[str] = ()) -> list[str]:
    """The font families to draw `texts` with: matplotlib's default, then those that are needed."""
    needed = {_family(c) for text in texts for c in text} - {None}
    return [name for i, name in enumerate(_fonts()) if i == 0 or name in needed]


def drawable(label: str, longest: int = _LONGEST) -> str:
    """`label` with white space made visible, cut to a readable length.

    A character that no installed font has, or that is invisible by nature, is written as its code
    point, such as U+4E2D, instead of as a box.  Dollar signs are escaped: matplotlib would read
    them as mathematics.  An empty label is shown as ∅.

    Args:
      label: a token's text.
      longest: how many characters are kept; an ellipsis stands for the rest.
    """
    units = list(_units(label)) or ["∅"]
    if sum(map(_width, units)) > longest:
        kept: list[str] = []
        room = longest - 1
        for unit in units:
            room -= _width(unit)
            if room < 0 and kept:
                break
            kept.append(unit)
        units = [*kept, "…"]
    return "".join(units).replace("$", r"\$")


def _units(label: str) -> Iterable[str]:
    """The parts of a label that are never cut: characters with their marks, and code points."""
    unit = ""
    for c in label:
        shown = _VISIBLE.get(c, c)
        if not shown.isprintable() or _family(shown) is None:
            shown = f"U+{ord(c):04X}"
        elif unit and unicodedata.combining(c):
            unit += c
            continue
        if unit:
            # A space, which can be no part of a label otherwise, ends one code and begins the next.
            yield unit + " " if unit.startswith("U+") and shown.startswith("U+") else unit
        unit = shown
    if unit:
        yield unit


def _width(unit: str) -> int:
    if unit.startswith("U+"):
        return len(unit)
    return 2 if unicodedata.east_asian_width(unit[0]) in "WF" else 1


def drawable_all(labels: Sequence[str]) -> list[str]:
    """`drawable` of each."""
    return [drawable(label) for label in labels]


def legible(text: str) -> str:
    """A sentence as it can be drawn: `drawable` without cutting it, and with its spaces."""
    return "".join(" " if c == " " else drawable(c, 99) for c in text)


def isolated(label: str) -> str:
    """A drawable label to be put beside other text, which it does not turn around."""
    return f"{_ISOLATE}{label}{_END_ISOLATE}" if _turns(label) else label


def inches(labels: Iterable[str], size: float) -> float:
    """Width of the widest of drawable `labels`, in inches, at a font size in points."""
    texts = [isolated(label).replace(r"\$", "$") for label in labels]
    font = FontProperties(family=families(texts), size=size)
    measure = TextToPath().get_text_width_height_descent
    return max((measure(text, font, ismath=False)[0] for text in texts), default=0.0) / 72


def _turns(label: str) -> bool:
    return any(unicodedata.bidirectional(c) in ("R", "AL") for c in label)
