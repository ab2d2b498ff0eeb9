"""Tokens of the replies in a tree: where they stand, and what else could have stood there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gemma_nb.chat.records import TokenRecord
from gemma_nb.chat.tokens import Tokens
from gemma_nb.chat.tree import ConversationTree, Node
from gemma_nb.chat.turns import Turn
from gemma_nb.text.prefix import shared_prefix


def locate(tree: ConversationTree, at: TokenRecord, turn: Turn | int | None) -> tuple[Node, int]:
    """Where a token is: the reply's node and the token's index.

    Siblings share tokens; then it is the one that is shown, or else the newest.

    Raises:
      ValueError: no reply of the tree, or of `turn`, holds the token.
    """
    if turn is not None:
        nodes = [tree.find(turn)]
    else:
        shown = tree.path()[::-1]
        nodes = [*shown, *sorted(tree.nodes(), key=lambda node: -node.id)]
    for same in (_is, _equals):
        for node in nodes:
            tokens = node.turn.tokens if node.turn is not None else ()
            if at.index < len(tokens) and same(tokens[at.index], at):
                return node, at.index
    raise ValueError(f"no reply of this conversation holds the token {at.piece!r} ({at.index})")


def _is(a: TokenRecord, b: TokenRecord) -> bool:
    return a is b


def _equals(a: TokenRecord, b: TokenRecord) -> bool:
    """Whether they are the same choice; one may be the event that told of it."""
    fields = ("token_id", "position", "logprob", "entropy", "key")
    return all(getattr(a, name) == getattr(b, name) for name in fields)


def spelling(tokens: Tokens, ids: Sequence[int]) -> Tokens:
    """The leading tokens that spell the beginning of `ids`."""
    return tokens[: shared_prefix(tokens.token_id.tolist(), ids)]


def alternative(record: TokenRecord, token: int, piece: str) -> TokenRecord | None:
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


def turn_of(node: Node) -> Turn:
    """Its turn; of any node but the root."""
    assert node.turn is not None
    return node.turn


def asked_by(node: Node) -> Node:
    """The node of what a reply replies to."""
    assert node.parent is not None
    return node.parent


def turns_to(node: Node) -> list[Turn]:
    """All turns up to and including a node's."""
    return [turn_of(n) for n in node.path()]
