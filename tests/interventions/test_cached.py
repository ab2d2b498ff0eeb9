"""Interventions are the same in every kind of pass: cached decoding and the whole text."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma_nb as gnb
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.settings import Sampling
from tests.interventions.checks import assert_close, logits

IDS = np.random.default_rng(5).integers(6, 260, 24)
numbers = st.integers(0, 30)
some_positions = st.one_of(
    st.none(), st.lists(numbers, min_size=2, max_size=2), st.builds(slice, numbers, numbers)
)
layer = st.integers(0, 2)
rng = np.random.default_rng(0)
VECTOR = rng.normal(size=32).astype(np.float32)
ROWS = np.abs(rng.normal(size=(2, 6))).astype(np.float32)


def in_sight(query):
    """A query's weights on the last six keys that it sees, all within the window."""
    row = np.zeros(query + 1, np.float32)
    row[-6:] = ROWS[0, : query + 1]
    return row


interventions = st.one_of(
    st.builds(lambda i, p: gnb.AblateHeads({i: [1]}, positions=p), layer, some_positions),
    st.builds(lambda i, p: gnb.ScaleHeads({i: {0: 3.0}}, positions=p), layer, some_positions),
    st.builds(lambda i, p: gnb.AblateMLP([i], positions=p), layer, some_positions),
    st.builds(lambda i, p: gnb.Steer(i, VECTOR, 2.0, positions=p), layer, some_positions),
    st.builds(lambda i, p: gnb.EditNeuron(i, 5, 9.0, positions=p), layer, some_positions),
    st.builds(lambda i, q, k: gnb.KnockOut(i, queries=q, keys=k), layer, *[some_positions] * 2),
    st.builds(
        lambda i, p: gnb.Patch("residual_mid", i, [p, p + 1], VECTOR[None] * [[1], [2]]),
        layer,
        numbers,
    ),
    st.builds(lambda i, p: gnb.Patch("k", i, p, VECTOR[None, :16]), layer, numbers),
    st.builds(lambda i, p: gnb.ReplaceAttention(i, 1, [in_sight(p)], queries=p), layer, numbers),
    st.builds(lambda p: gnb.ForceToken(p, 9), numbers),
)


@pytest.mark.filterwarnings("ignore::gemma_nb.errors.InterventionWarning")
@settings(max_examples=8)
@given(st.lists(interventions, min_size=1, max_size=2), st.sampled_from([0, 0, 7, 26]))
def test_cached_decoding_equals_the_full_pass(tiny_model, items, start):
    model = tiny_model[0].intervene(*items, start=start)
    decoder = Decoder(model, limit=64, top_k=8)
    evidences = [decoder.prefill(decoder.begin(IDS.tolist(), Sampling(temperature=0, seed=0)))]
    evidences += [decoder.step() for _ in range(5)]
    tokens = [*IDS.tolist(), *(int(e.token) for e in evidences)]
    # One length, so that hypothesis waits for few compilations.
    whole = np.asarray(jax.nn.log_softmax(logits(model, tokens)))
    for i, evidence in enumerate(evidences):
        expected = whole[len(IDS) - 1 + i]
        assert_close(evidence.logprobs, expected[evidence.ids], atol=5e-5)


@pytest.mark.parametrize(
    ("layer", "query", "message"),
    [
        (2, 3, "a weight from query 3 on key 4, which comes later"),
        (0, 13, "from query 13 on key 0, which has left the layer's window.*gnb.trace"),
    ],
)
def test_weights_on_what_a_cache_does_not_hold_are_refused(tiny_model, layer, query, message):
    """Decoded they would be other numbers than those of a pass over the whole text."""
    model, tokenizer = tiny_model
    changed = model.intervene(gnb.ReplaceAttention(layer, 1, ROWS[:1], queries=[query]))
    trace = gnb.trace(changed, IDS)
    row = trace.attention.sel(layer=layer, head=1, query=query, key=slice(0, 5))
    np.testing.assert_array_equal(row, ROWS[0])
    with pytest.raises(ValueError, match=message):
        Decoder(changed, limit=64, top_k=8)
    with pytest.raises(ValueError, match=message):
        gnb.ChatSession(changed, tokenizer, template="none")


def test_a_chat_that_refuses_weights_goes_on(tiny_model):
    sampling = Sampling(seed=1, max_new_tokens=12)
    chat = gnb.ChatSession(*tiny_model, template="none", sampling=sampling)
    first = chat.chat("Hello")
    with pytest.raises(ValueError, match="from query 14 on key 0, which has left"):
        chat.intervene(gnb.ReplaceAttention(0, 1, ROWS[:1], queries=[14]))
    assert chat.turns[-1] == first
    # What is before the reply does not act.
    row = np.eye(15, 6, dtype=np.float32)[[5]]
    early = gnb.ReplaceAttention(0, 1, [*ROWS[:1], *row], queries=[3, 9])
    assert chat.intervene(early, at=1).tokens[0] == first.tokens[0]
    assert len(chat.chat("More").tokens) == 12


def test_values_that_change_do_not_compile_the_step_again(tiny_model):
    model, _ = tiny_model
    decoder = Decoder(model.intervene(gnb.Steer(1, VECTOR)), limit=64, top_k=8)
    decoder.prefill(decoder.begin(IDS.tolist(), Sampling(seed=0)))
    decoder.step()
    compiled = decoder._programs.decode_step.feed.count()
    decoder.intervene(model.intervene(gnb.Steer(2, -VECTOR, 3.0)).interventions)
    decoder.prefill(decoder.begin(IDS.tolist(), Sampling(seed=0)))
    decoder.step()
    assert decoder._programs.decode_step.feed.count() == compiled


def test_a_change_keeps_what_it_does_not_concern_in_the_cache(tiny_model):
    model, _ = tiny_model
    decoder = Decoder(model, limit=64, top_k=8)
    greedy = Sampling(temperature=0, seed=0)
    decoder.prefill(decoder.begin(IDS.tolist(), greedy))
    changed = model.intervene(gnb.AblateHeads({0: [0]}), start=15)
    decoder.intervene(changed.interventions)
    assert decoder.ids == IDS[:15].tolist()
    evidence = decoder.prefill(decoder.begin(IDS.tolist(), greedy))
    expected = np.asarray(jax.nn.log_softmax(logits(changed, IDS)))[-1]
    assert_close(evidence.logprobs, expected[evidence.ids], atol=5e-5)
    decoder.intervene(changed.interventions)
    assert len(decoder.ids) == len(IDS)
    decoder.intervene(None)
    assert decoder.ids == IDS[:15].tolist()
    evidence = decoder.prefill(decoder.begin(IDS.tolist(), greedy))
    expected = np.asarray(jax.nn.log_softmax(logits(model, IDS)))[-1]
    assert_close(evidence.logprobs, expected[evidence.ids], atol=5e-5)
