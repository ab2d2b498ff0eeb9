from __future__ import annotations

import numpy as np
import pytest

from gemma_nb.widgets import heatmap


def causal(length: int, layers: int = 2, heads: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    weights = np.tril(rng.exponential(size=(layers, heads, length, length)))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def test_quantising_loses_less_than_a_step() -> None:
    weights = np.linspace(0, 1, 1001)
    back = (heatmap.quantise(weights) / 255) ** 2
    np.testing.assert_allclose(back, weights, atol=0.004)
    small = np.linspace(0, 0.01, 100)
    np.testing.assert_allclose((heatmap.quantise(small) / 255) ** 2, small, atol=0.0005)


@pytest.mark.parametrize("row", [None, 299, 299 - 39])
def test_the_window_is_the_end_when_the_row_is_there(row: int | None) -> None:
    assert heatmap.window_for(300, row, limit=40) == heatmap.Window(260, 300)


@pytest.mark.parametrize("row", [0, 5, 100, 259])
def test_the_window_moves_to_an_earlier_row(row: int) -> None:
    window = heatmap.window_for(300, row, limit=40)
    assert window.size == 40
    assert window.first <= row < window.last
    assert window.first >= 0


def test_short_contexts_are_shown_whole() -> None:
    assert heatmap.window_for(7, None) == heatmap.Window(0, 7)


def test_what_is_cropped_away_is_summed() -> None:
    maps = causal(30)[0, 0]
    window = heatmap.Window(20, 30)
    inside, before = heatmap.crop(maps, window, hide_first=False)
    shown = np.frombuffer(inside, np.uint8).reshape(10, 10)
    np.testing.assert_array_equal(shown, heatmap.quantise(maps[20:, 20:]))
    total = (np.frombuffer(before, np.uint8) / 255) ** 2 + ((shown / 255) ** 2).sum(1)
    np.testing.assert_allclose(total, 1, atol=0.03)
    _, without = heatmap.crop(maps, window, hide_first=True)
    np.testing.assert_array_equal(
        np.frombuffer(without, np.uint8), heatmap.quantise(maps[20:, 1:20].sum(1))
    )


def test_hiding_the_sink_leaves_the_trace_alone() -> None:
    maps = causal(8)[0, 0]
    kept = maps.copy()
    inside, _ = heatmap.crop(maps, heatmap.Window(0, 8), hide_first=True)
    assert not np.frombuffer(inside, np.uint8).reshape(8, 8)[:, 0].any()
    np.testing.assert_array_equal(maps, kept)


@pytest.mark.parametrize("length", [5, 32, 33, 100])
def test_thumbnails_keep_the_strongest_weight_of_every_block(length: int) -> None:
    attention = causal(length)
    data, side = heatmap.thumbnails(attention, hide_first=False)
    small = np.frombuffer(data, np.uint8).reshape(2, 3, side, side)
    assert side == min(32, length)
    np.testing.assert_array_equal(small.max((2, 3)), heatmap.quantise(attention.max((2, 3))))
    if length <= 32:
        np.testing.assert_array_equal(small, heatmap.quantise(attention))
    hidden, _ = heatmap.thumbnails(attention, hide_first=True)
    if length <= 32:
        assert not np.frombuffer(hidden, np.uint8).reshape(2, 3, side, side)[..., 0].any()


def test_the_strongest_keys_of_a_row() -> None:
    row = np.array([0.5, 0.1, 0.3, 0.1, 0.0], np.float32)
    assert heatmap.strongest(row, 3, 2, hide_first=False) == [0, 2]
    assert heatmap.strongest(row, 3, 9, hide_first=True)[0] == 2
    assert len(heatmap.strongest(row, 3, 9, hide_first=True)) == 3
