"""Figures that show themselves in a notebook, and what all plots have in common."""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator, ScalarFormatter

from gemma_nb.expected import a
from gemma_nb.plots.colors import GLOBAL, INK, LOCAL
from gemma_nb.plots.ink import Ink, take_literally
from gemma_nb.plots.labels import character, families
from gemma_nb.plots.scale import Extend
from gemma_nb.plots.settings import own_settings

_P = ParamSpec("_P")

SMALL, NORMAL = 7.0, 8.0  # points
_DPI = 120.0  # in a notebook, unless matplotlib is set to another resolution
_LINE = 0.165  # inches, from one line of the footer to the next


class NotebookFigure(Figure):
    """A matplotlib Figure made without pyplot, which a notebook shows all the same.

    pyplot keeps every figure alive and shows it once more at the end of the cell; a bare Figure is
    shown as text, unless pyplot was imported.

    Attributes:
      is_growing: while the plot that made it draws; later ones leave its size alone.
    """

    is_growing = True

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        chosen = self.dpi != matplotlib.rcParamsDefault["figure.dpi"]
        dpi = self.dpi if chosen else _DPI
        self.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
        return buffer.getvalue()

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        """Saves as matplotlib does, with fonts in PDF that printers take (TrueType, not Type 3)."""
        with own_settings():
            super().savefig(*args, **kwargs)

    def draw(self, renderer: RendererBase) -> None:
        """Draws as matplotlib does, under the settings that the picture was made with."""
        with own_settings():
            super().draw(renderer)

    def grow_below(self, extra: float) -> None:
        """Adds `extra` inches at the bottom; axes stay as large as they are."""
        width, height = self.get_size_inches()
        places = [(ax, ax.get_position(original=True)) for ax in self.axes]
        self.set_size_inches(width, height + extra)
        for ax, box in places:
            low, tall = box.y0 * height + extra, box.height * height
            ax.set_position((box.x0, low / (height + extra), box.width, tall / (height + extra)))


def picture(plot: Callable[_P, Axes]) -> Callable[_P, Any]:
    """Makes `plot`, which returns the Axes that it drew in, a public plot.

    It draws under the settings of a picture, with labels in legible colours, and returns as
    matplotlib's own do: the Axes that it was given as `ax=`, or else the Figure that it made.

    Raises:
      TypeError: an `ax` that is no Axes.
    """

    @functools.wraps(plot)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        given = kwargs.get("ax")
        if given is not None and not isinstance(given, Axes):
            raise TypeError(
                f"ax must be one matplotlib Axes, got {a(given)}: of plt.subplots(2, 2), axes[0, 0]"
            )
        with own_settings():
            ax = plot(*args, **kwargs)
            if (ink := Ink.of(ax)) is not None:
                ink.apply()
        if given is not None:
            return ax
        figure = ax.get_figure(root=True)
        if isinstance(figure, NotebookFigure):
            figure.is_growing = False
        return figure

    plot.__annotations__["return"] = "Figure | Axes"  # what `help` shows of `made`
    return made


def canvas(
    ax: Axes | None,
    width: float,
    height: float,
    *,
    left: float = 0.8,
    right: float = 0.9,
    top: float = 0.5,
    bottom: float = 0.1,
) -> Axes:
    """`ax`, prepared; or axes of `width` by `height` inches in a new figure with margins."""
    if ax is None:
        size = (left + width + right, bottom + height + top)
        figure = NotebookFigure(figsize=size)
        place = (left / size[0], bottom / size[1], width / size[0], height / size[1])
        ax = figure.add_axes(place)
        ax.add_artist(Ink())
    else:
        _prepare(ax)
    return ax


def _prepare(ax: Axes) -> None:
    """Takes from the user's axes what their settings had put there when they were made."""
    if Ink.of(ax) is None:
        ax.add_artist(Ink())
    ax.grid(False, which="both")
    ax.minorticks_off()
    ax.margins(0.05)
    sides: dict[str, Any] = {"top": False, "right": False, "bottom": True, "left": True}
    labelled: dict[str, Any] = {f"label{side}": shown for side, shown in sides.items()}
    ax.tick_params(which="both", reset=True, **sides, **labelled)
    ax.xaxis.set_label_position("bottom")
    ax.yaxis.set_label_position("left")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_inverted(False)
        axis.label.set_color(INK)
        if type(axis.get_major_formatter()) is ScalarFormatter:  # one without marks of its own
            axis.set_major_formatter(ScalarFormatter())


class Numbers(LogFormatter):
    """Labels of a logarithmic axis: 0.01, 10, 1,000, rather than powers in TeX."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a tick at `x`; empty where there are too many."""
        if not super().__call__(x, pos):
            return ""
        return f"{x:,.0f}" if x >= 1 else f"{x:g}"


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the axes before anything is laid out around them."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    box = ax.get_position()
    width, height = figure.get_size_inches()
    return float(box.width * width), float(box.height * height)


def bare(ax: Axes) -> None:
    """Takes away the frame and the tick marks."""
    ax.tick_params(length=0, labelsize=SMALL)
    for spine in ax.spines.values():
        spine.set_visible(False)


def headline(ax: Axes, text: str, badge: str = "", pad: float | None = None) -> None:
    """A title at the left; at the right, in a box of its colour, the kind of the layer."""
    font = families([text])
    title = ax.set_title(text, loc="left", fontsize=NORMAL + 1, color=INK, pad=pad, fontfamily=font)
    if (ink := Ink.of(ax)) is not None:
        ink.around(title)
    if badge:
        color = GLOBAL if badge.startswith("global") else LOCAL
        box = {"boxstyle": "round,pad=0.25", "facecolor": color, "edgecolor": "none"}
        name = ax.set_title(badge, loc="right", fontsize=SMALL, color="white", bbox=box)
        name.set_fontweight("bold")
        take_literally(name)


def footer(
    ax: Axes, handles: Sequence[Artist], notes: Sequence[str] = (), *, below: float = 0.0
) -> None:
    """Below the axes: what the marks mean, and what a reader must know about the numbers.

    Long entries are wrapped to the width of the axes.  A figure that a plot made grows by as much;
    in another, the layout is yours.

    Args:
      ax: what stands above.
      handles: artists with labels.
      notes: sentences.
      below: inches that are taken already.
    """
    remarks = [Line2D([], [], linestyle="none", label=note) for note in notes]
    entries: list[Artist] = [*handles, *remarks]
    if not entries:
        return
    width, height = inches(ax)
    room = max(width, 1.6) - 0.35
    letter = character(SMALL)
    longest = max(len(str(entry.get_label())) for entry in entries) * letter
    columns = max(1, min(len(entries), int(room / (longest + 0.35))))
    lines = 0
    for entry in entries:
        text = textwrap.fill(str(entry.get_label()), max(12, int(room / letter)))
        entry.set_label(text)
        lines = max(lines, text.count("\n") + 1) if columns > 1 else lines + text.count("\n") + 1
    lines = lines * -(-len(entries) // columns) if columns > 1 else lines
    figure = ax.get_figure()
    if isinstance(figure, NotebookFigure) and figure.is_growing:
        figure.grow_below(lines * _LINE + 0.1)
    legend = ax.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(0.0, -below / height),
        borderaxespad=0.8,
        borderpad=0.0,
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.2,
        labelcolor=INK,
    )
    for line in legend.get_texts():
        line.set_fontfamily(families([line.get_text()]))


def color_bar(
    mappable: ScalarMappable,
    ax: Axes,
    label: str,
    extend: Extend = "neither",
) -> Colorbar:
    """A colour bar at the right of `ax`, which keeps its size.

    Args:
      mappable: what has the colours.
      ax: where.
      label: what the numbers are, with their unit.
      extend: the ends beyond which there are numbers too; they are pointed.
    """
    width, height = inches(ax)
    long = min(height, max(0.6 * height, 1.4)) / height
    place = (1.0 + 0.12 / width, 1.0 - long, 0.11 / width, long)
    return _bar(mappable, ax, label, place, "vertical", extend)


def color_bar_below(
    mappable: ScalarMappable,
    ax: Axes,
    label: str,
    extend: Extend = "neither",
    *,
    below: float = 0.0,
) -> float:
    """A colour bar `below` inches under `ax`, of a figure that grows by it.

    Returns:
      Inches under the axes that are taken now.
    """
    taken = below + 0.55
    figure = ax.get_figure()
    if isinstance(figure, NotebookFigure) and figure.is_growing:
        figure.grow_below(0.55 + below)
    width, height = inches(ax)
    place = (0.0, -(below + 0.2) / height, min(1.0, 2.8 / width), 0.1 / height)
    _bar(mappable, ax, label, place, "horizontal", extend)
    return taken


def _bar(
    mappable: ScalarMappable,
    ax: Axes,
    label: str,
    place: tuple[float, float, float, float],
    orientation: Literal["vertical", "horizontal"],
    extend: Extend = "neither",
) -> Colorbar:
    figure = ax.get_figure(root=True)
    assert figure is not None
    inset = ax.inset_axes(place)
    bar = figure.colorbar(mappable, cax=inset, orientation=orientation, extend=extend)
    font: dict[str, Any] = {"fontsize": SMALL, "fontfamily": families([label])}
    if orientation == "horizontal":
        bar.set_label(label, loc="left", **font)
        if type(mappable.norm) is Normalize:  # labels of small numbers are long
            bar.locator = MaxNLocator(5)
    else:
        # As long as the bar; a short one's stands out a little.
        room = max(44, int(inches(ax)[1] * place[3] / character(SMALL)))
        lines = [textwrap.fill(line, room) for line in label.split("\n")]
        bar.set_label("\n".join(lines), **font)
    if isinstance(mappable.norm, LogNorm):
        bar.formatter = Numbers()
    inset.tick_params(labelsize=SMALL, length=2)
    bar.outline.set_visible(False)
    return bar
