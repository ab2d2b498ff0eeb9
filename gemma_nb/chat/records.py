"""Records of tokens: each token of a reply with the evidence of its choice."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_nb.sampling.evidence import Evidence
from gemma_nb.sampling.rows import AttentionRow
from gemma_nb.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xarray


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


@dataclasses.dataclass(frozen=True, slots=True, weakref_slot=True)
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
        default=None, kw_only=True, compare=False, repr=False
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
        return None if self.attention_row is None else _labelled(self.attention_row)


class Deferred:
    """The descriptor of a record's alternatives, which are made when they are first read.

    A record that shows a row of a reply's columns is set to what makes them; most are never asked.
    """

    def __init__(self, slot: Any) -> None:
        """Stands in the place of a slot.

        Args:
          slot: the descriptor of the record's own slot.
        """
        self._slot = slot

    def __get__(self, record: Any, owner: Any = None) -> Any:
        if record is None:
            return self
        alternatives = self._slot.__get__(record)
        if isinstance(alternatives, Callable):  # type: ignore[arg-type]
            alternatives = alternatives()
            self._slot.__set__(record, alternatives)
        return alternatives

    def __set__(self, record: Any, alternatives: Any) -> None:
        self._slot.__set__(record, alternatives)


setattr(TokenRecord, "alternatives", Deferred(vars(TokenRecord)["alternatives"]))  # noqa: B010


def with_alternative(record: TokenRecord, token: int, piece: str) -> TokenRecord | None:
    """Another token in the place of a record, from its own evidence; None where that lacks it.

    Args:
      record: the token that stands there.
      token: the other one's id; may be the same.
      piece: what a lone `token` stands for.
    """
    if record.token_id == token:
        return dataclasses.replace(record, text="", key=None)
    known = next((a for a in record.alternatives if a.token_id == token), None)
    if known is None:
        return None
    return dataclasses.replace(
        record,
        token_id=token,
        text="",
        piece=piece,
        logprob=known.logprob,
        probability=known.probability,
        rank=sum(a.logprob > known.logprob for a in record.alternatives),
        key=None,
    )


def _labelled(row: AttentionRow) -> xarray.DataArray | None:
    """(layer, head, key) float32 with the names that `chat.trace` uses; None once it is evicted."""
    from gemma_nb.interp.labels import Labels
    from gemma_nb.interventions.base import lines_of
    from gemma_nb.sites import SITES

    ids, weights, home = list(row.ids[: row.position + 1]), row.weights(), row.home
    if weights is None:
        return None
    labels = Labels(
        config=home.config,
        ids=np.array(ids, np.int32),
        tokens=tuple(map(home.tokenizer.token_text, ids)),
        attrs={"model": home.title, "interventions": lines_of(row.interventions)},
        tokenizer=home.tokenizer,
    )
    found = labels.array(
        weights[:, :, None],
        ("layer", "head", "query", "key"),
        "attention",
        {"site": SITES["attention"].holds},
        layers=home.layers,
        positions=[row.position],
    )
    return found.isel(query=0)


def token_record(
    tokenizer: Tokenizer,
    evidence: Evidence,
    *,
    index: int,
    position: int,
    key: tuple[int, int] | None = None,
) -> TokenRecord:
    """The record of a choice, its text still to come."""
    token = int(evidence.token)
    columns = (evidence.ids, evidence.logprobs, evidence.probabilities)
    return TokenRecord(
        index=index,
        token_id=token,
        text="",
        piece=token_label(tokenizer, token),
        position=position,
        logprob=float(evidence.logprob),
        probability=float(evidence.probability),
        entropy=float(evidence.entropy),
        rank=int(evidence.rank),
        alternatives=tuple(
            Alternative(int(i), token_label(tokenizer, int(i)), float(logprob), float(probability))
            for i, logprob, probability in zip(*columns, strict=True)
        ),
        key=key,
        attention_row=evidence.attention,
    )


def token_label(tokenizer: Tokenizer, token: int) -> str:
    """The text of a lone token; some embeddings have rows that stand for none."""
    known = token < tokenizer.vocab_size
    # A conversation repeats few tokens many times.
    return sys.intern(tokenizer.token_text(token)) if known else f"<row {token}>"
