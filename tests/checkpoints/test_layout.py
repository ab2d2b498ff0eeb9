from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_nb.checkpoints import layout
from gemma_nb.config import LayerSpec, Sliding, TransformerConfig
from tests.checkpoints import tiny

GROUPED = TransformerConfig(
    num_embed=11,
    embed_dim=6,
    hidden_dim=10,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerSpec(Sliding(4)),) * 2,
    query_pre_attn_scalar=8.0,
)
CONFIGS = {
    "multi-query": tiny.CONFIG,
    "grouped": GROUPED,
    "one key head per query head": dataclasses.replace(GROUPED, num_kv_heads=4),
    "Gemma 2": dataclasses.replace(GROUPED, use_qk_norm=False),
    "Gemma 1": dataclasses.replace(
        GROUPED,
        use_qk_norm=False,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        transpose_gating_einsum=False,
    ),
}
both = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def random_params(config):
    rng = np.random.default_rng(0)
    matrices = {
        leaf.path: leaf.join([rng.normal(size=shape).astype(np.float32) for shape in leaf.shapes])
        for leaf in layout.leaves(config)
    }
    return layout.nest(matrices)


@both
def test_split_undoes_join(config):
    flat = layout.flatten(random_params(config))
    for leaf in layout.leaves(config):
        pieces = leaf.split(flat[leaf.path])
        assert tuple(piece.shape for piece in pieces) == leaf.shapes
        assert np.array_equal(leaf.join(pieces), flat[leaf.path])


@both
def test_no_tensor_is_named_twice_and_none_is_lost(config):
    params = random_params(config)
    size = sum(array.size for array in layout.flatten(params).values())
    for tensors in (layout.to_hf(params, config), layout.to_gguf(params, config)):
        assert sum(array.size for array in tensors.values()) == size


@both
def test_official_shapes(config):
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    d, f = config.embed_dim, config.hidden_dim
    layer = random_params(config)["layer_1"]
    shapes = {"/".join(p): a.shape for p, a in layout.flatten(layer["attn"]).items()}
    expected = {"attn_vec_einsum/w": (n, h, d)}
    if n == k:
        expected["qkv_einsum/w"] = (3, n, d, h)
    else:
        expected |= {"q_einsum/w": (n, d, h), "kv_einsum/w": (2, k, d, h)}
    if config.use_qk_norm:
        expected |= {"_query_norm/scale": (h,), "_key_norm/scale": (h,)}
    assert shapes == expected
    gating = (2, f, d) if config.transpose_gating_einsum else (2, d, f)
    assert layer["mlp"]["gating_einsum"].shape == gating
    assert layer["mlp"]["linear"].shape == (f, d)
    assert ("post_ffw_norm" in layer) == config.use_post_ffw_norm


def test_hugging_face_names_of_gemma_3():
    tensors = layout.to_hf(random_params(tiny.CONFIG), tiny.CONFIG)
    layer = {name.removeprefix("model.layers.1.") for name in tensors if ".layers.1." in name}
    assert layer == {
        *(f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        *(f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
        *("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"),
    }
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(tensors)


def test_gemma_1_calls_the_norm_before_its_feed_forward_post_attention():
    params = random_params(CONFIGS["Gemma 1"])
    tensors = layout.to_hf(params, CONFIGS["Gemma 1"])
    name = "model.layers.0.post_attention_layernorm.weight"
    assert np.array_equal(tensors[name], params["layer_0"]["pre_ffw_norm"]["scale"])


def test_norms_are_stored_as_one_plus_scale_in_gguf_only():
    params = random_params(tiny.CONFIG)
    scale = params["final_norm"]["scale"]
    assert np.array_equal(layout.to_hf(params, tiny.CONFIG)["model.norm.weight"], scale)
    assert np.array_equal(layout.to_gguf(params, tiny.CONFIG)["output_norm.weight"], scale + 1)


names = st.text("abc", min_size=1, max_size=3)


@settings(max_examples=30)
@given(tree=st.recursive(st.integers(), lambda leaves: st.dictionaries(names, leaves, min_size=1)))
def test_nest_undoes_flatten(tree):
    tree = {"root": tree}
    assert layout.nest(layout.flatten(tree)) == tree
