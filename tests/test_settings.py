"""Under whatever JAX is set to around it, a model says and shows what it does without that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb

KEY = jax.random.key(0)
# What notebooks switch on for code of their own.  Strict promotion of dtypes is on in all tests.
SETTINGS = [
    ("jax_enable_x64", True),
    ("jax_numpy_rank_promotion", "raise"),
    ("jax_debug_nans", True),
    ("jax_debug_infs", True),
    ("jax_default_matmul_precision", "highest"),
    ("jax_default_matmul_precision", "bfloat16"),
    ("jax_default_matmul_precision", "BF16_BF16_F32"),
    ("jax_default_prng_impl", "rbg"),
    ("jax_default_prng_impl", "unsafe_rbg"),
    ("jax_threefry_partitionable", False),
    ("jax_enable_custom_prng", True),
    ("jax_debug_key_reuse", True),
    ("jax_disable_jit", True),
    ("jax_check_tracer_leaks", True),
    ("jax_transfer_guard", "disallow"),
    ("jax_log_compiles", True),
    ("jax_explain_cache_misses", True),
]


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Iterator[None]:
    name, value = request.param
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    yield
    jax.config.update(name, before)


def everything(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Tokens and numbers of all that computes."""
    chat = gnb.ChatSession(
        model, tokenizer, cache_length=64, template="none", sampling=gnb.Sampling(seed=3)
    )
    chat.sampling = gnb.Sampling(seed=3, max_new_tokens=4, top_p=0.9, repetition_penalty=1.1)
    turn = chat.chat("Hello")
    steered = chat.intervene(gnb.Steer(1, np.ones(32), 2.0), gnb.AblateHeads({0: [1]}), at=1)
    sampled = chat.sample("Hi", 4)
    traced = gnb.trace(model, "Hello", tokenizer=tokenizer)
    lens = gnb.logit_lens(traced, 3, watch=[70])
    sweep = gnb.activation_patching(
        *(model, "Hello", "Hallo", gnb.LogitDifference(70, 71)),
        tokenizer=tokenizer,
        progress=False,
    )
    made = gnb.GemmaTransformer.from_config(model.config, key=KEY)
    return {
        "tokens": [t.token_id for t in (*turn.tokens, *steered.tokens)],
        "sampled": [[t.token_id for t in reply.tokens] for reply in sampled],
        "logprob": [t.logprob for t in turn.tokens],
        "look": chat.look(2, turn=turn).residual.values,
        "attention": traced.attention.values,
        "scores": traced.scores.values,
        "lens": lens.kl.values,
        "statistics": gnb.token_statistics(traced).logprob.values,
        "sweep": sweep.values,
        "gradients": gnb.token_attribution(traced).values,
        "shares": gnb.direct_logit_attribution(traced, 70).values,
        "logits": model(gnb.GemmaInputs.from_basic_segments([3, 4, 5])).values,
        "weights": [x.dtype for x in jax.tree.leaves(made.params)],
    }


@pytest.fixture(scope="module")
def plain(tiny_model: Any) -> dict[str, Any]:
    return everything(*tiny_model)


@pytest.mark.parametrize("setting", SETTINGS, indirect=True, ids=lambda s: f"{s[0]}={s[1]}")
@pytest.mark.usefixtures("setting")
def test_settings_of_jax_change_nothing(tiny_model: Any, plain: dict[str, Any]) -> None:
    # Programs are the same ones, so their results are, bit for bit.
    for name, value in everything(*tiny_model).items():
        np.testing.assert_array_equal(value, plain[name], err_msg=name)


def test_they_are_left_as_they_were(tiny_model: Any) -> None:
    with jax.enable_x64(True), jax.debug_nans(True):
        gnb.trace(tiny_model[0], [3, 4])
        assert jnp.arange(3).dtype == np.int64
        assert jax.config.jax_debug_nans  # type: ignore[attr-defined]


def test_the_module_itself_computes_under_64_bit_numbers_and_strict_ranks(tiny_model: Any) -> None:
    model, _ = tiny_model
    ids = np.array([[3, 4, 5]], np.int32)

    def run(ids: Any) -> Any:
        cache = model.transformer.init_cache(batch_size=1, dtype=jnp.float32, cache_length=8)
        first = model.transformer.apply({"params": model.params}, ids[:, :2], cache=cache)
        return model.transformer.apply(
            {"params": model.params}, ids[:, 2:], cache=first.cache
        ).logits

    expected = jax.jit(run)(ids)
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        found = jax.jit(run)(ids)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
