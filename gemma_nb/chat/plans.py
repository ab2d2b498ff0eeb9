"""Plans of replies: to a message that was said, in the tree or beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gemma_nb.chat.context import Contexts
from gemma_nb.chat.node import Node
from gemma_nb.chat.reply_settings import ReplySettings
from gemma_nb.chat.tokens import Tokens
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.chat.turns import Context, Origin, Turn
from gemma_nb.interventions import Interventions
from gemma_nb.model import GemmaTransformer
from gemma_nb.sampling.settings import Sampling

_NONE = Tokens()


@dataclasses.dataclass(frozen=True)
class Plan:
    """A reply to be made.

    Attributes:
      parent: the message that it replies to.
      ids: token ids that stand before the reply.
      context: what they are made of.
      sampling: the settings, with a seed.
      prefix: tokens that the reply begins with and that stand already.
      given: tokens after them that the user puts there.
      refused: ids that must not come right after these.
      origin: see `Turn`.
      interventions: what is changed in the model; by default what is in the session's.
    """

    parent: Node
    ids: Sequence[int]
    context: Context
    sampling: Sampling
    prefix: Tokens = _NONE
    given: Tokens = _NONE
    refused: frozenset[int] = frozenset()
    origin: Origin | None = None
    interventions: Interventions | None = None

    @property
    def all_ids(self) -> list[int]:
        """Everything that stands before the first token to draw."""
        return [*self.ids, *(self.prefix + self.given).token_id.tolist()]


class NewReplies:
    """Plans replies to messages, under the settings of a session."""

    def __init__(
        self, model: GemmaTransformer, contexts: Contexts, settings: ReplySettings
    ) -> None:
        self._model = model
        self._contexts = contexts
        self._settings = settings

    def fit(self, turns: Sequence[Turn], room: int | None = None) -> tuple[list[int], Context]:
        """The context of a new reply to `turns`; see `Contexts.fit`."""
        settings = self._settings
        room = settings.sampling.max_new_tokens if room is None else room
        return self._contexts.fit(turns, settings.system, settings.when_full, room)

    def ids_of(self, node: Node) -> list[int]:
        """Token ids of the context up to and including a turn."""
        if node.role == "user":
            return self.fit(node.turns)[0]
        before, own = self._contexts.spoken(node)
        return [*before, *own]

    def reply(self, asked: Node, origin: Origin | None = None) -> Plan:
        """A new reply to a message."""
        ids, context = self.fit(asked.turns)
        sampling, under = self._settings.seeded(asked), self._model.interventions
        return Plan(asked, ids, context, sampling, origin=origin, interventions=under)

    def message(
        self, tree: ConversationTree, parent: Node, text: str, origin: Origin | None = None
    ) -> Plan:
        """Puts a message into the tree, if it fits, and plans the reply."""
        turn = Turn(id=tree.new_id(), role="user", text=text, origin=origin)
        ids, context = self.fit([*parent.turns, turn])
        asked = tree.add(parent, turn)
        sampling, under = self._settings.seeded(asked), self._model.interventions
        return Plan(asked, ids, context, sampling, interventions=under)

    def aside(self, tip: Node, prompt: str, sampling: Sampling) -> Plan:
        """A reply to a message after `tip` that is not in the tree."""
        asked = Node(Turn(id=0, role="user", text=prompt), tip)
        ids, context = self.fit(asked.turns, sampling.max_new_tokens)
        return Plan(asked, ids, context, sampling, interventions=self._model.interventions)
