"""Labels in any script, and colours that mean what they seem to mean."""

from __future__ import annotations

import io
import warnings

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

import gemma_nb as gnb
from gemma_nb.plots.colors import HIDDEN, OTHER, ROLES, diverging, sequential, text_on
from gemma_nb.plots.labels import drawable, families, isolated
from gemma_nb.plots.tokens import Tokens, nice_step
from tests.plots import conftest as make


def render(text: str) -> None:
    figure = Figure(figsize=(2, 1))
    figure.text(0.1, 0.5, text, fontfamily=families([text]), parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png")
        figure.savefig(io.BytesIO(), format="svg")


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        (" the\n", "·the⏎"),
        ("\t", "⇥"),
        ("$x$", "$x$"),
        ("", "∅"),
        ("\ue000", "U+E000"),
        ("\ue000\ue001", "U+E000 U+E001"),
        ("\ue000\ue001\ue002", "U+E000 …"),  # a code is never cut
        ("a\ue000b", "aU+E000b"),
        ("\u200f", "U+200F"),  # it would turn its neighbours around unseen
        ("<0xE4>", "<0xE4>"),
        ("a" * 40, "a" * 13 + "…"),
        ("e\u0301" * 20, "e\u0301" * 13 + "…"),  # neither is a letter with its mark
        ("مرحبا", "مرحبا"),
        ("שלום", "שלום"),
    ],
)
def test_labels_can_be_drawn(label, shown):
    assert drawable(label) == shown
    render(drawable(label))


@pytest.mark.parametrize("label", ["日本語", "한국어", "नमस्ते", "ไทย", "🤖", "👩‍👩‍👧", "🇩🇪"])
def test_characters_without_a_font_are_code_points(label):
    """With a font for them installed, they are themselves."""
    shown = drawable(label, 60)
    assert shown == label or f"U+{ord(label[0]):04X}" in shown
    render(shown)


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.text(max_size=8))
def test_any_text_is_drawn_without_warnings(text):
    shown = isolated(drawable(text))
    render(shown)  # fails on a warning
    assert shown.strip()  # there is something to see


def test_right_to_left_labels_leave_numbers_in_place():
    assert isolated("مرحبا") == "\u2068مرحبا\u2069"
    assert isolated("cat") == "cat"


def test_steps_are_round():
    assert [nice_step(n, 12) for n in (10, 13, 100, 240, 2000, 5000)] == [1, 2, 10, 20, 200, 500]


def test_spans_are_turns():
    roles = ("template", "user", "user", "model", "model", "model")
    tokens = Tokens(tuple("abcdef"), np.arange(6), roles, np.array([-1, 0, 0, 1, 1, 2]))
    assert [(s.name, s.first, s.last) for s in tokens.spans()] == [
        *(("template", 0, 1), ("user 0", 1, 3), ("model 1", 3, 5), ("model 2", 5, 6))
    ]
    assert Tokens(("a",), np.arange(1)).spans() == []


def test_template_tokens_share_a_column():
    maps = make.make_attention(60)
    roles, turns = maps.key_role.values.astype(object), maps.key_turn.values.copy()
    for at in (0, 24, 25):
        roles[at], turns[at] = "template", -1
    for dim in ("query", "key"):
        maps = maps.assign_coords({f"{dim}_role": (dim, roles), f"{dim}_turn": (dim, turns)})
    axes = gnb.plots.attention(maps, 2, 0, columns="turns").axes[0]
    names = [t.get_text() for t in axes.get_xticklabels()]
    assert names == ["system 0", "user 1", "model 2", "user 3", "model 4", "template"]


def test_a_turn_that_is_nothing_but_what_is_left_out_is_grey():
    maps = make.make_attention(60)
    roles, turns = maps.key_role.values.astype(object), maps.key_turn.values.copy()
    roles[0], turns[0] = "template", -1
    for dim in ("query", "key"):
        maps = maps.assign_coords({f"{dim}_role": (dim, roles), f"{dim}_turn": (dim, turns)})
    for layer, seen in ((2, 20), (0, 0)):  # a global layer, and one whose window is over
        figure = gnb.plots.attention(maps, layer, 0, columns="turns", hide_bos=True, start=40)
        grey = [p for p in figure.axes[0].patches if to_hex(p.get_facecolor()) == HIDDEN.lower()]
        assert [(p.get_xy(), p.get_height()) for p in grey] == [((4.5, 39.5), seen)]


# --- colours


def lab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) sRGB to CIELAB (D65)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
    xyz = linear @ np.array(to_xyz).T / [0.9505, 1.0, 1.0888]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear sRGB.
DEFICIENCIES = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def seen(rgb: np.ndarray, matrix) -> np.ndarray:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    dim = np.clip(linear @ np.array(matrix).T, 0, 1)
    return np.where(dim <= 0.0031308, 12.92 * dim, 1.055 * dim ** (1 / 2.4) - 0.055)


def colors(cmap) -> np.ndarray:
    return cmap(np.linspace(0, 1, 256))[:, :3]


def test_equal_steps_look_equal():
    steps = np.linalg.norm(np.diff(lab(colors(sequential())), axis=0), axis=1)
    assert steps.max() < 2 * steps.min()
    lightness = np.diff(lab(colors(sequential()))[:, 0])
    assert lightness.max() < 0
    assert lightness.min() / lightness.max() < 1.3
    half = np.linalg.norm(np.diff(lab(colors(diverging())), axis=0), axis=1)
    assert np.delete(half, 127).max() < 2.1 * np.delete(half, 127).min()


def test_both_directions_are_equally_dark():
    lightness = lab(colors(diverging()))[:, 0]
    np.testing.assert_allclose(lightness, lightness[::-1], atol=4)


@pytest.mark.parametrize("matrix", DEFICIENCIES.values(), ids=DEFICIENCIES)
def test_colour_blind_eyes_see_the_same(matrix):
    assert np.diff(lab(seen(colors(sequential()), matrix))[:, 0]).max() < 0
    both = lab(seen(colors(diverging()), matrix))
    assert np.diff(both[:128, 0]).min() > 0 > np.diff(both[128:, 0]).max()
    assert np.linalg.norm(both[0] - both[-1]) > 50
    roles = lab(seen(np.array([to_rgb(c) for c in (*ROLES.values(), OTHER)]), matrix))
    distances = np.linalg.norm(roles[:, None] - roles[None], axis=-1)
    assert distances[np.triu_indices(4, 1)].min() > 24


def test_letters_contrast_with_their_cells():
    assert text_on("white") == "black"
    assert text_on(sequential()(1.0)) == "white"
    for rgb in colors(sequential()):
        linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in rgb]
        back = float(np.dot(linear, [0.2126, 0.7152, 0.0722])) + 0.05
        assert max(back / 0.05, 1.05 / back) >= 4.5
        assert text_on(rgb) == ("black" if back / 0.05 > 1.05 / back else "white")


def test_public_plots_are_functions_whatever_was_imported_first():
    import importlib
    import pkgutil

    for module in pkgutil.iter_modules(gnb.plots.__path__):
        importlib.import_module(f"gemma_nb.plots.{module.name}")
        assert module.name not in gnb.plots.__all__
    for name in gnb.plots.__all__:
        assert callable(getattr(gnb.plots, name))
    assert dir(gnb.plots) == sorted(gnb.plots.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'heatmap3d'"):
        _ = gnb.plots.heatmap3d
