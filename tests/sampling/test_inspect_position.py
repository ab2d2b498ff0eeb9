"""Inspection of a cached position, against a pass without a cache."""

import jax
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.settings import Sampling
from tests.sampling.streams import GREEDY, assert_evidence, random_ids


@pytest.fixture
def stream(tiny_model):
    """A decoder that holds 50 tokens, and one more ahead; the window is 8."""
    decoder = Decoder(tiny_model[0], limit=200, top_k=12)
    decoder.prefill(decoder.begin(random_ids(37), GREEDY))
    for _ in range(13):
        decoder.step()
    return decoder


def assert_looks(decoder, model, positions):
    trace = gnb.trace(model, decoder.ids, sites=("attention", "residual", "final"))
    for position in positions:
        found = decoder.inspect_position(position)
        expected = trace.attention.values[:, :, position, : position + 1]
        np.testing.assert_allclose(found.attention, expected, atol=1e-5)
        np.testing.assert_array_equal(found.attention == 0, expected == 0)
        np.testing.assert_allclose(found.residual, trace.residual.values[:, position], atol=1e-5)
        np.testing.assert_allclose(found.final, trace.final.values[position], atol=1e-4)
        assert {x.dtype for x in vars(found).values()} == {np.dtype(np.float32)}


def test_a_look_equals_the_trace(stream, tiny_model):
    assert_looks(stream, tiny_model[0], (0, 1, 6, 7, 8, 9, 20, 36, 37, 41, 48, 49))


def test_a_look_leaves_the_stream_as_it_is(stream, score):
    before = jax.device_get(stream._cache)
    assert stream._ahead is not None
    for position in (3, 30, 49):
        stream.inspect_position(position)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(stream._cache), before)
    ids = [*stream.ids, stream._next]
    evidences = [stream.step() for _ in range(12)]
    tokens = [*ids, *(int(e.token) for e in evidences)]
    expected = score(tokens)
    for i, evidence in enumerate(evidences):
        assert_evidence(evidence, expected[len(ids) - 1 + i])


def test_a_look_into_a_stream_that_was_taken_back(stream, tiny_model):
    back = [*stream.ids[:20], *random_ids(6, seed=3)]
    stream.prefill(stream.begin(back, Sampling(seed=1)))
    assert_looks(stream, tiny_model[0], (19, 20, 25))
    stream.step()
    assert_looks(stream, tiny_model[0], (26,))


def test_a_look_sees_the_interventions(stream, tiny_model):
    model = tiny_model[0].intervene(gnb.AblateHeads({1: [0]}), start=12)
    stream.intervene(model.interventions)
    stream.prefill(stream.begin(random_ids(37), GREEDY))
    stream.step()
    assert_looks(stream, model, (10, 13, 37))


def test_a_look_compiles_once_for_each_cache_size(stream):
    stream.inspect_position(5)
    program = stream._programs.inspection
    compiled = program.count()
    for position in (0, 17, 49):
        stream.inspect_position(position)
    assert program.count() == compiled


def test_positions_that_are_not_held_are_refused(stream, tiny_model):
    for position in (-1, 50, 51):
        with pytest.raises(ValueError, match="positions 0 to 49"):
            stream.inspect_position(position)
    with pytest.raises(ValueError, match="holds positions"):
        Decoder(tiny_model[0], limit=20, top_k=2).inspect_position(0)
