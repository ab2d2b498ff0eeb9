"""The folder of what is made once and kept, and files in it that are whole or not there.

Its parts, and how much of each is kept (see `limit_bytes`):

    weights/    converted weights, mapped into memory              GEMMA_NB_CACHE_WEIGHTS_GB   64
    programs/   compiled programs, found without being traced      GEMMA_NB_CACHE_PROGRAMS_GB  2
    jax/        JAX's own compiled programs                        GEMMA_NB_CACHE_JAX_GB       2
    hashes/     checksums of files, some hundred bytes each        4,096 of them
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import platformdirs

_STALE_SECONDS = 24 * 3600
_GIGABYTES = {"weights": 64.0, "programs": 2.0, "jax": 2.0}


def cache_dir() -> Path:
    """Where converted weights and compiled programs are kept.

    `GEMMA_NB_CACHE` if it is set, otherwise the platform's place for caches.
    """
    override = os.environ.get("GEMMA_NB_CACHE")
    if override:
        return expanded(override)
    return Path(platformdirs.user_cache_dir("gemma_nb", appauthor=False))


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with the home folder in place of "~"; nobody's stays as it is, as in shells."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def limit_bytes(part: str) -> float:
    """Most bytes that are kept in "weights", "programs" or "jax"; what was used last stays.

    `GEMMA_NB_CACHE_WEIGHTS_GB` and its siblings say otherwise, in units of 1e9 bytes; `inf` is no
    limit.

    Raises:
      ValueError: the variable is no such number.
    """
    variable = f"GEMMA_NB_CACHE_{part.upper()}_GB"
    given = os.environ.get(variable, "").strip()
    if not given:
        return _GIGABYTES[part] * 1e9
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = math.nan
    if not gigabytes >= 0:
        raise ValueError(
            f"expected a number of gigabytes from 0 to inf in the environment variable {variable}, "
            f"got {given!r}"
        )
    return gigabytes * 1e9


def make(folder: Path) -> None:
    """Makes a folder, and those above it, that others may look into but not write to.

    Whatever the process's mask says: what others can write to is not trusted (see `trust`).
    """
    for path in reversed((folder, *folder.parents)):
        if not path.is_dir():
            path.mkdir(0o755, exist_ok=True)


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` when the block ends well, and is removed when it does not.

    Others may read it, and not write to it.
    """
    name = _temporary_name(path)
    try:
        with open(name, "xb", opener=lambda file, flags: os.open(file, flags, 0o644)) as file:
            yield file
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            name.unlink()
        raise


def _temporary_name(path: Path) -> Path:
    owner = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{owner}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Deletes temporary files of processes that died while they wrote."""
    for file in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError, ValueError):
            *_, pid, _, _ = file.name.split(".")
            here = f".{socket.gethostname()}.{pid}." in file.name
            old = time.time() - file.stat().st_mtime > _STALE_SECONDS
            if old or (here and not _alive(int(pid))):
                file.unlink()


def drop_oldest(
    folder: Path,
    pattern: str,
    most: float,
    *,
    count: float = math.inf,
    last_used: Callable[[Path], float] | None = None,
) -> None:
    """Removes files, the ones first that have not been used for longest, until the rest fits.

    The last one stays, whatever its size, and so does what a process has locked (see
    `lock_shared`).  Several processes may do this at once.

    Args:
      folder: where they are.
      pattern: which they are.
      most: bytes that the rest may take.
      count: files that the rest may be.
      last_used: when a file was used last, in seconds; by default when it was written or touched.
    """
    found = []
    for file in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process has removed it
            about = file.stat()
            used = max(about.st_mtime, last_used(file) if last_used else 0.0)
            found.append((used, about.st_size, file))
    found.sort(key=lambda entry: entry[0])
    left, total = len(found), sum(size for _, size, _ in found)
    for _, size, file in found[:-1]:
        if total <= most and left <= count:
            return
        if _remove_unused(file):
            left, total = left - 1, total - size


def lock_shared(file: BinaryIO) -> None:
    """Marks an open file as in use, until it and every mapping of it is closed.

    On Windows that an open file is in use needs no mark.
    """
    if sys.platform != "win32":
        import fcntl

        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """An empty file that is there, and locked, while the block runs, and after that not there.

    Where the process dies meanwhile it stays, and nobody locks it any more.

    Raises:
      OSError: it cannot be written.
    """
    # Nobody is to find it before it is locked; on Windows it is from its first moment.
    name = path if sys.platform == "win32" else _temporary_name(path)
    with open(name, "xb") as file:
        try:
            lock_shared(file)
            os.replace(name, path)
            yield
        finally:
            file.close()  # Windows removes no open file
            with contextlib.suppress(OSError):
                path.unlink()


def is_locked(path: Path) -> bool:
    """Whether a process has a file in use, this one or another, or it cannot be told."""
    try:
        if sys.platform == "win32":
            os.replace(path, path)  # of an open file that is not allowed
        else:
            import fcntl

            with open(path, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _remove_unused(path: Path) -> bool:
    """Whether a file, which nobody has in use, was removed."""
    try:
        if is_locked(path):
            return False
        path.unlink()  # who has opened it since still has all of it
    except OSError:
        return False
    return True


def _alive(pid: int) -> bool:
    if os.name != "posix":  # signal 0 is no question on Windows: leave it to the file's age
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
