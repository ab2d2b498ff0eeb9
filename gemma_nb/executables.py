"""Compiled programs that are kept across processes, and found again without being traced.

JAX's compilation cache finds a program by what it was lowered to, so every process traces and
lowers it first: most of two seconds of Python before the first token of Gemma 3 270M.  Here it is
found by what it would be traced from: the source, the versions, the settings and the shapes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import operator
import os
import pickle
import platform
import shutil
import sys
import sysconfig
import threading
import uuid
import weakref
import zlib
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable

from gemma_nb import processor
from gemma_nb.cache import cache_dir, remove_leftovers, temporary

# Of so many versions of the source, or of what it runs on, programs are kept.
_GENERATIONS = 4
_PACKAGE = Path(__file__).parent
# What a program is traced through.
_TRACED = ("config", "interventions", "nn", "processor", "sampling", "sites", "typing")
# JAX's settings that say where things go and what is said of them, or are for other devices: they
# change no program.  Of the others each takes a quarter of a microsecond of every step.
_ASIDE = (
    *("cache", "log", "traceback", "dump", "explain", "pprint", "guard", "leak", "url", "metadata"),
    *("gpu", "cuda", "rocm", "oneapi", "pallas", "mosaic", "pgle", "mock", "jax2tf", "serializ"),
    *("export", "distributed", "preemption", "recoverability", "proxy", "host", "topology"),
    *("platform", "profile", "collectives", "hlo_source", "bcoo", "ragged", "captured"),
)

_log = logging.getLogger(__name__)


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
        key = (shapes, _settings())
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
        generation, name = _generation(folder()), _name(self._static, args)
        if generation is None or name is None or _disabled():
            return self.jitted
        _start.note(name)
        place = generation / name
        loaded = _start.loaded(name) or _load(place)
        if loaded is not None:
            return loaded
        if _refused(place).exists():
            return self.jitted
        made = self._anew().lower(*args).compile()
        # At once: what has been run cannot always be written any more.
        _save(place, made)
        return made

    def _anew(self) -> Any:
        """The jitted function under a name of its own, which JAX's cache does not know.

        What has been loaded from there runs, but written to a file once more it lacks functions.
        """

        def renamed(*args: Any) -> Any:
            return self._function(*args)

        renamed.__name__ = f"{self._function.__name__}_{uuid.uuid4().hex}"
        return jax.jit(renamed, **self._options)


def _own(static: object) -> bool:
    """Whether a module, if it is one, is of this package alone.

    What somebody else's computes does not show in its `repr`, and may be another thing next time.
    """
    ours = ("gemma_nb.nn.transformer", "gemma_nb.nn.block")
    return not isinstance(static, flax.linen.Module) or type(static).__module__ in ours


_all: weakref.WeakSet[Kept] = weakref.WeakSet()


def forget() -> None:
    """Lets go of all compiled programs, as `jax.clear_caches` does of the others."""
    for kept in list(_all):
        kept.forget()


def shapes_of(tree: Any) -> Hashable:
    """The shapes and dtypes of some arrays, for `Kept`; None where they are being traced."""
    leaves = jax.tree.leaves(tree)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def folder() -> Path | None:
    """Where programs are kept: beside JAX's where `gnb.load` keeps those, else nowhere."""
    where = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    kept = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    if where is None or not kept or not _can():
        return None
    return _beside(where, os.environ.get("GEMMA_NB_CACHE"))


@functools.lru_cache(maxsize=4)
def _beside(where: str, override: str | None) -> Path | None:
    del override  # what `cache_dir` depends on
    own = cache_dir()
    return own / "programs" if where == str(own / "jax") else None


@functools.cache
def _can() -> bool:
    """Whether this is one CPU device.

    With several a program belongs to some of them; and others have not been tried.
    """
    return jax.default_backend() == "cpu" and jax.local_device_count() == 1


def _disabled() -> bool:
    return bool(jax.config.jax_disable_jit)  # type: ignore[attr-defined]


def _settings() -> tuple[Any, ...]:
    """JAX's settings that hold here, in this thread."""
    return tuple([getattr(jax.config, name) for name in _names()])


@functools.cache
def _names() -> tuple[str, ...]:
    named = (n for n in jax.config.values if not any(word in n for word in _ASIDE))
    return tuple(name for name in named if hasattr(jax.config, name))  # flags have no attribute


# --- what a program is found by -------------------------------------------------------------------


def _name(static: str, args: tuple[Any, ...]) -> str | None:
    """The file of a program; None where it is not to be kept."""
    leaves, structure = jax.tree.flatten(args)
    shapes = [(x.shape, str(x.dtype), getattr(x, "weak_type", False)) for x in leaves]
    source = _traced()
    said = "\n".join([static, str(structure), repr(shapes), repr(_settings()), source or ""])
    # An address is another one in every process.
    if source is None or " at 0x" in said:
        return None
    first, _, _ = static.partition("\n")
    return f"{first}-{hashlib.sha256(said.encode()).hexdigest()}"


@functools.cache
def _generation(programs: Path | None) -> Path | None:
    """The folder below `programs` of what is compiled from this source, on this machine.

    Older ones are cleared away.  None where nothing can be written.
    """
    if programs is None:
        return None
    said = [
        *(f"{x.__name__} {x.__version__}" for x in (jax, jaxlib, flax, np)),
        sys.version,
        platform.machine(),
        processor.described(),
        jax.local_devices()[0].client.platform_version,
        str(_cores()),
        os.environ.get("XLA_FLAGS", ""),
    ]
    digest = hashlib.sha256("\n".join(said).encode())
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(_PACKAGE)).encode() + b"\0" + file.read_bytes())
    place = programs / digest.hexdigest()
    try:
        place.mkdir(parents=True, exist_ok=True)
        os.utime(place)
        remove_leftovers(place)
        others = sorted(programs.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in others[_GENERATIONS:]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        _log.info("%s cannot be written to; programs are not kept there", programs, exc_info=True)
        return None
    return place


def _cores() -> int:
    """XLA divides work among so many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _traced() -> str | None:
    """What stands in the modules that a program is traced through; None where not all is ours.

    Their source tells what does, unless somebody has put something else there since.
    """
    global _last
    spaces: list[tuple[str, Mapping[str, Any]]] = [
        (name, vars(sys.modules[name])) for name in _modules()
    ]
    classes = [
        (f"{module} {name}", vars(value))
        for module, space in spaces
        for name, value in space.items()
        if isinstance(value, type) and value.__module__ == module
    ]
    spaces += classes
    held = [value for _, space in spaces for value in space.values()]
    before, found = _last
    if len(before) != len(held) or not all(map(operator.is_, before, held)):
        found = _digest(spaces)
        _last = held, found
    return found


@functools.cache
def _modules() -> tuple[str, ...]:
    """The modules that a program is traced through.

    All are imported, so that it makes no difference which of them were.
    """
    files = (file for what in _TRACED for file in (_PACKAGE / what).glob("*.py"))
    single = (_PACKAGE / f"{what}.py" for what in _TRACED)
    paths = [file.relative_to(_PACKAGE.parent) for file in (*files, *single) if file.exists()]
    names = sorted(".".join(path.with_suffix("").parts) for path in paths)
    names = [name.removesuffix(".__init__") for name in names]
    for name in names:
        importlib.import_module(name)
    return tuple(names)


# What `_traced` found to stand there, and its digest.
_last: tuple[list[Any], str | None] = ([], None)


class _ForeignError(Exception):
    """A function from outside this package and installed ones."""


def _digest(spaces: list[tuple[str, Mapping[str, Any]]]) -> str | None:
    digest = hashlib.sha256()
    try:
        for where, space in spaces:
            for name, value in sorted(space.items()):
                if name not in ("__builtins__", "__slotnames__"):  # copyreg sets the second
                    digest.update(f"{where} {name} {_described(value, name)}\n".encode())
    except _ForeignError:
        return None
    return digest.hexdigest()


def _described(value: Any, name: str) -> str:
    """What stands under a name of a module or a class."""
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(_described(x, name) for x in value)})"
    if isinstance(value, dict):
        items = (f"{key!r}: {_described(x, name)}" for key, x in value.items())
        return f"dict({', '.join(items)})"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({', '.join(sorted(map(repr, value)))})"
    if isinstance(value, bool | int | float | str | bytes | None):
        return repr(value)
    for inner in ("__wrapped__", "__func__", "fget", "func"):
        if (wrapped := getattr(value, inner, None)) is not None and wrapped is not value:
            return f"{_kind(value, name)} of {_described(wrapped, name)}"
    return _kind(value, name)


def _kind(value: Any, name: str) -> str:
    """What something is, by the place in the source of what it runs."""
    if isinstance(value, FunctionType):
        # What dataclasses and named tuples generate is in no file, nor is what `python -c` runs.
        return _place(value.__code__, generated=name.startswith("__"))
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.cache
def _place(code: CodeType, *, generated: bool) -> str:
    file = code.co_filename
    if not file.startswith(_installed()) and not (generated and file == "<string>"):
        raise _ForeignError
    return f"{file}:{code.co_firstlineno}"


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return (str(_PACKAGE) + os.sep, "<frozen ", *(str(path) + os.sep for path in paths))


# --- files ----------------------------------------------------------------------------------------


def _save(place: Path, made: jax.stages.Compiled) -> None:
    """Writes a program; that takes a twentieth of the time that it was compiled in."""
    try:
        payload, *trees = serialize_executable.serialize(made)
        # Of a tree's structure only an example can be pickled.
        examples = [jax.tree.unflatten(tree, range(tree.num_leaves)) for tree in trees]
        data = zlib.compress(pickle.dumps((payload, *examples)), 1)
        with temporary(place) as file:
            file.write(data)
    except OSError:
        _log.info("%s cannot be written", place, exc_info=True)
    except Exception:  # whatever it is: the program runs, and from now on JAX's cache does for it
        _log.info("%s cannot be kept", place, exc_info=True)
        with contextlib.suppress(OSError):
            _refused(place).touch()


def _refused(place: Path) -> Path:
    """A file that says that a program can not be kept."""
    return place.with_name(f"{place.name}.refused")


def _load(place: Path) -> jax.stages.Compiled | None:
    """A program from its file; None where there is no such file, or not a good one."""
    try:
        payload, *examples = pickle.loads(zlib.decompress(place.read_bytes()))
        trees = map(jax.tree.structure, examples)
        return serialize_executable.deserialize_and_load(payload, *trees)
    except FileNotFoundError:
        return None
    except Exception:  # whatever is wrong with it: a new one takes its place
        _log.info("%s cannot be loaded; it is compiled anew", place, exc_info=True)
        return None


# --- what a start needs ---------------------------------------------------------------------------


def expect(what: str) -> None:
    """Begins to load, on another thread, what ran between this and `started` the last time.

    To load the program of a prompt takes XLA most of a second, on one core and without Python.

    Args:
      what: any text, a model's name say.
    """
    _start.begin(what)


def started() -> None:
    """The first token is there: what runs from now on is not what a start waits for."""
    _start.end()


class _Start:
    """The programs that come first after `expect`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._index: Path | None = None
        self._before: list[str] = []
        self._names: list[str] = []
        self._loading: dict[str, Future[jax.stages.Compiled | None]] = {}

    def begin(self, what: str) -> None:
        generation = _generation(folder())
        if generation is None:
            return
        with self._lock:
            self._index = generation / f"start-{hashlib.sha256(what.encode()).hexdigest()}.json"
            self._names, self._before = [], []
            with contextlib.suppress(OSError, ValueError):
                self._before = [str(name) for name in json.loads(self._index.read_text())]
            if self._before and not self._loading:
                _modules()  # what is unpickled; not to be imported on two threads at once
                pool = ThreadPoolExecutor(1, "gemma-nb-load")
                for name in self._before:
                    self._loading[name] = pool.submit(_load, generation / name)
                pool.shutdown(wait=False)

    def loaded(self, name: str) -> jax.stages.Compiled | None:
        loading = self._loading.pop(name, None)
        return None if loading is None else loading.result()

    def note(self, name: str) -> None:
        with self._lock:
            if self._index is not None:
                self._names.append(name)
                if name not in self._before:
                    self._write(self._index)  # now, since nobody knows whether more will come

    def end(self) -> None:
        if self._index is None:
            return
        with self._lock:
            index, self._index = self._index, None
            if index is not None and set(self._names) != set(self._before):
                self._write(index)

    def _write(self, index: Path) -> None:
        with contextlib.suppress(OSError), temporary(index) as file:
            file.write(json.dumps(self._names).encode())


_start = _Start()
