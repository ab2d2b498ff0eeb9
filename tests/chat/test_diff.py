"""Two branches beside each other, from where they part."""

import pytest

from tests.chat.checks import ids


def test_two_forks_are_seen_under_each_others_choice(make, score):
    chat = make()
    a = chat.chat("Hello")
    b = chat.fork(a.tokens[4], 100)
    diff = chat.diff(a, b)
    assert (diff.index, diff.shared) == (4, chat.turns[:1])
    assert (diff.a.turn, diff.b.reply) == (a, b)
    before = len(chat.tokens(a)) - len(a.tokens)
    for side, own, other in ((diff.a, a, b), (diff.b, b, a)):
        assert [t.token_id for t in side.tokens] == ids(own)[4:]
        swapped = chat.tokens(own)
        swapped[before + 4] = other.tokens[4].token_id
        here, there = score(chat.tokens(own)), score(swapped)
        for token, record in zip(side.tokens, own.tokens[4:], strict=True):
            row = record.position - 1
            assert token.piece == record.piece
            assert token.logprob == pytest.approx(record.logprob, abs=2e-5)
            assert token.logprob == pytest.approx(here[row, token.token_id], abs=2e-5)
            assert token.under_other == pytest.approx(there[row, token.token_id], abs=2e-5)
        # The token at the parting stands in the same place in both.
        assert side.tokens[0].logprob == pytest.approx(side.tokens[0].under_other, abs=1e-6)
        assert side.logprob == pytest.approx(sum(t.logprob for t in side.tokens))
    table = diff.table()
    assert len(table) == max(len(a.tokens), len(b.tokens)) - 4
    assert list(table["index"])[:2] == [4, 5]
    assert "in the place of the other" in repr(diff)
    assert diff.a.text == "".join(record.text for record in a.tokens[4:])
    assert repr(diff.a.text) in repr(diff)
    assert "<table" in diff._repr_html_()


def test_two_messages_are_seen_under_each_other(make, score):
    chat = make()
    first = chat.chat("Hello")
    a = chat.chat("More")
    b = chat.edit(chat.turns[2], "Less of it")
    chat.chat("And on")
    diff = chat.diff(a, chat.turns[-1])
    assert (diff.index, diff.shared) == (0, chat.turns[:2])
    assert diff.shared[-1] is first
    assert (diff.a.turn.text, diff.b.turn.text) == ("More", "Less of it")
    assert (diff.a.reply, diff.b.reply) == (a, b)
    context = chat.tokens(b)[: -len(b.tokens)]
    under = score([*context, *ids(a)])
    for i, token in enumerate(diff.a.tokens):
        row = under[len(context) + i - 1]
        assert token.under_other == pytest.approx(row[token.token_id], abs=2e-5)
    # Messages stand for the replies that follow them.
    assert chat.diff(diff.a.turn, diff.b.turn).a == diff.a


def test_branches_that_do_not_part_have_no_difference(make):
    chat = make()
    first = chat.chat("Hello")
    second = chat.chat("More")
    for a, b in ((first, second), (second, first), (first, first)):
        with pytest.raises(ValueError, match="stand on one branch"):
            chat.diff(a, b)
    stopped = chat.fork(second.tokens[3], chat.tokenizer.eos_id)
    diff = chat.diff(second, stopped)
    assert len(diff.b.tokens) == 1
    assert diff.b.tokens[0].token_id == chat.tokenizer.eos_id
    # One that goes on from where the other one stops.
    resumed = chat.resume(second)
    diff = chat.diff(second, resumed)
    assert (diff.index, diff.a.tokens) == (12, ())
    assert all(t.logprob == pytest.approx(t.under_other, abs=1e-6) for t in diff.b.tokens)
