"""The same parameters, the same numbers: trees, logits and gradients beside gm's."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb import presets
from gemma_nb.config import TransformerConfig
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn import Transformer
from tests.contract import theirs
from tests.parity.cases import RANDOM, RandomCase, model_of
from tests.parity.measure import logits_error

LOGITS, GRADIENTS = 2e-5, 1e-4

SIZES = {
    name: f"Gemma{name[5]}_{name[7:].upper()}"
    for name in presets.PRESETS
    if not name.startswith("gemma1")  # gm has no module of Gemma 1
}


def shapes(params: Any) -> dict[str, tuple[int, ...]]:
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(params), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_trees_are_gms(name: str) -> None:
    kind = getattr(theirs.gm().nn, SIZES[name])
    text_only = {"text_only": True} if kind.config.vision_encoder else {}
    module = kind(tokens="tokens", **text_only)
    tokens = jnp.zeros((1, 2), jnp.int32)
    expected = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    config = presets.by_name(name)
    assert shapes(GemmaTransformer.from_config(config).params) == shapes(expected)
    assert TransformerConfig.from_gm(module.config) == config
    info = Transformer(config).INFO
    assert info.tokenizer_version == module.INFO.tokenizer_version
    assert module.INFO.default_ckpt in (None, info.default_ckpt)


@pytest.mark.parametrize("name", RANDOM)
def test_configurations_survive_gm(name: str) -> None:
    ours = RANDOM[name].config
    read = TransformerConfig.from_gm(theirs.config(ours))
    assert dataclasses.replace(read, max_context=ours.max_context) == ours


@pytest.mark.parametrize("name", RANDOM)
def test_logits(name: str) -> None:
    case = RANDOM[name]
    model, module = model_of(case), theirs.module(case.config)
    tokens = jnp.asarray(case.tokens())[None]
    expected = module.apply({"params": model.params}, tokens, **theirs.causal(case.length))
    output = jax.jit(model.transformer.apply)({"params": model.params}, tokens)
    whole, anywhere = logits_error(np.asarray(output.logits[0]), np.asarray(expected.logits[0]))
    print(f"{name}: {whole:.2e} over the whole, {anywhere:.2e} at worst")
    assert anywhere < LOGITS


def _loss_gradients(apply: Any, case: RandomCase, **inputs: Any) -> dict[tuple[str, ...], Any]:
    tokens = jnp.asarray(case.tokens())[None]

    def loss(params: Any) -> jax.Array:
        logits = apply({"params": params}, tokens, **inputs).logits[0, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[0, 1:, None], axis=-1)
        return -chosen.mean()

    gradients = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, case.params()))
    return flax.traverse_util.flatten_dict(flax.core.unfreeze(gradients))


@pytest.mark.parametrize("name", RANDOM)
def test_gradients_of_the_loss(name: str) -> None:
    case = RANDOM[name]
    ours = _loss_gradients(Transformer(case.config).apply, case)
    module = theirs.module(case.config)
    expected = _loss_gradients(module.apply, case, **theirs.causal(case.length))
    assert set(ours) == set(expected)
    worst = 0.0
    for path, gradient in ours.items():
        assert np.isfinite(gradient).all()
        size = np.abs(expected[path]).max()
        worst = max(worst, float(np.abs(gradient - expected[path]).max() / size))
    print(f"{name}: {worst:.2e} of the largest gradient of the same parameter")
    assert worst < GRADIENTS


def test_a_mask_of_the_callers_own_is_treated_alike() -> None:
    """Both ways round the window reaches, where the caller's mask looks ahead."""
    case = RANDOM["grouped-query"]
    model, module = model_of(case), theirs.module(case.config)
    tokens = jnp.asarray(case.tokens())[None]
    inputs = theirs.causal(case.length)
    inputs["attention_mask"] = jnp.ones_like(inputs["attention_mask"])
    expected = module.apply({"params": model.params}, tokens, **inputs).logits[0]
    output = jax.jit(model.transformer.apply)({"params": model.params}, tokens, **inputs)
    assert logits_error(np.asarray(output.logits[0]), np.asarray(expected))[1] < LOGITS


@pytest.mark.parametrize("batch", [(), (2, 2)])
def test_batch_axes_and_last_logits_are_treated_alike(batch: tuple[int, ...]) -> None:
    case = RANDOM["Gemma 2"]
    model, module = model_of(case), theirs.module(case.config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, case.config.num_embed, (*batch, 50))
    tokens[..., 44:] = 0  # padding
    call = {"return_last_only": True, "return_hidden_states": True}
    expected = module.apply({"params": model.params}, jnp.asarray(tokens), **call)
    output = jax.jit(lambda *a: model.transformer.apply(*a, **call))(
        {"params": model.params}, jnp.asarray(tokens)
    )
    for ours, gms in (
        (output.logits, expected.logits),
        (output.hidden_states, expected.hidden_states),
    ):
        assert ours.shape == gms.shape
        np.testing.assert_allclose(ours, gms, rtol=0, atol=LOGITS * float(np.abs(gms).max()))
