"""Every spelling of RoPE that a `config.json` has been seen with.

The values are those of transformers 5.24: base and scale of `Gemma3RotaryEmbedding` and
`Gemma2RotaryEmbedding`, taken from the `inv_freq` of a configuration with these fields.  Where it
fails with a Python error, or drops fields that a file clearly has, the entry says so.  The others
are computed anew in `tests/checkpoints/test_transformers_folders.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

from gemma_nb.config import Sliding, TransformerConfig

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 100,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
PLAIN = {"rope_type": "default"}


def rotations(kind: str, fields: dict[str, Any]) -> tuple[Any, Any]:
    """(base, scale) of the global layers and of the sliding ones; None where there are none."""
    layers = TransformerConfig.from_hf({**SIZES, **fields, "model_type": kind}).layers
    sliding = {spec.rotation for spec in layers if isinstance(spec.kind, Sliding)} or {None}
    full = {spec.rotation for spec in layers if not isinstance(spec.kind, Sliding)}
    [one], [other] = full, sliding
    return one, other


def nested(full: Any = None, sliding: Any = None, **more: Any) -> dict[str, Any]:
    entries = {"full_attention": full, "sliding_attention": sliding}
    return {"rope_parameters": {k: v for k, v in entries.items() if v is not None}, **more}


OLD = {"rope_theta": 2e6, "rope_local_base_freq": 2e4}
GEMMA3 = {
    "nothing": ({}, (1e6, 1), (1e4, 1)),
    "null": ({"rope_parameters": None, "rope_scaling": None}, (1e6, 1), (1e4, 1)),
    "empty": ({"rope_parameters": {}}, (1e6, 1), (1e4, 1)),
    "old fields": (OLD, (2e6, 1), (2e4, 1)),
    "old fields, scaled": (OLD | {"rope_scaling": LINEAR}, (2e6, 8), (2e4, 1)),
    "scaled, with a base": ({"rope_scaling": LINEAR | {"rope_theta": 5e5}}, (5e5, 8), (1e4, 1)),
    "two types": ({"rope_scaling": LINEAR | {"type": "dynamic"}}, (1e6, 8), (1e4, 1)),
    "a factor of no type": ({"rope_scaling": {"factor": 8.0}}, (1e6, 1), (1e4, 1)),
    "one entry": (nested(LINEAR | {"rope_theta": 1e6}), (1e6, 8), (1e4, 1)),
    "one entry beside an old field": (
        nested(LINEAR | {"rope_theta": 1e6}, rope_local_base_freq=2e4),
        (1e6, 8),
        (2e4, 1),
    ),
    "no base for sliding layers": (nested(LINEAR | {"rope_theta": 1e6}, PLAIN), (1e6, 8), (1e4, 1)),
    "only sliding layers": (nested(None, PLAIN | {"rope_theta": 2e4}), (1e6, 1), (2e4, 1)),
    "only sliding layers beside an old field": (
        nested(None, PLAIN | {"rope_theta": 2e4}, rope_theta=2e6),
        (2e6, 1),
        (2e4, 1),
    ),
    "sliding layers with a factor of their own": (
        nested(None, LINEAR | {"rope_theta": 2e4}),
        (1e6, 1),
        (2e4, 8),
    ),
    "null entries": (
        {"rope_parameters": {"full_attention": None, "sliding_attention": None}, **OLD},
        (2e6, 1),
        (2e4, 1),
    ),
    "`type` in entries": (nested({"type": "linear", "factor": 4.0}, {"type": "default"}),
                          (1e6, 4), (1e4, 1)),
    "flat": ({"rope_parameters": PLAIN | {"rope_theta": 1e6}}, (1e6, 1), (1e4, 1)),
    "flat beside old fields": (
        {"rope_parameters": PLAIN | {"rope_theta": 1e6}, **OLD},
        (2e6, 1),
        (2e4, 1),
    ),
    "entries beside rope_scaling": (
        nested({"type": "linear", "factor": 4.0}, PLAIN, rope_scaling=LINEAR),
        (1e6, 8),
        (1e4, 1),
    ),
    "of global layers only": (
        nested(PLAIN | {"rope_theta": 2e6}, layer_types=["full_attention"] * 6),
        (2e6, 1),
        None,
    ),
    # transformers 4 reads `type` here; 5.24 sees a default that it put there itself.
    "`type` in rope_scaling": ({"rope_scaling": {"type": "linear", "factor": 8.0}},
                               (1e6, 8), (1e4, 1)),
    # 5.24 drops every field of a flat object; llama.cpp's converter takes them for global layers.
    "flat, scaled": ({"rope_parameters": LINEAR | {"rope_theta": 2e6}}, (2e6, 8), (1e4, 1)),
    # 5.24 drops these.
    "entries in rope_scaling": ({"rope_scaling": {"full_attention": LINEAR}}, (1e6, 8), (1e4, 1)),
    # A KeyError there.
    "both empty": ({"rope_parameters": {}, "rope_scaling": {}}, (1e6, 1), (1e4, 1)),
    "flat beside rope_scaling": (
        {"rope_parameters": PLAIN | {"rope_theta": 1e6}, "rope_scaling": LINEAR},
        (1e6, 8),
        (1e4, 1),
    ),
    # A TypeError there.
    "null in entries": (
        nested({"rope_theta": None, "rope_type": None}, {"rope_theta": None}, **OLD),
        (2e6, 1),
        (2e4, 1),
    ),
}  # fmt: skip


NOT_COMPUTED = {
    *("`type` in rope_scaling", "flat, scaled", "entries in rope_scaling"),
    *("both empty", "flat beside rope_scaling", "null in entries"),
}


@pytest.mark.parametrize("spelling", GEMMA3)
def test_sliding_layers_of_gemma3_have_a_base_of_their_own(spelling):
    fields, full, sliding = GEMMA3[spelling]
    assert rotations("gemma3_text", fields) == (full, sliding)
    text = {**SIZES, **fields}
    assert TransformerConfig.from_hf({"model_type": "gemma3", "text_config": text}).layers == (
        TransformerConfig.from_hf({**text, "model_type": "gemma3_text"}).layers
    )


GEMMA2 = {
    "nothing": ({}, (1e4, 1)),
    "old fields": (OLD, (2e6, 1)),
    "scaled": ({"rope_theta": 2e6, "rope_scaling": LINEAR}, (2e6, 8)),
    "`type`": ({"rope_scaling": {"type": "linear", "factor": 8.0}}, (1e4, 8)),
    "scaled, with a base": ({**OLD, "rope_scaling": LINEAR | {"rope_theta": 5e5}}, (5e5, 8)),
    "flat": ({"rope_parameters": LINEAR | {"rope_theta": 2e6}}, (2e6, 8)),
    "flat beside an old field": (
        {"rope_parameters": PLAIN | {"rope_theta": 2e6}, "rope_theta": 3e6},
        (2e6, 1),
    ),
    "both": ({"rope_parameters": PLAIN | {"rope_theta": 1e6}, "rope_scaling": LINEAR}, (1e4, 8)),
    "empty": ({"rope_parameters": {}, "rope_scaling": {}}, (1e4, 1)),
    # A KeyError there.
    "null type": ({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 4.0}}, (1e4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("spelling", GEMMA2)
def test_all_layers_of_gemma1_and_2_rotate_alike(spelling):
    fields, expected = GEMMA2[spelling]
    assert rotations("gemma2", fields) == (expected, expected)
    assert rotations("gemma", fields) == (expected, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'linear', got 'dynamic'"),
        (nested({"rope_type": "yarn", "factor": 2.0}), "'linear', got 'yarn'"),
        (nested(None, {"type": "longrope"}), "'linear', got 'longrope'"),
        (nested({"rope_type": ["linear"]}), "'linear', got"),
        (nested({"rope_type": "linear"}), "'factor' .* is missing"),
        (nested(8), "'rope_parameters' .* expected an object, got 8"),
        ({"rope_parameters": {"global": {}, "local": {}}}, "expected entries of .* got 'global'"),
        (nested({"partial_rotary_factor": 0.5}), "'partial_rotary_factor' .* expected 1, got 0.5"),
    ],
)
def test_what_would_rotate_in_another_way_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_hf({**SIZES, **fields, "model_type": "gemma3_text"})
