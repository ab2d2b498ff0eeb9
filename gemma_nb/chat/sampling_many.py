"""Many replies at once, which leave the conversation as it is."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

import jax

from gemma_nb import settings
from gemma_nb.chat.context import ran_full, too_long
from gemma_nb.chat.core import SessionCore
from gemma_nb.chat.generation import STOPPED, Generation, not_finite
from gemma_nb.chat.interrupts import between_steps
from gemma_nb.chat.plans import NewReplies, Plan
from gemma_nb.chat.replies import Replies
from gemma_nb.chat.reply import Reply
from gemma_nb.chat.turns import Turn
from gemma_nb.errors import NonFiniteLogitsError
from gemma_nb.processor import has_matrix_unit
from gemma_nb.sampling.batch import MOST, Batch
from gemma_nb.sampling.evidence import Evidence
from gemma_nb.sampling.settings import Sampling


def fewest() -> int:
    """Fewer replies than this are made one after another.

    A step of a batch multiplies matrices, which takes longer than one token's step, however few
    streams there are.  Measured with Gemma 3 270M on two cores without a matrix unit for bfloat16:
    four streams at once made 1.2 of a single one's tokens per second, eight 1.6, sixteen 1.7.  On
    two cores with one, two made 0.7, four 1.2, sixteen 2.6 (before all read one int8 vocabulary).
    """
    slow = jax.default_backend() == "cpu" and not has_matrix_unit()
    return 4 if slow else 3


class ManySampler:
    """Samples many replies beside the conversation.

    Up to 16 replies are made at the same time, a token of each per step, where that is faster than
    one after another.
    """

    def __init__(
        self, core: SessionCore, new: NewReplies, generation: Generation, replies: Replies
    ) -> None:
        self._core = core
        self._decoder = core.decoder
        self._new = new
        self._generation = generation
        self._replies = replies

    def sample(self, prompt: str, n: int = 8, *, sampling: Sampling | None = None) -> list[Turn]:
        """Makes `n` independent replies to a message, and leaves the conversation as it is.

            replies = chat.sample("Name a colour.", n=8)
            collections.Counter(turn.text for turn in replies)

        What stands before the replies is computed once.  Reply i is drawn with seed + i: with a
        fixed seed they are those that `chat` and then `regenerate` would make, as nearly as
        float32 rounds; made at once they are more exact where the model stores int8.  At
        temperature 0 all are the same.

        The turns have full evidence, but for attention rows where they are made at once (see
        `fewest`), and the id 0, since they are not in `tree`.  `stop` ends all
        replies being made with `finish_reason` "cancelled", the kernel's interrupt with
        "interrupted"; either way what had come is returned, also as an empty reply, rather than
        lost to an exception.  A reply that fills the context ends with "length" whatever
        `when_full` says.

        Args:
          prompt: what is said.
          n: how many replies, at least 1.
          sampling: settings in place of the session's.

        Raises:
          ValueError: n is less than 1.
          BusyError: a reply is being made.
          TextError: text that cannot be tokenized.
          NonFiniteLogitsError: the model computed NaN or infinity.
          ContextFullError: the message does not fit and `when_full` is "error".
        """
        n = settings.whole("n", n)
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n!r}")
        chosen = Sampling.given(sampling) or self._core.settings.sampling
        seed = secrets.randbits(31) if chosen.seed is None else chosen.seed
        each = [dataclasses.replace(chosen, seed=(seed + i) % 2**32) for i in range(n)]
        return self._sampled([prompt] * n, each)

    def sample_each(
        self, prompts: Sequence[str], *, sampling: Sampling | None = None
    ) -> list[Turn]:
        """Makes one reply to each of many messages, none of which sees the others.

            chat = gnb.ChatSession(model, tokenizer, system=rules, sampling=gnb.Sampling(0))
            answers = chat.sample_each([question.text for question in questions])

        For evaluations: what all messages have in common, such as the system text, the conversation
        so far (examples, say) and their own beginning, is computed once for up to 16 of them.
        Each reply is what `chat` would give here; with a fixed seed all use that seed.  Everything
        else is as in `sample`.

        Args:
          prompts: what is said, each on its own.
          sampling: settings in place of the session's.

        Returns:
          A reply for each, in their order.

        Raises:
          TypeError: a single string.
          BusyError, TextError, NonFiniteLogitsError, ContextFullError: as `sample`.
        """
        if isinstance(prompts, str):
            raise TypeError("sample_each() takes a list of messages; for one, call sample()")
        chosen = Sampling.given(sampling) or self._core.settings.sampling
        drawn = [secrets.randbits(31) if chosen.seed is None else chosen.seed for _ in prompts]
        each = [dataclasses.replace(chosen, seed=seed) for seed in drawn]
        return self._sampled(prompts, each)

    # --- internals ------------------------------------------------------------------------------

    def _sampled(self, prompts: Sequence[str], samplings: Sequence[Sampling]) -> list[Turn]:
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"a message must be a string, got {type(prompt).__name__}")
        replies: list[Reply] = []
        try:
            with self._core.lock.alone():
                self._generation.stop.clear()
                pairs = list(zip(prompts, samplings, strict=True))
                plans = [
                    self._new.aside(self._core.tree.tip, prompt, each) for prompt, each in pairs
                ]
                self._make_all(plans, replies)
        except KeyboardInterrupt:
            if not replies:
                raise
            # It came when they were all there.
        return self._replies.beside_the_tree(replies)

    def _make_all(self, plans: Sequence[Plan], replies: list[Reply]) -> None:
        """Makes a reply for each plan, in `replies`; an interrupt ends them."""
        try:
            for first in range(0, len(plans), MOST):
                group = plans[first : first + MOST]
                begun = [self._generation.begin(plan, 0) for plan in group]
                replies += begun
                self._make(list(zip(group, begun, strict=True)))
        except KeyboardInterrupt:
            replies += [self._generation.begin(plan, 0) for plan in plans[len(replies) :]]
            for reply in replies:
                reply.finish("interrupted", "The kernel was interrupted.")
        for reply in replies:
            reply.finish("cancelled", STOPPED)  # all that have not come to an end
            reply.flush()

    def _make(self, made: Sequence[tuple[Plan, Reply]]) -> None:
        """Makes some replies, as many as a batch holds."""
        stop = self._generation.stop
        if not self._decoder.traits.can_batch or len(made) < fewest():
            # Another library's module, or one on a mesh; or so few that turns are faster.
            for plan, reply in made:
                if not stop.is_set():
                    for _ in self._generation.run(plan, reply):
                        pass
            return
        limit = self._decoder.limit
        for plan, reply in made:
            reply.used = min(len(plan.ids), limit)
            if len(plan.ids) > limit:
                reply.finish("length", too_long(len(plan.ids), limit))
        made = [(plan, reply) for plan, reply in made if reply.finish_reason is None]
        if not made or stop.is_set():
            return
        self._decoder.intervene(self._core.model.interventions)
        batch = Batch(self._core.model, self._decoder, top_k=self._core.capture.top_k)
        barred = [self._core.settings.barred(plan.sampling) for plan, _ in made]
        with between_steps() as interrupted:
            first = batch.begin(
                [plan.ids for plan, _ in made],
                barred,
                self._generation.between_pieces(interrupted),
            )
        for place, (_, reply) in enumerate(made):
            # What was computed for all of them is told once.
            reply.prompt(batch.fed if place == 0 else 0)
        chosen = {} if first is None else dict(enumerate(first))
        while chosen and not stop.is_set():
            following = {}
            for i, evidence in chosen.items():
                if self._add(*made[i], batch.ids[i], evidence):
                    following[i] = int(evidence.token)
            if not following or stop.is_set():
                break
            with between_steps():
                chosen = batch.step(following)

    def _add(self, plan: Plan, reply: Reply, ids: Sequence[int], evidence: Evidence) -> bool:
        """Takes a reply's next choice; whether it goes on."""
        position, limit = len(ids), self._decoder.limit
        if not evidence.finite:
            self._decoder.reset()
            raise NonFiniteLogitsError(not_finite(position - 1))
        seed = plan.sampling.seed
        assert seed is not None
        reply.add(evidence, position, (seed, position - 1))
        reply.used = position
        if reply.finish_reason is None and position >= limit:
            reply.finish("length", ran_full(position, limit))
        return reply.finish_reason is None
