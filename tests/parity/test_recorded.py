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
    assert len(recorded.tokens) > 2 * max(_windows(case.config), default=0)
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


def _mistakes() -> dict[str, tuple[str, TransformerConfig]]:
    """What was changed -> the case, and its configuration with that one mistake."""
    three, two, one = (
        RANDOM[name].config for name in ("RoPE scale 8", "Gemma 2", "Gemma 1 multi-query")
    )
    global_first = (dataclasses.replace(three.layers[0], kind=Global()), *three.layers[1:])
    wrong = {
        "RoPE scale 8": {
            "window one longer": _respecify(three, Sliding, kind=Sliding(41)),
            "window one shorter": _respecify(three, Sliding, kind=Sliding(39)),
            "no window in one layer": dataclasses.replace(three, layers=global_first),
            "RoPE scale left out": _respecify(three, Global, rope_scale=1.0),
            "RoPE scale in local layers too": _respecify(three, Sliding, rope_scale=8.0),
            "RoPE base off by one in a thousand": _respecify(three, Global, rope_base=1.001e6),
            "other query scale": dataclasses.replace(three, query_pre_attn_scalar=32.01),
        },
        "Gemma 2": {
            "windows in the other layers": dataclasses.replace(two, layers=two.layers[::-1]),
            "other attention soft-cap": dataclasses.replace(two, attn_logits_soft_cap=2.001),
            "global RoPE base of Gemma 3": _respecify(two, Global, rope_base=1e6),
        },
        "Gemma 1 multi-query": {
            "window in one layer": dataclasses.replace(
                one, layers=(LayerSpec(Sliding(100)), *one.layers[1:])
            ),
            "soft-cap of Gemma 2": dataclasses.replace(one, attn_logits_soft_cap=50.0),
        },
    }
    return {what: (name, c) for name, changes in wrong.items() for what, c in changes.items()}


_MISTAKES = _mistakes()


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_small_mistakes_are_noticed(mistake: str) -> None:
    name, config = _MISTAKES[mistake]
    wrong = GemmaTransformer.from_config(config).replace(params=RANDOM[name].params())
    assert "attention" in exceeded(wrong, recording.load(name))


def test_another_final_soft_cap_is_noticed() -> None:
    case = RANDOM["Gemma 2"]
    config = dataclasses.replace(case.config, final_logit_soft_cap=3.001)
    wrong = GemmaTransformer.from_config(config).replace(params=case.params())
    assert "logits_whole" in exceeded(wrong, recording.load("Gemma 2"))
