"""Saving's view of a session: the members that it reads, and nothing else of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from gemma_nb.chat.context import WhenFull
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.chat.turns import Turn
from gemma_nb.model import GemmaTransformer
from gemma_nb.sampling.settings import Capture, Sampling
from gemma_nb.text.template import Template
from gemma_nb.text.tokenizer import Tokenizer


class SavedSession(Protocol):
    """A session as saving sees it; `ChatSession` is one."""

    @property
    def model(self) -> GemmaTransformer:
        """The model that its evidence is of."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""

    @property
    def template(self) -> Template:
        """The template that its turns are encoded by."""

    @property
    def tree(self) -> ConversationTree:
        """All branches."""

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The active branch."""

    @property
    def making(self) -> tuple[int, Turn] | None:
        """The id of the message that is being replied to, and the reply as far as it has come."""

    @property
    def system(self) -> str | None:
        """The text that the model is given before the conversation."""

    @property
    def sampling(self) -> Sampling:
        """How the next reply is sampled."""

    @property
    def cache_length(self) -> int:
        """Most positions of context."""

    @property
    def capture(self) -> Capture:
        """The evidence that each token keeps."""

    @property
    def when_full(self) -> WhenFull:
        """The policy for a full context."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a session, as its file holds them.

    Attributes:
      system, sampling, cache_length, capture, when_full: as of `ChatSession`.
    """

    system: str | None
    sampling: Sampling
    cache_length: int
    capture: Capture
    when_full: WhenFull = "stop"

    @classmethod
    def of(cls, session: SavedSession) -> Settings:
        """The settings of a session."""
        return cls(
            **{field.name: getattr(session, field.name) for field in dataclasses.fields(cls)}
        )

    def arguments(self) -> dict[str, Any]:
        """The settings by their names, as arguments of `ChatSession`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class Partial:
    """A reply in the making.

    Attributes:
      parent: id of the node that it follows.
      turn: as far as it has come.
    """

    parent: int
    turn: Turn
