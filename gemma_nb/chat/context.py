"""The context: turns that are put before the model, and those left out when they are too many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from gemma_nb.chat.node import Node
from gemma_nb.chat.turns import Context, Turn
from gemma_nb.errors import ContextFullError
from gemma_nb.text.template import Message, Template
from gemma_nb.text.tokenizer import Tokenizer

# What happens when the context is full.
# stop: the reply ends there.  drop_oldest: the oldest exchanges are left out of the context (never
# of the tree).  error: ContextFullError.
WhenFull = Literal["stop", "drop_oldest", "error"]


def check_policy(when_full: str) -> WhenFull:
    """`when_full`, if there is such a policy.

    Raises:
      ValueError: there is none.
    """
    for policy in get_args(WhenFull):
        if when_full == policy:
            return policy
    known = ", ".join(map(repr, get_args(WhenFull)))
    raise ValueError(f"when_full must be one of {known}; got {when_full!r}")


class Contexts:
    """Turns as token ids, within a number of positions.

    Attributes:
      limit: most positions.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, limit: int) -> None:
        self.limit = limit
        self._tokenizer = tokenizer
        self._template = template

    def encode(self, turns: Sequence[Turn], system: str | None, dropped: int = 0) -> list[int]:
        """Token ids of `turns` but the first `dropped`, led by the template's opening."""
        messages = [Message(turn.role, turn.text, turn.ids) for turn in turns[dropped:]]
        return self._template.encode(self._tokenizer, messages, system)

    def opening(self, system: str | None) -> list[int]:
        """Token ids of a conversation in which nothing was said yet."""
        return self.encode((), system)

    def before(self, turns: Sequence[Turn], context: Context | None) -> list[int]:
        """Token ids that a reply to `turns` saw in its `context`."""
        context = context or Context()
        return self.encode(turns, context.system, context.dropped)

    def own_ids(self, turn: Turn) -> list[int]:
        """Token ids of a reply as it stays in the context."""
        if turn.ids is not None:
            return list(turn.ids)
        return list(self._template.reply_ids(self._tokenizer, turn.text))

    def spoken(self, node: Node) -> tuple[list[int], list[int]]:
        """Token ids of what stood before a reply when it was made, and its own."""
        turn = node.said
        before = self.before(node.asked.turns, turn.context)
        return before, turn.tokens.token_id.tolist() if turn.tokens else self.own_ids(turn)

    def fit(
        self,
        turns: Sequence[Turn],
        system: str | None,
        policy: WhenFull,
        room: int,
        *,
        prefix: int = 0,
        dropped: int | None = None,
    ) -> tuple[list[int], Context]:
        """The context of a reply to `turns`.

        Where "drop_oldest" has to make room, it makes room for some turns more: each time, what
        stays behind has to be computed anew, since its positions change.

        Args:
          turns: of the path, the last one the user's.
          system: what the model is told first.
          policy: what to do when there are too many.
          room: positions wanted for the reply; a quarter of the context at most is kept free.
          prefix: tokens of the reply that stand already.
          dropped: how many turns were left out before; None: as in the last reply of the path.

        Returns:
          Token ids, which under "stop" and where a single exchange is too long may be more than
          `limit`; and what they leave out.

        Raises:
          ContextFullError: there is no room and the policy is "error".
          ValueError: the message before the last one has no reply.
        """
        if len(turns) > 1 and turns[-2].role == turns[-1].role == "user":
            raise ValueError(
                "the message before this one has no reply yet: make one with chat.regenerate(), "
                "or take the message back with chat.undo()"
            )
        if dropped is None:
            last = next((turn.context for turn in reversed(turns) if turn.context), None)
            dropped = last.dropped if last is not None else 0
        ids = self.encode(turns, system, dropped)
        room = min(room, self.limit // 4)
        if policy == "drop_oldest" and len(ids) + prefix + room > self.limit:
            goal = self.limit - self.limit // 4 - room - prefix
            # The last exchange stays, whatever its length.
            while len(ids) > goal and dropped + 2 < len(turns):
                dropped += 2
                ids = self.encode(turns, system, dropped)
        if policy == "error" and len(ids) + prefix > self.limit:
            raise ContextFullError(too_long(len(ids) + prefix, self.limit))
        return ids, Context(system, dropped, 0, self.limit)


def too_long(needed: int, limit: int) -> str:
    """The message of an error where a message does not fit."""
    return (
        f"The context is full: with this message it needs {needed} positions and there are "
        f"{limit}.  {_WAYS_OUT}"
    )


def ran_full(used: int, limit: int) -> str:
    """The reason given where a reply fills the context."""
    return f"The context is full: {used} of {limit} positions are in use.  {_WAYS_OUT}"


_WAYS_OUT = (
    'Set chat.when_full = "drop_oldest" to let the oldest messages go, undo() some, start a new '
    "conversation, or a session with a larger cache_length."
)
