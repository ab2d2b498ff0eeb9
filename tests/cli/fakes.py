"""A session that answers without a model, and what is typed to the command."""

from __future__ import annotations

import dataclasses
import io
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma_nb.chat.events import PrefillEvent

REPO = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class FakeSampling:
    temperature: float = 0.5
    top_k: int | None = 64
    top_p: float | None = 0.95
    min_p: float | None = None
    seed: int | None = None
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k}")


def token(index: int, text: str, **changes: Any) -> SimpleNamespace:
    """A token with probability 1/2, behind " the" in the model's own order."""
    fields: dict[str, Any] = {
        "index": index,
        "token_id": 100 + index,
        "text": text,
        "piece": text,
        "logprob": math.log(0.25),
        "probability": 0.5,
        "rank": 1,
        "entropy": 1.25,
        "alternatives": (
            SimpleNamespace(token_id=7, text=" the", logprob=math.log(0.5), probability=0.375),
            SimpleNamespace(
                token_id=100 + index, text=text, logprob=math.log(0.25), probability=0.5
            ),
        ),
    }
    return SimpleNamespace(**(fields | changes))


class FakeSession:
    """Answers every message with `tokens`, or raises what stands among them."""

    tokens: tuple[Any, ...] = (token(0, " Paris"), token(1, ".\n"))
    finish = ("stop", "the reply is complete")
    last: FakeSession

    def __init__(self, model: str, tokenizer: str, **options: Any) -> None:
        assert (model, tokenizer) == ("the model", "the tokenizer")
        if options["template"] == "wrong":
            raise ValueError("unknown template 'wrong'")
        self.options = options
        self.sampling = FakeSampling()
        self.template = SimpleNamespace(strip_reply=True)
        self.turns: tuple[Any, ...] = ()
        self.heard: list[str] = []
        self.listeners: list[Any] = []
        FakeSession.last = self

    def on_prefill(self, listener: Any) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def stream(self, text: str) -> Iterator[Any]:
        self.heard.append(text)
        for done in (1500, 3000):
            for listener in self.listeners:
                listener(PrefillEvent(done, 3000))
        for item in self.tokens:
            if isinstance(item, BaseException):
                raise item
            yield item
        reason, detail = self.finish
        turn = SimpleNamespace(tokens=self.tokens, finish_reason=reason, finish_detail=detail)
        self.turns = (*self.turns, text, turn)


def speak(monkeypatch: pytest.MonkeyPatch, *tokens: Any, finish: tuple[str, str] | None = None):
    monkeypatch.setattr(FakeSession, "tokens", tokens)
    if finish:
        monkeypatch.setattr(FakeSession, "finish", finish)


def type_in(monkeypatch: pytest.MonkeyPatch, text: str, *, tty: bool) -> None:
    stdin = io.StringIO(text)
    stdin.isatty = lambda: tty  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)


def pipe_in(monkeypatch: pytest.MonkeyPatch, content: bytes, encoding: str = "utf-8") -> None:
    stdin = io.TextIOWrapper(io.BytesIO(content), encoding=encoding)
    monkeypatch.setattr(sys, "stdin", stdin)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options
    )
