"""Decoding against the plain pass in float32, over 1,000 positions of English.

What is held here is what the docstrings say of the two storages.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb.cpu.products import product
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.settings import Sampling
from gemma_nb.sampling.weights import decoding_weights

pytestmark = pytest.mark.real

TEXT = Path(__file__).parents[1] / "parity" / "data" / "text.txt"


@pytest.fixture(scope="module")
def passage(real_model):
    """Token ids of English, more than 1,000 of them."""
    own = Path(__file__).with_name("english.txt").read_text(encoding="utf-8")
    ids = real_model[1].encode(TEXT.read_text(encoding="utf-8") + own, bos=True)
    assert len(ids) > COUNT
    return ids[:COUNT]


@pytest.fixture(scope="module")
def plain(real_model, passage):
    """Final states (T, D) of the plain pass in float32, and part by part of the text its
    log-probabilities (T, V) and the ids of the twenty likeliest tokens (T, 20)."""
    model, _ = real_model
    run = jax.jit(partial(model.transformer.apply, return_hidden_states=True))
    states = run({"params": model.params}, jnp.asarray([passage])).hidden_states[0]
    table = model.params["embedder"]["input_embedding"]
    parts = [log_softmax(product(chunk, table)) for chunk in jnp.split(states, SPLITS)]
    return states, [(part, np.argpartition(part, -20)[:, -20:]) for part in parts]


COUNT, SPLITS = 1040, (260, 520, 780)
log_softmax = jax.jit(jax.nn.log_softmax)


@pytest.fixture(scope="module")
def head(real_model):
    return decoding_weights(real_model[0]).head


@jax.jit
def rows(head, table, states, p_log, top):
    logits = jax.lax.map(lambda h: head.scores(h, table, None).logits, states)
    q_log = jax.nn.log_softmax(logits)
    p = jnp.exp(p_log)
    kl = (p * (p_log - q_log)).sum(-1)
    same = p_log.argmax(-1) == q_log.argmax(-1)
    off = jnp.abs(jnp.take_along_axis(q_log - p_log, top, 1)).max(-1)
    entropy = (jnp.exp(q_log) * q_log).sum(-1) - (p * p_log).sum(-1)
    return kl, same, off, jnp.abs(entropy)


def compare(head, table, states, expected):
    """Mean KL divergence from the plain pass, share of the same first choices, and the largest
    differences in the log-probabilities of its twenty likeliest tokens and in entropy."""

    parts = [
        rows(head, table, s, *e) for s, e in zip(jnp.split(states, SPLITS), expected, strict=True)
    ]
    kl, same, off, entropy = (np.concatenate(x) for x in zip(*parts, strict=True))
    print(
        f"KL {kl.mean():.1e} mean, {kl.max():.1e} at most; first choice {same.mean():.4f}; "
        f"top 20 off by {off.max():.1e} at most, {np.median(off):.1e} in the median; "
        f"entropy off by {entropy.max():.1e}"
    )
    return kl.mean(), same.mean(), off, entropy


def test_the_default_decodes_what_float32_computes(real_model, plain, head):
    """The layers are exact (see `tests/parity/test_cached.py`); the head is not quite."""
    table = real_model[0].params["embedder"]["input_embedding"]
    kl, same, off, entropy = compare(head, table, *plain)
    assert kl < 2e-4
    assert same >= 0.995
    assert off.max() < 2e-3
    assert np.median(off) < 1e-4
    assert entropy.max() < 1e-2


@pytest.mark.parametrize(
    ("columns", "most", "least"),
    [
        # Every token is computed from the int8 rows, as single ones are.
        pytest.param(None, 3e-3, 0.97, id="decoding"),
        # From the weights as they are, with activations rounded where that is faster.
        pytest.param(jnp.bfloat16, 3e-4, 0.99, id="a prompt"),
    ],
)
def test_int8_models_compute_nearly_that(real_model, passage, plain, head, columns, most, least):
    model, _ = real_model
    prepared = model.transformer.prepare(model.params, int8=True, columns=columns)
    run = jax.jit(partial(model.transformer.apply, return_hidden_states=True))
    variables = {"params": model.params, "prepared": prepared}
    states = run(variables, jnp.asarray([passage])).hidden_states[0]
    table = model.params["embedder"]["input_embedding"]
    kl, same, _, _ = compare(head, table, states, plain[1])
    assert kl < most
    assert same >= least


def test_steps_compute_what_these_tests_compare(real_model, passage, plain):
    """A real step's evidence is that of the compared logits."""
    model, _ = real_model
    decoder = Decoder(model, limit=1024, top_k=20)
    evidence = decoder.prefill(decoder.begin(passage[:300], Sampling(temperature=0, seed=0)))
    expected = np.asarray(plain[1][1][0][299 - 260])
    assert evidence.ids.tolist() == np.argsort(-expected)[:20].tolist()
    np.testing.assert_allclose(evidence.logprobs, expected[evidence.ids], atol=2e-3)
