"""The evidence of a conversation under a model that did not hold it: teacher forcing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from gemma_nb.chat.context import Contexts
from gemma_nb.chat.core import SessionCore
from gemma_nb.chat.records import token_record
from gemma_nb.chat.scoring import score
from gemma_nb.chat.tokens import Tokens
from gemma_nb.chat.tree import ConversationTree
from gemma_nb.chat.turns import Turn
from gemma_nb.sampling.settings import Sampling
from gemma_nb.text.detokenizer import StreamingDetokenizer
from gemma_nb.text.prefix import shared_prefix


class Recomputation:
    """Computes the evidence of replies that stand already.

    Nothing is drawn: each token of a reply gets the evidence that the model gives it after all
    that stands before it.  Texts, branches and settings stay as they are.
    """

    def __init__(self, core: SessionCore) -> None:
        """Readies it for the model, tokenizer and template of a session."""
        self._model = core.model
        self._tokenizer = core.tokenizer
        self._template = core.template
        self._stop_ids = core.template.stop_ids(core.tokenizer)
        longest = core.model.config.max_context
        self._contexts = Contexts(core.tokenizer, core.template, longest)
        self._top_k = core.capture.top_k

    def tree(
        self,
        tree: ConversationTree,
        *,
        respell: bool = False,
        progress: Callable[[float, str], None] | None = None,
    ) -> None:
        """Computes all replies of a tree, in place.

        Args:
          tree: no session's yet.
          respell: tokenize the texts, since the ids are another tokenizer's.
          progress: called with a fraction and a sentence.
        """
        before: dict[int, list[int]] = {}
        for done, node in enumerate(tree.nodes()):
            if progress is not None:
                progress(done / (len(tree) + 1), "Computing the evidence of the replies")
            if node.turn is None or node.turn.role != "model":
                continue
            turn = self.turn([n.turn for n in node.path()[:-1] if n.turn], node.turn, respell)
            ids = turn.tokens.token_id.tolist()
            if respell and turn.origin is not None:
                shared = shared_prefix(before.get(turn.origin.turn, []), ids)
                origin = dataclasses.replace(turn.origin, index=shared, given=0)
                turn = dataclasses.replace(turn, origin=origin)
            node.turn = turn
            before[turn.id] = ids
        if progress is not None:
            progress(1.0, "Computed the evidence of the replies")

    def turn(self, before: Sequence[Turn], turn: Turn, respell: bool = False) -> Turn:
        """A reply with evidence computed now.

        Args:
          before: the turns of its path before it.
          turn: the reply.
          respell: tokenize its text; a reply without tokens always is.
        """
        context = self._contexts.before(before, turn.context)
        sampling = turn.sampling or Sampling()
        ids = turn.ids
        if respell or not turn.tokens:
            ids, given = self._spell(before, turn, len(context))
            texts = self._texts(given)
            sampling = dataclasses.replace(sampling, forbidden=())  # another vocabulary's
        else:
            given = turn.tokens.token_id.tolist()
            texts = turn.tokens.text.tolist()
        evidence = score(self._model, [*context, *given], len(context), sampling, self._top_k)
        records = (
            token_record(self._tokenizer, choice, index=index, position=len(context) + index)
            for index, choice in enumerate(evidence)
        )
        pairs = zip(records, texts, strict=True)
        tokens = Tokens(dataclasses.replace(record, text=text) for record, text in pairs)
        return dataclasses.replace(turn, tokens=tokens, ids=ids)

    def _spell(
        self, before: Sequence[Turn], turn: Turn, start: int
    ) -> tuple[tuple[int, ...], list[int]]:
        """A reply's text as tokens: what stays in the context, and the same with what ends it."""
        ids = tuple(self._template.reply_ids(self._tokenizer, turn.text))
        spelled = dataclasses.replace(turn, ids=ids)
        after = self._contexts.before([*before, spelled], turn.context)[start + len(ids) :]
        end = after[:1] if after and after[0] in self._stop_ids else []
        return ids, [*ids, *end]

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds."""
        stream = StreamingDetokenizer(self._tokenizer)
        texts = ["" if id_ in self._stop_ids else stream.feed(id_) for id_ in ids]
        rest = stream.finish()
        if rest and texts:
            texts[-1] += rest
        return texts
