"""The making of a reply: the decoder driven by a plan, stoppable between any two tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gemma_nb.chat.context import ran_full, too_long
from gemma_nb.chat.events import PrefillEvent
from gemma_nb.chat.interrupts import between_steps
from gemma_nb.chat.interventions import ReplyInterventions
from gemma_nb.chat.plans import Plan
from gemma_nb.chat.records import TokenRecord
from gemma_nb.chat.reply import Reply
from gemma_nb.chat.reply_settings import ReplySettings
from gemma_nb.ending import Ending
from gemma_nb.errors import NonFiniteLogitsError
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.evidence import Evidence
from gemma_nb.sampling.prefill import Between
from gemma_nb.sampling.settings import Sampling
from gemma_nb.text.tokenizer import Tokenizer

STOPPED = "The reply was stopped."


class Generation:
    """Makes replies, one at a time.

    Attributes:
      stop: when set, or when Python ends, the reply being made ends after the current token, or
        piece of its prompt.
      listeners: called with each piece of a prompt that was read.
      out_of_room: whether the last reply ended because the context was full.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        settings: ReplySettings,
        made_under: ReplyInterventions,
    ) -> None:
        self.stop = Ending()
        self.listeners: list[Callable[[PrefillEvent], None]] = []
        self.out_of_room = False
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._settings = settings
        self._made_under = made_under

    def begin(self, plan: Plan, turn_id: int) -> Reply:
        """A reply of which nothing is made yet."""
        self._made_under.remember(turn_id, plan.interventions)
        return Reply(
            turn_id,
            self._tokenizer,
            self._settings.template,
            plan.sampling,
            origin=plan.origin,
            context=plan.context,
            under=plan.interventions,
        )

    def run(self, plan: Plan, reply: Reply) -> Iterator[list[TokenRecord]]:
        """Makes the reply; yields the records that became certain, after each token."""
        self.out_of_room = False
        self._decoder.intervene(plan.interventions)
        reply.used = len(plan.ids)
        reply.adopt_prefix(plan.prefix)
        for record in plan.given:
            if reply.finish_reason is None:
                yield reply.give(record)
        if reply.finish_reason is not None:
            return
        for evidence, position in self._choices(plan, reply):
            # The key that `draw` uses: that of the position whose logits it was drawn from.
            seed = plan.sampling.seed
            assert seed is not None
            records = reply.add(evidence, position, (seed, position - 1))
            self._end_from_outside(reply)
            if reply.finish_reason is not None:
                records += reply.flush()
            yield records

    def _choices(self, plan: Plan, reply: Reply) -> Iterator[tuple[Evidence, int]]:
        """Each choice with the position of the chosen token, until the reply is finished."""
        ids, limit = plan.all_ids, self._decoder.limit
        if len(ids) > limit:
            self.out_of_room, reply.used = True, limit
            reply.finish("length", too_long(len(ids), limit))
            return
        try:
            yield from self._drawn(ids, plan, reply)
        finally:
            reply.used = len(self._decoder.ids)

    def _drawn(self, ids: list[int], plan: Plan, reply: Reply) -> Iterator[tuple[Evidence, int]]:
        if plan.refused:
            strict = self._settings.barred(plan.sampling, also=plan.refused)
            evidence = self._prefill(ids, strict, reply)
            if evidence is None:
                return
            yield self._checked(evidence)
            ids.append(int(evidence.token))
            self._end_from_outside(reply)
            if reply.finish_reason is not None:
                return
        evidence = self._prefill(ids, self._settings.barred(plan.sampling), reply)
        while evidence is not None:
            yield self._checked(evidence)
            self._end_from_outside(reply)
            if reply.finish_reason is not None:
                return
            with between_steps():
                evidence = self._decoder.step(last=reply.one_left)

    def _prefill(self, ids: Sequence[int], sampling: Sampling, reply: Reply) -> Evidence | None:
        """The first choice after `ids`; None where the reply was stopped before."""
        rest = self._decoder.begin(ids, sampling)
        reply.prompt(len(rest))
        with between_steps() as interrupted:
            evidence = self._decoder.prefill(rest, self.between_pieces(interrupted))
        self._end_from_outside(reply)
        return evidence

    def between_pieces(self, interrupted: Callable[[], bool]) -> Between:
        """Tells the listeners of each piece of a prompt, and goes on unless that is to end.

        Args:
          interrupted: what `between_steps` yielded.
        """

        def goes_on(done: int, total: int) -> bool:
            for listener in tuple(self.listeners):
                listener(PrefillEvent(done, total))
            return not (self.stop.is_set() or interrupted())

        return goes_on

    def _checked(self, evidence: Evidence) -> tuple[Evidence, int]:
        position = len(self._decoder.ids)
        if not evidence.finite:
            self._decoder.reset()
            raise NonFiniteLogitsError(not_finite(position - 1))
        return evidence, position

    def _end_from_outside(self, reply: Reply) -> None:
        """Finishes a reply that was stopped, or for which there is no more room."""
        if reply.finish_reason is not None:
            return
        if self.stop.is_set():
            reply.finish("cancelled", STOPPED)
        elif self._decoder.full:
            self.out_of_room = True
            reply.finish("length", ran_full(len(self._decoder.ids), self._decoder.limit))


def not_finite(position: int) -> str:
    """The message of an error where the model computed NaN or infinity."""
    return (
        f"the logits at position {position} are not finite: the weights hold NaN or infinity, or "
        'the activations overflowed.  Reload the model, or load it with dtype="float32".'
    )
