"""Events of a reply in the making: pieces of its prompt that were read, and its tokens."""

from __future__ import annotations

import dataclasses

from gemma_nb.chat.records import TokenRecord
from gemma_nb.chat.turns import FinishReason


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillEvent:
    """A piece of the prompt was read; see `ChatSession.on_prefill`.

    Attributes:
      done: tokens of the prompt that were read so far.
      total: how many there are to read, without those that were cached before.
    """

    done: int
    total: int

    @property
    def fraction(self) -> float:
        """Share of the prompt that was read."""
        return self.done / self.total


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class TokenEvent(TokenRecord):
    """A token of the reply being made.

    Attributes:
      cache_used: positions of the context in use.
      finish_reason: set on the last event of a reply.
      nearly_full: whether at least 80% of the context is in use.
    """

    cache_used: int
    finish_reason: FinishReason | None
    nearly_full: bool = False
