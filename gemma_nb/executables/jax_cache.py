"""JAX's own cache of compiled programs, kept as ours are: trusted, whole, and within a limit.

JAX reads whatever lies in its folder, and runs it; writes files in place, where another process may
read half of one; and never replaces one that is damaged.  `Entries` takes the place of what JAX
reads and writes its files with, in our folder only.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache

from gemma_nb import cache, trust

_SUM_BYTES = 4
_log = logging.getLogger(__name__)
_aside = threading.local()


class Entries:
    """JAX's cache of compiled programs as JAX calls it; an entry is its bytes, and their CRC-32."""

    def __init__(self, folder: Path) -> None:
        self._path = folder
        self._unlooked = math.inf  # bytes written since the folder was last looked through

    def get(self, key: str) -> bytes | None:
        """The entry of a key; None where there is none, or none to be used."""
        if getattr(_aside, "depth", 0) or trust.distrust(self._path, cache.cache_dir()):
            return None
        file = self._file(key)
        try:
            raw = trust.read(file)
        except FileNotFoundError:
            return None
        except OSError:
            _log.info("%s is not used", file, exc_info=True)
            return None
        data, stored = raw[:-_SUM_BYTES], raw[-_SUM_BYTES:]
        if zlib.crc32(data).to_bytes(_SUM_BYTES, "little") != stored:
            _log.info("%s is damaged; it is compiled anew", file)
            return None
        with contextlib.suppress(OSError):
            os.utime(file)  # what is not used any more goes first
        return data

    def put(self, key: str, value: bytes) -> None:
        """Write an entry; where that is not possible, nothing is stored."""
        file = self._file(key)
        if getattr(_aside, "depth", 0):
            return
        if file.exists() and trust.distrust(self._path, cache.cache_dir()):
            return  # somebody else's, which is not read either
        try:
            cache.make(self._path)
            with cache.temporary(file) as opened:
                opened.write(value + zlib.crc32(value).to_bytes(_SUM_BYTES, "little"))
        except OSError:
            _log.info("%s cannot be written", file, exc_info=True)
            return
        self._hold_to_limit(len(value))

    def _file(self, key: str) -> Path:
        return self._path / f"{key}-cache"

    def _hold_to_limit(self, count: int) -> None:
        most = cache.limit_bytes("jax")
        if (given := jax.config.jax_compilation_cache_max_size) != -1:  # type: ignore[attr-defined]
            most = given
        self._unlooked += count
        if self._unlooked > most / 16:
            self._unlooked = 0
            cache.remove_leftovers(self._path)
            cache.drop_oldest(self._path, "*-cache", most)


def use(folder: Path) -> bool:
    """Let JAX keep its programs in a folder of ours, from the next compilation on.

    Returns:
      False where this version of JAX reads its files in another way: then it is to keep none.
    """
    trust.warn_of(folder, cache.cache_dir())
    plain = getattr(compilation_cache, "get_file_cache", None)
    if plain is None:
        _log.info("this version of JAX has no get_file_cache: compiled programs are not kept")
        return False
    if getattr(plain, "is_ours", False):
        return True

    def get_file_cache(path: str) -> Any:
        ours = path == str(cache.cache_dir() / "jax")
        return (Entries(Path(path)), path) if ours else plain(path)

    get_file_cache.is_ours = True  # type: ignore[attr-defined]
    compilation_cache.get_file_cache = get_file_cache
    return True


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """A block in which this thread neither looks up programs in `Entries` nor stores them there."""
    _aside.depth = getattr(_aside, "depth", 0) + 1
    try:
        yield
    finally:
        _aside.depth -= 1
