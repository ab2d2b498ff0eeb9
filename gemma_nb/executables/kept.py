"""A function whose compiled forms are kept."""

from __future__ import annotations

import contextlib
import threading
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax

from gemma_nb.executables.files import folder, generation, is_refused, load, save, trial
from gemma_nb.executables.jax_cache import aside
from gemma_nb.executables.limits import note, on_relief
from gemma_nb.executables.names import disabled, program_name, settings
from gemma_nb.executables.starts import start


class Kept:
    """A jitted function whose compiled forms are kept, where JAX's are (see `folder`).

    It computes what the jitted function does.  Where somebody has replaced a part of what would be
    traced, in a notebook say, it is that function, and nothing is kept.

    Attributes:
      jitted: the function.
    """

    def __init__(self, function: Callable[..., Any], *static: object, **options: Any) -> None:
        """A function of which nothing has been compiled.

        Args:
          function: what is to be compiled.
          static: what it depends on beside its arguments' shapes, and the source; by `repr`.
          options: of `jax.jit`.
        """
        self.jitted: Any = jax.jit(function, **options)
        self._function, self._options = function, options
        self._static = "\n".join([function.__name__, *map(repr, (*static, options))])
        self._keeps = all(map(_own, static))
        self._compiled: dict[Hashable, Any] = {}
        self._locks: dict[Hashable, threading.Lock] = {}
        _all.add(self)

    def __call__(self, shapes: Hashable, *args: Any) -> Any:
        """Runs the function on arguments.

        Args:
          shapes: what tells their shapes from those of other calls, or None for the plain jitted
            function, which looks for itself: to do so in Python would take long in every step.
          args: the arguments.
        """
        return self.at(shapes, *args)(*args)

    def at(self, shapes: Hashable, *args: Any) -> Any:
        """What is called with arguments of these shapes: loaded, or compiled now."""
        if shapes is None or not self._keeps or folder() is None:
            return self.jitted
        key = (shapes, settings())
        found = self._compiled.get(key)
        if found is None:
            # Whoever needs it while it is compiled ahead waits for that.
            with self._locks.setdefault(key, threading.Lock()):
                found = self._compiled.get(key)
                if found is None:
                    found = self._compiled[key] = self._obtain(args)
        return found

    def compile(self, shapes: Hashable, *args: Any) -> None:
        """Loads or compiles it for the shapes of `args`; nothing is allocated or run."""
        if self.at(shapes, *args) is self.jitted:
            self.jitted.lower(*args).compile()

    def count(self) -> int:
        """For how many shapes it was compiled."""
        kept = [made for made in self._compiled.values() if made is not self.jitted]
        return len(kept) + int(self.jitted._cache_size())

    def forget(self) -> None:
        """Lets go of what was compiled."""
        self._compiled.clear()
        self._locks.clear()

    def _obtain(self, args: tuple[Any, ...]) -> Any:
        place, name = generation(), program_name(self._static, args)
        if place is None or name is None or disabled():
            return self.jitted
        start.note(name)
        place /= name
        loaded = start.loaded(name) or load(place)
        if loaded is not None:
            note()
            return _FirstRun(loaded, place)
        if is_refused(place):
            return self.jitted
        with aside():
            made = self._anew().lower(*args).compile()
        # At once: what has been run cannot always be written any more.
        save(place, made)
        return made

    def _anew(self) -> Any:
        """The jitted function under a name of its own, which no cache of JAX's knows.

        What has been loaded from one runs, but written to a file once more it lacks functions.
        """

        def renamed(*args: Any) -> Any:
            return self._function(*args)

        renamed.__name__ = f"{self._function.__name__}_{uuid.uuid4().hex}"
        return jax.jit(renamed, **self._options)


class _FirstRun:
    """A program from a file, of which is noted while it runs for the first time that it does.

    Compiled for another processor it loads, and ends the process when it runs.
    """

    def __init__(self, program: Any, place: Path) -> None:
        self._program = program
        self._place: Path | None = place

    def __call__(self, *args: Any) -> Any:
        place = self._place
        if place is None:
            return self._program(*args)
        self._place = None
        trials: contextlib.ExitStack | None = getattr(_together, "trials", None)
        if trials is None:
            with trial(place):
                return jax.block_until_ready(self._program(*args))
        trials.enter_context(trial(place))
        results = self._program(*args)
        # Weakly: what the block has read and lets go of must not stay in memory.
        _together.results += map(weakref.ref, jax.tree.leaves(results))
        return results


_together = threading.local()


@contextlib.contextmanager
def tried_together() -> Iterator[None]:
    """First runs in the block are waited for at its end, and not each by itself.

    Computations then overlap with each other, and with what Python does meanwhile.  For blocks that
    read what they free, and give no result away to another program: else a program's mark could be
    taken away while it still runs.
    """
    with contextlib.ExitStack() as trials:
        _together.trials, _together.results = trials, []
        try:
            yield
        finally:
            results = [result() for result in _together.results]
            del _together.trials, _together.results
            jax.block_until_ready([result for result in results if result is not None])


def _own(static: object) -> bool:
    """Whether a module, if it is one, is of this package alone.

    What somebody else's computes does not show in its `repr`, and may be another thing next time.
    """
    ours = ("gemma_nb.nn.transformer", "gemma_nb.nn.layer")
    return not isinstance(static, flax.linen.Module) or type(static).__module__ in ours


_all: weakref.WeakSet[Kept] = weakref.WeakSet()


def forget() -> None:
    """Lets go of all compiled programs, as `jax.clear_caches` does of the others."""
    for kept in list(_all):
        kept.forget()


on_relief.append(forget)


def shapes_of(tree: Any) -> Hashable:
    """The shapes and dtypes of some arrays, for `Kept`; None where they are being traced."""
    leaves = jax.tree.leaves(tree)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves)
