"""Which programs a start needs first: they are loaded while the rest is imported."""

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


class Start:
    """The programs that come first after `expect`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._index: Path | None = None
        self._before: list[str] = []
        self._names: list[str] = []
        self._loading: dict[str, Future[jax.stages.Compiled | None]] = {}

    def begin(self, what: str) -> None:
        """See `expect`."""
        place = generation()
        if place is None:
            return
        with self._lock:
            self._index = place / f"start-{hashlib.sha256(what.encode()).hexdigest()}.json"
            self._names, self._before = [], []
            with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
                names = map(str, json.loads(self._index.read_text(encoding="utf-8")))
                self._before = [name for name in names if Path(name).name == name]
            if self._before and not self._loading:
                traced_modules()  # what is unpickled; not to be imported on two threads at once
                pool = ThreadPoolExecutor(1, "gemma-nb-load")
                for name in self._before:
                    self._loading[name] = pool.submit(load, place / name)
                pool.shutdown(wait=False)

    def loaded(self, name: str) -> jax.stages.Compiled | None:
        """A program that is being loaded, once it is; None where it is not, or is damaged."""
        loading = self._loading.pop(name, None)
        return None if loading is None else loading.result()

    def note(self, name: str) -> None:
        """Notes that a program is needed."""
        with self._lock:
            if self._index is not None:
                self._names.append(name)
                if name not in self._before:
                    self._write(self._index)  # now, since nobody knows whether more will come

    def end(self) -> None:
        """See `started`."""
        if self._index is None:
            return
        with self._lock:
            index, self._index = self._index, None
            if index is not None and set(self._names) != set(self._before):
                self._write(index)

    def _write(self, index: Path) -> None:
        with contextlib.suppress(OSError), temporary(index) as file:
            file.write(json.dumps(self._names).encode())


start = Start()


def expect(what: str) -> None:
    """Begins to load, on another thread, what ran between this and `started` the last time.

    To load the program of a prompt takes XLA most of a second, on one core and without Python.

    Args:
      what: any text, a model's name say.
    """
    start.begin(what)


def started() -> None:
    """The first token is there: what runs from now on is not what a start waits for."""
    start.end()
