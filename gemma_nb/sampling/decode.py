"""The stream of tokens that compiled steps choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb import executables, placement
from gemma_nb.executables import pinned
from gemma_nb.interventions import Interventions
from gemma_nb.interventions.reach import refuse_uncached
from gemma_nb.model import GemmaTransformer
from gemma_nb.sampling.cache import Archive, StreamCache, grow, rewind, size_for
from gemma_nb.sampling.compile_ahead import AheadCompiler
from gemma_nb.sampling.draw import may_suffice
from gemma_nb.sampling.evidence import Evidence
from gemma_nb.sampling.filters import Controls
from gemma_nb.sampling.inspect_position import InspectedPosition, inspect_position
from gemma_nb.sampling.prefill import BUCKETS, Between, chunks
from gemma_nb.sampling.programs import Programs, StepOutput
from gemma_nb.sampling.residuals import KeptResiduals, Residuals
from gemma_nb.sampling.rows import AttentionRows
from gemma_nb.sampling.settings import Sampling
from gemma_nb.sampling.traits import EngineTraits
from gemma_nb.sampling.whole import WholeChanges
from gemma_nb.text.prefix import shared_prefix

# A context of up to so many tokens gets its slots at once.  In a longer one each piece would read
# all of them, most still empty, so they come as it does: to compile a layer for one size more takes
# a second or two, once for each machine.
_AT_ONCE = 2048


class Decoder:
    """One stream of tokens: what is in the cache, and the next choice.

    While a choice is on its way to the host, the step that feeds it is already running, on the
    guess that its token will be wanted: what the host does between two tokens costs no time.  A
    step that nobody asks for is taken back.

    Not thread-safe: the session that owns it holds a lock.

    Attributes:
      ids: the token ids in the cache, in order.
      limit: most positions that the cache may hold.
      traits: of the engine.
      interventions: that it computes under, see `intervene`.
    """

    @pinned
    def __init__(
        self, model: GemmaTransformer, *, limit: int, top_k: int, rows: AttentionRows | None = None
    ) -> None:
        """An empty stream.

        Args:
          model: what computes.
          limit: most positions.
          top_k: number of alternatives.
          rows: where the attention rows of each choice are stored; None computes none.
        """
        self.limit = limit
        self.ids: list[int] = []
        self.traits = EngineTraits.of(model)
        self._config = model.transformer.config
        refuse_uncached(model.interventions, self._config)
        self._mesh = model.mesh
        self.interventions = model.interventions
        self._rows = rows
        layers = rows.layers if rows is not None else ()
        self._programs = Programs(model, self.traits, top_k=top_k, attention_layers=layers)
        self._ahead_compiler = AheadCompiler(self._programs, self.traits, limit)
        self._cache: StreamCache | None = None
        self._written = 0  # see `_rewind_to`
        self._whole = WholeChanges(self.reset)
        self._archive = Archive()
        self._residuals = Residuals(model.config)
        self._seen: Any = None
        self._controls: Controls | None = None
        self._short = False  # they may draw from the shortlist alone
        self._next: int | None = None  # the token chosen last, not yet fed
        self._ahead: StepOutput | None = None  # of the step that feeds it

    @property
    def cache(self) -> StreamCache | None:
        """The cache of `ids`, for reading: the next step takes its arrays away."""
        return self._cache

    @property
    def full(self) -> bool:
        """True where no further token can be fed."""
        return len(self.ids) >= self.limit

    @pinned
    def reset(self) -> None:
        """Forget everything; the next prompt is computed from its first token."""
        self.ids, self._cache, self._next, self._ahead = [], None, None, None
        self._written = 0
        self._archive = Archive()
        self._residuals = Residuals(self._config)

    def holds(self, ids: Sequence[int]) -> bool:
        """True where the tokens in the cache begin with `ids`."""
        self._whole.check()
        return self.ids[: len(ids)] == list(ids)

    @pinned
    def rewind_to(self, ids: Sequence[int]) -> None:
        """Take back what is in the cache beyond the prefix that it shares with `ids`."""
        with self._whole.change():
            self._rewind_to(shared_prefix(self.ids, ids))

    @pinned
    def intervene(self, interventions: Interventions | None) -> None:
        """Compute under other interventions from now on; None takes them away.

        What is cached stays up to where the old or the new ones start to act.

        Raises:
          ValueError: they cannot be computed token by token.
        """
        if interventions is not self.interventions:
            refuse_uncached(interventions, self._config)
            both = (self.interventions, interventions)
            start = min(int(x.start) for x in both if x is not None)
            with self._whole.change():
                self._rewind_to(min(start, len(self.ids)))
                self.interventions = interventions

    @pinned
    def begin(self, ids: Sequence[int], sampling: Sampling) -> list[int]:
        """Ready the stream to continue `ids`, reusing what the cache already holds of it.

        Args:
          ids: the whole context, at least one token.
          sampling: settings of the reply; its seed is set.

        Returns:
          The ids that are still to be fed; at least the last token, whose logits are needed.

        Raises:
          ValueError: the context is empty or exceeds `limit`.
        """
        if not 0 < len(ids) <= self.limit:
            raise ValueError(f"a context must hold 1 to {self.limit} tokens, got {len(ids)}")
        config, room = self._config, min(len(ids) + 1, _AT_ONCE)
        controls = Controls.of(sampling, config.num_embed)
        with self._whole.change():
            self._rewind_to(shared_prefix(self.ids, ids[:-1]))
            if self._cache is None:
                size, own = size_for(room, self.limit), self.traits.ring_cache
                self._cache = StreamCache.empty(config, size, self._mesh, own=own)
            self._make_room(room)
            self._controls, self._short = controls, may_suffice(sampling)
            seen = np.zeros(config.num_embed, bool)
            seen[self.ids] = True
            where = placement.vocabulary_sharding(config, self._mesh)
            self._seen = placement.put(seen, where)
        return list(ids[len(self.ids) :])

    @pinned
    def prefill(
        self, ids: Sequence[int], between: Between | None = None, *, token: int | None = None
    ) -> Evidence | None:
        """Feed a prompt and choose the token after it.

        Args:
          ids: what `begin` returned.
          between: see `gemma_nb.sampling.prefill.Between`.
          token: chosen whatever is drawn, with the evidence of this choice.

        Returns:
          The evidence on the host, or None where `between` ended it.

        Raises:
          ValueError: `token` lies outside the vocabulary.
        """
        controls = self._forcing(token)
        result, done = None, 0
        pieces = list(chunks(ids, len(self.ids)))
        # Not the first of several: a long prompt would wait for two programs to be compiled.
        first = not self.ids and len(pieces) == 1
        self._ahead_compiler.note_prompt(first=first)
        for i, (tokens, positions, last) in enumerate(pieces):
            fed = [int(token) for token in tokens[0, : last + 1]]
            wanted = i == len(pieces) - 1
            with self._whole.change():
                if wanted:
                    self._make_room(len(self.ids) + len(fed) + 1)  # with what is chosen after it
                output = self._feed(tokens, positions, last, controls, first=first, wanted=wanted)
                result = self._take(fed, output)
            done += len(fed)
            if between is not None and not between(done, len(ids)) and done < len(ids):
                return None
        executables.end_prefetch()
        return result

    @pinned
    def step(self, token: int | None = None, *, last: bool = False) -> Evidence:
        """Feed the token chosen last, and choose the next; evidence on the host.

        Args:
          token: chosen whatever is drawn, with the evidence of this choice.  What follows it is not
            computed ahead, since it may be given too.
          last: nothing is computed ahead, since nobody will ask for it.

        Raises:
          RuntimeError: nothing was chosen yet, or the cache is full.
          ValueError: `token` lies outside the vocabulary.
        """
        self._whole.check()
        if self._next is None or self.full:
            raise RuntimeError("step() needs a prefilled stream with room for one more token")
        controls, fed = self._forcing(token), self._next
        assert self._cache is not None
        self._ahead_compiler.note_step(self._cache.size, *self._settings)
        with self._whole.change():
            at = len(self.ids)
            if token is not None:
                self._rewind_to(at)  # a step ahead has chosen already
            output = self._ahead or self._feed_one(np.array([[fed]], np.int32), at, controls)
            self._ahead = None
            if token is None and not last and at + 1 < self.limit:
                self._ahead = self._feed_one(output.token, at + 1, controls)
            return cast(Evidence, self._take([fed], output))

    @pinned
    def inspect_position(self, position: int) -> InspectedPosition:
        """Attention and residual stream at a cached position, in about the time of a step.

        It is computed from the weights that decoding runs on and from the cached keys and values,
        under the interventions that the stream has, and equals a pass over all tokens up to there
        as nearly as decoding does.  The stream is left as it is.

        It is a program of its own for each cache size.  From `compile` or the first call on it
        is compiled ahead, as the steps are; a call before that takes seconds.

        Args:
          position: an index into `ids`.

        Raises:
          ValueError: no such position.
          RuntimeError: this decoder cannot capture, see `EngineTraits`.
        """
        if not self.traits.can_capture:
            raise RuntimeError("another library's module, or one on a mesh, cannot be looked into")
        self._whole.check()
        if self._cache is None or not 0 <= position < len(self.ids):
            raise ValueError(f"the cache holds positions 0 to {len(self.ids) - 1}, not {position}")
        self._ahead_compiler.capture_expected = True
        programs, held = self._programs, (self._cache, self._archive, self.interventions)
        leaves, at = programs.decode_step.ends.leaves, (self.ids[position], position)
        return inspect_position(programs.inspection, leaves, *held, *at)

    @pinned
    def residuals(self, ids: Sequence[int]) -> KeptResiduals:
        """The residual stream of the tokens in the cache that `ids` begins with, as computed.

        The last token of a reply was chosen but not fed.  Where it is all that `ids` has beyond the
        cache it is fed now, and taken back: the stream is left as it is.
        """
        self._whole.check()
        shared = shared_prefix(self.ids, ids)
        stored = self._residuals.first(shared)
        if 0 < stored.length == len(self.ids) == len(ids) - 1 and not self.full:
            assert self._controls is not None
            token = np.array([ids[-1:]], np.int32)
            with self._whole.change():
                self._rewind_to(shared)  # a step ahead may stand there
                self._ahead = self._feed_one(token, shared, self._controls)
                self._residuals.write(shared, jax.device_get(self._ahead.residuals), 1)
                stored = self._residuals.first(len(ids))
                self._rewind_to(shared)
        return stored

    @pinned
    def compile(self, progress: Callable[[float], None] | None = None) -> None:
        """Compile every step that a short conversation needs, and leave the stream empty.

        Those of a longer one, and the inspection, are compiled on another thread afterwards, while
        nobody waits.
        """
        self.reset()
        sizes = (*BUCKETS[:2], 1)
        for i, size in enumerate(sizes):
            # One for each of both choices.
            sampling = Sampling(temperature=i % 2, seed=0)
            rest = self.begin([0] * min(size, self.limit - 1), sampling)
            self.prefill(rest)
            self.reset()
            if progress is not None:
                progress((i + 1) / len(sizes))
        self._ahead_compiler.compile_the_rest(*self._settings)

    def settle(self) -> None:
        """Have the weights moved to where they are read faster, on another thread."""
        self._ahead_compiler.settle()

    @property
    def _settings(self) -> tuple[Controls, Interventions | None]:
        """Controls and interventions: what every step takes beside the tokens."""
        assert self._controls is not None
        return self._controls, self.interventions

    def _forcing(self, token: int | None) -> Controls:
        assert self._controls is not None
        return self._controls if token is None else self._controls.forcing(int(token))

    def _feed_one(self, token: Any, position: int, controls: Controls) -> StepOutput:
        return self._feed(token, np.array([[position]], np.int32), 0, controls)

    def _feed(
        self,
        tokens: Any,
        positions: np.ndarray,
        last: int,
        controls: Controls,
        *,
        first: bool = False,
        wanted: bool = True,
    ) -> StepOutput:
        """Start a step, whose output is not there yet.

        Args:
          tokens: (1, T), on the host or the device.
          positions: (1, T) theirs.
          last: index of the last that is not padding.
          controls: of the choice after it.
          first: nothing is cached.
          wanted: the choice is; not after a prompt's pieces but the last.
        """
        end = int(positions[0, last]) + 1
        cache = self._make_room(end)
        program = self._programs.feeding(tokens.shape[1], first=first)
        fed = (tokens, positions, last, controls, self.interventions)
        self._cache, self._seen, output = program.run(
            cache, self._seen, *fed, wanted=wanted, short=self._short
        )
        self._written = max(self._written, end)
        return output

    def _take(self, fed: Sequence[int], output: StepOutput) -> Evidence | None:
        """Wait for the output of a step that fed `fed`, and store it; its evidence, if any."""
        start = len(self.ids)
        # Not `jax.device_get`, which takes longer, and every token has these two.
        words, rows = (None if x is None else np.asarray(x) for x in (output.words, output.kv_rows))
        attention, residuals = jax.device_get((output.attention, output.residuals))
        evidence = None if words is None else Evidence.unpack(words)
        if rows is not None:
            self._archive.write(start, rows[:, :, : len(fed)])
        if residuals is not None:
            self._residuals.write(start, residuals, len(fed))
        self.ids.extend(fed)
        self._next = None if evidence is None else int(evidence.token)
        if evidence is not None and attention is not None:
            assert self._rows is not None
            row = self._rows.keep(attention, self.ids, start, self.interventions)
            evidence = evidence.replace(attention=row)  # type: ignore[attr-defined]
        assert self._cache is not None
        self._ahead_compiler.note_fed(len(fed), len(self.ids), self._cache.size, *self._settings)
        return evidence

    def _rewind_to(self, length: int) -> None:
        """Leave the first `length` tokens in the cache, and no step ahead.

        `_written` is the position behind the last one that the rings of W slots were written at, or
        were made anew up to.  They hold the W before it, except for what was taken back since, and
        whoever goes on after `length` tokens looks at W - 1: so one token can be taken back as it
        is, and no second one.
        """
        cache, held = self._cache, len(self.ids) + (self._ahead is not None)
        if cache is not None and length < held:
            if cache.ring_size and self._written > max(cache.ring_size, length + 1):
                self._cache = cache.with_rings(self._archive, length)
                self._written = length
            else:
                self._cache = rewind(cache, jnp.int32(length))
        if length < len(self.ids):
            # Another list: attention rows refer to the old one.
            self.ids = self.ids[:length]
        self._next = self._ahead = None

    def _make_room(self, length: int) -> StreamCache:
        """The cache, grown where so many tokens need it."""
        assert self._cache is not None
        size = size_for(length, self.limit)
        if self._cache.size < size:
            self._cache = grow(self._cache, size, self._config)
        return self._cache
