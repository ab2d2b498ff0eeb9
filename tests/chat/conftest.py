"""Sessions on the tiny random model."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import gemma_nb as gnb
from tests.chat.checks import SAMPLING


@pytest.fixture(scope="module")
def make(tiny_model) -> Callable[..., gnb.ChatSession]:
    """Makes a session; keyword arguments are those of `ChatSession`."""

    def make(**kwargs):
        kwargs = {"sampling": SAMPLING, "cache_length": 400, "template": "none", **kwargs}
        return gnb.ChatSession(*tiny_model, **kwargs)

    return make


@pytest.fixture
def ended(make, tiny_model):
    """A session whose only reply the model ended, after five tokens, by <eos>."""
    _, tokenizer = tiny_model
    chat = make()
    first = chat.chat("Hello")
    turn = chat.fork(first.tokens[5], tokenizer.eos_id)
    assert (turn.finish_reason, len(turn.tokens), len(turn.ids)) == ("stop", 6, 5)
    return chat, turn


@pytest.fixture(scope="module")
def grown(make):
    """A conversation with branches of every kind, one of them undone.  Not to be changed."""
    chat = make()
    chat.chat("Hello")
    chat.regenerate()
    chat.fork(2, with_token="x")
    chat.edit(chat.turns[0], "Hello there")
    chat.chat("More")
    chat.resume()
    chat.undo()
    return chat


@pytest.fixture
def saved(grown, tmp_path):
    return grown.save(tmp_path / "talk.gnb")
