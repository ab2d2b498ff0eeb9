"""Editing, resuming, taking back: what a branch keeps, and where one stands."""

import dataclasses

import pytest

from gemma_nb.chat.turns import Origin
from gemma_nb.errors import BusyError, TextError
from tests.chat.checks import SAMPLING, assert_parity, ids

# --- other replies, other messages ----------------------------------------------------------------


def test_any_message_can_be_replied_to_again(make, score):
    chat = make()
    first = chat.chat("Hello")
    chat.chat("More")
    asked = chat.turns[0]
    again = chat.regenerate(first)
    assert chat.turns == (asked, again)
    assert again.origin == Origin("regenerate", first.id)
    assert chat.regenerate(asked).origin == Origin("regenerate", again.id)
    assert len(chat.siblings(first)) == 3
    assert_parity(chat, again, score)


def test_an_edited_message_is_sent_again(make, score):
    chat = make()
    first, second = chat.chat("Hello"), chat.chat("More")
    asked = chat.turns[2]
    third = chat.edit(asked, "Less")
    assert [turn.text for turn in chat.turns if turn.role == "user"] == ["Hello", "Less"]
    assert chat.siblings(asked) == (asked, chat.turns[2])
    assert chat.turns[2].origin == Origin("edit", asked.id)
    assert chat.turns[1] is first
    chat.select(second)
    assert chat.turns[2] is asked
    fourth = chat.edit(chat.turns[0].id, "Hi")
    assert chat.turns == (chat.turns[0], fourth)
    for turn in (third, fourth):
        assert_parity(chat, turn, score)
    assert [turn.id for turn in chat.tree] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_an_edited_reply_keeps_what_it_shares_and_goes_on(make, score):
    chat = make(template="gemma")
    first = chat.chat("Hello")
    prefix = "".join(record.text for record in first.tokens[:4]).strip() or "x"
    edited = chat.edit(first, f"{prefix}, he said: é")
    assert (edited.finish_reason, edited.text) == ("edited", f"{prefix}, he said: é")
    assert edited.origin.kind == "edit"
    assert chat.tokenizer.decode(edited.ids) == edited.text
    assert chat.turns[-1] is edited
    assert all(r.key is None for r in edited.tokens[edited.origin.index :])
    resumed = chat.resume()
    assert resumed.tokens[: len(edited.tokens)] == edited.tokens
    assert resumed.text.startswith(edited.text)
    assert len(resumed.tokens) > len(edited.tokens)
    for turn in (edited, resumed, chat.chat("Go on")):
        assert_parity(chat, turn, score)
    with pytest.raises(ValueError, match=r"stream_resume\(\)"):
        chat.stream_edit(first, "x")
    with pytest.raises(TextError):
        chat.edit(first, "\ud800")


def test_an_edited_reply_may_hold_a_stop_string(make, score):
    chat = make(template="transcript", cache_length=1000)
    chat.chat("Hello")
    edited = chat.edit(chat.turns[-1], "One.\n\nTwo.")
    assert edited.text == "One.\n\nTwo."
    assert chat.resume().text.startswith("One.\n\nTwo.")


def test_an_empty_reply_can_be_written_and_resumed(make, score):
    chat = make()
    chat.chat("Hello")
    edited = chat.edit(chat.turns[-1], "")
    assert (edited.text, edited.tokens, edited.ids) == ("", (), ())
    assert_parity(chat, chat.resume(), score)


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 3, 10])
def test_a_stopped_reply_goes_on_as_it_would_have(make, score, index):
    whole = make().chat("Hello")
    chat = make()
    for event in chat.stream("Hello"):
        if event.index == index:
            chat.stop()
    stopped = chat.turns[-1]
    assert len(stopped.tokens) == index + 1
    resumed = chat.resume()
    assert resumed.tokens[:12] == whole.tokens
    assert resumed.origin == Origin("resume", stopped.id, index + 1)
    assert resumed.timing.prompt_tokens == 1
    assert chat.siblings(stopped) == (stopped, resumed)
    assert_parity(chat, resumed, score)


def test_a_reply_cut_by_its_limit_goes_on(make, score):
    short = make(sampling=dataclasses.replace(SAMPLING, max_new_tokens=5))
    whole = make().chat("Hello")
    turn = short.chat("Hello")
    assert turn.finish_reason == "length"
    assert short.resume().tokens == whole.tokens[:10]
    assert short.resume(turn).tokens == whole.tokens[:10]
    # Settings may be others, the seed stays.
    long = dataclasses.replace(SAMPLING, seed=None, max_new_tokens=7)
    assert short.resume(turn, sampling=long).tokens == whole.tokens


def test_a_reply_that_came_to_its_end_goes_on_without_it(ended, score):
    chat, turn = ended
    resumed = chat.resume()
    assert resumed.text.startswith(turn.text)
    assert ids(resumed)[5] not in chat.template.stop_ids(chat.tokenizer)
    assert resumed.origin == Origin("resume", turn.id, 5, 1)
    assert_parity(chat, resumed, score)


def test_a_reply_that_a_stop_string_ended_goes_on_before_it(make, score):
    whole = make().chat("Hello")
    stop = next(record.text for record in whole.tokens[3:] if record.text.strip())
    chat = make(sampling=dataclasses.replace(SAMPLING, stop=(stop,)))
    turn = chat.chat("Hello")
    assert turn.finish_reason == "stop"
    resumed = chat.resume()
    assert resumed.text.startswith(turn.text)
    count = resumed.origin.index
    assert ids(resumed)[: len(turn.ids)] == list(turn.ids)
    assert ids(resumed)[count] != ids(turn)[count]
    assert_parity(chat, resumed, score)


def test_only_replies_resume(make):
    chat = make()
    with pytest.raises(ValueError, match="no reply yet"):
        chat.resume()
    chat.chat("Hello")
    with pytest.raises(ValueError, match="expected a reply"):
        chat.resume(chat.turns[0])


# --- moving about ---------------------------------------------------------------------------------


def test_undo_hides_and_redo_shows(make, score):
    chat = make()
    with pytest.raises(ValueError, match="nothing to undo"):
        chat.undo()
    chat.chat("Hello")
    used = chat.cache_used
    chat.chat("More")
    whole = chat.turns
    assert chat.undo() == whole[2:]
    assert (chat.turns, chat.cache_used) == (whole[:2], used)
    assert chat.undo() == whole[:2]
    assert chat.turns == ()
    assert chat.redo() == whole[:2]
    assert chat.redo() == whole[2:]
    assert chat.turns == whole
    with pytest.raises(ValueError, match="nothing to redo"):
        chat.redo()
    chat.undo()
    turn = chat.chat("Other")
    with pytest.raises(ValueError, match="nothing to redo"):
        chat.redo()
    assert_parity(chat, turn, score)
    chat.select(whole[-1])
    assert chat.turns == whole
    assert len(chat.tree) == 6


def test_a_new_conversation_can_be_taken_back(make):
    chat = make()
    chat.chat("Hello")
    turns = chat.turns
    chat.new_conversation()
    assert chat.turns == ()
    assert chat.redo() == turns
    chat.new_conversation()
    chat.chat("Hi")
    assert chat.select(turns[0]) == turns


def test_selecting_shows_what_was_last_shown_below(make, score):
    chat = make()
    first = chat.chat("Hello")
    below = chat.chat("More")
    other = chat.regenerate(first)
    assert chat.turns[-1] is other
    assert chat.select(first)[-1] is below
    assert chat.tree.branches == (below, other)
    # What the cache holds of the branch is used again.
    turn = chat.chat("Go on")
    assert_parity(chat, turn, score)
    with pytest.raises(ValueError, match="not a turn"):
        chat.select(99)


def test_nothing_changes_while_a_reply_is_made(make):
    chat = make()
    first = chat.chat("Hello")
    stream = chat.stream("More")
    next(stream)
    asked = chat.turns[0]
    operations = [
        chat.undo,
        chat.redo,
        chat.resume,
        chat.replay,
        lambda: chat.select(first),
        lambda: chat.fork(first.tokens[0]),
        lambda: chat.edit(asked, "x"),
        lambda: chat.edit(first, "x"),
        lambda: chat.adopt(chat.tree),
    ]
    for operation in operations:
        with pytest.raises(BusyError):
            operation()
    stream.close()
    assert len(chat.tree) == 4


def test_the_making_of_a_reply_can_be_watched(make):
    chat = make()
    first = chat.chat("Hello")
    assert chat.making is None
    for event in chat.stream_regenerate():
        parent, partial = chat.making
        assert (parent, partial.id) == (chat.turns[0].id, 3)
        assert chat.turns == (chat.turns[0],)
        assert len(partial.tokens) > event.index
    assert chat.siblings(first)[-1] is chat.turns[-1]


def test_another_tree_can_be_adopted(make, score):
    chat, other = make(), make()
    turn = chat.chat("Hello")
    other.chat("Something else")
    other.adopt(chat.tree)
    assert other.turns == chat.turns
    assert_parity(other, other.fork(turn.tokens[4], 100), score)
    assert other.chat("More").id == 5
