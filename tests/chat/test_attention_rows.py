"""Attention of a chat's tokens as kept when they were chosen, through all that a chat can do."""

import warnings

import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.chat import sampling_many
from gemma_nb.errors import ConversationWarning

EVERYTHING = gnb.Capture(top_k=5, attention_layers="all")


def assert_attention(chat, turn, count=None):
    """Every token (or so many) has the row of a pass over the whole context."""
    ids = chat.tokens(turn)
    # With others after them, which they do not see: one compilation for all lengths.
    model = chat.model.replace(interventions=chat._core.made_under.of(turn))
    trace = gnb.trace(model, [*ids, *[9] * (200 - len(ids))], tokenizer=chat.tokenizer)
    held = [record for record in turn.tokens if record.attention is not None]
    assert len(held) == (len(turn.tokens) if count is None else count)
    for record in held:
        found, p = record.attention, record.position - 1
        expected = trace.attention.sel(query=p, key=slice(0, p))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)
        np.testing.assert_array_equal(found == 0, expected == 0)
        for name in found.coords:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        assert found.dims == ("layer", "head", "key")
        assert found.attrs["model"] == expected.attrs["model"]


def test_every_way_to_a_reply_has_its_rows(make):
    """The window is 8; the conversation is a hundred tokens."""
    chat = make(capture=EVERYTHING)
    first = chat.chat("A message that is longer than the window")
    assert_attention(chat, first)
    fork = chat.fork(first.tokens[4], first.tokens[4].alternatives[1].token_id)
    assert_attention(chat, fork)
    # Whichever token was put there: the row is of what stands before it.
    assert fork.tokens[4].attention_row is first.tokens[4].attention_row
    assert_attention(chat, chat.fork(first.tokens[3], 100))
    again = chat.regenerate(first)
    assert_attention(chat, again)
    assert_attention(chat, chat.resume(again, sampling=gnb.Sampling(seed=5, max_new_tokens=3)))
    chat.undo()
    last = chat.chat("Something else")
    assert_attention(chat, last)
    chat.select(first)
    stream = chat.stream("More")
    event = next(stream)
    assert event.attention.sizes["key"] == event.position
    for _ in range(4):
        next(stream)
    stream.close()
    assert_attention(chat, chat.turns[-1])
    changed = chat.intervene(gnb.AblateHeads({1: [0]}), at=2)
    assert_attention(chat, changed, count=len(changed.tokens))
    names = [record.attention.attrs["interventions"] for record in changed.tokens]
    assert names == [""] * 2 + list(changed.interventions) * (len(names) - 2)
    for turn in (first, fork, again, last):  # what was said before is as it was
        assert_attention(chat, turn)
    assert_attention(chat, chat.replay(first))


def test_what_no_step_has_chosen_has_no_row(make, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling_many, "fewest", lambda: 3)
    chat = make(capture=EVERYTHING)
    first = chat.chat("Hello")
    edited = chat.edit(first, first.text[:2] + "quite another reply")
    assert_attention(chat, edited, count=edited.origin.index)
    many = chat.sample("Hello", n=3)
    assert [turn.tokens[0].attention for turn in many] == [None] * 3
    for turn in chat.sample("Hello", n=2):
        assert all(record.attention is not None for record in turn.tokens)
    loaded = gnb.ChatSession.load(
        chat.save(tmp_path / "talk.gnb"), chat.model, chat.tokenizer, template="none"
    )
    assert loaded.capture == chat.capture
    assert loaded.turns[-1].tokens == chat.turns[-1].tokens
    assert [record.attention for record in loaded.turns[-1].tokens] == [None] * len(edited.tokens)
    assert_attention(loaded, loaded.chat("And on"))


def test_a_few_tokens_put_there_have_rows(make):
    chat = make(capture=EVERYTHING)
    first = chat.chat("A message that is long enough for a step to be cheaper than a pass over it")
    fork = chat.fork(first.tokens[6], "abc")
    assert fork.origin.given == 3
    assert_attention(chat, fork)


def test_rows_have_a_limit_that_is_told_once(make):
    chat = make(capture=gnb.Capture(attention_layers=(0, 2), attention_bytes=500))
    with pytest.warns(ConversationWarning, match="at most 0.0005 MB"):
        first = chat.chat("Hello")
    kept = chat.attention_kept
    assert kept.layers == (0, 2)
    assert 0 < kept.bytes <= kept.limit == 500
    assert kept.evicted + kept.tokens == len(first.tokens)
    held = [record.attention is not None for record in first.tokens]
    assert held == [False] * kept.evicted + [True] * kept.tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chat.chat("More")
    assert chat.attention_kept.evicted > kept.evicted


@pytest.mark.optimized
def test_capturing_changes_no_reply(make):
    """On this machine's compiler also bit for bit."""
    turns = [
        [chat.chat(text) for text in ("Hello", "A message longer than the window")]
        for chat in (make(), make(capture=gnb.Capture(attention_layers="all")))
    ]
    for without, with_rows in zip(*turns, strict=True):
        assert without.tokens == with_rows.tokens
        assert without.tokens[0].attention is None
        assert with_rows.tokens[0].attention is not None


def test_layers_that_are_not_there_are_refused(make, tmp_path):
    with pytest.raises(ValueError, match="layers 0 to 2"):
        make(capture=gnb.Capture(attention_layers=(3,)))
    for wrong in ("some", "0"):
        with pytest.raises(ValueError, match='must be "all"'):
            gnb.Capture(attention_layers=wrong)
    with pytest.raises(ValueError, match="at least 0"):
        gnb.Capture(attention_bytes=-1)
    capture = gnb.Capture(attention_layers=[0, 17, -4])
    assert capture.fitting(18) is not None
    assert capture.fitting(3).attention_layers == (0,)
    assert gnb.Capture(attention_layers=[17]).fitting(3).attention_layers is None
