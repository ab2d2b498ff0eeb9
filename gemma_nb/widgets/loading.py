"""From a model's name or path to a session that is compiled, with progress."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemma_nb.errors import GemmaNbError
from gemma_nb.widgets.runner import Job

# What panels have loaded and something still uses: model and tokenizer by what was read.  Models
# are never changed, so sessions share them; the last one to go takes its model along.
_alive: dict[tuple[Any, ...], tuple[weakref.ref[Any], weakref.ref[Any]]] = {}
# One at a time: whoever wants what is being loaded already waits for it and shares it.
_loading = threading.Lock()


class Cancelled(Exception):
    """The panel was closed while it loaded."""


class Loader:
    """Loads and compiles, telling `show(phase, text, fraction)` how far it is.

    Progress is passed on at most ten times a second.
    """

    def __init__(self, show: Callable[[str, str, float], None]) -> None:
        self._show = show
        self._expected: Any = None

    def expect(self, source: Any) -> None:
        """Holds on to what `source` was loaded to already, until `load` is called.

        In a cell that runs again, the session of its last run is gone by then.
        """
        self._expected = _found(_key(source)) if _alive else None

    def load(self, source: Any, job: Job) -> Any:
        """A warmed-up `ChatSession` for `source`.

        Raises:
          Cancelled: the job was cancelled meanwhile.
        """
        # Late: importing a panel must not start JAX.
        from gemma_nb.chat.session import ChatSession

        with _one_at_a_time(job):
            model, tokenizer = self._read(source, job)
        session = ChatSession(model, tokenizer)
        self._show("compiling", "Compiling for this machine", 0.0)
        session.warmup(progress=self._progress("compiling", job))
        return session

    def _read(self, source: Any, job: Job) -> tuple[Any, Any]:
        """Model and tokenizer, shared with whoever has read the same files."""
        from gemma_nb.loading import load

        key = _key(source)
        expected, self._expected = _found(key), None
        if expected is not None:
            return expected
        gc.collect()  # closed sessions: their memory is what the model needs
        model, tokenizer = load(source, progress=self._progress("loading", job))
        if key is not None and key == _key(source):  # nobody has replaced the files meanwhile
            for stale in [k for k in list(_alive) if _found(k) is None]:
                del _alive[stale]
            with contextlib.suppress(TypeError):  # of objects that cannot be watched
                _alive[key] = weakref.ref(model), weakref.ref(tokenizer)
        return model, tokenizer

    def _progress(self, phase: str, job: Job) -> Callable[[float, str], None]:
        last = 0.0

        def progress(fraction: float, text: str) -> None:
            nonlocal last
            if job.cancelled.is_set():
                raise Cancelled
            now = time.monotonic()
            if now - last >= 0.1 or fraction >= 1:
                last = now
                self._show(phase, text, fraction)

        return progress


@contextlib.contextmanager
def _one_at_a_time(job: Job) -> Iterator[None]:
    """Until no other panel loads; raises Cancelled when the panel is closed before."""
    while not _loading.acquire(timeout=0.1):
        if job.cancelled.is_set():
            raise Cancelled
    try:
        yield
    finally:
        _loading.release()


def _found(key: tuple[Any, ...] | None) -> tuple[Any, Any] | None:
    """The model and tokenizer that were read from there, where both are still in use."""
    if key is None or key not in _alive:
        return None
    model, tokenizer = (ref() for ref in _alive[key])
    return None if model is None or tokenizer is None else (model, tokenizer)


def _key(source: Any) -> tuple[Any, ...] | None:
    """The files of `source` as they are now, by path, size and time; None where there are none."""
    from gemma_nb.checkpoints.sources import resolve

    try:
        found = resolve(source)
        # Of a folder, everything in it: it may be a link to another by the next time.
        files = [
            file
            for path in found.files
            for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        ]
        stats = [(str(file.resolve()), file.stat()) for file in files]
    except (GemmaNbError, ValueError, OSError):
        return None  # `load` says what is wrong
    return found.name, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def model_title(chat_or_source: Any) -> str:
    """Title of the model, as the panel shows it."""
    if isinstance(chat_or_source, str | Path):
        return Path(chat_or_source).name if "/" in str(chat_or_source) else str(chat_or_source)
    return str(getattr(chat_or_source.model, "title", "Gemma"))


def model_chips(session: Any) -> list[str]:
    """Short facts beside the title: tuning and template, storage of the weights."""
    info = getattr(session.model, "info", None)
    template = getattr(session.template, "name", "")
    chips = [" · ".join(part for part in (getattr(info, "tuning", ""), template) if part)]
    # A wrapped model may keep its parameters elsewhere.
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        dtype = str(session.model.params["embedder"]["input_embedding"].dtype)
        chips.append(dtype.replace("bfloat", "bf").replace("float", "f"))
    return [chip for chip in chips if chip]
