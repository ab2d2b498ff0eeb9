"""The commands run on a fake model."""

from __future__ import annotations

import pytest

import gemma_nb
from gemma_nb.errors import ModelNotInstalledError
from tests.cli.fakes import FakeSession


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts fakes in the place of the real model; holds the sources that were loaded."""
    sources: list[str] = []

    def load(source: str) -> tuple[str, str]:
        if source == "absent":
            raise ModelNotInstalledError("not here:\n  pip install it")
        sources.append(source)
        return "the model", "the tokenizer"

    monkeypatch.setitem(vars(gemma_nb), "load", load)
    monkeypatch.setitem(vars(gemma_nb), "ChatSession", FakeSession)
    return sources
