"""Names of stored programs: digests of what a program would be traced from."""

from __future__ import annotations

import functools
import hashlib
import importlib
import operator
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import jax

# This package, whose source is what programs are compiled from.
PACKAGE = Path(__file__).parents[1]
# What a program is traced through.
_TRACED = ("config", "cpu", "interventions", "nn", "processor", "sampling", "sites", "typing")
# The one setting of a whole process that changes programs.
_OPTIMIZATIONS = "jax_disable_most_optimizations"
# JAX's settings that say where things go and what is said of them, or are for other devices: they
# change no program.  Of the others each takes a quarter of a microsecond of every step.
_ASIDE = (
    *("cache", "log", "traceback", "dump", "explain", "pprint", "guard", "leak", "url", "metadata"),
    *("gpu", "cuda", "rocm", "oneapi", "pallas", "mosaic", "pgle", "mock", "jax2tf", "serializ"),
    *("export", "distributed", "preemption", "recoverability", "proxy", "host", "topology"),
    *("platform", "profile", "collectives", "hlo_source", "bcoo", "ragged", "captured"),
)


def disabled() -> bool:
    """True where JAX is to compile nothing."""
    return bool(jax.config.jax_disable_jit)  # type: ignore[attr-defined]


def settings() -> list[Any]:
    """JAX's settings that hold here, in this thread."""
    return [holder.value for holder in _holders()]


@functools.cache
def _holders() -> tuple[Any, ...]:
    """JAX's objects that hold the settings: those that a thread can have for itself, and one more.

    To read them as attributes takes four times as long, and `jax.config.values` makes a dictionary
    of all.
    """
    named = (n for n in jax.config.values if not any(word in n for word in _ASIDE))
    names = [name for name in named if hasattr(jax.config, name)]  # those of threads are attributes
    held = getattr(jax.config, "_value_holders", {})
    return tuple(held[n] if n in held else _Setting(n) for n in (*names, _OPTIMIZATIONS))


class _Setting:
    """A setting of a version of JAX that does not show what holds it."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def value(self) -> Any:
        return jax.config.values[self._name]


def abstract_shapes(leaves: list[Any]) -> list[tuple[Any, ...]]:
    """Shapes, dtypes and weakness of types of some arrays."""
    return [(x.shape, str(x.dtype), getattr(x, "weak_type", False)) for x in leaves]


def program_name(static: str, args: tuple[Any, ...]) -> str | None:
    """The file of a program; None where it is not to be stored."""
    leaves, structure = jax.tree.flatten(args)
    shapes = abstract_shapes(leaves)
    source = _traced()
    said = "\n".join([static, str(structure), repr(shapes), repr(settings()), source or ""])
    # An address is another one in every process.
    if source is None or " at 0x" in said:
        return None
    first, _, _ = static.partition("\n")
    return f"{first}-{hashlib.sha256(said.encode()).hexdigest()}"


def _traced() -> str | None:
    """Digest of the modules that a program is traced through; None where not all is ours.

    Their source tells what does, unless somebody has put something else there since.
    """
    global _last
    spaces: list[tuple[str, Mapping[str, Any]]] = [
        (name, vars(sys.modules[name])) for name in traced_modules()
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
def traced_modules() -> tuple[str, ...]:
    """The modules that a program is traced through.

    All are imported, so that it makes no difference which of them were.
    """
    files = (file for what in _TRACED for file in (PACKAGE / what).rglob("*.py"))
    single = (PACKAGE / f"{what}.py" for what in _TRACED)
    paths = [file.relative_to(PACKAGE.parent) for file in (*files, *single) if file.exists()]
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
    """Description of what stands under a name of a module or a class."""
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
    """Description of an object by the place in the source of what it runs."""
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
    return (str(PACKAGE) + os.sep, "<frozen ", *(str(path) + os.sep for path in paths))
