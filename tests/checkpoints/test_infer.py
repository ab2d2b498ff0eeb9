from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from gemma_nb import presets
from gemma_nb.checkpoints import infer, layout
from gemma_nb.config import Global, LayerSpec
from gemma_nb.errors import CheckpointError
from tests.checkpoints import tiny, written


def shapes(config):
    """A tree without weights."""
    return layout.nest(
        (leaf.path, jax.ShapeDtypeStruct(leaf.shape, np.float32)) for leaf in layout.leaves(config)
    )


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_released_size_is_told_by_its_shapes(name):
    config = presets.PRESETS[name]
    assert infer.config_of(shapes(config)) == config
    assert infer.config_of(layout.released(shapes(config))) == config


def test_a_vocabulary_without_its_padding_is_kept_as_it_is():
    bare = dataclasses.replace(presets.GEMMA3_1B, num_embed=presets.GEMMA3_1B.num_embed - 128)
    assert infer.config_of(shapes(bare)) == bare


def test_the_layout_of_the_gating_weights_is_read_from_their_shape():
    other = dataclasses.replace(presets.GEMMA3_1B, transpose_gating_einsum=False)
    assert infer.config_of(shapes(other)) == other


UNSEEN = {
    "layers": tiny.CONFIG.layers,
    "query_pre_attn_scalar": 32.0,
    "attn_logits_soft_cap": None,
    "final_logit_soft_cap": None,
}


def test_an_unreleased_size_needs_what_no_shape_tells():
    known = dict(UNSEEN)
    while known:
        field = next(iter(known))
        del known[field]
        with pytest.raises(CheckpointError, match=f"no released size .* do not tell .*{field}"):
            infer.config_of(shapes(tiny.CONFIG), **known)
    config = infer.config_of(shapes(tiny.CONFIG), **UNSEEN, max_context=tiny.CONFIG.max_context)
    assert config == tiny.CONFIG


def test_a_square_feed_forward_leaves_its_layout_open():
    square = dataclasses.replace(tiny.CONFIG, hidden_dim=tiny.CONFIG.embed_dim)
    with pytest.raises(CheckpointError, match="do not tell transpose_gating_einsum"):
        infer.config_of(shapes(square), **UNSEEN)
    config = infer.config_of(shapes(square), **UNSEEN, transpose_gating_einsum=False)
    assert not config.transpose_gating_einsum


def test_two_sizes_of_the_same_shapes_are_named(monkeypatch):
    other = dataclasses.replace(presets.GEMMA3_1B, query_pre_attn_scalar=128.0)
    table = {"gemma3-1b": presets.GEMMA3_1B, "other-1b": other, "again-1b": other}
    monkeypatch.setattr(presets, "PRESETS", table)
    with pytest.raises(CheckpointError, match="of gemma3-1b and other-1b and again-1b, which diff"):
        infer.config_of(shapes(other))
    assert infer.config_of(shapes(other), query_pre_attn_scalar=128.0) == other


def test_overrides_win_over_the_released_size_but_not_over_shapes():
    layers = (LayerSpec(Global()),) * 26
    config = infer.config_of(shapes(presets.GEMMA3_1B), layers=layers)
    assert config == dataclasses.replace(presets.GEMMA3_1B, layers=layers)
    with pytest.raises(CheckpointError, match="head_dim=128 was given, the shapes say 256"):
        infer.config_of(shapes(presets.GEMMA3_1B), head_dim=128)
    with pytest.raises(CheckpointError, match="25 layers were given, the names say 26"):
        infer.config_of(shapes(presets.GEMMA3_1B), layers=layers[1:])
    with pytest.raises(TypeError, match="no such field of TransformerConfig: widow"):
        infer.config_of(shapes(presets.GEMMA3_1B), widow=3)


def without(path):
    return lambda flat: {k: v for k, v in flat.items() if k != path}


def with_extra(path):
    return lambda flat: {**flat, path: np.zeros(2)}


EMBEDDING = ("embedder", "input_embedding")
LINEAR = ("layer_1", "mlp", "linear")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(EMBEDDING), "embedder/input_embedding is missing"),
        (without(LINEAR), r"layer_1/mlp/linear \(64, 32\) is missing"),
        (lambda flat: {k: v for k, v in flat.items() if k[0] != "layer_0"}, "layer_0 is missing"),
        (lambda flat: {}, "layer_0 is missing"),
        (lambda flat: {**flat, EMBEDDING: np.zeros(3)}, "expected 2 axes, got shape"),
        (lambda flat: {**flat, LINEAR: np.zeros((3, 4))}, r"expected shape \(64, 32\), got \(3, 4"),
        (with_extra(("layer_0", "attn", "q_einsum", "lora")), "belongs to no Gemma 1, 2 or 3"),
        (with_extra(("layer_0", "per_layer_input_gate", "w")), "shows Gemma 3n or 4"),
        (with_extra(("altup_projection_0",)), "shows Gemma 3n, which is not supported"),
        (with_extra(("layer_0", "moe", "router")), "shows Gemma 4, which is not supported"),
        (lambda flat: {**flat, LINEAR: 3.0}, "layer_1/mlp/linear is float, expected an array"),
        (with_extra(("transformer", *LINEAR)), "layer_1/mlp/linear is there twice"),
        (lambda flat: {**flat, (1,): np.zeros(2)}, r"\(1,\) is not a name of a parameter"),
    ],
)
def test_trees_of_other_models_are_refused(change, message):
    tree = layout.nest(change(layout.flatten(written.params())))
    with pytest.raises(CheckpointError, match=message) as error:
        infer.config_of(tree, name="my checkpoint", **UNSEEN)
    assert str(error.value).startswith("my checkpoint: ")


def test_a_configuration_survives_json():
    for config in (tiny.CONFIG, *presets.PRESETS.values()):
        assert infer.from_json(json.loads(json.dumps(infer.to_json(config))), "x") == config


@pytest.mark.parametrize(
    "fields",
    [None, [], {}, {"layers": 3}, {"layers": [{}]}, {"layers": [], "num_embed": "many"}],
)
def test_a_stored_configuration_that_is_none_is_refused(fields):
    with pytest.raises(CheckpointError, match=r"x: the stored configuration cannot be read"):
        infer.from_json(fields, "x")
