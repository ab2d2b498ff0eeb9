"""Strips: what is drawn is the data, and nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

import gemma_nb as gnb
from gemma_nb.plots.labels import drawable
from tests.plots import conftest as make
from tests.plots.drawing import (
    bar_of,
    drawn,
    notes,
    overflows,
    save,
    written,
)

P = gnb.plots


# --- strips


@pytest.mark.parametrize("by", ["probability", "surprisal", "entropy", "rank"])
def test_strips_color_every_token_by_its_number(length, by):
    turn = make.make_turn(length)
    axes = P.token_probabilities(turn, by=by).axes[0]
    numbers = {
        "probability": [np.exp(t.logprob) for t in turn.tokens],
        "surprisal": [-t.logprob for t in turn.tokens],
        "entropy": [t.entropy for t in turn.tokens],
        "rank": [t.rank + 1 for t in turn.tokens],
    }[by]
    if length > 500:
        np.testing.assert_allclose(drawn(axes).compressed(), numbers, rtol=1e-12)
        assert "100 tokens on a line" in notes(axes)
        return
    mesh = bar_of(axes)
    low, high = mesh.norm.vmin, mesh.norm.vmax
    assert (low, high) == (by == "rank", 1.0 if by == "probability" else max(numbers))
    boxes = axes.collections[0].get_facecolors()
    np.testing.assert_allclose(boxes, mesh.cmap(mesh.norm(np.array(numbers, float))))
    assert isinstance(mesh.norm, LogNorm) == (by == "rank")
    shown = [t.strip("\u2068\u2069") for t in written(axes)]
    assert shown == [drawable(t.piece, 40) for t in turn.tokens]


def test_strips_of_texts_leave_the_first_token_open():
    statistics = make.make_statistics(60)
    axes = P.token_probabilities(statistics, by="rank", stop=20).axes[0]
    assert len(written(axes)) == 20
    assert axes.collections[0].get_facecolors()[0][3] == 0
    assert "without colour: the first token, which nothing predicts" in notes(axes)
    with pytest.raises(ValueError, match="by must be one of"):
        P.token_probabilities(statistics, by="colour")
    with pytest.raises(ValueError, match="no token lies"):
        P.token_probabilities(statistics, start=60)


def test_strips_of_signed_numbers_have_zero_in_the_middle():
    values = make.make_token_attribution(60)
    axes = P.token_strip(values).axes[0]
    mesh = bar_of(axes)
    assert mesh.norm.vmin == -mesh.norm.vmax == -float(np.abs(values).max())
    positive = P.token_strip(abs(values), vmax=2.0).axes[0]
    mesh = bar_of(positive)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 2)
    with pytest.raises(ValueError, match="one number per token"):
        P.token_strip(make.make_attribution(5))


def test_short_texts_have_no_wide_strip():
    figure = P.token_probabilities(make.make_statistics(3))
    assert figure.get_size_inches()[0] < 5
    assert overflows(figure) == []


def test_ticks_of_small_numbers_do_not_touch():
    figure = P.token_strip(make.make_token_attribution(5) * 1e-3)
    figure.draw_without_rendering()
    labels = figure.axes[0].child_axes[0].get_xticklabels()
    boxes = sorted((b.x0, b.x1) for b in (t.get_window_extent() for t in labels if t.get_text()))
    assert all(a[1] < b[0] for a, b in itertools.pairwise(boxes))


def test_strips_wrap_inside_their_axes():
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    assert P.token_probabilities(make.make_turn(60), ax=axes) is axes
    left, right = axes.get_xlim()
    for text in axes.texts:
        assert left <= text.get_position()[0] <= right
    save(figure)


def test_user_turns_have_no_strip():
    from gemma_nb.chat.turns import Turn

    with pytest.raises(ValueError, match="reply of the model"):
        P.token_probabilities(Turn(id=1, role="user", text="Hello"))
