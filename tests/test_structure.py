"""How a model is shown: axis names, layer kinds, array summaries, and never megabytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import treescope

import gemma_nb as gnb
from gemma_nb import structure
from gemma_nb.axes import param_dims
from gemma_nb.checkpoints import layout


@pytest.mark.parametrize(
    ("preset", "gating"),
    [
        ("gemma1-2b", ("gate_up", "D", "F")),
        ("gemma1-7b", ("gate_up", "D", "F")),  # keeps query, key and value in one array
        ("gemma2-9b", ("gate_up", "F", "D")),
        ("gemma3-4b", ("gate_up", "F", "D")),
    ],
)
def test_every_official_parameter_has_names_for_its_axes(preset, gating):
    config = gnb.presets.by_name(preset)
    sizes = {
        *(("V", config.num_embed), ("D", config.embed_dim), ("F", config.hidden_dim)),
        *(("N", config.num_heads), ("K", config.num_kv_heads), ("H", config.head_dim)),
        *(("kv", 2), ("qkv", 3), ("gate_up", 2)),
    }
    params = gnb.GemmaTransformer.from_config(config).params
    for path, leaf in layout.flatten(params).items():
        dims = param_dims(path, transpose_gating=config.transpose_gating_einsum)
        assert dims is not None, path
        assert set(zip(dims, leaf.shape, strict=True)) <= sizes
        if path[-1] == "gating_einsum":
            assert dims == gating


def test_what_is_not_of_the_text_model_has_no_names():
    assert param_dims(("vision_encoder", "kernel")) is None


def test_an_array_is_one_line():
    leaf = jnp.full((4, 640, 256), 0.5, jnp.bfloat16)
    line = structure.describe(leaf, ("N", "D", "H"))
    assert line == "bfloat16 (head:4, embedding:640, head_dim:256), 1.31 MB, ≈0.5 ± 0"
    assert structure.describe(np.zeros((2, 3), np.float32), None) == "float32 (2, 3), 24.0 B, 0 ± 0"
    shape = jax.ShapeDtypeStruct((5,), jnp.float32)
    assert structure.describe(shape, ("D",)) == "float32 (embedding:5), 20.0 B, not initialised"


def test_the_spread_is_that_of_the_array():
    values = np.random.default_rng(0).normal(3, 2, (1000, 100)).astype(np.float32)
    line = structure.describe(jnp.asarray(values), ("V", "D"))
    mean, std = (float(x) for x in line.rpartition("≈")[2].split(" ± "))
    assert (mean, std) == (pytest.approx(3, abs=0.2), pytest.approx(2, abs=0.2))


def test_numbers_that_are_none_are_not_hidden():
    assert "50% of the values are NaN or infinite" in structure.describe(
        jnp.asarray([1.0, jnp.nan, jnp.inf, 0.0]), ("D",)
    )


def test_a_traced_model_can_be_shown(tiny_model):
    model, _ = tiny_model
    shown = []
    jax.eval_shape(lambda m: shown.append(treescope.render_to_text(m)), model)
    assert "traced" in shown[0]


def test_the_tree_names_axes_and_layer_kinds_in_the_order_of_the_computation(tiny_model):
    model, _ = tiny_model
    tree = treescope.render_to_text(model)
    for part in (
        "36,608 parameters",
        "float32 (head:2, embedding:32, head_dim:16)",
        "float32 (vocabulary:264, embedding:32)",
        "layer_0 (sliding 8, 9,376 parameters): {",
        "layer_2 (global, 9,376 parameters): {",
        "query_pre_attn_scalar=16",
    ):
        assert part in tree
    order = ["embedder (", "layer_0 (", "layer_1 (", "layer_2 (", "final_norm (", "config="]
    assert sorted(order, key=tree.index) == order


def test_layers_are_in_the_order_of_their_numbers():
    model = gnb.GemmaTransformer.from_config(gnb.presets.GEMMA3_270M)
    tree = treescope.render_to_text(model)
    assert tree.index("layer_2 (") < tree.index("layer_10 (")
    assert "not initialised" in tree


def test_a_notebook_gets_the_tree_and_a_line(tiny_model):
    model, _ = tiny_model
    bundle = model._repr_mimebundle_(include=None, exclude=None)
    assert bundle["text/plain"] == repr(model)
    assert set(bundle) == {"text/plain", "text/html"}
    assert "treescope" in bundle["text/html"]


def test_not_even_the_largest_model_takes_megabytes_to_show():
    model = gnb.GemmaTransformer.from_config(gnb.presets.GEMMA3_27B)
    assert len(model._repr_mimebundle_()["text/html"]) < 200_000
    assert len(treescope.render_to_text(model)) < 200_000


def test_showing_a_model_copies_no_array(monkeypatch):
    leaf = np.zeros((262_144, 640), np.float16)
    seen = []
    real = np.concatenate

    def concatenate(arrays, *args):
        seen.append(sum(x.size for x in arrays))
        return real(arrays, *args)

    monkeypatch.setattr(np, "concatenate", concatenate)
    assert "vocabulary:262144" in structure.describe(leaf, ("V", "D"))
    assert seen == [16 * 256]


def test_structures_are_readable():
    full = structure.ArrayStructure({"batch": None, "vocabulary": 5}, "float32", "logits", True)
    assert repr(full) == "float32(batch, vocabulary:5)  # logits; optional"
    assert (full.dims, full.shape) == (("batch", "vocabulary"), (None, 5))
    assert repr(structure.ArrayStructure({"seq": 3}, "int32")) == "int32(seq:3)"
