"""The choice among a shortlist, against the choice among the whole vocabulary."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb.cpu.head import Int8Head
from gemma_nb.cpu.scores import SHORTLIST, Scores
from gemma_nb.sampling.draw import choose
from gemma_nb.sampling.evidence import exact_logit, observe
from gemma_nb.sampling.filters import Controls, distribution
from gemma_nb.sampling.settings import Sampling

VOCABULARY = 4096 * 4


@jax.jit
def chosen(logits, controls, position):
    seen = jnp.zeros(logits.shape, bool)
    return choose(Scores.of(logits), controls, seen, position, 20)


@jax.jit
def observed(logits, controls, token):
    seen = jnp.zeros(logits.shape, bool)
    return observe(Scores.of(logits), distribution(logits, controls, seen), token, 20)


def logits_of(seed, spread=3.0):
    return (np.random.default_rng(seed).normal(size=VOCABULARY) * spread).astype(np.float32)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=0, forbidden=tuple(range(0, VOCABULARY, 3))),
        Sampling(top_k=1),
        Sampling(top_k=64, top_p=0.95),
        Sampling(top_k=SHORTLIST, temperature=1.7),
        Sampling(top_k=20, top_p=0.5, temperature=0.4),
        Sampling(top_k=40, min_p=0.2),
        Sampling(top_k=30, forbidden=tuple(range(0, VOCABULARY, 2))),
        Sampling(top_k=500),  # more than the shortlist holds
        Sampling(top_p=0.9),
        Sampling(),
    ],
    ids=str,
)
def test_the_shortlist_gives_the_evidence_of_the_whole(sampling):
    for seed in range(5):
        logits = logits_of(seed)
        controls = Controls.of(dataclasses.replace(sampling, seed=seed), VOCABULARY)
        evidence = chosen(logits, controls, jnp.int32(seed))
        expected = observed(logits, controls, evidence.token)
        assert float(evidence.probability) > 0
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), evidence, expected)


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = logits_of(7, spread=2.0)
    sampling = Sampling(top_k=30, top_p=0.9, temperature=0.8, seed=5)
    controls = Controls.of(sampling, VOCABULARY)
    count = 4000
    evidence = jax.jit(jax.vmap(chosen, (None, None, 0)))(logits, controls, jnp.arange(count))
    p = np.asarray(evidence.probabilities[0])
    ids = np.asarray(evidence.ids[0])
    drawn = np.array([(np.asarray(evidence.token) == i).sum() for i in ids])
    assert (drawn[p == 0] == 0).all()
    common = p * count > 20
    chi2 = ((drawn[common] - p[common] * count) ** 2 / (p[common] * count)).sum()
    assert chi2 < 3 * common.sum()


def test_nan_logits_are_reported():
    logits = logits_of(0)
    logits[17] = np.nan
    assert not chosen(logits, Controls.of(Sampling(seed=0), VOCABULARY), jnp.int32(0)).finite


@pytest.fixture(scope="module")
def table():
    return (jax.random.normal(jax.random.key(0), (VOCABULARY, 128)) * 0.3).astype(jnp.bfloat16)


@pytest.mark.parametrize("soft_cap", [None, 50.0])
def test_the_int8_head_is_exact_where_it_matters(table, soft_cap):
    hidden = jax.random.normal(jax.random.key(1), (128,)) * 2
    scores = jax.jit(Int8Head.scores, static_argnums=3)(Int8Head.of(table), hidden, table, soft_cap)
    exact = np.asarray(table.astype(jnp.float32), np.float64) @ np.asarray(hidden, np.float64)
    if soft_cap is not None:
        exact = soft_cap * np.tanh(exact / soft_cap)
    order = np.argsort(-exact)
    # The likeliest hundred are all on the shortlist, in order, with the plain head's logits.
    assert scores.ids[:100].tolist() == order[:100].tolist()
    np.testing.assert_allclose(scores.values, exact[np.asarray(scores.ids)], rtol=1e-5)
    np.testing.assert_allclose(scores.logits[scores.ids], scores.values)
    assert np.abs(np.asarray(scores.logits) - exact).max() < 0.01 * np.abs(exact).max()


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_the_int8_head_reads_its_rows_once_for_several_states(table, streams, count):
    hidden = jax.random.normal(jax.random.key(3), (count, 128)) * 2
    sums = jax.jit(Int8Head.sums)
    alone = [sums(Int8Head.of(table), state[None])[0] for state in hidden]
    # Sums of integers do not depend on their order.
    np.testing.assert_array_equal(sums(Int8Head.of(table, streams=streams), hidden), alone)


@pytest.mark.parametrize("soft_cap", [None, 50.0])
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(top_k=64, top_p=0.95), Sampling()], ids=str
)
def test_a_forced_token_has_the_plain_heads_logit(table, soft_cap, sampling):
    """On the shortlist or far from it, where the int8 head's own logit is off."""
    hidden = jax.random.normal(jax.random.key(2), (128,)) * 2
    exact = np.asarray(table.astype(jnp.float32), np.float64) @ np.asarray(hidden, np.float64)
    if soft_cap is not None:
        exact = soft_cap * np.tanh(exact / soft_cap)

    @jax.jit
    def forced(head, table, controls):
        seen = jnp.zeros(VOCABULARY, bool)
        scores = head.scores(hidden, table, soft_cap)
        logit = exact_logit(controls.forced, hidden, table, soft_cap)
        return choose(scores, controls, seen, jnp.int32(0), 20, logit)

    head = Int8Head.of(table)
    log_total = np.log(np.exp(exact - exact.max()).sum()) + exact.max()
    order = np.argsort(-exact)
    controls = Controls.of(dataclasses.replace(sampling, seed=0), VOCABULARY)
    for rank in (0, 3, 19, 300, 5000, VOCABULARY - 1):
        token = int(order[rank])
        evidence = forced(head, table, controls.forcing(token))
        assert int(evidence.token) == token
        # What the int8 rows make of the whole sum is the same for every token.
        assert float(evidence.logprob) == pytest.approx(exact[token] - log_total, abs=2e-3)
        first = exact[order[0]] - exact[token]
        assert float(evidence.logprobs[0] - evidence.logprob) == pytest.approx(first, abs=1e-4)
        assert int(evidence.rank) == pytest.approx(rank, abs=0.01 * rank)
        if token in evidence.ids:
            where = evidence.ids.tolist().index(token)
            assert evidence.probability == evidence.probabilities[where]


def test_sums_of_the_widest_model_stay_in_range():
    """5,376 equal activations against rows of the largest int8: the largest sum there can be."""
    table = jnp.ones((64, 5376), jnp.bfloat16)
    hidden = jnp.ones(5376)
    scores = Int8Head.of(table).scores(hidden, table, None)
    np.testing.assert_allclose(scores.logits, 5376.0, rtol=1e-3)
