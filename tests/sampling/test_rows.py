"""Attention rows out of the decoding step, against a pass without a cache."""

import gc
import logging
import threading

import jax
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.sampling import compile_ahead
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.inspect_position import compiled_inspection
from gemma_nb.sampling.rows import AttentionRows, in_order
from gemma_nb.sampling.settings import Capture, Sampling
from tests.sampling.streams import GREEDY, random_ids


@pytest.fixture
def make(tiny_model):
    """Makes a decoder that captures; the window is 8."""

    def make(layers="all", nbytes=10**9):
        rows = AttentionRows(Capture(12, layers, nbytes), *tiny_model, shown=True)
        return Decoder(tiny_model[0], limit=200, top_k=12, rows=rows), rows

    return make


def padded(tokens):
    """With others after them, which they do not see: one compilation for all lengths."""
    return [*tokens, *random_ids(128 - len(tokens))]


def assert_rows(model, tokens, rows):
    """Each row is that of the pass over `tokens`, as float16 has it."""
    trace = gnb.trace(model, padded(tokens))
    for row in rows:
        p, layers = row.position, list(row.home.layers)
        expected = trace.attention.values[layers, :, p, : p + 1]
        found = row.weights()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(found == 0, expected == 0)
        assert list(row.ids[: p + 1]) == list(tokens[: p + 1])


@pytest.mark.parametrize("length", [1, 8, 17, 100])
def test_rows_of_any_prompt_equal_the_trace(make, tiny_model, length):
    """Rings that are empty, partly filled and full, padded pieces, several pieces."""
    decoder, _ = make()
    decoder.prefill(decoder.begin(random_ids(length, seed=3)[: length // 2 + 1], GREEDY))
    ids = random_ids(length, seed=3)
    found = decoder.prefill(decoder.begin(ids, GREEDY))
    assert found.attention.position == length - 1
    assert_rows(tiny_model[0], ids, [found.attention])


def test_rows_of_steps_equal_the_trace(make, tiny_model, monkeypatch):
    """Across the window's edge and a growing cache; rings hold no more than a window."""
    monkeypatch.setattr("gemma_nb.sampling.cache.SIZES", (6, 48))
    decoder, rows = make()
    ids = random_ids(4)
    evidences = [decoder.prefill(decoder.begin(ids, GREEDY))]
    evidences += [decoder.step() for _ in range(30)]
    found = [e.attention for e in evidences]
    tokens = [*ids, *(int(e.token) for e in evidences)]
    assert_rows(tiny_model[0], tokens, found)
    layers, heads = (2, 1), 2  # local, global
    for row in found:
        held = layers[0] * min(row.position + 1, 8) + layers[1] * (row.position + 1)
        assert row.nbytes == held * heads * np.dtype(np.float16).itemsize
    assert rows.kept.tokens == len(found)
    assert rows.kept.bytes == sum(row.nbytes for row in found)
    assert rows.kept.warning == ""


def test_rows_of_chosen_layers(make, tiny_model):
    for layers, expected in (((0,), (0,)), ([-1], (2,))):  # without global ones, without local ones
        decoder, rows = make(layers)
        ids = random_ids(9)
        found = [decoder.prefill(decoder.begin(ids, GREEDY)), decoder.step()]
        assert rows.kept.layers == expected
        tokens = [*ids, *(int(e.token) for e in found)]
        assert_rows(tiny_model[0], tokens, [e.attention for e in found])
    with pytest.raises(ValueError, match="layers 0 to 2"):
        make((3,))


def test_rows_after_a_stream_was_taken_back(make, tiny_model):
    """Steps ahead, forced tokens, a ring made anew: each row is that of its own context."""
    decoder, _ = make()
    model = tiny_model[0]
    ids = random_ids(30)
    evidences = [decoder.prefill(decoder.begin(ids, Sampling(seed=8, temperature=2.0)))]
    evidences += [decoder.step(token) for token in (None, None, 77, None, 9, 10, None, None)]
    first = [*ids, *(int(e.token) for e in evidences)]
    for back in (37, 20, 9, 3):
        context = [*first[:back], *random_ids(3, seed=back)]
        again = [decoder.prefill(decoder.begin(context, GREEDY)), decoder.step(), decoder.step()]
        tokens = [*context, *(int(e.token) for e in again)]
        assert_rows(model, tokens, [e.attention for e in again])
    assert_rows(model, first, [e.attention for e in evidences])  # what they were chosen under


def test_rows_see_the_interventions(make, tiny_model):
    decoder, _ = make()
    changed = tiny_model[0].intervene(gnb.KnockOut(2, queries=[20], keys=[3]))
    ids = random_ids(21)
    before = decoder.prefill(decoder.begin(ids, GREEDY)).attention
    decoder.intervene(changed.interventions)
    after = decoder.prefill(decoder.begin(ids, GREEDY)).attention
    assert before.weights()[2, 0, 3] > 0
    assert after.weights()[2, 0, 3] == 0
    assert (before.interventions, after.interventions) == (None, changed.interventions)


def test_the_oldest_rows_go_first(make, tiny_model):
    decoder, rows = make(nbytes=4_000)
    ids = random_ids(20)
    evidences = [decoder.prefill(decoder.begin(ids, GREEDY))]
    evidences += [decoder.step() for _ in range(30)]
    kept = rows.kept
    assert 0 < kept.bytes <= kept.limit == 4_000
    assert kept.evicted + kept.tokens == 31
    assert str(kept.evicted) in kept.warning
    gone = [e.attention.weights() is None for e in evidences]
    assert gone == [True] * kept.evicted + [False] * kept.tokens
    tokens = [*ids, *(int(e.token) for e in evidences)]
    assert_rows(tiny_model[0], tokens, [e.attention for e in evidences[kept.evicted :]])
    # What nobody refers to takes no room.
    del evidences
    gc.collect()
    assert (rows.kept.tokens, rows.kept.bytes) == (0, 0)


@pytest.mark.optimized
def test_capturing_changes_no_choice(make, tiny_model):
    """Here tokens and evidence are the same bit for bit."""
    ids = random_ids(25)
    found = []
    for decoder in (make()[0], Decoder(tiny_model[0], limit=200, top_k=12)):
        evidences = [decoder.prefill(decoder.begin(ids, Sampling(seed=3)))]
        evidences += [decoder.step() for _ in range(20)]
        found.append(evidences)
    for with_rows, without in zip(*found, strict=True):
        jax.tree.map(np.testing.assert_array_equal, with_rows.replace(attention=None), without)


def test_a_ring_in_order():
    # Slots of a window of 4 after 6 tokens: 4 5 2 3.
    np.testing.assert_array_equal(in_order(np.array([4, 5, 2, 3]), 4, 5, 5), [2, 3, 4, 5])
    np.testing.assert_array_equal(in_order(np.array([0, 1, 9, 9]), 4, 1, 1), [0, 1])
    np.testing.assert_array_equal(in_order(np.array([0, 1, 9]), 4, 0, 1), [0, 1])  # no ring yet
    # Two more at once, and one of padding: the first four as they were before.
    fed = np.array([4, 5, 2, 3, 6, 7, 9])
    np.testing.assert_array_equal(in_order(fed, 4, 6, 7), [4, 5, 6, 7])


def test_looks_are_compiled_ahead(tiny_model, caplog):
    compile_ahead.begun.cache_clear()  # of other tests
    compiled_inspection.cache_clear()
    decoder = Decoder(tiny_model[0], limit=300, top_k=5)
    decoder.compile()
    for thread in threading.enumerate():
        if thread.name == compile_ahead.COMPILING:
            thread.join()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        decoder.prefill(decoder.begin(random_ids(5), GREEDY))
        decoder.inspect_position(3)
    assert "jit(look" not in caplog.text
