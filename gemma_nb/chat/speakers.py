"""Speakers: whose words stand at each position of a context."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_nb.chat.context import Contexts
from gemma_nb.chat.turns import Context, Turn
from gemma_nb.text.tokenizer import Tokenizer

_NOBODY = -1


def speakers(
    contexts: Contexts,
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    context: Context | None,
    ids: Sequence[int],
) -> tuple[list[int], list[str]]:
    """For each token, the index of its turn in `turns`, and who speaks: "user" or "model".

    What stands before the first turn is "system" and belongs to no turn (-1); the template's
    control tokens are "template", and belong to the turn that they open or close.

    Args:
      contexts: turns to token ids.
      tokenizer: which tokens are control tokens.
      turns: the path up to and including the turn whose tokens are last.
      context: what that turn was made in.
      ids: (T,) all tokens.
    """
    context = context or Context()
    ends = [
        len(contexts.encode(turns[:count], context.system, context.dropped))
        for count in range(context.dropped, len(turns))
    ]
    control = set(tokenizer.control.values()) | {tokenizer.bos_id}
    owner, role = [_NOBODY] * len(ids), ["system"] * len(ids)
    for position, token in enumerate(ids):
        before = sum(position >= end for end in ends)
        if before:
            index = context.dropped + before - 1
            owner[position], role[position] = index, turns[index].role
        if token in control:
            role[position] = "template"
    return owner, role
