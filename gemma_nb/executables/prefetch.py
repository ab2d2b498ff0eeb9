"""Programs that a start needs first, loaded while the rest is imported."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax

from gemma_nb.cache import temporary
from gemma_nb.executables.files import generation, load
from gemma_nb.executables.names import traced_modules


class _Start:
    """The programs that come first after `begin_prefetch`, this time and the last.

    An index file beside the programs holds their names.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._index: Path | None = None
        self._before: list[str] = []
        self._names: list[str] = []
        self._loading: dict[str, Future[jax.stages.Compiled | None]] = {}

    def begin(self, what: str) -> None:
        folder = generation()
        if folder is None:
            return
        with self._lock:
            self._index = folder / f"start-{hashlib.sha256(what.encode()).hexdigest()}.json"
            self._names, self._before = [], []
            with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
                names = map(str, json.loads(self._index.read_text(encoding="utf-8")))
                self._before = [name for name in names if Path(name).name == name]
            if self._before and not self._loading:
                traced_modules()  # what is unpickled; not to be imported on two threads at once
                pool = ThreadPoolExecutor(1, "gemma-nb-load")
                for name in self._before:
                    self._loading[name] = pool.submit(load, folder / name)
                pool.shutdown(wait=False)

    def take(self, name: str) -> jax.stages.Compiled | None:
        with self._lock:
            if self._index is not None:
                self._names.append(name)
                if name not in self._before:
                    self._write(self._index)  # now, since nobody knows whether more will come
        loading = self._loading.pop(name, None)
        return None if loading is None else loading.result()

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


def begin_prefetch(what: str) -> None:
    """Begin to load, on another thread, what ran between this and `end_prefetch` the last time.

    To load the program of a prompt takes XLA most of a second, on one core and without Python.

    Args:
      what: any text, a model's name say.
    """
    _start.begin(what)


def prefetched(name: str) -> jax.stages.Compiled | None:
    """A needed program that is being loaded, once it is; None where it is not, or is damaged."""
    return _start.take(name)


def end_prefetch() -> None:
    """Note that the first token is there: later programs are not what a start waits for."""
    _start.end()
