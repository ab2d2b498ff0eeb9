"""Whatever matplotlib is set to, a picture says the same, and can be read."""

from __future__ import annotations

import io
import pickle
import warnings

import matplotlib
import matplotlib.patheffects
import matplotlib.style
import numpy as np
import pytest
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font
from matplotlib.text import Text

import gemma_nb as gnb
from gemma_nb.plots.colors import contrast, legible
from tests.plots import conftest as make
from tests.plots.drawing import overflows, pixels, texts, unreadable

# Each of these changed what some picture said, hid a part of it or made it unreadable, when it was
# set before or after the picture was made.
ADVERSE = {
    **{"image.origin": "lower", "image.interpolation": "bilinear", "image.aspect": "equal"},
    **{"image.cmap": "jet", "axes.grid": True, "axes.grid.which": "both", "grid.linewidth": 4.0},
    **{"axes.axisbelow": False, "axes.xmargin": -0.4, "axes.ymargin": -0.4},
    **{"axes.autolimit_mode": "round_numbers", "axes.titlelocation": "right"},
    **{"axes.titlesize": 30, "axes.labelsize": 30, "axes.titlecolor": "white"},
    **{"axes.labelcolor": "white", "axes.prop_cycle": cycler(color=["white"])},
    **{"axes.formatter.use_mathtext": True, "axes.formatter.limits": (-1, 1)},
    **{"axes.formatter.useoffset": True, "axes.formatter.offset_threshold": 1},
    **{f"axes.spines.{side}": False for side in ("left", "bottom")},
    **{f"xtick.{name}": False for name in ("bottom", "labelbottom")},
    **{f"xtick.{name}": True for name in ("top", "labeltop", "minor.visible")},
    **{"xtick.direction": "in", "xtick.alignment": "left", "xtick.labelcolor": "white"},
    **{f"ytick.{name}": False for name in ("left", "labelleft")},
    **{f"ytick.{name}": True for name in ("right", "labelright", "minor.visible")},
    **{"ytick.alignment": "top", "ytick.labelcolor": "white", "ytick.labelsize": 30},
    **{"xaxis.labellocation": "right", "yaxis.labellocation": "top", "font.size": 30.0},
    **{"figure.constrained_layout.use": True, "figure.autolayout": False},
    **{"figure.frameon": False, "hatch.color": "white"},
    **{"lines.marker": "o", "lines.linestyle": "none", "lines.linewidth": 9.0},
    **{"patch.force_edgecolor": True, "patch.edgecolor": "red", "scatter.marker": "x"},
    **{"legend.loc": "center", "legend.labelcolor": "white", "legend.fontsize": 30},
    **{"legend.frameon": True, "legend.handlelength": 9.0, "mathtext.fontset": "cm"},
    **{"path.sketch": (3, 100, 2), "text.parse_math": True},
    "path.effects": [matplotlib.patheffects.withStroke(linewidth=4, foreground="white")],
}
TEX = {"text.usetex": True}  # TeX itself need not be here: nothing is given to it
LITERAL = {"text.parse_math": False}

plots = gnb.plots
ATTENTION = make.make_attention(5)
LENS = make.make_lens(5, layers=3)
HALF = LENS.assign(probability=LENS.probability.where(LENS.position > 0))
COMPONENTS = make.make_attribution(5, layers=3)
COMPONENTS["component"] = [rf"$\alpha_{i}$ 5% {{x}}" for i in range(7)]

DRAW = {
    "attention": lambda ax: plots.attention(ATTENTION, 2, 0, ax=ax, hide_bos=True, highlight=3),
    "many cells": lambda ax: plots.attention(make.make_attention(70), 0, 1, ax=ax),
    "grid": lambda ax: plots.attention_grid(ATTENTION, ax=ax),
    "lines": lambda ax: plots.attention_lines(ATTENTION, 0, 1, ax=ax),
    "lens": lambda ax: plots.logit_lens(HALF, ax=ax),
    "norms": lambda ax: plots.residual_norms(make.make_norms(5, layers=3), ax=ax),
    "ranks": lambda ax: plots.token_probabilities(make.make_statistics(8), by="rank", ax=ax),
    "bars": lambda ax: plots.attribution_bars(COMPONENTS, ax=ax),
    "patching": lambda ax: plots.patching(make.make_sweep(5, "layer", "head", layers=3), ax=ax),
    "heads": lambda ax: plots.head_statistics(make.make_head_statistics(layers=8), ax=ax),
}


@pytest.fixture(autouse=True)
def settings_of_my_own():
    """matplotlib's defaults before a test, and again afterwards."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph or family is one
        matplotlib.rcdefaults()
        yield


def axes(size: tuple[float, float] = (9, 8)):
    """Axes of the user's, made under the settings there are."""
    return Figure(figsize=size).add_subplot()


def drawn_in(ax, plot: str) -> Figure:
    """The figure of the user's axes that a plot drew in."""
    assert DRAW[plot](ax) is ax
    return ax.figure


@pytest.mark.parametrize("plot", DRAW)
def test_settings_that_would_change_its_meaning_change_nothing(plot) -> None:
    """Pixel by pixel, whether they are set when it is made, when it is drawn, or both."""
    figure = DRAW[plot](None)
    image = pixels(figure)
    matplotlib.rcParams.update({**ADVERSE, **TEX})
    assert np.array_equal(pixels(figure), image)
    figure = DRAW[plot](None)
    assert np.array_equal(pixels(figure), image)
    assert (matplotlib.rcParams["image.origin"], matplotlib.rcParams["image.cmap"]) == (
        *("lower", "jet"),
    )
    matplotlib.rcdefaults()
    assert np.array_equal(pixels(figure), image)


@pytest.mark.parametrize("plot", DRAW)
def test_axes_that_the_settings_had_made_say_the_same(plot) -> None:
    expected = drawn_in(axes(), plot)
    matplotlib.rcParams.update({**ADVERSE, **TEX, **LITERAL})
    figure = drawn_in(axes(), plot)
    assert texts(figure).split() == texts(expected).split()  # lines may break elsewhere
    labels = [t for t in figure.findobj(Text) if t.get_text()]
    assert not any(t.get_usetex() or t.get_parse_math() for t in labels)
    assert not any(t.get_path_effects() or t.get_sketch_params() for t in labels)
    mine = figure.axes[0]
    assert mine.get_xlim() == pytest.approx(expected.axes[0].get_xlim())
    assert mine.get_ylim() == pytest.approx(expected.axes[0].get_ylim())
    for axis in (mine.xaxis, mine.yaxis):
        ticks = axis.get_major_ticks()
        assert any(t.label1.get_visible() or t.label2.get_visible() for t in ticks) or not ticks
        if plot not in ("norms", "bars", "heads"):  # whose lines are their own
            assert not any(t.gridline.get_visible() for t in ticks)
    assert unreadable(figure) == []


@pytest.mark.parametrize("length", [5, 70], ids=["rectangles", "an image"])
def test_the_first_token_is_at_the_top_left(length) -> None:
    matplotlib.rcParams["image.origin"] = "lower"
    maps = make.make_attention(length)
    maps[...] = 0.0
    maps[2, 0, -1, 0] = 1.0  # the last query looks at the first key
    ax = axes()
    ax.invert_yaxis()
    ax.invert_xaxis()
    image = pixels(plots.attention(maps, 2, 0, ax=ax).figure, 100.0)
    for key, query in ((0, length - 1), (1, length - 1), (0, length // 2)):
        x, y = ax.transData.transform((key, query))
        color = image[len(image) - 1 - int(y), int(x)]
        assert (color[:3].sum() < 1.2) == ((key, query) == (0, length - 1))
    assert ax.transAxes.inverted().transform(ax.transData.transform((0, 0)))[1] > 0.85


# --- what is behind the labels


FACES = ("axes.facecolor", "figure.facecolor", "savefig.facecolor", "text.color", "font.family")


def styles() -> list[str]:
    """Those that differ in what is followed; the others share their faces and fonts."""
    library = matplotlib.style.library
    different = {
        str([library[name].get(key) for key in FACES]): name for name in matplotlib.style.available
    }
    return sorted(different.values())


@pytest.mark.parametrize("style", styles())
def test_labels_can_be_read_in_every_style(style) -> None:
    """Of pictures made in the style, and of those that it only saves, maybe on another face."""
    before = DRAW["bars"](None)
    matplotlib.style.use(style)
    assert unreadable(drawn_in(axes(), "heads")) == []
    face = matplotlib.rcParams["savefig.facecolor"]
    before.set_facecolor("white" if face == "auto" else face)
    assert unreadable(before) == []


@pytest.mark.parametrize(
    ("inside", "around"),
    [("black", "none"), ("#777", "black"), ("none", "#005"), ("black", "w"), ("w", "#777")],
)
def test_labels_can_be_read_on_any_two_faces(inside, around) -> None:
    matplotlib.rcParams.update({"axes.facecolor": inside, "figure.facecolor": around})
    for name in ("lens", "bars"):
        assert unreadable(DRAW[name](None)) == []


def test_labels_in_the_colours_of_turns_can_be_read() -> None:
    maps = make.make_attention(20)
    assert unreadable(plots.attention(maps, 2, 0, columns="turns")) == []


def test_a_colour_for_text_is_followed_where_it_can_be_read() -> None:
    matplotlib.rcParams["text.color"] = "navy"
    figure = DRAW["heads"](None)
    assert figure.axes[0].xaxis.label.get_color() == "#000080"
    figure.set_facecolor("black")
    assert unreadable(figure) == []


def test_files_on_another_face_can_be_read() -> None:
    figure = DRAW["norms"](None)
    light = [t.get_color() for t in figure.axes[0].get_yticklabels()]
    for given, rc in (("black", "auto"), (None, "black")):
        with matplotlib.rc_context({"savefig.facecolor": rc}):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", **({"facecolor": given} if given else {}))
        dark = [t.get_color() for t in figure.axes[0].get_yticklabels()]
        assert contrast(dark[0], "black") >= 4.5 > contrast(light[0], "black")
    figure.savefig(io.BytesIO(), format="svg", transparent=True)
    pixels(figure)
    assert [t.get_color() for t in figure.axes[0].get_yticklabels()] == light


def test_a_transparent_dark_picture_keeps_its_light_labels() -> None:
    matplotlib.style.use("dark_background")
    figure = DRAW["bars"](None)
    pixels(figure)
    figure.patch.set_alpha(0.0)
    assert unreadable(figure, paper=0.0) == []


def test_a_colour_that_somebody_gives_a_label_stays() -> None:
    figure = DRAW["norms"](None)
    figure.axes[0].xaxis.label.set_color("red")
    pixels(figure)
    assert figure.axes[0].xaxis.label.get_color() == "red"


def test_a_picture_that_was_pickled_is_the_same() -> None:
    figure = DRAW["bars"](None)
    image = pixels(figure)
    again = pickle.loads(pickle.dumps(figure))
    assert np.array_equal(pixels(again), image)
    again.set_facecolor("black")
    assert unreadable(again) == []


@pytest.mark.parametrize("color", ["#E69F00", "#009E73", "#CC79A7", "#882255"])
@pytest.mark.parametrize("face", ["white", "black", "#777777", "#ffff00"])
def test_colours_of_labels_move_no_farther_than_they_must(color, face) -> None:
    moved = legible(color, face)
    assert contrast(moved, face) >= 3.0
    assert moved == color.lower() or contrast(moved, face) < 4.0


# --- text


TOKENS = ("$x$", "$$", "_", "a_b", r"\alpha", "%", "{", "}", "x^2", r"\$", "~", "#", "&amp;", "<b>")


@pytest.mark.parametrize(("settings", "own"), [({}, False), (TEX, False), (LITERAL, True)])
def test_no_token_is_read_as_markup(settings, own) -> None:
    """In the SVG stands what was said, letter by letter."""
    matplotlib.rcParams.update({**settings, "svg.fonttype": "none"})
    statistics = make.make_statistics(len(TOKENS))
    statistics["token"] = ("position", list(TOKENS))
    maps = make.make_attention(len(TOKENS)).assign_coords(
        {f"{dim}_token": (dim, list(TOKENS)) for dim in ("query", "key")}
    )
    for drawn in (
        plots.token_probabilities(statistics, ax=None if own else axes()),
        plots.attention(maps, 2, 0, ax=None if own else axes()),
    ):
        figure = drawn if own else drawn.figure
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        for token in TOKENS:
            escaped = token.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            assert f">{escaped}<" in buffer.getvalue()


@pytest.mark.parametrize(
    ("family", "drawn"),
    [
        ("DejaVu Serif", "DejaVu Serif"),
        (["no such family", "STIXGeneral"], "STIXGeneral"),
        ("monospace", "DejaVu Sans Mono"),
        ("no such family", "DejaVu Sans"),
        ("cmr10", "DejaVu Sans"),  # has a "¡" where "<" should be
        ("STIXSizeOneSym", "DejaVu Sans"),  # has no letters at all
    ],
)
def test_font_families_are_followed_where_they_can_be_read(family, drawn) -> None:
    matplotlib.rcParams["font.family"] = family
    for name in ("attention", "bars"):
        figure = DRAW[name](None)
        paths = {t.get_fontproperties() for t in figure.findobj(Text) if t.get_text()}
        faces = {
            get_font(matplotlib.font_manager.findfont(p, fallback_to_default=False)).family_name
            for p in paths
        }
        assert faces == {drawn}
        assert overflows(figure) == []


def test_weight_and_resolution_are_followed() -> None:
    matplotlib.rcParams.update({"font.weight": "bold", "figure.dpi": 240})
    figure = DRAW["heads"](None)
    assert {t.get_weight() for t in figure.axes[0].get_xticklabels()} == {"bold"}
    assert figure.dpi == 240
    large = len(figure._repr_png_())
    matplotlib.rcParams["figure.dpi"] = 100
    assert large > 1.4 * len(DRAW["heads"](None)._repr_png_())


def test_faces_are_followed() -> None:
    matplotlib.rcParams.update({"axes.facecolor": "#123", "figure.facecolor": "#fed"})
    figure = DRAW["attention"](None)
    image = pixels(figure)
    np.testing.assert_allclose(image[0, 0, :3], np.array([0xFF, 0xEE, 0xDD]) / 255, atol=0.01)
    assert matplotlib.colors.to_hex(figure.axes[0].get_facecolor()) == "#112233"


def test_labels_of_logarithmic_axes_are_numbers() -> None:
    labels = [t.get_text() for t in DRAW["norms"](None).axes[0].get_yticklabels()]
    assert "1,000" in labels
    assert not any("$" in label for label in labels)
