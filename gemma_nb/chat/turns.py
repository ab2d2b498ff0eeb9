"""Turns of a conversation, with all that is known about how each was made."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from gemma_nb.chat.tokens import Tokens
from gemma_nb.sampling.settings import Sampling

if TYPE_CHECKING:
    import pandas

_NONE = Tokens()

Role = Literal["user", "model"]

# stop: the model ended its turn, or a stop string came.  length: max_new_tokens, or the context is
# full.  cancelled: chat.stop().  interrupted: the kernel's interrupt.  error: an exception.
# edited: the user wrote it.
FinishReason = Literal["stop", "length", "cancelled", "interrupted", "error", "edited"]
# How a turn came to stand beside another one.
Branching = Literal["fork", "resume", "edit", "regenerate", "intervene"]
# From this share of the context on, the user is warned.
WARN_FROM = 0.8


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Durations of a reply.

    Attributes:
      prompt_tokens: tokens that had to be computed before the reply (not those still cached).
      prefill_seconds: until the first token was chosen, compilation included.
      new_tokens: tokens chosen.
      decode_seconds: from the first token to the last.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, over all tokens but the first; 0 where there is no second."""
        if self.new_tokens < 2 or self.decode_seconds <= 0:
            return 0.0
        return (self.new_tokens - 1) / self.decode_seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """The place where a turn branched off another one.

    A reply's tokens before `index` are those of the turn it came from, with their evidence; the
    `given` tokens from there on were put there by the user; the rest was drawn.

    Attributes:
      kind: what the user did.
      turn: id of the turn it came from, a sibling.
      index: the reply's first token of its own; 0 for the user's messages.
      given: how many tokens were given, from `index` on.
    """

    kind: Branching
    turn: int
    index: int = 0
    given: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """The context that a reply was made in.

    Attributes:
      system: what the model was told before the conversation.
      dropped: how many turns of the path, from the oldest on, were left out to make room.
      used: positions in use when the reply ended.
      length: positions that there were.
    """

    system: str | None = None
    dropped: int = 0
    used: int = 0
    length: int = 0

    @property
    def fraction(self) -> float:
        """Share of the context in use."""
        return self.used / self.length if self.length else 0.0

    @property
    def nearly_full(self) -> bool:
        """Whether at least 80% of the context is in use."""
        return self.length > 0 and self.used >= WARN_FROM * self.length

    @property
    def warning(self) -> str:
        """Advice to the user about the context; empty while there is nothing to tell."""
        told = []
        if self.nearly_full:
            state = "full" if self.used >= self.length else f"{self.fraction:.0%} full"
            told.append(f"The context is {state}: {self.used} of {self.length} positions in use.")
        if self.dropped:
            told.append(f"The oldest {self.dropped} messages are no longer in it.")
        return "  ".join(told)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
      id: unique in its session.
      role: "user" or "model".
      text: the message.
      tokens: a reply's tokens with their evidence, as records and as columns; empty for the
        user's messages.  Any sequence of records may be given.
      ids: a reply's token ids as they stay in the context, without what ended it.
      finish_reason: why a reply ended.
      finish_detail: the same in a sentence.
      timing: of a reply.
      sampling: the settings of a reply, its seed included.
      origin: where it branched off; None for what was simply said next.
      context: what a reply was made in; None for the user's messages.
      interventions: what a reply was computed under, one line for each.
    """

    id: int
    role: Role
    text: str
    tokens: Tokens = _NONE
    ids: tuple[int, ...] | None = None
    finish_reason: FinishReason | None = None
    finish_detail: str = ""
    timing: Timing = Timing()
    sampling: Sampling | None = None
    origin: Origin | None = None
    context: Context | None = None
    interventions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Tokens):
            object.__setattr__(self, "tokens", Tokens(self.tokens))

    def __repr__(self) -> str:
        if self.role == "user":
            return f"<Turn {self.id} user: {self.text!r}>"
        # An empty reply is a riddle without its reason.
        evidence = f"{len(self.tokens)} tokens" if self.tokens else "no evidence"
        known = self.text or not self.finish_detail
        end = f"{evidence}, {self.finish_reason}" if known else self.finish_detail
        return f"<Turn {self.id} model: {self.text!r}, {end}>"

    def table(self, k: int = 3) -> pandas.DataFrame:
        """The reply's tokens, one per row, with the `k` alternatives that were not chosen.

        Columns: token, probability (before the sampler), drawn with (after it), rank (1: the
        model's first choice), entropy (nats), and the alternatives with their probabilities.
        """
        import math

        import pandas

        tokens, others = self.tokens, self.tokens.alternatives
        columns = (tokens.token_id, others.count, others.token_id, others.text, others.logprob)
        instead = []
        for token_id, count, *row in zip(*(column.tolist() for column in columns), strict=True):
            named = [
                f"{text!r} {math.exp(logprob):.1%}"
                for other, text, logprob in list(zip(*row, strict=True))[:count]
                if other != token_id
            ]
            instead.append(", ".join(named[:k]))
        return pandas.DataFrame(
            {
                "token": tokens.piece.tolist(),
                "probability": [math.exp(logprob) for logprob in tokens.logprob.tolist()],
                "drawn with": tokens.probability.tolist(),
                "rank": (tokens.rank + 1).tolist(),
                "entropy": tokens.entropy.tolist(),
                "alternatives": instead,
            }
        )
