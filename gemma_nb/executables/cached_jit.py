"""Jitted functions whose compiled programs are stored across processes."""

from __future__ import annotations

import contextlib
import threading
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
from jax._src.array import ArrayImpl

from gemma_nb.executables.files import folder, generation, is_refused, load, save, trial
from gemma_nb.executables.jax_cache import aside
from gemma_nb.executables.limits import note, on_relief
from gemma_nb.executables.names import abstract_shapes, disabled, program_name, settings
from gemma_nb.executables.prefetch import prefetched

# Kinds of calls that are recognised without hashing their shapes.
_RECENT = 8


class _Call(NamedTuple):
    """A program, and the calls that it is for.

    Attributes:
      structure: tree of the arguments.
      shapes: of their leaves, as `_quick_shapes` has them.
      settings: JAX's, see `names.settings`.
      program: what computes such a call.
    """

    structure: Any
    shapes: list[Any]
    settings: list[Any]
    program: Any


class CachedJit:
    """A jitted function whose compiled programs are stored where JAX's are (see `files.folder`).

    A program is found by what is static, the shapes and dtypes of the arguments and JAX's settings;
    not by shardings, since nothing is stored but on a single device.  Where that is not so, or
    somebody has replaced a part of what would be traced, in a notebook say, or arguments are being
    traced, it is the plain jitted function.

    Attributes:
      jitted: the plain jitted function.
    """

    def __init__(self, function: Callable[..., Any], *static: object, **options: Any) -> None:
        """A function of which nothing has been compiled; also a decorator.

        Args:
          function: is compiled; takes positional arguments.
          static: what it depends on beside its arguments' shapes, and the source; by `repr`.
          options: of `jax.jit`.
        """
        self.jitted: Any = jax.jit(function, **options)
        self._function, self._options = function, options
        self._static = "\n".join([function.__name__, *map(repr, (*static, options))])
        self._is_stored = all(map(_is_own, static))
        self._compiled: dict[Hashable, Any] = {}
        self._recent: list[_Call] = []  # the latest first
        self._locks: dict[Hashable, threading.Lock] = {}
        _all.add(self)

    def __call__(self, *args: Any) -> Any:
        """The function's result; its program is loaded, or compiled, where it was not yet."""
        return self.program(*args)(*args)

    def program(self, *args: Any) -> Any:
        """The program of calls with such arguments: loaded, or compiled now.

        Takes less than hashing all shapes would, since every token asks.
        """
        if not self._is_stored or folder() is None:
            return self.jitted
        leaves, structure = jax.tree.flatten(args)
        shapes, current, recent = _quick_shapes(leaves), settings(), self._recent
        for call in recent:
            if call.shapes == shapes and call.structure == structure and call.settings == current:
                break
        else:
            found = self._find(args, leaves, structure, current)
            if found is None:
                return self.jitted
            call = _Call(structure, shapes, current, found)
        if not recent or call is not recent[0]:
            # A new list, since other threads may go through this one.
            others = [other for other in recent if other is not call]
            self._recent = [call, *others[: _RECENT - 1]]
        return call.program

    def compile(self, *args: Any) -> None:
        """Load or compile the program for the shapes of `args`; nothing is allocated or run."""
        if self.program(*args) is self.jitted:
            self.jitted.lower(*args).compile()

    def count(self) -> int:
        """The number of programs that were compiled."""
        stored = [program for program in self._compiled.values() if program is not self.jitted]
        return len(stored) + int(self.jitted._cache_size())

    def forget(self) -> None:
        """Let go of what was compiled."""
        self._recent = []
        self._compiled.clear()
        self._locks.clear()

    def _find(
        self, args: tuple[Any, ...], leaves: list[Any], structure: Any, current: list[Any]
    ) -> Any:
        """The program by the hash of all shapes; None where the arguments have none."""
        if any(isinstance(x, jax.core.Tracer) or not hasattr(x, "dtype") for x in leaves):
            return None
        key = structure, tuple(abstract_shapes(leaves)), tuple(current)
        found = self._compiled.get(key)
        if found is None:
            # Whoever needs it while it is compiled ahead waits for that.
            with self._locks.setdefault(key, threading.Lock()):
                found = self._compiled.get(key)
                if found is None:
                    found = self._compiled[key] = self._obtain(args)
        return found

    def _obtain(self, args: tuple[Any, ...]) -> Any:
        path, name = generation(), program_name(self._static, args)
        if path is None or name is None or disabled():
            return self.jitted
        path /= name
        loaded = prefetched(name) or load(path)
        if loaded is not None:
            note()
            return _FirstRun(loaded, path)
        if is_refused(path):
            return self.jitted
        with aside():
            compiled = self._renamed().lower(*args).compile()
        # At once: what has been run cannot always be written any more.
        save(path, compiled)
        return compiled

    def _renamed(self) -> Any:
        """The jitted function under a name of its own, which no cache of JAX's knows.

        What has been loaded from one runs, but written to a file once more it lacks functions.
        """

        def renamed(*args: Any) -> Any:
            return self._function(*args)

        renamed.__name__ = f"{self._function.__name__}_{uuid.uuid4().hex}"
        return jax.jit(renamed, **self._options)


class Kept(CachedJit):
    """`CachedJit` as scripts outside of this package call it, `Kept(f, "static")((2,), array)`."""

    def __call__(self, shapes: object, *args: Any) -> Any:
        """The function's result; `shapes` are found out anyway."""
        del shapes
        return super().__call__(*args)


def _quick_shapes(leaves: list[Any]) -> list[Any]:
    """Descriptions of the leaves of a call, which are compared faster than shapes are.

    An array's `aval` is one object for all that a program returns in one place, and for one array
    in all calls: lists of them are compared by identity, as long as calls are alike.
    """
    return [
        x.aval
        if type(x) is ArrayImpl
        else (type(x), getattr(x, "shape", None), getattr(x, "dtype", None))
        for x in leaves
    ]


class _FirstRun:
    """A program from a file, of which is noted while it runs for the first time that it does.

    Compiled for another processor it loads, and ends the process when it runs.
    """

    def __init__(self, program: Any, path: Path) -> None:
        self._program = program
        self._path: Path | None = path

    def __call__(self, *args: Any) -> Any:
        path = self._path
        if path is None:
            return self._program(*args)
        self._path = None
        trials: contextlib.ExitStack | None = getattr(_together, "trials", None)
        if trials is None:
            with trial(path):
                return jax.block_until_ready(self._program(*args))
        trials.enter_context(trial(path))
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


def _is_own(static: object) -> bool:
    """True of all but linen modules that are, or wrap, somebody else's.

    What such a module computes does not show in its `repr`, and may be another thing next time.
    """
    module = type(static).__module__
    own = module.startswith("gemma_nb.nn.") and module != "gemma_nb.nn.wrapped"
    return own or not isinstance(static, flax.linen.Module)


_all: weakref.WeakSet[CachedJit] = weakref.WeakSet()


def forget() -> None:
    """Let go of all compiled programs, as `jax.clear_caches` does of the others."""
    for function in list(_all):
        function.forget()


on_relief.append(forget)
