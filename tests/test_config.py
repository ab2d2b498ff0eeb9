"""Configurations that make no sense cannot be written."""

import dataclasses

import pytest

from gemma_nb import presets
from gemma_nb.config import Global, Sliding, interleave
from gemma_nb.sites import SITES, check_layers, site


def test_gemma3_interleaves_five_sliding_layers_and_a_global_one():
    kinds = [spec.kind for spec in presets.GEMMA3_270M.layers]
    assert [i for i, kind in enumerate(kinds) if kind == Global()] == [5, 11, 17]
    assert kinds[0] == Sliding(512)
    assert presets.GEMMA3_270M.layers[5].rope_base == 1e6
    assert presets.GEMMA3_270M.layers[4].rope_base == 1e4


def test_only_the_larger_models_scale_global_rope():
    assert presets.GEMMA3_1B.layers[5].rope_scale == 1.0
    assert presets.GEMMA3_4B.layers[5].rope_scale == 8.0
    assert presets.GEMMA3_4B.layers[0].rope_scale == 1.0


def test_the_27b_scales_queries_by_width_per_head():
    assert presets.GEMMA3_27B.query_pre_attn_scalar == 5376 / 32
    assert presets.GEMMA3_12B.query_pre_attn_scalar == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"head_dim": 7}, "even"),
        ({"layers": ()}, "at least one"),
        ({"embed_dim": 0}, "embed_dim must be at least 1"),
    ],
)
def test_impossible_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(presets.GEMMA3_270M, **change)


def test_a_window_holds_at_least_one_position():
    with pytest.raises(ValueError, match="at least 1 position"):
        interleave(2, window=0)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="gemma3-270m, gemma3-1b"):
        presets.by_name("gemma3-2b")
    with pytest.raises(ValueError, match="attention"):
        site("attn_probs")
    assert site("attention") is SITES["attention"]


def test_layers_are_checked_and_sorted():
    assert check_layers(None, 3) == (0, 1, 2)
    assert check_layers(-1, 3) == (2,)
    assert check_layers([2, 0, 2], 3) == (0, 2)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        check_layers([3], 3)
    with pytest.raises(ValueError, match="empty"):
        check_layers([], 3)
