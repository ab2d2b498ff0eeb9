"""A reply that is stopped, dropped or interrupted holds what had come, and the session goes on."""

import contextlib
import os
import signal
import threading

import pytest

import gemma_nb as gnb
from gemma_nb.sampling import prefill
from tests.chat.checks import assert_parity

# --- replies --------------------------------------------------------------------------------------


def test_stop_ends_the_reply_and_the_conversation_goes_on(make, score):
    chat = make()
    for event in chat.stream("Hello"):
        if event.index == 4:
            chat.stop()
    turn = chat.turns[-1]
    assert (turn.finish_reason, len(turn.tokens)) == ("cancelled", 5)
    assert_parity(chat, chat.chat("Go on"), score)


def test_stop_before_a_reply_does_not_end_the_next(make):
    chat = make()
    chat.stop()
    assert chat.chat("Hello").finish_reason != "cancelled"


def test_dropping_the_stream_keeps_what_came(make, score):
    chat = make()
    stream = chat.stream("Hello")
    events = [next(stream) for _ in range(3)]
    assert chat.busy
    assert [r.token_id for r in chat.partial.tokens] == [e.token_id for e in events]
    stream.close()
    assert chat.turns[-1].finish_reason == "cancelled"
    assert len(chat.turns[-1].tokens) == 3
    assert not chat.busy
    assert_parity(chat, chat.chat("Go on"), score)


def read_and_interrupt(chat, index):
    """Reads a reply, and presses Ctrl-C right after a token."""
    for event in chat.stream("Hello"):
        if event.index == index:
            os.kill(os.getpid(), signal.SIGINT)


def test_stop_frees_a_stream_that_nobody_reads_on(make):
    chat = make()
    stream = chat.stream("Hello")
    next(stream)
    chat.stop()
    assert not chat.busy
    assert chat.turns[-1].finish_reason == "cancelled"
    assert list(stream) == []


def test_a_keyboard_interrupt_keeps_the_partial_turn(make, score):
    chat = make()
    with pytest.raises(KeyboardInterrupt):
        read_and_interrupt(chat, 3)
    turn = chat.turns[-1]
    assert turn.finish_reason in ("interrupted", "cancelled")
    assert len(turn.tokens) == 4
    assert_parity(chat, chat.chat("Go on"), score)


def test_stop_closes_no_stream_that_another_thread_reads(make):
    """A thread that read a reply before stops another's, which ends after its token."""
    chat = make(sampling=gnb.Sampling(seed=1, max_new_tokens=4, forbidden=(0, 1, 5)))
    chat.chat("Hello")
    unread = chat.stream("Not begun")
    chat.stop()
    assert len(list(unread)) == 4, "nor does it close what nobody reads yet"
    reads, stopped, ended = threading.Event(), threading.Event(), []

    def read():
        stream = chat.stream("More")
        assert next(stream)
        reads.set()
        assert stopped.wait(30)
        ended.append(chat.busy)
        ended.append(len(list(stream)))

    thread = threading.Thread(target=read)
    thread.start()
    assert reads.wait(30)
    chat.stop()
    stopped.set()
    thread.join()
    assert ended[0], "it was still open"
    assert chat.turns[-1].finish_reason == "cancelled"


def test_an_interrupt_inside_a_step_waits_for_its_end(make, monkeypatch, score):
    chat = make()
    step = chat._decoder.step

    def interrupted_step(**how):
        os.kill(os.getpid(), signal.SIGINT)
        return step(**how)

    monkeypatch.setattr(chat._decoder, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        chat.chat("Hello")
    monkeypatch.undo()
    assert chat.turns[-1].finish_reason == "interrupted"
    assert len(chat.turns[-1].tokens) == 1
    # The step was finished, so the cache holds its token.
    assert chat.cache_used == len(chat.tokens())
    assert_parity(chat, chat.chat("Go on"), score)


@pytest.fixture
def in_pieces(monkeypatch):
    """Prompts are read sixteen tokens at a time."""
    monkeypatch.setattr(prefill, "BUCKETS", (16,))


def test_each_piece_of_a_prompt_is_told(make, in_pieces, score):
    chat, told = make(), []
    forget = chat.on_prefill(told.append)
    turn = chat.chat("x" * 40)
    read = turn.timing.prompt_tokens
    assert read > 32
    assert [event.done for event in told] == [16, 32, read]
    assert {event.total for event in told} == {read}
    assert told[0].fraction == 16 / read
    assert_parity(chat, turn, score)
    forget()
    chat.chat("y" * 40)
    assert len(told) == 3


@pytest.mark.parametrize("reason", ["cancelled", "interrupted", "error"])
def test_a_prompt_can_be_left_between_two_pieces(make, in_pieces, score, reason):
    chat, told = make(), []

    def fail():
        raise RuntimeError("my own mistake")

    acts = {
        "cancelled": chat.stop,
        "interrupted": lambda: os.kill(os.getpid(), signal.SIGINT),
        "error": fail,
    }

    def act(event):
        told.append(event)
        acts[reason]()

    forget = chat.on_prefill(act)
    raised = {"interrupted": KeyboardInterrupt, "error": RuntimeError}.get(reason)
    with pytest.raises(raised) if raised else contextlib.nullcontext():
        chat.chat("x" * 60)
    assert len(told) == 1
    message, reply = chat.turns
    assert (message.text, reply.tokens, reply.finish_reason) == ("x" * 60, (), reason)
    forget()
    turn = chat.regenerate()
    # What was read is not read again.
    assert turn.timing.prompt_tokens == told[0].total - told[0].done
    assert_parity(chat, turn, score)
