"""Files of stored programs: where they lie, how they are written and read.

A program that a process did not survive is not tried again: while one is loaded, and while it runs
for the first time, a file stands beside it that is locked by the process (see `trial`).  One that
nobody holds was left by a process that died.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import os
import pickle
import platform
import re
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import flax
import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable

from gemma_nb import cache, processor, trust
from gemma_nb.cache import cache_dir
from gemma_nb.executables.names import PACKAGE

# Of so many versions of the source, or of what it runs on, programs are kept.
_GENERATIONS = 4
_GENERATION = re.compile("[0-9a-f]{64}")
# So long a program that was refused is not kept; after that it may have been an accident.
_REFUSED_SECONDS = 7 * 24 * 3600
_TRIED = ".tried"

_log = logging.getLogger(__name__)


def folder() -> Path | None:
    """The folder of stored programs: beside JAX's where `gnb.load` stores those, else None."""
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
    """True where this is one CPU device.

    With several a program belongs to some of them; and others have not been tried.
    """
    return jax.default_backend() == "cpu" and jax.local_device_count() == 1


def generation() -> Path | None:
    """The folder, below `folder`, of what is compiled from this source on this machine.

    Older ones are cleared away.  One that is there is used also where nothing can be written; None
    where nothing is kept, or nothing is there.
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
    path = programs / digest.hexdigest()
    trust.warn_of(path, cache_dir())
    try:
        cache.make(path)
        os.utime(path)
        cache.remove_leftovers(path)
        _give_up_on_what_crashed(path)
    except OSError:
        _log.info("%s cannot be written to; nothing new is kept there", programs, exc_info=True)
        return path if path.is_dir() else None
    _drop_old_generations(programs)
    return path


def _drop_old_generations(programs: Path) -> None:
    """Remove all but the last few; of a link, or of what others can write to, nothing."""
    if trust.distrust(programs, cache_dir()) or programs.is_symlink():
        return
    found = [path for path in programs.iterdir() if _GENERATION.fullmatch(path.name)]
    with contextlib.suppress(OSError):  # another process removes them, too
        for old in sorted(found, key=lambda path: path.stat().st_mtime)[:-_GENERATIONS]:
            shutil.rmtree(old, ignore_errors=True)


def _cores() -> int:
    """XLA divides work among so many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def save(path: Path, compiled: jax.stages.Compiled) -> None:
    """Write a program; that takes a twentieth of the time that it was compiled in."""
    if path.exists() and trust.distrust(path.parent, cache_dir()):
        return  # somebody else's, which is not read either
    try:
        payload, *trees = serialize_executable.serialize(compiled)
        # Of a tree's structure only an example can be pickled.
        examples = [jax.tree.unflatten(tree, range(tree.num_leaves)) for tree in trees]
        data = zlib.compress(pickle.dumps((payload, *examples)), 1)
        with cache.temporary(path) as file:
            file.write(data)
        _within_limit.add(path.parents[1], len(data))
    except OSError:
        _log.info("%s cannot be written", path, exc_info=True)
    except Exception:  # whatever it is: the program runs, and from now on JAX's cache does for it
        _log.info("%s cannot be kept", path, exc_info=True)
        with contextlib.suppress(OSError):
            _refused(path).touch()


class _Limit:
    """Holds the programs of all generations to `cache.limit_bytes`."""

    def __init__(self) -> None:
        self._unlooked = math.inf  # bytes written since the folder was last looked through

    def add(self, programs: Path, count: int) -> None:
        """Note that so much was written; the first time, and then seldom, drop the oldest."""
        most = cache.limit_bytes("programs")
        self._unlooked += count
        if self._unlooked > most / 16:
            self._unlooked = 0
            cache.drop_oldest(programs, "*/*", most)


_within_limit = _Limit()


def is_refused(path: Path) -> bool:
    """True where a program could not be kept, or crashed, not long ago."""
    try:
        return time.time() - _refused(path).stat().st_mtime < _REFUSED_SECONDS
    except OSError:
        return False


def _refused(path: Path) -> Path:
    return path.with_name(f"{path.name}.refused")


def load(path: Path) -> jax.stages.Compiled | None:
    """A program from its file; None where there is no such file, or not a good one.

    Nothing is read of a file that others can have written.
    """
    if trust.distrust(path.parent, cache_dir()) or is_refused(path):
        return None
    try:
        data = trust.read(path)
        with contextlib.suppress(OSError):
            os.utime(path)  # what is not used any more goes first
        with trial(path):
            payload, *examples = pickle.loads(zlib.decompress(data))
            trees = map(jax.tree.structure, examples)
            return serialize_executable.deserialize_and_load(payload, *trees)
    except FileNotFoundError:
        return None
    except Exception:  # whatever is wrong with it: a new one takes its place
        _log.info("%s cannot be loaded; it is compiled anew", path, exc_info=True)
        return None


@contextlib.contextmanager
def trial(path: Path) -> Iterator[None]:
    """While the block runs, a locked file says that it may not survive a program."""
    marker = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_TRIED}")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # of a folder that is only read
            stack.enter_context(cache.held(marker))
        yield


def _give_up_on_what_crashed(path: Path) -> None:
    """Remove programs that a process died with, and note that they are not stored again."""
    for marker in path.glob(f"*{_TRIED}"):
        if cache.is_locked(marker):
            continue
        program = marker.with_name(marker.name.removesuffix(_TRIED).rpartition(".")[0])
        _log.warning("%s crashed a process, or was being tried when it was ended", program)
        _refused(program).touch()
        for file in (program, marker):
            file.unlink(missing_ok=True)
