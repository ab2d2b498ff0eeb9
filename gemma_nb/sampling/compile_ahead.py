"""Compilation of programs before they are needed, on a thread of its own."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import jax
import numpy as np

from gemma_nb.ending import python_ends
from gemma_nb.executables import pinned
from gemma_nb.interventions import Interventions
from gemma_nb.nn import Transformer
from gemma_nb.sampling.cache import StreamCache, compile_rewinding, next_size, size_for
from gemma_nb.sampling.filters import Controls
from gemma_nb.sampling.inspect_position import compile_inspection
from gemma_nb.sampling.prefill import BUCKETS
from gemma_nb.sampling.programs import Programs
from gemma_nb.sampling.traits import EngineTraits

# The name of the threads.
COMPILING = "gemma-nb-compile"

# So many steps have the processor for themselves: a reply's first words wait for them.
_UNDISTURBED = 4

Jobs = Iterator[Callable[[], object]]

_log = logging.getLogger(__name__)


class AheadCompiler:
    """Compiles what a stream will need next, when nobody waits for it.

    Programs are compiled from shapes, since the arrays themselves are given away by the next step;
    once in a process, whichever stream asks for it.

    Attributes:
      capture_expected: somebody inspects positions, or may soon; until then no inspection is
        compiled ahead.
    """

    def __init__(self, programs: Programs, traits: EngineTraits, limit: int) -> None:
        """Nothing is begun yet.

        Args:
          programs: of the stream.
          traits: of its engine.
          limit: most positions of the stream.
        """
        self.capture_expected = False
        self._programs, self._traits, self._limit = programs, traits, limit
        self._steps = 0  # of the stream
        self._lone_prompt = False  # the program of a first prompt has just run
        self._settled = False  # the weights are moved to where they are read faster

    def settle(self) -> None:
        """Have the weights moved to where they are read faster.

        Not before the first token is there, which would wait for it.
        """
        if not self._settled:
            self._settled = True
            begin([self._programs.use_huge_pages])

    def note_prompt(self, *, first: bool) -> None:
        """Note that a prompt is fed.  `first`: by `Programs.first_prefill`."""
        self._lone_prompt = first and self._programs.first_prefill is not self._programs.prefill

    def note_step(self, size: int, controls: Controls, interventions: Interventions | None) -> None:
        """Note that a step begins at a cache size; now and then there is time for more."""
        self._steps += 1
        if self._steps > _UNDISTURBED:
            if self._lone_prompt:
                self._lone_prompt = False
                prefills = self._prefills_at(size, controls, interventions)
                begin([*prefills, *self._choice(controls)])
            self.settle()

    def note_fed(
        self,
        count: int,
        length: int,
        size: int,
        controls: Controls,
        interventions: Interventions | None,
    ) -> None:
        """Note that `count` tokens were fed, `length` with those before them.

        Where the cache is half full, the programs of its next size are compiled.  Not between a
        prompt's pieces, which that would slow down, nor beside the first step after it: compiling a
        step takes half a gigabyte, and both cores.
        """
        first = count > 1 or (self._steps <= _UNDISTURBED and length <= BUCKETS[-1])
        if 2 * length >= size and not first:
            following = next_size(size, self._limit)
            steps = self._steps_at(following, controls, interventions)
            begin([*steps, *self._inspection_at(following, interventions)])

    def compile_the_rest(self, controls: Controls, interventions: Interventions | None) -> None:
        """Compile what a longer conversation than the first steps needs, and what inspects it."""
        self._steps = _UNDISTURBED
        self.settle()
        self.capture_expected = True
        size = size_for(1, self._limit)
        following = next_size(size, self._limit)
        begin(
            [
                *self._prefills_at(size, controls, interventions),
                *self._steps_at(following, controls, interventions),
                *self._inspection_at(size, interventions),
                *self._inspection_at(following, interventions),
            ]
        )

    # --- jobs: each compiles one program, unless that was begun -------------------------------

    def _steps_at(
        self, size: int | None, controls: Controls, interventions: Interventions | None
    ) -> Jobs:
        """Jobs for the steps that come first at a cache size."""
        step = self._programs.decode_step
        if size is None or not self._is_new(step.feed, size, interventions):
            return
        yield partial(step.compile, *self._shapes(size), 1, controls, interventions)
        yield partial(compile_rewinding, self._shapes(size)[0])
        yield from self._prefills_at(size, controls, interventions)

    def _prefills_at(
        self, size: int, controls: Controls, interventions: Interventions | None
    ) -> Jobs:
        """Jobs for the short pieces behind others at a cache size."""
        prefill = self._programs.prefill
        # Its program may be that of single tokens, too, but for other shapes.
        if not self._is_new(prefill.feed, size, interventions, several=True):
            return
        for length in BUCKETS[:2]:
            yield partial(prefill.compile, *self._shapes(size), length, controls, interventions)

    def _choice(self, controls: Controls) -> Jobs:
        """Jobs for the choice after a prompt under all settings.

        Most need the short one, which is compiled in half the time.
        """
        prefill, transformer = self._programs.prefill, self._programs.transformer
        is_begun = begun(prefill.choose)
        if not self._traits.can_capture or is_begun:
            return
        is_begun.add(True)
        config, dtype = transformer.config, cast(Transformer, transformer).dtype
        hidden = jax.ShapeDtypeStruct((config.embed_dim,), dtype)
        state = hidden, jax.ShapeDtypeStruct((), np.dtype(np.int32))
        seen = jax.ShapeDtypeStruct((config.num_embed,), np.dtype(bool))
        yield partial(prefill.compile_choice, seen, state, controls)

    def _inspection_at(self, size: int | None, interventions: Interventions | None) -> Jobs:
        """Jobs for the inspection at a cache size, where one may be wanted."""
        if size is None or not (self.capture_expected and self._traits.can_capture):
            return
        inspection = self._programs.inspection
        if self._is_new(inspection, size, interventions):
            leaves = self._programs.decode_step.ends.leaves
            cache, _ = self._shapes(size)
            yield partial(compile_inspection, inspection, leaves, cache, interventions)

    def _shapes(self, size: int) -> tuple[StreamCache, jax.ShapeDtypeStruct]:
        """Shapes of the cache and of the tokens seen."""
        config = self._programs.transformer.config
        seen = jax.ShapeDtypeStruct((config.num_embed,), np.dtype(bool))
        return StreamCache.shapes(config, size, own=self._traits.ring_cache), seen

    def _is_new(
        self, program: Any, size: int, interventions: Interventions | None, *, several: bool = False
    ) -> bool:
        """True where nobody has begun to compile a program for a cache size; notes that it is."""
        kind = (size, several, jax.tree.structure(interventions))
        is_begun = begun(program)
        if kind in is_begun or not self._traits.compiles_ahead:
            return False
        is_begun.add(kind)
        return True


def begin(jobs: Iterable[Callable[[], object]]) -> None:
    """Run jobs that compile something, one after the other, while the caller goes on.

    JAX keeps what was compiled for some shapes, and a later call with such finds it.  A job that
    fails is logged, and the others are run: whoever needs what it should have compiled compiles it
    then, and is the one to be told why that cannot be done.
    """
    jobs = list(jobs)
    if jobs and not python_ends():
        # Not a daemon, whoever starts it: XLA must not be stopped in the middle of a compilation
        # when Python ends.
        threading.Thread(target=_run, args=(jobs,), name=COMPILING, daemon=False).start()


def _run(jobs: Iterable[Callable[[], object]]) -> None:
    for job in jobs:
        if python_ends():
            return
        try:
            pinned(job)()
        except Exception:  # whatever it is: nobody asked for this yet
            # No warning: it may be a setting of JAX's that holds for one thread only.
            _log.info("compiling ahead of need failed; it is done when needed", exc_info=True)
        _give_back()


def _give_back() -> None:
    """Return to the system what compiling has left, which glibc keeps otherwise.

    After each job, so that none begins on top of what another has left: half a gigabyte of a step.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@functools.cache
def begun(program: Any) -> set[Any]:
    """The kinds of calls that a program was compiled for ahead, in this process."""
    del program
    return set()
