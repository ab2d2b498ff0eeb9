"""Streams of random tokens, and what their evidence has to be."""

import numpy as np
import pytest

from gemma_nb.sampling.settings import Sampling

GREEDY = Sampling(temperature=0, seed=0)


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(6, 260, count).tolist()


def assert_evidence(evidence, log_probabilities):
    """The evidence is that of the whole distribution."""
    p = np.exp(log_probabilities)
    order = np.argsort(-log_probabilities, kind="stable")
    token = int(evidence.token)
    assert set(evidence.ids.tolist()) == set(order[: len(evidence.ids)].tolist())
    np.testing.assert_allclose(evidence.logprobs, log_probabilities[evidence.ids], atol=1e-5)
    assert float(evidence.logprob) == pytest.approx(log_probabilities[token], abs=1e-5)
    assert float(evidence.entropy) == pytest.approx(-(p * log_probabilities).sum(), abs=1e-5)
    assert int(evidence.rank) == (log_probabilities > log_probabilities[token] + 1e-6).sum()
