"""Where kept programs lie, and how they are written and read."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import platform
import shutil
import sys
import zlib
from pathlib import Path

import flax
import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable

from gemma_nb import processor
from gemma_nb.cache import cache_dir, remove_leftovers, temporary
from gemma_nb.executables.names import PACKAGE

# Of so many versions of the source, or of what it runs on, programs are kept.
_GENERATIONS = 4

_log = logging.getLogger(__name__)


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


def generation() -> Path | None:
    """The folder, below `folder`, of what is compiled from this source on this machine.

    Older ones are cleared away.  None where nothing is kept, or nothing can be written.
    """
    programs = folder()
    return None if programs is None else _generation(programs)


@functools.cache
def _generation(programs: Path) -> Path | None:
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
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(PACKAGE)).encode() + b"\0" + file.read_bytes())
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


def save(place: Path, made: jax.stages.Compiled) -> None:
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
            refused(place).touch()


def refused(place: Path) -> Path:
    """A file that says that a program can not be kept."""
    return place.with_name(f"{place.name}.refused")


def load(place: Path) -> jax.stages.Compiled | None:
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
