"""GGUF files of Gemma 1 and Gemma 2, and what they leave unsaid."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from gemma_nb import presets
from gemma_nb.checkpoints import layout
from gemma_nb.checkpoints.gguf import GGUFFile, config_from_gguf, official_params
from gemma_nb.config import Global, LayerSpec, Sliding, TransformerConfig, interleave
from gemma_nb.errors import CheckpointError
from gemma_nb.model import GemmaTransformer
from tests.checkpoints import tiny

GEMMA1 = dataclasses.replace(
    tiny.CONFIG,
    layers=(LayerSpec(Global()),) * 2,
    use_qk_norm=False,
    use_post_attn_norm=False,
    use_post_ffw_norm=False,
    transpose_gating_einsum=False,
)
GEMMA2 = dataclasses.replace(
    tiny.CONFIG,
    layers=interleave(2, window=16, pattern=(False, True), global_base=10_000.0),
    use_qk_norm=False,
    attn_logits_soft_cap=50.0,
    final_logit_soft_cap=30.0,
)
FAMILIES = {
    "gemma": GEMMA1,
    "gemma, multi-head": dataclasses.replace(GEMMA1, num_kv_heads=2),
    "gemma2": GEMMA2,
}


def fields(architecture: str, config: TransformerConfig) -> dict[str, Any]:
    """What llama.cpp's converter writes."""
    written = {
        name.replace("gemma3", architecture): value
        for name, value in tiny.FIELDS.items()
        if "rope" not in name and "sliding" not in name
    }
    written[f"{architecture}.attention.head_count_kv"] = config.num_kv_heads
    if architecture == "gemma2":
        written["gemma2.attention.sliding_window"] = 16
        written["gemma2.attn_logit_softcapping"] = 50.0
        written["gemma2.final_logit_softcapping"] = 30.0
    return written


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_loads_to_what_was_written(family, tmp_path):
    config, architecture = FAMILIES[family], family.partition(",")[0]
    params = GemmaTransformer.from_config(config, key=jax.random.key(0)).params
    params = jax.tree.map(np.asarray, params)
    path = tiny.write(
        tmp_path / "x.gguf",
        fields=fields(architecture, config),
        arrays=layout.to_gguf(params, config),
        architecture=architecture,
    )
    with GGUFFile(path) as file:
        assert config_from_gguf(file.metadata) == config
        read = layout.nest(official_params(file, config))
    assert jax.tree.structure(read) == jax.tree.structure(params)
    # Norms are kept as 1 + scale, and random models begin with scales of zero: nothing is lost.
    jax.tree.map(np.testing.assert_array_equal, read, params)


def released(architecture: str, **numbers: float) -> dict[str, Any]:
    names = {
        "D": "embedding_length",
        "L": "block_count",
        "F": "feed_forward_length",
        "N": "attention.head_count",
        "K": "attention.head_count_kv",
    }
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        f"{architecture}.context_length": 8192,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.tokens": 256_000,
    }
    metadata |= {f"{architecture}.{names[n]}": numbers[n] for n in names}
    for name in ("attention.key_length", "attention.value_length"):
        metadata[f"{architecture}.{name}"] = numbers["H"]
    return metadata


@pytest.mark.parametrize(
    ("preset", "metadata"),
    [
        ("gemma1-2b", released("gemma", D=2048, L=18, F=16_384, N=8, K=1, H=256)),
        ("gemma1-7b", released("gemma", D=3072, L=28, F=24_576, N=16, K=16, H=256)),
        ("gemma2-2b", released("gemma2", D=2304, L=26, F=9216, N=8, K=4, H=256)),
        ("gemma2-9b", released("gemma2", D=3584, L=42, F=14_336, N=16, K=8, H=256)),
        ("gemma2-27b", released("gemma2", D=4608, L=46, F=36_864, N=32, K=16, H=128)),
    ],
)
def test_released_sizes_are_the_presets(preset, metadata):
    """Also the first files of Gemma 2, which say nothing of windows and soft-caps."""
    expected = dataclasses.replace(presets.by_name(preset), num_embed=256_000)
    assert config_from_gguf(metadata) == expected


def test_gemma2_fields_reach_the_config():
    metadata = released("gemma2", D=3584, L=3, F=64, N=16, K=8, H=256) | {
        "gemma2.attention.sliding_window": 128,
        "gemma2.attention.sliding_window_pattern": np.array([False, True, True]),
        "gemma2.attn_logit_softcapping": 20.0,
        "gemma2.final_logit_softcapping": 0.0,
        "gemma2.rope.freq_base": 5000.0,
    }
    config = config_from_gguf(metadata)
    assert [spec.kind for spec in config.layers] == [Global(), Sliding(128), Sliding(128)]
    assert {spec.rope_base for spec in config.layers} == {5000.0}
    assert (config.attn_logits_soft_cap, config.final_logit_soft_cap) == (20.0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma3n"}, "got 'gemma3n'; .* not supported yet"),
        ({"gemma2.attn_logit_softcapping": -1.0}, "expected a positive number, got -1"),
        ({"gemma2.attention.sliding_window": 0}, "expected a whole number from 1"),
        ({"gemma2.attention.key_length": None}, "'gemma2.attention.key_length': is missing"),
    ],
)
def test_impossible_metadata_are_refused(change, message):
    metadata = released("gemma2", D=3584, L=2, F=64, N=16, K=8, H=256) | change
    with pytest.raises(CheckpointError, match=message):
        config_from_gguf(metadata, "file.gguf")
