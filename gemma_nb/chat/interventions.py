"""Interventions that replies were made under."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from gemma_nb.chat.turns import Turn
from gemma_nb.interventions import Interventions
from gemma_nb.interventions.reach import refuse_uncached
from gemma_nb.model import GemmaTransformer

if TYPE_CHECKING:
    from gemma_nb.chat.tree import ConversationTree


@dataclasses.dataclass(frozen=True)
class Unresolved:
    """Interventions of which a class was not given when their conversation was loaded.

    Attributes:
      missing: names of the classes.
      stored: the interventions in the form that saving has read and writes again.
    """

    missing: tuple[str, ...]
    stored: object

    @property
    def remedy(self) -> str:
        """Advice how to have them."""
        given = ", ".join(self.missing)
        return f"load it with interventions=[{given}], the class of your own that it was made with"


class ReplyInterventions:
    """Notes in the tree which interventions a reply is made under, and finds them again."""

    def __init__(self, model: GemmaTransformer, tree: ConversationTree) -> None:
        self._model = model
        self._tree = tree

    def remember(self, turn_id: int, interventions: Interventions | None) -> None:
        """Notes the interventions of a reply, where they are others than the model's own."""
        if interventions is not None and interventions is not self._model.interventions:
            self._tree.interventions[turn_id] = interventions

    def of(self, turn: Turn) -> Interventions | None:
        """The interventions that a reply was computed under.

        Raises:
          ValueError: what the conversation's file does not hold (interventions of the model of
            another session), a class of the user's own that was not given when it was loaded, or
            what this model does not have.
        """
        found, own = self._tree.interventions.get(turn.id), self._model.interventions
        if isinstance(found, Unresolved):
            raise ValueError(
                f"this reply was made under {'; '.join(turn.interventions)}: {found.remedy}"
            )
        if found is not None:
            for item in found.items:
                item.check(self._model.config)
            refuse_uncached(found, self._model.config)
            return found
        if turn.interventions == (() if own is None else own.describe()):
            return own
        raise ValueError(
            f"this reply was made under {'; '.join(turn.interventions) or 'no interventions'}, "
            "which is not kept with this conversation and not what the model has now: intervene "
            "again with chat.intervene(...)"
        )
