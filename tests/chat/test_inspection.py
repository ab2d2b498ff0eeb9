"""Single tokens looked at from the cache, against passes over the whole context."""

import numpy as np
import pytest

import gemma_nb as gnb


@pytest.fixture
def looks(make, monkeypatch):
    """A session, and the positions that its decoder looks at."""
    chat = make()
    seen = []
    inspect = chat._decoder.inspect_position
    monkeypatch.setattr(chat._decoder, "inspect_position", lambda p: seen.append(p) or inspect(p))
    return chat, seen


def assert_lens(chat, turn, index):
    record = turn.tokens[index]
    expected = gnb.logit_lens(
        chat.trace(turn, sites=()), 5, positions=record.position - 1, watch=[record.token_id]
    )
    found = chat.lens(record, turn=turn, k=5)
    assert set(found) == set(expected)
    assert found.attrs == expected.attrs
    for name in (*found, *found.coords):
        assert found[name].dims == expected[name].dims
        if found[name].dtype.kind == "f":
            np.testing.assert_allclose(found[name], expected[name], atol=2e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert int(found.watched[0]) == record.token_id
    logprob = float(found.watched_logprob[-1, 0, 0])
    assert logprob == pytest.approx(record.logprob, abs=2e-5)


def test_the_lens_of_any_token_comes_from_the_cache(looks):
    chat, seen = looks
    first = chat.chat("Hello")
    second = chat.chat("A message that is longer than the window")
    for turn in (first, second):
        for index in (0, 1, 7, 11):
            assert_lens(chat, turn, index)
    assert seen == [t.tokens[i].position - 1 for t in (first, second) for i in (0, 1, 7, 11)]
    # The conversation goes on as if nobody had looked.
    again = gnb.ChatSession(
        chat.model, chat.tokenizer, sampling=chat.sampling, cache_length=400, template="none"
    )
    for text in ("Hello", "A message that is longer than the window", "More"):
        other = again.chat(text)
    assert chat.chat("More").tokens == other.tokens


def test_a_look_is_a_trace_of_one_position(looks):
    chat, seen = looks
    chat.chat("Hello")
    turn = chat.chat("And on")
    record = turn.tokens[6]
    found = chat.look(6)
    whole = chat.trace(turn, sites=("attention", "residual", "final"))
    at = record.position - 1
    assert seen == [at]
    assert found.attention["query"].values.tolist() == [at]
    expected = {
        "attention": whole.attention.sel(query=[at]),
        "residual": whole.residual.sel(position=[at]),
        "final": whole.final.sel(position=[at]),
    }
    for name, array in expected.items():
        assert found[name].dims == array.dims
        assert found[name].coords.identical(array.coords)
        np.testing.assert_allclose(found[name], array, atol=1e-4)
    # What it does not hold is computed.
    np.testing.assert_allclose(
        found.get("mlp_out", layers=1, positions=at), whole.mlp_out[[1]][:, [at]], atol=1e-5
    )


def test_what_the_cache_does_not_hold_is_computed(looks):
    chat, seen = looks
    first = chat.chat("Hello")
    fork = chat.fork(first.tokens[4], 100)
    assert_lens(chat, fork, 8)
    assert_lens(chat, first, 4)
    assert len(seen) == 2
    assert_lens(chat, first, 8)
    chat.intervene(gnb.AblateHeads({1: [0]}), at=5, turn=fork)
    assert len(seen) == 2
    assert_lens(chat, chat.turns[-1], 7)
    assert len(seen) == 3
    assert_lens(chat, fork, 8)
    assert len(seen) == 3
    stream = chat.stream("More")
    next(stream)
    assert_lens(chat, chat.turns[-1] if chat.turns[-1].tokens else fork, 2)
    stream.close()
    assert len(seen) == 3


def test_tokens_that_are_not_there_have_no_lens(make):
    chat = make()
    with pytest.raises(ValueError, match="no reply yet"):
        chat.lens(0)
    chat.chat("Hello")
    with pytest.raises(ValueError, match="tokens 0 to 11"):
        chat.look(12)
    with pytest.raises(ValueError, match="token ids must lie in"):
        chat.lens(3, watch=[10_000])
