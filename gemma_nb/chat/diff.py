"""Two branches of a conversation, side by side from where they part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from gemma_nb.chat.context import Contexts
from gemma_nb.chat.interventions import ReplyInterventions
from gemma_nb.chat.node import Node
from gemma_nb.chat.scoring import Scorer
from gemma_nb.chat.turns import Turn
from gemma_nb.text.prefix import shared_prefix

if TYPE_CHECKING:
    import pandas


@dataclasses.dataclass(frozen=True, slots=True)
class DiffToken:
    """A token of one branch, and how the model saw it in both.

    Attributes:
      index: its place in the reply.
      token_id: its id.
      piece: what it stands for on its own.
      logprob: its log-probability in nats where it stands, before the sampler.
      under_other: the same in the place of the other branch.
    """

    index: int
    token_id: int
    piece: str
    logprob: float
    under_other: float


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two branches.

    Attributes:
      turn: the first turn that is not shared.
      reply: the reply that is compared: `turn`, or the one that follows it; None where there is
        none.
      tokens: its tokens from where the branches part.
    """

    turn: Turn
    reply: Turn | None
    tokens: tuple[DiffToken, ...]

    @property
    def text(self) -> str:
        """Text of the reply from where the branches part."""
        if self.reply is None or not self.reply.tokens:
            return "".join(token.piece for token in self.tokens)
        first = len(self.reply.tokens) - len(self.tokens)
        return "".join(self.reply.tokens[first:].text.tolist())

    @property
    def logprob(self) -> float:
        """Log-probability in nats of all `tokens` together where they stand."""
        return math.fsum(token.logprob for token in self.tokens)

    @property
    def under_other(self) -> float:
        """Log-probability in nats of all `tokens` together in the place of the other branch."""
        return math.fsum(token.under_other for token in self.tokens)


@dataclasses.dataclass(frozen=True)
class Diff:
    """Two branches from where they part.

    Attributes:
      shared: the turns that both have.
      index: of the first token that differs; 0 where two messages differ.
      a: one branch.
      b: the other.
    """

    shared: tuple[Turn, ...]
    index: int
    a: Side
    b: Side

    def table(self) -> pandas.DataFrame:
        """The tokens in rows.

        Columns: index, and for both sides token, probability where it stands, and probability in
        the place of the other branch.
        """
        import pandas

        columns = ["index"]
        for side in "ab":
            columns += [f"{side}: token", f"{side}: probability", f"{side}: under the other"]
        rows = [
            [self.index + i, *_cells(left), *_cells(right)]
            for i, (left, right) in enumerate(zip_longest(self.a.tokens, self.b.tokens))
        ]
        return pandas.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        lines = [f"<Diff at token {self.index} after {len(self.shared)} turns>"]
        for name, side in (("a", self.a), ("b", self.b)):
            lines.append(
                f"{name}: {side.text!r}  {side.logprob:.2f} nats, "
                f"{side.under_other:.2f} in the place of the other"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False, float_format="{:.3f}".format, escape=True)


def _cells(token: DiffToken | None) -> list[object]:
    if token is None:
        return ["", math.nan, math.nan]
    return [token.piece, math.exp(token.logprob), math.exp(token.under_other)]


def compare(
    contexts: Contexts, scorer: Scorer, made_under: ReplyInterventions, a: Node, b: Node
) -> Diff:
    """The difference between the branches of two turns; see `ChatSession.diff`.

    Raises:
      ValueError: both turns stand on one branch.
    """
    paths = a.path(), b.path()
    together = shared_prefix(*([node.id for node in path] for path in paths))
    if together == min(map(len, paths)):
        raise ValueError(
            f"turns {a.said.id} and {b.said.id} stand on one branch, which does not part "
            "between them: give turns of two branches, such as two of chat.siblings(turn)"
        )
    firsts = [path[together] for path in paths]
    replies = [_reply_from(path[together:]) for path in paths]
    spoken = [contexts.spoken(node) if node is not None else ([], []) for node in replies]
    # Two replies to the same message part at a token, all others at the message.
    same_message = firsts == replies
    index = shared_prefix(spoken[0][1], spoken[1][1]) if same_message else 0

    def logprobs(where: int, ids: list[int]) -> list[float]:
        """Log-probabilities of `ids[index:]` in a branch; NaN where it says nothing."""
        before, reply = spoken[where][0], replies[where]
        if reply is None or reply.turn is None:
            return [math.nan] * len(ids[index:])
        return scorer.logprobs([*before, *ids], len(before) + index, made_under.of(reply.turn))

    def side(own: int, other: int) -> Side:
        (_, ids), (_, others) = spoken[own], spoken[other]
        swapped = list(ids)
        if same_message and index < min(len(ids), len(others)):
            swapped[index] = others[index]
        here = logprobs(own, ids)
        under = logprobs(other, swapped)
        # The token at the parting is itself seen in the other's place.
        under[:1] = logprobs(other, ids[: index + 1])
        turn, reply = firsts[own].turn, replies[own]
        assert turn is not None
        tokens = tuple(
            DiffToken(index + i, token, scorer.label(token), here[i], under[i])
            for i, token in enumerate(ids[index:])
        )
        return Side(turn, reply.turn if reply is not None else None, tokens)

    shared = tuple(node.turn for node in paths[0][:together] if node.turn is not None)
    return Diff(shared, index, side(0, 1), side(1, 0))


def _reply_from(nodes: Sequence[Node]) -> Node | None:
    """The first reply on or after these nodes."""
    for node in nodes:
        if node.turn is not None and node.turn.role == "model":
            return node
    return nodes[-1].shown or nodes[-1].newest
