"""Prompts that go through compiled layers one by one, against one program of the whole."""

import copy
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb import processor
from gemma_nb.config import Global, Sliding
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.feed import Captured
from gemma_nb.sampling.layerwise import Layerwise
from gemma_nb.sampling.programs import StepProgram
from gemma_nb.sampling.rows import AttentionRows
from gemma_nb.sampling.settings import Capture, Sampling
from gemma_nb.sampling.weights import decoding_weights

GREEDY = Sampling(temperature=0, seed=0)


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(6, 260, count).tolist()


def alike(actual, expected, share):
    """What differs is a small share of the whole."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert np.linalg.norm(actual - expected) <= share * np.linalg.norm(expected)


def windowed(model, window):
    """The same with another window."""
    config = model.config
    layers = tuple(
        dataclasses.replace(spec, kind=Sliding(window)) if isinstance(spec.kind, Sliding) else spec
        for spec in config.layers
    )
    config = dataclasses.replace(config, layers=layers)
    return dataclasses.replace(model, transformer=model.transformer.clone(config=config))


def test_within_a_window_one_kind_of_layer_is_compiled(tiny_model):
    """Which computes what a layer of the other kind does; until the window may be left."""
    model = windowed(tiny_model[0], 300)
    assert {type(spec.kind) for spec in model.config.layers} == {Global, Sliding}
    decoder, ids, found = Decoder(model, limit=400, top_k=5), random_ids(40, seed=3), []
    feed = decoder._programs.prefill.feed
    assert set(feed._near) < set(feed._layers)
    for apart in (False, True):
        if apart:
            feed = copy.copy(feed)
            feed._window = 0
            programs = decoder._programs
            programs.first_prefill = programs.prefill = dataclasses.replace(
                programs.prefill, feed=feed
            )
        decoder.reset()
        decoder.prefill(decoder.begin(ids[:7], GREEDY))
        evidence = decoder.prefill(decoder.begin(ids, GREEDY))
        assert decoder.cache.size == 256
        archive = decoder._archive.rows(np.arange(len(ids)))
        found.append(jax.device_get((evidence, decoder.cache, archive)))
    a, b = map(jax.tree.leaves, found)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


# What several tokens are computed from, see `Stored`: rows, wide rows, or columns.
@pytest.mark.parametrize(
    ("storage", "dtype", "matrix_unit"),
    [
        ("exact", "float32", False),
        ("exact", "bfloat16", False),
        ("exact", "bfloat16", True),
        ("bfloat16 activations", "bfloat16", False),
        ("int8", "float32", False),
        ("int8", "bfloat16", True),
    ],
)
# The cache holds 200: a window of 300 is never left, and all layers are computed as one kind.
@pytest.mark.parametrize(
    ("before", "window"),
    [
        *((0, 8), (7, 8), (0, 300), (40, 300)),
        # As users compile them, too.
        pytest.param(40, 8, marks=pytest.mark.optimized),
    ],
)
def test_layer_by_layer_is_what_one_program_computes(
    tiny_model, before, window, storage, dtype, matrix_unit, monkeypatch
):
    """Choice, cache, attention, and what is kept of keys, values and residuals."""
    monkeypatch.setattr(processor, "has_matrix_unit", lambda: matrix_unit)
    model, tokenizer = windowed(tiny_model[0], window), tiny_model[1]
    params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    model = dataclasses.replace(model, params=params)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    if storage == "bfloat16 activations":
        transformer = model.transformer.clone(dtype=jnp.bfloat16)
        model = dataclasses.replace(model, transformer=transformer)
        # Eight bits, to which one program does not round everything in between, over three layers.
        close = partial(alike, share=2**-5)
    else:
        model = dataclasses.replace(model, storage=storage)
    ids = random_ids(before + 30, seed=before)
    found = []
    for apart in (True, False):
        rows = AttentionRows(Capture(attention_layers="all"), model, tokenizer, shown=True)
        decoder = Decoder(model, limit=200, top_k=5, rows=rows)
        programs = decoder._programs
        assert isinstance(programs.prefill.feed, Layerwise)
        if not apart:
            captured = Captured(rows.layers, residuals=storage != "int8")
            weights = decoding_weights(model)
            whole = StepProgram.prefill(model.transformer, weights, 5, captured)
            programs.first_prefill = programs.prefill = whole
        if before:
            decoder.prefill(decoder.begin(ids[:before], GREEDY))
        evidence = decoder.prefill(decoder.begin(ids, GREEDY))
        kept = decoder.residuals(ids)
        shown = [kept.before(i) for i in range(1, model.config.num_layers)]
        archive = decoder._archive.rows(np.arange(len(ids)))
        found.append((evidence, decoder.cache, archive, shown))
    (evidence, *others), (evidence_, *others_) = found
    assert int(evidence.token) == int(evidence_.token)
    close(evidence.logprobs, evidence_.logprobs)
    weights, weights_ = (e.attention.weights() for e in (evidence, evidence_))
    close(weights, weights_, **({} if close.func is alike else {"atol": 1e-3}))  # in float16
    assert jax.tree.structure(others) == jax.tree.structure(others_)
    for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(others_), strict=True):
        assert a.dtype == b.dtype
        close(a, b)


@pytest.mark.parametrize("length", [5, 16, 40, 64, 130])
def test_a_first_prompt_is_computed_as_one_behind_others(tiny_model, length):
    """By a program of its own, which reads no cache: choice, evidence and cache are the same."""
    ids = random_ids(length, seed=length)
    found = []
    for own in (True, False):
        rows = AttentionRows(
            Capture(attention_layers="all"), tiny_model[0], tiny_model[1], shown=True
        )
        decoder = Decoder(tiny_model[0], limit=200, top_k=5, rows=rows)
        if not own:
            decoder._programs.first_prefill = decoder._programs.prefill
        first = decoder.prefill(decoder.begin(ids, GREEDY))
        found.append(
            (first, decoder.step(), decoder.cache, decoder._archive.rows(np.arange(length)))
        )
    (first, second, cache, archive), (first_, second_, cache_, archive_) = found
    for own, other in ((first, first_), (second, second_)):
        assert int(own.token) == int(other.token)
        np.testing.assert_allclose(own.logprobs, other.logprobs, atol=1e-5)
        weights = own.attention.weights()
        assert weights.shape[-1] == own.attention.position + 1
        # Kept as float16.
        np.testing.assert_allclose(weights, other.attention.weights(), atol=1e-3)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=2e-3)
    np.testing.assert_allclose(archive, archive_, atol=1e-5)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(cache_), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
