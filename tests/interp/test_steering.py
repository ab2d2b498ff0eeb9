"""Steering vectors from contrasting prompts."""

import numpy as np
import pytest

import gemma_nb as gnb
from tests.interventions.checks import assert_close
from tests.parity.cases import RANDOM, model_of


@pytest.fixture(scope="module")
def case():
    """A grouped-query model and 24 token ids."""
    return model_of(RANDOM["grouped-query"]), RANDOM["grouped-query"].tokens()[:24]


def test_a_steering_vector_is_the_mean_difference_of_prompts(case):
    model, ids = case
    sides = [ids[:6], ids[3:11]], [ids[10:20]]
    vector = gnb.steering_vector(model, *sides, layer=3)
    last = [[gnb.trace(model, x).residual.values[3, -1] for x in side] for side in sides]
    assert_close(vector, np.mean(last[0], axis=0) - np.mean(last[1], axis=0), atol=1e-5)
    mean = gnb.steering_vector(model, [ids[:6]], [ids[10:20]], 3, positions="mean")
    rows = [gnb.trace(model, x).residual.values[3, 1:].mean(0) for x in (ids[:6], ids[10:20])]
    assert_close(mean, rows[0] - rows[1], atol=1e-5)
    model.intervene(gnb.Steer(3, vector, 2.0))
    with pytest.raises(ValueError, match="residual stream"):
        gnb.steering_vector(model, *sides, layer=3, site="z")
    with pytest.raises(ValueError, match="at least one prompt"):
        gnb.steering_vector(model, [], [ids], layer=3)
