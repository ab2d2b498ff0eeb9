"""The folder of what is made once and kept, and files in it that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import platformdirs

_STALE_SECONDS = 24 * 3600


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


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` when the block ends well, and is removed when it does not."""
    owner = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    name = path.with_name(f".{path.name}.{owner}.tmp")
    try:
        with open(name, "xb") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            name.unlink()
        raise


def remove_leftovers(folder: Path) -> None:
    """Deletes temporary files of processes that died while they wrote."""
    for file in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError, ValueError):
            *_, pid, _, _ = file.name.split(".")
            here = f".{socket.gethostname()}.{pid}." in file.name
            old = time.time() - file.stat().st_mtime > _STALE_SECONDS
            if old or (here and not _alive(int(pid))):
                file.unlink()


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
