"""The kernel's interrupt at any moment leaves a session that goes on, and loses nothing.

GEMMA_NB_INTERRUPTS is the number of moments; 500 show it, a few guard it.
"""

from __future__ import annotations

import os
import random
import signal

import numpy as np

import gemma_nb as gnb
from gemma_nb.chat.saving import reader
from tests.chat.checks import assert_parity
from tests.chat.interrupting import Interrupt

MOMENTS = int(os.environ.get("GEMMA_NB_INTERRUPTS", "16"))
SAMPLING = gnb.Sampling(seed=1, max_new_tokens=4, forbidden=(0, 1, 5))


def read(stream):
    for _ in stream:
        pass


OPERATIONS = {
    "chat": lambda chat, path: chat.chat("Hello"),
    "stream": lambda chat, path: read(chat.stream("Hello")),
    "regenerate": lambda chat, path: chat.regenerate(),
    "fork": lambda chat, path: chat.fork(1, with_token="xy"),
    "edit a message": lambda chat, path: chat.edit(chat.turns[-2], "Hi"),
    "edit a reply": lambda chat, path: chat.edit(chat.turns[-1], "so"),
    "resume": lambda chat, path: chat.resume(),
    "intervene": lambda chat, path: chat.intervene(gnb.AblateHeads({1: [0]}), at=2),
    "undo": lambda chat, path: chat.undo(),
    "select": lambda chat, path: chat.select(chat.tree.branches[0]),
    "replay": lambda chat, path: chat.replay(),
    "sample": lambda chat, path: chat.sample("Hello", n=2),
    "look": lambda chat, path: chat.look(0),
    "lens": lambda chat, path: chat.lens(1),
    "trace": lambda chat, path: chat.trace(),
    "save": lambda chat, path: chat.save(path),
}


def make(tiny_model, **kwargs):
    chat = gnb.ChatSession(
        *tiny_model, template="none", cache_length=400, sampling=SAMPLING, **kwargs
    )
    chat.chat("longer than the window of eight")
    chat.regenerate()
    chat.chat("More")
    return chat


def go_back(chat, turn):
    """To where nothing was said after a turn."""
    chat.select(turn)
    chat.tree.hide_after(chat.tree.find(turn))


def assert_goes_on(chat, tiny_model, score):
    """The next message is answered as by a session that computes all of it from nothing."""
    assert not chat.busy
    assert chat.partial is None
    if chat.turns and chat.turns[-1].role == "user":
        chat.undo()  # what `select` has shown may be a message
    turn = chat.chat("Still there?")
    assert_parity(chat, turn, score)
    other = gnb.ChatSession(*tiny_model, template="none", cache_length=400)
    other.adopt(chat.tree)
    again = other.replay(turn)
    assert [t.token_id for t in again.tokens] == [t.token_id for t in turn.tokens]
    logprobs = [[t.logprob for t in each.tokens] for each in (again, turn)]
    np.testing.assert_allclose(*logprobs, atol=2e-5)


def assert_nothing_lost(chat, before):
    after = {turn.id: turn for turn in chat.tree}
    assert all(after[turn.id] is turn for turn in before)
    for node in chat.tree.nodes():
        if node.role == "user":
            assert node.children, "a message has a reply, empty or not"


def count(chat, operate, path):
    with Interrupt() as counted:
        operate(chat, path)
    return counted.moments


def test_an_interrupt_at_any_moment_leaves_a_session_that_goes_on(tiny_model, score, tmp_path):
    draw, path = random.Random(0), tmp_path / "talk.gnb"
    chat = make(tiny_model)
    chat.save(path)
    last = chat.turns[-1]
    lengths = {}
    for name, operate in OPERATIONS.items():
        operate(chat, path)  # compiled
        go_back(chat, last)
        lengths[name] = count(chat, operate, path)
        go_back(chat, last)
    raised = 0
    for number in range(MOMENTS):
        name = list(OPERATIONS)[number % len(OPERATIONS)]
        before, at = list(chat.tree), draw.randint(1, lengths[name])
        errors = []  # as a notebook keeps the last one, with all the frames that it went through
        try:
            with Interrupt(at):
                OPERATIONS[name](chat, path)
        except KeyboardInterrupt as error:
            errors.append(error)
        raised += len(errors)
        try:
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert_nothing_lost(chat, before)
            assert_goes_on(chat, tiny_model, score)
            reader.read(path)
            go_back(chat, last)
        except BaseException as error:
            error.add_note(f"{name}, interrupted at moment {at} of {lengths[name]}")
            raise
    assert raised > MOMENTS / 4
