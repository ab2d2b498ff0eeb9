"""Our forward pass against recorded outputs of the reference; see `measure` for what that shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gemma_nb.config import Global, LayerSpec, Sliding, TransformerConfig
from gemma_nb.model import GemmaTransformer
from tests.parity import ours, recording
from tests.parity.cases import RANDOM, REAL, model_of, text
from tests.parity.measure import ANYWHERE, NOISE_FACTOR, WHOLE, compare, sketch

if TYPE_CHECKING:
    from gemma_nb.text.tokenizer import Tokenizer


def exceeded(model: GemmaTransformer, recorded: recording.Recorded) -> dict[str, str]:
    """Which tolerances `model` exceeds on the recorded text: quantity -> what was measured."""
    noise = recorded.noise
    got = sketch(ours.run(model, recorded.tokens), recorded.sketch["top_ids"])
    error = compare(got, recorded.sketch)
    allowed: Mapping[str, float | np.ndarray] = {
        "logits_whole": WHOLE,
        "logits_anywhere": ANYWHERE,
        "logprobs": NOISE_FACTOR * noise["logprobs"],
        "attention": NOISE_FACTOR * noise["attention"],
        "attention_row": NOISE_FACTOR * noise["attention_row"],
        # A single row's own noise is too few numbers to go by: the head's.
        "attention_last": NOISE_FACTOR * noise["attention_whole"],
    }
    share = {name: float(np.max(error[name] / limit)) for name, limit in allowed.items()}
    print(f"measured, in units of what is allowed: {share}")
    # `not <=`: NaN exceeds as well.
    return {name: f"{s:.2f} times what is allowed" for name, s in share.items() if not s <= 1}


@pytest.mark.parametrize("name", RANDOM)
def test_random_models_agree_with_the_reference(name: str) -> None:
    case, recorded = RANDOM[name], recording.load(name)
    assert len(recorded.tokens) > 2 * max(_windows(case.config))
    np.testing.assert_array_equal(case.tokens(), recorded.tokens)
    assert recording.fingerprint(case.params()) == recorded.fingerprint
    assert exceeded(model_of(case), recorded) == {}


@pytest.mark.real
def test_default_model_agrees_with_the_reference(
    float32_model: tuple[GemmaTransformer, Tokenizer],
) -> None:
    model, tokenizer = float32_model
    recorded = recording.load(REAL)
    assert len(recorded.tokens) > 700 > max(_windows(model.config))
    assert tokenizer.encode(text(), bos=True) == recorded.tokens.tolist()
    assert exceeded(model, recorded) == {}


def _windows(config: TransformerConfig) -> set[int]:
    return {spec.kind.window for spec in config.layers if isinstance(spec.kind, Sliding)}


def _respecify(config: TransformerConfig, of: type, **changes: Any) -> TransformerConfig:
    def changed(spec: LayerSpec) -> LayerSpec:
        return dataclasses.replace(spec, **changes) if isinstance(spec.kind, of) else spec

    return dataclasses.replace(config, layers=tuple(map(changed, config.layers)))


_BASE = RANDOM["RoPE scale 8"].config
_MISTAKES = {
    "window one longer": _respecify(_BASE, Sliding, kind=Sliding(41)),
    "window one shorter": _respecify(_BASE, Sliding, kind=Sliding(39)),
    "no window in one layer": dataclasses.replace(
        _BASE,
        layers=(dataclasses.replace(_BASE.layers[0], kind=Global()), *_BASE.layers[1:]),
    ),
    "RoPE scale left out": _respecify(_BASE, Global, rope_scale=1.0),
    "RoPE scale in local layers too": _respecify(_BASE, Sliding, rope_scale=8.0),
    "RoPE base off by one in a thousand": _respecify(_BASE, Global, rope_base=1.001e6),
    "other query scale": dataclasses.replace(_BASE, query_pre_attn_scalar=32.01),
}


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_small_mistakes_are_noticed(mistake: str) -> None:
    name = "RoPE scale 8"
    wrong = GemmaTransformer.from_config(_MISTAKES[mistake]).replace(params=RANDOM[name].params())
    assert "attention" in exceeded(wrong, recording.load(name))
