"""What a conversation is made of, and what is told while a reply is being made."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from gemma_nb.chat.packed import Packed
from gemma_nb.chat.rows import labelled
from gemma_nb.sampling.rows import AttentionRow
from gemma_nb.sampling.settings import Sampling

if TYPE_CHECKING:
    import pandas
    import xarray

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
class Alternative:
    """A token that the model considered.

    Attributes:
      token_id: its id.
      text: what it stands for on its own.
      logprob: log-probability in nats, before the sampler.
      probability: what the sampler drew it with (0 where top-k, top-p or min-p removed it).
    """

    token_id: int
    text: str
    logprob: float
    probability: float


@dataclasses.dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token of a reply, with the evidence of its choice.

    Attributes:
      index: its place in the reply.
      token_id: its id.
      text: what it added to the reply; empty for a part of a character, and for the token that
        ended the reply.
      piece: what it stands for on its own.
      position: its absolute position in the context.  It was chosen at position - 1.
      logprob: log-probability in nats, before the sampler.
      probability: what the sampler drew it with.
      entropy: of the model's distribution, in nats.
      rank: how many tokens the model found more likely (0: its first choice).
      alternatives: the model's most likely tokens, in order.
      key: (seed, fold) of the random key that drew it: `jax.random.fold_in(key(seed), fold)`.  None
        for a token that was given, not drawn; `probability` is then what the sampler would have
        drawn it with.
      attention_row: what `attention` reads; neither compared nor saved.
    """

    index: int
    token_id: int
    text: str
    piece: str
    position: int
    logprob: float
    probability: float
    entropy: float
    rank: int
    alternatives: tuple[Alternative, ...]
    key: tuple[int, int] | None = dataclasses.field(default=None, kw_only=True)
    attention_row: AttentionRow | None = dataclasses.field(
        default=None, kw_only=True, compare=False, repr=False, metadata={"stored": False}
    )

    def __repr__(self) -> str:
        others = [a for a in self.alternatives if a.token_id != self.token_id][:3]
        instead = ", ".join(f"{a.text!r} {a.probability:.3f}" for a in others)
        return (
            f"<{type(self).__name__} {self.index} {self.piece!r}: probability "
            f"{self.probability:.3f}, logprob {self.logprob:.2f}, rank {self.rank}, entropy "
            f"{self.entropy:.2f}; instead {instead or 'nothing'}>"
        )

    @property
    def attention(self) -> xarray.DataArray | None:
        """How much each head looked at each token before this one when it was chosen.

        The query is the token at `position` - 1, whose states the choice was made from: its row
        says why this token, not what this token looked at itself.  It came out of the step that
        made the choice, under the interventions of that step, and was kept in float16.

        Returns:
          (layer, head, key) float32 over the layers captured and the positions up to the query's,
          0 outside a local layer's window; each row sums to 1 within float16's rounding.  None
          where the session's `Capture.attention_layers` is None; where the token's evidence did
          not come from a decoding step (one of three or more replies of `chat.sample`, a long text
          put there by hand, evidence that was recomputed, another library's module or one on a
          mesh); where the row was evicted (see `chat.attention_kept`); and in a conversation that
          was loaded, since files do not hold rows.  `chat.look` computes what is not there.
        """
        return None if self.attention_row is None else labelled(self.attention_row)


# In place of the slot, which then holds what `Packed` makes of the alternatives.
setattr(TokenRecord, "alternatives", Packed(vars(TokenRecord)["alternatives"], Alternative))  # noqa: B010


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


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """How long a reply took.

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
    """Where a turn branched off another one.

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
    """What a reply was made in.

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
        """What to tell the user about the context; empty while there is nothing to tell."""
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
      tokens: a reply's tokens with their evidence; empty for the user's messages.
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
    tokens: tuple[TokenRecord, ...] = ()
    ids: tuple[int, ...] | None = None
    finish_reason: FinishReason | None = None
    finish_detail: str = ""
    timing: Timing = Timing()
    sampling: Sampling | None = None
    origin: Origin | None = None
    context: Context | None = None
    interventions: tuple[str, ...] = ()

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

        rows = []
        for record in self.tokens:
            others = [a for a in record.alternatives if a.token_id != record.token_id][:k]
            rows.append(
                {
                    "token": record.piece,
                    "probability": math.exp(record.logprob),
                    "drawn with": record.probability,
                    "rank": record.rank + 1,
                    "entropy": record.entropy,
                    "alternatives": ", ".join(
                        f"{a.text!r} {math.exp(a.logprob):.1%}" for a in others
                    ),
                }
            )
        columns = ["token", "probability", "drawn with", "rank", "entropy", "alternatives"]
        return pandas.DataFrame(rows, columns=columns)
