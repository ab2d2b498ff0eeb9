"""A context that fills up: warnings, what each policy does, and that the conversation goes on."""

import dataclasses
import itertools

import pytest

from gemma_nb.chat.turns import Context
from gemma_nb.errors import ContextFullError
from tests.chat.checks import SAMPLING, assert_parity

LONG = dataclasses.replace(SAMPLING, max_new_tokens=1000)


def test_a_warning_from_eighty_percent_on(make):
    chat = make(cache_length=50, sampling=LONG)
    assert chat.context.warning == ""
    events = list(chat.stream("Hello"))
    flags = [event.nearly_full for event in events]
    assert flags == sorted(flags)
    assert [event.cache_used >= 40 for event in events] == flags
    turn = chat.turns[-1]
    assert turn.context.nearly_full
    assert turn.context == chat.context
    assert turn.context.warning == "The context is full: 50 of 50 positions in use."
    assert Context(None, 0, 39, 50).warning == ""
    assert "80% full: 40 of 50" in Context(None, 0, 40, 50).warning
    assert "oldest 4 messages" in Context(None, 4, 10, 50).warning
    assert Context().fraction == 0
    # Taking it back makes room.
    chat.undo()
    assert not chat.context.nearly_full


def test_a_reply_that_found_no_room_says_so(make):
    chat = make(cache_length=30, template="gemma")
    shown = repr(chat.chat("This message is longer than the context"))
    assert shown.startswith("<Turn 2 model: '', The context is full: ")


def test_stop_ends_the_reply_and_another_policy_lets_it_go_on(make, score):
    chat = make(cache_length=64, template="gemma")
    chat.chat("one")
    chat.sampling = LONG
    full = chat.chat("two")
    assert full.finish_reason == "length"
    assert chat.cache_used == 64
    chat.sampling = SAMPLING
    assert 'chat.when_full = "drop_oldest"' in full.finish_detail
    with pytest.raises(ContextFullError, match="64"):
        chat.resume()
    assert chat.turns[-1] is full
    chat.when_full = "drop_oldest"
    resumed = chat.resume()
    assert resumed.context.dropped > 0
    assert resumed.text.startswith(full.text.rstrip("\ufffd"))
    assert resumed.tokens[0].position < full.tokens[0].position
    for turn in (resumed, chat.chat("four")):
        assert turn.tokens
        assert_parity(chat, turn, score)


def test_stop_goes_on_after_undoing(make, score):
    chat = make(cache_length=64, template="gemma")
    for word in ("one", "two", "three"):
        chat.chat(word)
    assert chat.turns[-1].tokens == ()
    assert chat.context.used == 64
    chat.undo()
    assert_parity(chat, chat.chat("3"), score)


def test_dropping_leaves_the_tree_and_the_system_text(make, score):
    chat = make(cache_length=96, template="gemma", system="Be kind.", when_full="drop_oldest")
    for count in range(1, 13):
        turn = chat.chat(f"message {count}")
        assert turn.finish_reason != "length" or len(turn.tokens) == SAMPLING.max_new_tokens
        assert turn.context.system == "Be kind."
        assert turn.context.dropped % 2 == 0
        assert turn.context.used <= 96
        assert_parity(chat, turn, score)
        opening = chat.tokenizer.decode(chat.tokens(turn))
        assert opening.startswith("user\nBe kind.\n\nmessage ")
        assert len(chat.turns) == 2 * count
    assert 0 < turn.context.dropped < 2 * count
    assert "no longer in it" in chat.context.warning
    # What was left out is still there, and can be gone back to.
    first = chat.turns[1]
    fork = chat.fork(first.tokens[4], 100)
    assert fork.context.dropped == 0
    assert_parity(chat, fork, score)


def test_room_is_made_for_some_turns_at_once(make):
    """Each time that something is dropped, all that stays has to be computed anew."""
    chat = make(cache_length=200, template="gemma", when_full="drop_oldest")
    dropped = [chat.chat("message").context.dropped for _ in range(30)]
    changes = [b - a for a, b in itertools.pairwise(dropped) if a != b]
    assert changes
    assert min(changes) >= 4
    assert len(changes) <= 30 // 2


def test_error_says_so_and_says_nothing(make, score):
    chat = make(cache_length=64, template="gemma", when_full="error")
    chat.chat("one")
    chat.sampling = LONG
    with pytest.raises(ContextFullError, match="context is full"):
        chat.chat("two")
    kept = chat.turns[-1]
    # The reply that ran out of room is kept.
    assert (kept.role, kept.finish_reason) == ("model", "length")
    assert kept.tokens
    before = len(chat.tree)
    with pytest.raises(ContextFullError, match="64"):
        chat.chat("A message for which there is no room at all")
    assert len(chat.tree) == before
    assert not chat.busy
    chat.undo()
    chat.sampling = SAMPLING
    assert_parity(chat, chat.chat("2"), score)


def test_a_message_too_long_for_any_context(make):
    chat = make(cache_length=30, when_full="drop_oldest")
    chat.chat("Hello")
    turn = chat.chat("x" * 40)
    assert (turn.finish_reason, turn.tokens) == ("length", ())
    assert "30" in turn.finish_detail
    chat.undo()
    assert chat.chat("Hi").tokens
    with pytest.raises(ContextFullError):
        chat.edit(chat.turns[-1], "y" * 40)


def test_policies_are_checked(make):
    with pytest.raises(ValueError, match="'stop', 'drop_oldest', 'error'"):
        make(when_full="forget")
    chat = make()
    assert chat.when_full == "stop"
    with pytest.raises(ValueError, match="got 'forget'"):
        chat.when_full = "forget"
    chat.when_full = "error"
    assert chat.when_full == "error"


def test_a_branch_keeps_the_context_of_its_reply(make, score):
    """Also where the system text is another one by now."""
    chat = make(system="Be kind.")
    first = chat.chat("Hello")
    chat.system = "Be stern."
    fork = chat.fork(first.tokens[4], 100)
    assert fork.context.system == "Be kind."
    assert chat.regenerate().context.system == "Be stern."
    for turn in chat.siblings(first):
        assert_parity(chat, turn, score)
