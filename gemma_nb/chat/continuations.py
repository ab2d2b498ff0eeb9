"""Plans of replies that go on from some token of another one, or repeat it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gemma_nb.chat.context import too_long
from gemma_nb.chat.core import SessionCore
from gemma_nb.chat.node import Node
from gemma_nb.chat.plans import NewReplies, Plan
from gemma_nb.chat.records import with_alternative
from gemma_nb.chat.scoring import Scorer
from gemma_nb.chat.tokens import Tokens
from gemma_nb.chat.turns import Branching, Context, Origin
from gemma_nb.errors import ContextFullError
from gemma_nb.interventions import Intervention
from gemma_nb.interventions.reach import refuse_uncached
from gemma_nb.sampling.settings import Sampling


class Continuations:
    """Plans siblings of a reply that begin as it does."""

    def __init__(self, core: SessionCore, new: NewReplies, scorer: Scorer) -> None:
        self._core = core
        self._contexts = core.contexts
        self._settings = core.settings
        self._new = new
        self._scorer = scorer

    def fork(
        self, node: Node, index: int, given: Sequence[int] | None, sampling: Sampling | None
    ) -> Plan:
        """Another end of a reply.

        Args:
          node: the reply's.
          index: of the token to fork at.
          given: what takes its place; None keeps it, unless it ended the reply.
          sampling: settings; see `ChatSession.fork`.
        """
        source = node.said
        if given is not None:
            settings = self._settings.with_seed_of(source, sampling)
            return self._continue(node, "fork", source.tokens[:index], settings, given=given)
        settings = self._settings.with_own_seed(node.asked, sampling)
        if source.finish_reason == "stop" and index == len(source.tokens) - 1:
            return self._go_on(node, "fork", settings)
        return self._continue(node, "fork", source.tokens[: index + 1], settings)

    def resume(self, node: Node, sampling: Sampling | None) -> Plan:
        """A reply that goes on after its end."""
        source = node.said
        settings = self._settings.with_seed_of(source, sampling)
        if source.finish_reason == "stop":
            return self._go_on(node, "resume", settings)
        return self._continue(node, "resume", self._records(node, settings), settings)

    def replay(self, node: Node) -> Plan:
        """A reply once more, with the keys that it was made with."""
        source, asked = node.said, node.asked
        first = source.origin.index if source.origin else 0
        drawn = first + (source.origin.given if source.origin else 0)
        sampling = source.sampling
        if sampling is None or not len(source.tokens) > drawn:
            raise ValueError("none of this turn's tokens was drawn: there is nothing to replay")
        return Plan(
            asked,
            self._contexts.before(asked.turns, source.context),
            source.context or Context(),
            dataclasses.replace(sampling, max_new_tokens=len(source.tokens) - drawn),
            prefix=source.tokens[:first],
            given=source.tokens[first:drawn],
            origin=source.origin,
            interventions=self._core.made_under.of(source),
        )

    def intervene(
        self,
        node: Node,
        index: int,
        items: Sequence[Intervention],
        sampling: Sampling | None,
    ) -> Plan:
        """A reply made again under interventions that act on the choice of the token at `index`."""
        source = node.said
        settings = self._settings.with_seed_of(source, sampling)
        plan = self._continue(node, "intervene", source.tokens[:index], settings)
        changed = self._core.model.intervene(*items, start=len(plan.all_ids) - 1)
        refuse_uncached(changed.interventions, changed.config)
        return dataclasses.replace(plan, interventions=changed.interventions)

    def edited(self, node: Node, text: str) -> Plan:
        """A reply with another text, all of it prefix or given: nothing is left to draw.

        Raises:
          ContextFullError: there is no room for the text.
        """
        source, asked = node.said, node.asked
        settings = self._settings.with_seed_of(source, None)
        ids = self._core.template.reply_ids(self._core.tokenizer, text)
        context = source.context or self._new.fit(asked.turns)[1]
        before = self._contexts.before(asked.turns, context)
        if len(before) + len(ids) > self._contexts.limit:
            raise ContextFullError(too_long(len(before) + len(ids), self._contexts.limit))
        prefix = source.tokens.spelling(ids)
        under = self._core.model.interventions
        rest = self._scorer.records([*before, *ids], len(prefix), len(before), settings, under)
        origin = Origin("edit", source.id, len(prefix), len(rest))
        return Plan(
            asked,
            before,
            context,
            settings,
            prefix,
            rest,
            origin=origin,
            interventions=under,
        )

    # --- internals ------------------------------------------------------------------------------

    def _records(self, node: Node, sampling: Sampling) -> Tokens:
        """Records of a reply as it stays in the context, also where it has none of its own."""
        source, asked = node.said, node.asked
        ids = self._contexts.own_ids(source)
        prefix = source.tokens.spelling(ids)
        before = self._contexts.before(asked.turns, source.context)
        under = self._core.made_under.of(source)
        rest = self._scorer.records([*before, *ids], len(prefix), len(before), sampling, under)
        return prefix + rest

    def _continue(
        self,
        node: Node,
        kind: Branching,
        prefix: Tokens,
        sampling: Sampling,
        *,
        given: Sequence[int] = (),
        refused: frozenset[int] = frozenset(),
    ) -> Plan:
        """A sibling of a reply that begins with `prefix` and then `given`."""
        source, asked = node.said, node.asked
        under = self._core.made_under.of(source)
        ids, context, moved = self._room(node, len(prefix) + len(given), sampling)
        before = [*ids, *prefix.token_id.tolist()]
        if moved:
            # Seen in another context than before: what holds there is computed anew.
            prefix = self._scorer.records(before, 0, len(ids), sampling, under)
        first = len(prefix)
        known = None
        if len(given) == 1 and not moved and first < len(source.tokens):
            known = with_alternative(source.tokens[first], given[0], self._scorer.label(given[0]))
        if known is not None:
            put = Tokens([known])
        else:
            put = self._scorer.records([*before, *given], first, len(ids), sampling, under)
        # A token drawn under a condition of its own counts as given.
        count = len(put) + bool(refused)
        origin = Origin(kind, source.id, first, count)
        return Plan(asked, ids, context, sampling, prefix, put, refused, origin, under)

    def _go_on(self, node: Node, kind: Branching, sampling: Sampling) -> Plan:
        """A sibling of a reply that came to its end, in which that end is refused."""
        source = node.said
        prefix = self._records(node, sampling)
        following = set(source.tokens[len(prefix) : len(prefix) + 1].token_id.tolist())
        refused = self._core.template.stop_ids(self._core.tokenizer) | following
        return self._continue(node, kind, prefix, sampling, refused=refused)

    def _room(self, node: Node, length: int, sampling: Sampling) -> tuple[list[int], Context, bool]:
        """The context of a reply that begins with `length` tokens, and whether it is a new one.

        Raises:
          ContextFullError: there is no room for one token more.
        """
        source, turns = node.said, node.asked.turns
        limit = self._contexts.limit
        context = source.context or self._new.fit(turns)[1]
        context = dataclasses.replace(context, used=0, length=limit)
        ids = self._contexts.before(turns, context)
        wanted = min(sampling.max_new_tokens, limit // 16)
        moved = False
        if self._settings.when_full == "drop_oldest" and len(ids) + length + wanted > limit:
            before = context.dropped
            ids, context = self._contexts.fit(
                *(turns, context.system, self._settings.when_full, sampling.max_new_tokens),
                prefix=length,
                dropped=before,
            )
            moved = context.dropped != before
        if len(ids) + length > limit:
            raise ContextFullError(too_long(len(ids) + length + 1, limit))
        return ids, context, moved
