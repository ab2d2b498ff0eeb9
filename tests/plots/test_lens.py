"""Lens and curves: what is drawn is the data, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.plots.labels import drawable
from tests.plots import conftest as make
from tests.plots.drawing import (
    drawn,
    largest_of_each,
    notes,
    texts,
    written,
)

P = gnb.plots


# --- the lens


def test_lens_shows_tokens_and_probabilities(length):
    lens = make.make_lens(length)
    figure = P.logit_lens(lens)
    axes = figure.axes[0]
    values = lens.probability.isel(rank=0).transpose("position", "layer").values
    words = lens.token.isel(rank=0).transpose("position", "layer").values
    if length <= 64:
        np.testing.assert_array_equal(drawn(axes), values.ravel())
        assert written(axes) == [drawable(w, 8) for w in words.ravel()]
        assert [t.get_text() for t in axes.get_yticklabels()] == [
            drawable(w) for w in lens.input_token.values
        ]
    else:
        np.testing.assert_array_equal(drawn(axes), largest_of_each(values, 4))
        assert written(axes) == []
        assert "the largest of each 4 tokens" in texts(figure)
    colored = next(a for a in [*axes.images, *axes.collections] if a.get_array() is not None)
    assert colored.get_clim() == (0, 1)
    assert [t.get_text() for t in axes.get_xticklabels()] == [str(i) for i in range(18)]
    assert axes.get_xticklabels()[4].get_color() != axes.get_xticklabels()[5].get_color()
    assert "local, window 512" in notes(axes)
    assert "global" in notes(axes)


def test_lens_frames_what_does_follow():
    lens = make.make_lens(60)
    axes = P.logit_lens(lens).axes[0]
    words = lens.token.isel(rank=0).transpose("position", "layer").values[:-1]
    hits = np.argwhere(words == lens.input_token.values[1:, None])
    frames = {(round(p.get_y() + 0.45), round(p.get_x() + 0.47)) for p in axes.patches}
    assert frames == set(map(tuple, hits.tolist()))
    assert "the token that follows in the text" in notes(axes)


def test_lens_leaves_rows_of_positions_that_it_has_not_empty():
    lens = make.make_lens(60)
    gaps = lens.isel(position=[0, 1, 20])
    axes = P.logit_lens(gaps).axes[0]
    values = gaps.probability.isel(rank=0).transpose("position", "layer").values
    np.testing.assert_array_equal(drawn(axes), values.ravel())
    (cells,) = axes.collections
    middles = {round(path.vertices[:4, 1].mean()) for path in cells.get_paths()}
    assert middles == {0, 1, 20}
    # Framed is what follows in the text, not in the picture.
    words = gaps.token.isel(rank=0).transpose("position", "layer").values
    hits = np.flatnonzero(words[0] == gaps.input_token.values[1])
    assert len(axes.patches) == len(hits)


@pytest.mark.parametrize("value", ["logprob", "logit", "entropy", "kl"])
def test_lens_in_other_numbers(value):
    lens = make.make_lens(5)
    axes = P.logit_lens(lens, value=value, rank=1, start=1, stop=4).axes[0]
    numbers = lens[value].isel(position=slice(1, 4))
    numbers = numbers.isel(rank=1) if "rank" in numbers.dims else numbers
    np.testing.assert_array_equal(
        drawn(axes), numbers.transpose("position", "layer").values.ravel()
    )
    assert "prediction 2" in axes.get_title("left")
    low, high = axes.collections[0].get_clim()
    assert (low == 0) == (value in ("entropy", "kl"))
    assert (high == 0) == (value == "logprob")


def test_lens_watches_a_token():
    lens = make.make_lens(5)
    by_text, by_id = (P.logit_lens(lens, watch=w).axes[0] for w in ("日", 9))
    ranks = lens.watched_rank.isel(watched=1).transpose("position", "layer").values + 1
    assert written(by_text) == written(by_id) == [str(r) for r in ranks.ravel()]
    logprobs = lens.watched_logprob.isel(watched=1).transpose("position", "layer").values
    np.testing.assert_array_equal(drawn(by_text), logprobs.ravel())


def test_far_values_share_a_colour_and_the_bar_says_so():
    lens = make.make_lens(5)
    lens["kl"][0], lens["watched_logprob"][0] = 430.0, -430.0
    for kwargs, range_, end in (
        ({"value": "kl"}, (0, 25), "max"),
        ({"watch": 9}, (-25, 0), "min"),
        ({"watch": 9, "vmin": -50.0}, (-50, 0), "min"),
        ({"value": "kl", "vmax": 500.0}, (0, 500), "neither"),
        ({"value": "entropy"}, (0, float(lens.entropy.max())), "neither"),
    ):
        axes = P.logit_lens(lens, **kwargs).axes[0]
        mesh = next(c for c in axes.collections if c.get_array() is not None)
        assert mesh.get_clim() == range_
        assert mesh.colorbar.extend == end


def test_words_stay_inside_their_cells():
    lens = make.make_lens(5)
    lens["token"][:] = "\u2014" * 8
    figure = P.logit_lens(lens)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    cell = axes.get_window_extent().width / lens.sizes["layer"]
    assert all(text.get_window_extent().width <= cell for text in axes.texts)


def test_flat_curves_are_below_the_edge():
    lens = make.make_lens(5)
    lens["entropy"][:] = 5.5
    assert P.entropy_curves(lens).axes[0].get_ylim() == (0, pytest.approx(5.775))


def test_lens_refuses_what_is_not_there():
    lens = make.make_lens(5)
    for kwargs, message in (
        ({"value": "colour"}, "'probability', 'logprob'"),
        ({"rank": 3}, "the lens has ranks 0 to 2"),
        ({"start": 5}, "no position"),
        ({"watch": " dog"}, "watch="),
    ):
        with pytest.raises(ValueError, match=message):
            P.logit_lens(lens, **kwargs)


# --- curves


def test_curves_of_few_positions_are_one_by_one():
    lens = make.make_lens(60)
    axes = P.entropy_curves(lens, positions=[0, 7, 30]).axes[0]
    curves = [line for line in axes.lines if line.get_gid() is None]
    for line, position in zip(curves, (0, 7, 30), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), lens.entropy.sel(position=position))
    assert "after 30" in notes(axes)
    ticks = next(line for line in axes.lines if line.get_gid() == "global layers")
    assert list(ticks.get_xdata()) == [5, 11, 17]
    with pytest.raises(ValueError, match="positions \\[60\\]"):
        P.entropy_curves(lens, positions=[60])
    with pytest.raises(ValueError, match="'entropy', 'kl'"):
        P.entropy_curves(lens, value="norm")


def test_curves_of_many_positions_are_medians_and_bands():
    lens = make.make_lens(60)
    axes = P.entropy_curves(lens, value="kl").axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), lens.kl.median("position"))
    assert "medians of 60 positions; bands: the middle 80%" in notes(axes)
    edges = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert edges.max() == pytest.approx(float(lens.kl.quantile(0.9, "position").max()))


def test_norms_tell_the_first_position_apart(length):
    norms = make.make_norms(length)
    axes = P.residual_norms(norms).axes[0]
    rest = norms.isel(position=slice(1, None))
    for i, name in enumerate(("residual", "attn_out", "mlp_out")):
        median, first = axes.lines[2 * i : 2 * i + 2]
        np.testing.assert_allclose(median.get_ydata(), rest[name].median("position"), rtol=1e-6)
        np.testing.assert_array_equal(first.get_ydata(), norms[name].isel(position=0))
    assert axes.get_yscale() == "log"
    assert "the same at position 0" in notes(axes)
    hidden = P.residual_norms(norms, hide_bos=True).axes[0]
    assert "position 0 is left out" in notes(hidden)
    assert len(hidden.lines) == len(axes.lines) - 3
