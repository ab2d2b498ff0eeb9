"""Sessions on the tiny random model."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import gemma_nb as gnb
from tests.chat.checks import SAMPLING


@pytest.fixture
def make(tiny_model) -> Callable[..., gnb.ChatSession]:
    """Makes a session; keyword arguments are those of `ChatSession`."""

    def make(**kwargs):
        kwargs = {"sampling": SAMPLING, "cache_length": 400, "template": "none", **kwargs}
        return gnb.ChatSession(*tiny_model, **kwargs)

    return make
