"""Our `ChatSession` and `trace` on gm's modules, beside our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
from tests.contract import theirs
from tests.parity.cases import RANDOM, model_of

if TYPE_CHECKING:
    from gemma_nb.model import GemmaTransformer
    from gemma_nb.text.tokenizer import Tokenizer

GREEDY = gnb.Sampling(temperature=0, max_new_tokens=24)
# Sites that gm's modules show from outside.
SHOWN = ("attention", "embed", "attn_out", "residual_mid", "mlp_out", "residual", "final")


def wrap(model: GemmaTransformer) -> GemmaTransformer:
    """The same model, computed by gm's module."""
    wrapped = gnb.GemmaTransformer.wrap(theirs.module(model.config), model.params)
    context = model.config.max_context  # which gm does not keep
    assert wrapped.config.num_layers == model.config.num_layers
    assert wrapped.config.max_context >= min(context, 8192)
    return wrapped.replace(info=model.info)


@pytest.fixture(scope="module")
def models(
    lively: tuple[GemmaTransformer, Tokenizer],
) -> tuple[GemmaTransformer, GemmaTransformer, Tokenizer]:
    model, tokenizer = lively
    return model, wrap(model), tokenizer


def test_sessions_write_the_same_tokens(models: Any) -> None:
    """Two turns, the second behind a prompt in padded pieces and what the first left cached."""
    ours, gms, tokenizer = models
    drawn = gnb.Sampling(temperature=1, seed=5, max_new_tokens=24)
    sessions = [
        gnb.ChatSession(model, tokenizer, sampling=drawn, cache_length=512, template="none")
        for model in (ours, gms)
    ]
    for message in ("Hello " * 12, "and then?"):
        turns = [chat.chat(message) for chat in sessions]
        ids, logprobs = zip(
            *([[getattr(t, n) for t in turn.tokens] for n in ("token_id", "logprob")]
              for turn in turns),
            strict=True,
        )  # fmt: skip
        assert ids[0] == ids[1]
        np.testing.assert_allclose(*logprobs, atol=1e-4)
        assert len(set(ids[0])) > 4  # greedy, a small random model repeats itself
    assert sessions[0].cache_used == sessions[1].cache_used > 100


@pytest.mark.parametrize("name", RANDOM)
def test_trace_sees_the_same(name: str) -> None:
    ours, tokens = model_of(RANDOM[name]), RANDOM[name].tokens()
    gms = wrap(ours)
    expected, actual = (gnb.trace(model, tokens, sites=SHOWN) for model in (ours, gms))
    for site in SHOWN:
        a, b = getattr(actual, site), getattr(expected, site)
        assert a.dims == b.dims
        size = float(np.abs(b).max())
        np.testing.assert_allclose(a.values, b.values, rtol=0, atol=3e-5 * size, err_msg=site)


def test_sites_that_gm_does_not_show_are_named(models: Any) -> None:
    _, gms, tokenizer = models
    with pytest.raises(ValueError, match="does not show the site 'q'; it shows embed, "):
        gnb.trace(gms, "Hello", tokenizer=tokenizer, sites="q")


def test_scoring(models: Any) -> None:
    ours, gms, tokenizer = models
    tokens = np.array([tokenizer.encode("Hello there", bos=True)] * 2)
    inputs = gnb.GemmaInputs.from_basic_segments(tokens)
    np.testing.assert_allclose(gms(inputs), ours(inputs), rtol=0, atol=1e-4)


def test_bfloat16_params_in_a_float32_cache(models: Any) -> None:
    """gm computes in the dtype of its parameters; the session's cache is float32."""
    _, gms, tokenizer = models
    low = gms.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), gms.params))
    chat = gnb.ChatSession(low, tokenizer, sampling=GREEDY, cache_length=128, template="none")
    assert len(chat.chat("Hello").tokens) == GREEDY.max_new_tokens


@pytest.mark.real
def test_default_model_says_the_same() -> None:
    model, tokenizer = gnb.load("gemma3-270m", dtype="float32", progress=False)
    texts = [
        gnb.ChatSession(m, tokenizer, sampling=GREEDY, cache_length=512)
        .chat("What is the capital of France?")
        .text
        for m in (model, wrap(model))
    ]
    print(texts[0])
    assert texts[0] == texts[1]
    assert "Paris" in texts[0]
