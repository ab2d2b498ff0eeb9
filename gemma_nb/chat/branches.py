"""What each operation continues: from a place in the tree to a plan of the reply to make there."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

from gemma_nb.chat.context import Contexts, WhenFull, too_long
from gemma_nb.chat.interventions import Unresolved
from gemma_nb.chat.places import alternative, asked_by, spelling, turn_of, turns_to
from gemma_nb.chat.records import token_label, token_record
from gemma_nb.chat.scoring import score, score_cached
from gemma_nb.chat.tokens import Tokens
from gemma_nb.chat.tree import Node
from gemma_nb.chat.turns import Branching, Context, Origin, Turn
from gemma_nb.errors import ContextFullError
from gemma_nb.interventions import Intervention, Interventions
from gemma_nb.interventions.reach import refuse_uncached
from gemma_nb.model import GemmaTransformer
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.methods import Sampling
from gemma_nb.text.template import Template
from gemma_nb.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Plan:
    """A reply to be made.

    Attributes:
      parent: the message that it replies to.
      ids: token ids that stand before the reply.
      context: what they are made of.
      sampling: the settings, with a seed.
      kept: tokens that the reply begins with and that stand already.
      given: tokens after them that the user puts there.
      refused: ids that must not come right after these.
      origin: see `Turn`.
      interventions: what is changed in the model; by default what is in the session's.
    """

    parent: Node
    ids: Sequence[int]
    context: Context
    sampling: Sampling
    kept: Tokens = Tokens()  # noqa: RUF009
    given: Tokens = Tokens()  # noqa: RUF009
    refused: frozenset[int] = frozenset()
    origin: Origin | None = None
    interventions: Interventions | None = None

    @property
    def all_ids(self) -> list[int]:
        """Everything that stands before the first token to draw."""
        return [*self.ids, *(self.kept + self.given).token_id.tolist()]


class Planner:
    """Plans replies under the settings of a session.

    Attributes:
      sampling: how the next reply is sampled.
      system: what the model is told before the conversation.
      when_full: what happens when the context is full.
      contexts: turns to token ids.
    """

    def __init__(
        self,
        model: GemmaTransformer,
        tokenizer: Tokenizer,
        template: Template,
        decoder: Decoder,
        *,
        top_k: int,
        sampling: Sampling,
        system: str | None,
        when_full: WhenFull,
    ) -> None:
        self.sampling = sampling
        self.system = system
        self.when_full = when_full
        self.contexts = Contexts(tokenizer, template, decoder.limit)
        self._model = model
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._template = template
        self._top_k = top_k
        self._under: dict[int, Interventions | Unresolved] = {}
        self._never = (
            *template.forbidden_ids(tokenizer),
            # Some embeddings have rows that stand for no token.
            *range(tokenizer.vocab_size, model.config.num_embed),
        )

    def barred(self, sampling: Sampling, *, also: frozenset[int] = frozenset()) -> Sampling:
        """`sampling` without the tokens that never belong into a reply."""
        forbidden = (*sampling.forbidden, *self._never, *also)
        return dataclasses.replace(sampling, forbidden=forbidden)

    # --- another reply --------------------------------------------------------------------------

    def fit(self, turns: Sequence[Turn]) -> tuple[list[int], Context]:
        """The context of a new reply to `turns`; see `Contexts.fit`."""
        room = self.sampling.max_new_tokens
        return self.contexts.fit(turns, self.system, self.when_full, room)

    def reply(self, asked: Node, origin: Origin | None = None) -> Plan:
        """A new reply to a message."""
        ids, context = self.fit(turns_to(asked))
        under = self._model.interventions
        return Plan(asked, ids, context, self.seeded(asked), origin=origin, interventions=under)

    def spoken(self, node: Node) -> tuple[list[int], list[int]]:
        """Token ids of what stood before a reply when it was made, and its own."""
        turn = turn_of(node)
        before = self.contexts.before(turns_to(asked_by(node)), turn.context)
        if turn.tokens:
            return before, turn.tokens.token_id.tolist()
        return before, list(self._own_ids(turn))

    def tokens(self, node: Node) -> list[int]:
        """Token ids up to and including a turn."""
        if turn_of(node).role == "user":
            return self.fit(turns_to(node))[0]
        before, own = self.spoken(node)
        return [*before, *own]

    def seeded(self, asked: Node) -> Sampling:
        """The settings, with a seed of this attempt's own."""
        seed = self.sampling.seed
        chosen = secrets.randbits(31) if seed is None else (seed + len(asked.children)) % 2**32
        return dataclasses.replace(self.sampling, seed=chosen)

    # --- the same reply, from some token on -------------------------------------------------------

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
        source = turn_of(node)
        if given is not None:
            settings = self._with_seed_of(source, sampling)
            return self._continue(node, "fork", source.tokens[:index], settings, given=given)
        settings = self._with_own_seed(node, sampling)
        if source.finish_reason == "stop" and index == len(source.tokens) - 1:
            return self._go_on(node, "fork", settings)
        return self._continue(node, "fork", source.tokens[: index + 1], settings)

    def resume(self, node: Node, sampling: Sampling | None) -> Plan:
        """The same reply, going on after its end."""
        source = turn_of(node)
        settings = self._with_seed_of(source, sampling)
        if source.finish_reason == "stop":
            return self._go_on(node, "resume", settings)
        return self._continue(node, "resume", self.records(node, settings), settings)

    def replay(self, node: Node) -> Plan:
        """The same reply once more."""
        source, asked = turn_of(node), asked_by(node)
        first = source.origin.index if source.origin else 0
        drawn = first + (source.origin.given if source.origin else 0)
        sampling = source.sampling
        if sampling is None or not len(source.tokens) > drawn:
            raise ValueError("none of this turn's tokens was drawn: there is nothing to replay")
        return Plan(
            asked,
            self.contexts.before(turns_to(asked), source.context),
            source.context or Context(),
            dataclasses.replace(sampling, max_new_tokens=len(source.tokens) - drawn),
            kept=source.tokens[:first],
            given=source.tokens[first:drawn],
            origin=source.origin,
            interventions=self.under(source),
        )

    def records(self, node: Node, sampling: Sampling) -> Tokens:
        """Records of a reply as it stays in the context, also where it has none of its own."""
        source, asked = turn_of(node), asked_by(node)
        ids = self._own_ids(source)
        kept = spelling(source.tokens, ids)
        before = self.contexts.before(turns_to(asked), source.context)
        under = self.under(source)
        rest = self.scored([*before, *ids], len(kept), len(before), sampling, under)
        return kept + rest

    def edited(self, node: Node, text: str) -> Plan:
        """A reply with another text, all of it kept or given: nothing is left to draw.

        Raises:
          ContextFullError: there is no room for the text.
        """
        source, asked = turn_of(node), asked_by(node)
        settings = self._with_seed_of(source, None)
        ids = self._template.reply_ids(self._tokenizer, text)
        context = source.context or self.fit(turns_to(asked))[1]
        before = self.contexts.before(turns_to(asked), context)
        if len(before) + len(ids) > self.contexts.limit:
            raise ContextFullError(too_long(len(before) + len(ids), self.contexts.limit))
        kept = spelling(source.tokens, ids)
        under = self._model.interventions
        rest = self.scored([*before, *ids], len(kept), len(before), settings, under)
        origin = Origin("edit", source.id, len(kept), len(rest))
        return Plan(
            asked,
            before,
            context,
            settings,
            kept,
            rest,
            origin=origin,
            interventions=under,
        )

    def scored(
        self,
        ids: Sequence[int],
        index: int,
        begin: int,
        sampling: Sampling,
        under: Interventions | None,
    ) -> Tokens:
        """Records of given tokens, with the evidence of having been chosen.

        Few of them are computed by the decoder from its cache, many by one pass over everything.

        Args:
          ids: everything, up to the last of these tokens.
          index: of the first of them in the reply.
          begin: where in `ids` the reply begins.
          sampling: for the probabilities after the sampler.
          under: what is changed in the model.
        """
        start, settings = begin + index, self.barred(sampling)
        self._decoder.intervene(under)
        evidence = score_cached(self._decoder, ids, start, settings)
        if evidence is None:
            model = self._model.replace(interventions=under)
            evidence = score(model, ids, start, settings, self._top_k)
        return Tokens(
            token_record(self._tokenizer, found, index=index + i, position=start + i)
            for i, found in enumerate(evidence)
        )

    def logprobs(self, ids: Sequence[int], start: int, reply: Turn | None = None) -> list[float]:
        """Log-probabilities in nats of `ids[start:]`, each after all that stand before it.

        Under the interventions that `reply` was made under, or else the session's model has.
        """
        model = self._model
        if reply is not None:
            model = model.replace(interventions=self.under(reply))
        evidence = score(model, ids, start, Sampling(seed=0), 1)
        return [float(found.logprob) for found in evidence]

    def label(self, token: int) -> str:
        """What a lone token stands for."""
        return token_label(self._tokenizer, token)

    def _continue(
        self,
        node: Node,
        kind: Branching,
        kept: Tokens,
        sampling: Sampling,
        *,
        given: Sequence[int] = (),
        refused: frozenset[int] = frozenset(),
    ) -> Plan:
        """A sibling of a reply that begins with `kept` and then `given`."""
        source, asked = turn_of(node), asked_by(node)
        under = self.under(source)
        ids, context, moved = self._room(node, len(kept) + len(given), sampling)
        before = [*ids, *kept.token_id.tolist()]
        if moved:
            # Seen in another context than before: what holds there is computed anew.
            kept = self.scored(before, 0, len(ids), sampling, under)
        first = len(kept)
        known = None
        if len(given) == 1 and not moved and first < len(source.tokens):
            known = alternative(source.tokens[first], given[0], self.label(given[0]))
        if known is not None:
            put = Tokens([known])
        else:
            put = self.scored([*before, *given], first, len(ids), sampling, under)
        # A token drawn under a condition of its own counts as given.
        count = len(put) + bool(refused)
        origin = Origin(kind, source.id, first, count)
        return Plan(asked, ids, context, sampling, kept, put, refused, origin, under)

    def intervene(
        self,
        node: Node,
        index: int,
        items: Sequence[Intervention],
        sampling: Sampling | None,
    ) -> Plan:
        """The same reply under interventions that act on the choice of the token at `index`."""
        source = turn_of(node)
        settings = self._with_seed_of(source, sampling)
        plan = self._continue(node, "intervene", source.tokens[:index], settings)
        changed = self._model.intervene(*items, start=len(plan.all_ids) - 1)
        refuse_uncached(changed.interventions, changed.config)
        return dataclasses.replace(plan, interventions=changed.interventions)

    def under(self, turn: Turn) -> Interventions | None:
        """What a reply was computed under.

        Raises:
          ValueError: what the conversation's file does not hold (interventions of the model of
            another session), a class of the user's own that was not given when it was loaded, or
            what this model does not have.
        """
        found, own = self._under.get(turn.id), self._model.interventions
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

    def remember(self, turn_id: int, interventions: Interventions | None) -> None:
        """Notes what a reply is made under."""
        if interventions is not None and interventions is not self._model.interventions:
            self._under[turn_id] = interventions

    def remember_in(self, under: dict[int, Interventions | Unresolved]) -> None:
        """Goes on with what is noted there: id of a reply -> what it was made under."""
        self._under = under

    def _go_on(self, node: Node, kind: Branching, sampling: Sampling) -> Plan:
        """A sibling of a reply that came to its end, in which that end is refused."""
        source = turn_of(node)
        kept = self.records(node, sampling)
        following = set(source.tokens[len(kept) : len(kept) + 1].token_id.tolist())
        refused = self._template.stop_ids(self._tokenizer) | following
        return self._continue(node, kind, kept, sampling, refused=refused)

    def _room(self, node: Node, length: int, sampling: Sampling) -> tuple[list[int], Context, bool]:
        """The context of a reply that begins with `length` tokens, and whether it is a new one.

        Raises:
          ContextFullError: there is no room for one token more.
        """
        source, turns = turn_of(node), turns_to(asked_by(node))
        limit = self.contexts.limit
        context = source.context or self.fit(turns)[1]
        context = dataclasses.replace(context, used=0, length=limit)
        ids = self.contexts.before(turns, context)
        wanted = min(sampling.max_new_tokens, limit // 16)
        moved = False
        if self.when_full == "drop_oldest" and len(ids) + length + wanted > limit:
            before = context.dropped
            ids, context = self.contexts.fit(
                *(turns, context.system, self.when_full, sampling.max_new_tokens),
                kept=length,
                dropped=before,
            )
            moved = context.dropped != before
        if len(ids) + length > limit:
            raise ContextFullError(too_long(len(ids) + length + 1, limit))
        return ids, context, moved

    def _own_ids(self, turn: Turn) -> Sequence[int]:
        """A reply as it stays in the context."""
        if turn.ids is not None:
            return turn.ids
        return self._template.reply_ids(self._tokenizer, turn.text)

    def _with_seed_of(self, source: Turn, sampling: Sampling | None) -> Sampling:
        """The settings with the seed of `source`: each place draws with the key it had."""
        sampling = Sampling.given(sampling)
        settings = sampling or self.sampling
        if sampling is not None and sampling.seed is not None:
            return settings
        seed = source.sampling.seed if source.sampling else self.sampling.seed
        return dataclasses.replace(settings, seed=secrets.randbits(31) if seed is None else seed)

    def _with_own_seed(self, node: Node, sampling: Sampling | None) -> Sampling:
        sampling = Sampling.given(sampling)
        if sampling is None:
            return self.seeded(asked_by(node))
        seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
        return dataclasses.replace(sampling, seed=seed)
