"""Token strings as they can be drawn: in any script, with the fonts that there are."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

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
# Families that are lists of others.
_GENERIC = tuple(f"font.{n}" for n in ("serif", "sans-serif", "cursive", "fantasy", "monospace"))
_LATIN = range(0x21, 0x7F)
# Of TeX: fonts that have other characters in the places of some Latin ones.
_TEX = ("cmr10", "cmb10", "cmex10", "cmmi10", "cmss10", "cmsy10", "cmti10", "cmtt10")
_VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_LONGEST = 14
# Isolates: what is between them keeps its own direction and does not turn its neighbours around.
_ISOLATE, _END_ISOLATE = "\u2068", "\u2069"


def chosen_families() -> list[str]:
    """The families that matplotlib is set to, as far as they are installed and have Latin letters.

    matplotlib's own default comes last, for what the others lack.
    """
    settings: Any = matplotlib.rcParams
    names = settings["font.family"]
    names = [names] if isinstance(names, str) else names
    wanted: list[str] = []
    for name in names:
        generic = f"font.{name.lower()}"
        wanted += settings[generic] if generic in _GENERIC else [name]
    return list(_usable(tuple(wanted)))


@functools.cache
def _usable(wanted: tuple[str, ...]) -> tuple[str, ...]:
    fonts = [(name, _font(name)) for name in wanted if name not in _TEX]
    whole = [n for n, f in fonts if f is not None and all(map(f.get_char_index, _LATIN))]
    return tuple(dict.fromkeys((*whole, _OWN[0])))


@functools.cache
def _font(name: str) -> matplotlib.ft2font.FT2Font | None:
    """The face that matplotlib takes of a family; None where it is not installed.

    Another face of the family may have fewer characters.
    """
    manager = matplotlib.font_manager
    if name not in {font.name for font in manager.fontManager.ttflist}:
        return None
    return manager.get_font(manager.findfont(name))


@functools.cache
def _family(character: str, chosen: tuple[str, ...]) -> str | None:
    """The first installed family with a glyph for `character`, those that are `chosen` first."""
    for name in (*chosen, *_OWN, *_ELSEWHERE):
        font = _font(name)
        if font is not None and font.get_char_index(ord(character)):
            return name
    return None


def families(texts: Iterable[str] = ()) -> list[str]:
    """The font families to draw `texts` with: those that are chosen, then those that are needed."""
    chosen = tuple(chosen_families())
    needed = {_family(c, chosen) for text in texts for c in text}
    others = [name for name in (*_OWN, *_ELSEWHERE) if name in needed and name not in chosen]
    return [*chosen, *others]


def drawable(label: str, longest: int = _LONGEST) -> str:
    """`label` with white space made visible, cut to a readable length.

    A character that no installed font has, or that is invisible by nature, is written as its code
    point, such as U+4E2D, instead of as a box.  An empty label is shown as ∅.

    Args:
      label: a token's text.
      longest: how many characters are kept; an ellipsis stands for the rest.
    """
    units = list(_units(label)) or ["∅"]
    if sum(map(_width, units)) > longest:
        shown: list[str] = []
        room = longest - 1
        for unit in units:
            room -= _width(unit)
            if room < 0 and shown:
                break
            shown.append(unit)
        units = [*shown, "…"]
    return "".join(units)


def _units(label: str) -> Iterable[str]:
    """The parts of a label that are never cut: characters with their marks, and code points."""
    unit, chosen = "", tuple(chosen_families())
    for c in label:
        shown = _VISIBLE.get(c, c)
        if not shown.isprintable() or _family(shown, chosen) is None:
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
    texts = [isolated(label) for label in labels]
    font = FontProperties(family=families(texts), size=size)
    measure = TextToPath().get_text_width_height_descent
    return max((measure(text, font, ismath=False)[0] for text in texts), default=0.0) / 72


def character(size: float) -> float:
    """Width of an average character of a sentence, in inches, at a font size in points."""
    return _average(tuple(chosen_families()), str(matplotlib.rcParams["font.weight"]), size)


@functools.cache
def _average(chosen: tuple[str, ...], weight: str, size: float) -> float:
    sentence = "weights below 0.05 are not drawn: the largest of each 12 tokens"
    font = FontProperties(family=list(chosen), weight=weight, size=size)
    measure = TextToPath().get_text_width_height_descent
    return float(measure(sentence, font, ismath=False)[0]) / 72 / len(sentence)


def _turns(label: str) -> bool:
    return any(unicodedata.bidirectional(c) in ("R", "AL") for c in label)
