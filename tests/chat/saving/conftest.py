"""Sessions that are saved while they go on."""

import pytest

import gemma_nb as gnb
from gemma_nb.chat.saving.autosave import Autosave
from tests.chat.saving.autosaved import SAMPLING


@pytest.fixture
def begin(tiny_model):
    """Begins a session, which stops saving when the test ends."""
    made = []

    def begin(**kwargs):
        kwargs = {"sampling": SAMPLING, "cache_length": 400, "template": "none", **kwargs}
        made.append(gnb.ChatSession(*tiny_model, **kwargs))
        return made[-1]

    yield begin
    for chat in made:
        chat.autosave = None


@pytest.fixture
def by_hand(monkeypatch):
    """The thread does not look by itself: the test says when."""
    monkeypatch.setattr(Autosave, "_run", lambda self: None)
