"""Labels that can be read on whatever is behind them, and are read as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, Tick
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import FigureBase
from matplotlib.patches import Patch
from matplotlib.text import Text

from gemma_nb.plots.colors import INK, RGB, contrast, legible, over, text_on

_PALE = "#E8EBEF"  # text on dark faces
_PLAIN = (INK.lower(), "#000000")  # the colours of a label that has none of its own
_WHITE = (1.0, 1.0, 1.0)


class Ink(Artist):
    """Chooses the colours of the labels of one axes when they are drawn; draws nothing itself.

    Only then is it known what is behind them: a file can have another face than the figure had
    when the picture was made.  A colour that somebody has given a label since stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_zorder(-1e9)  # before everything else of the axes
        self.set_in_layout(False)
        self._inside: list[Text] = []
        self._around: list[Text] = []
        self._wishes: dict[Artist, str] = {}
        self._given: dict[Artist, str] = {}
        self._own = to_hex(matplotlib.rcParams["text.color"])

    @classmethod
    def of(cls, ax: Axes) -> Ink | None:
        """The ink of `ax`; None where it has none."""
        return next((one for one in ax.artists if isinstance(one, Ink)), None)

    def inside(self, text: Text) -> None:
        """Takes care of a label that stands on the face of the axes."""
        self._inside.append(text)

    def around(self, text: Text) -> None:
        """Takes care of a label outside of the axes, besides ticks, axes' names and legends."""
        self._around.append(text)

    def draw(self, renderer: RendererBase) -> None:
        """Draws nothing, as the first of the axes' artists."""
        del renderer
        self.apply()
        self.stale = False

    def apply(self) -> None:
        """Gives every label a colour that has a contrast of 3:1 at least with what is behind it."""
        ax = self.axes
        assert isinstance(ax, Axes)
        behind, inner = face_around(ax), face_inside(ax)
        for one in _with_children(ax):
            for text in self._labels(one):
                self._adopt(text, behind)
            for edge in one.spines.values():
                self._adopt(edge, behind)
            for tick in _ticks(one):
                for line in (tick.tick1line, tick.tick2line):
                    self._adopt(line, behind)
        for text in self._around:
            self._adopt(text, behind)
        for text in self._inside:
            self._adopt(text, inner)

    def _labels(self, ax: Axes) -> Iterator[Text]:
        """Labels outside of any axes with a picture in it."""
        for axis in (ax.xaxis, ax.yaxis):
            yield axis.label
            yield axis.get_offset_text()
        for tick in _ticks(ax):
            yield tick.label1
            yield tick.label2
        if (legend := ax.get_legend()) is not None:
            yield from legend.get_texts()

    def _adopt(self, artist: Any, face: RGB | None) -> None:
        if isinstance(artist, Text):
            take_literally(artist)
        edge = isinstance(artist, Patch)
        now = to_hex(artist.get_edgecolor() if edge else artist.get_color())
        if artist not in self._wishes:
            self._wishes[artist] = now
        elif now != self._given.get(artist, now):
            return  # somebody else's choice
        if face is None and artist in self._given:
            return  # on an unknown page, as it was on the figure's own face
        color = self._color(self._wishes[artist], _WHITE if face is None else face)
        self._given[artist] = color
        if color != now:
            (artist.set_edgecolor if edge else artist.set_color)(color)

    def _color(self, wish: str, face: RGB) -> str:
        if wish not in (*_PLAIN, self._own):
            return legible(wish, face)
        if self._own not in _PLAIN and contrast(self._own, face) >= 3.0:
            return self._own
        return _ink(face)


def ink_inside(ax: Axes) -> str:
    """The colour of black lines on the face of the axes."""
    return _ink(face_inside(ax) or _WHITE)


def ink_around(ax: Axes) -> str:
    """The colour of black lines around the axes."""
    return _ink(face_around(ax) or _WHITE)


def _ink(face: RGB) -> str:
    good = (ink for ink in (INK, _PALE) if contrast(ink, face) >= 4.5)
    return to_hex(next(good, text_on(face)))


def face_around(ax: Axes) -> RGB | None:
    """Colour behind the labels around the axes; None where it is a page that nobody knows."""
    patches, figure = [], ax.get_figure(root=False)
    while isinstance(figure, FigureBase):
        patches.append(figure.patch)
        parent = figure.get_figure(root=False)
        figure = None if parent is figure else parent
    face: RGB | None = None
    for patch in reversed(patches):
        if patch.get_visible():
            face = _cover(face, patch)
    return face


def face_inside(ax: Axes) -> RGB | None:
    """Colour behind what is drawn in the axes."""
    face = face_around(ax)
    return _cover(face, ax.patch) if ax.patch.get_visible() and ax.axison else face


def _cover(face: RGB | None, patch: Any) -> RGB | None:
    color = to_rgba(patch.get_facecolor())
    if face is None and color[3] < 0.5:
        return None
    return over(color, face or _WHITE)


def _with_children(ax: Axes) -> list[Axes]:
    return [ax, *(child for child in ax.child_axes if isinstance(child, Axes))]


def _ticks(ax: Axes) -> Iterator[Tick]:
    axes: tuple[Axis, Axis] = (ax.xaxis, ax.yaxis)
    for axis in axes:
        yield from axis.get_major_ticks()
        yield from axis.get_minor_ticks()


def take_literally(text: Text) -> None:
    """Takes from a label what settings gave it: a `$` is a dollar sign, in clear letters."""
    if text.get_usetex():
        text.set_usetex(False)
    if text.get_parse_math():
        text.set_parse_math(False)
    if text.get_path_effects():
        text.set_path_effects([])
    if text.get_sketch_params() is not None:
        text.set_sketch_params(None)
