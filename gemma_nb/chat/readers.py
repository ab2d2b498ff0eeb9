"""Readers of replies, and the end of a reply that nobody reads on."""

from __future__ import annotations

import atexit
import dataclasses
import inspect
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress

from gemma_nb.chat.events import TokenEvent

Stream = Generator[TokenEvent, None, None]

# How long Python waits, at its end, for a step of a reply on a daemon thread.
_LAST_STEP_SECONDS = 60.0


@dataclasses.dataclass(eq=False)
class Reader:
    """The reader of a reply.

    Attributes:
      stream: of the reply; None before it is made.
      thread: that read the last token; None before the first.
    """

    stream: weakref.ref[Stream] | None = None
    thread: threading.Thread | None = None


def close(stream: weakref.ref[Stream] | None) -> None:
    """Ends a reply that nobody reads on, if it is still there."""
    open_stream = None if stream is None else stream()
    if open_stream is not None:
        # Closing fails while the generator runs; then it looks at its flag itself.
        with suppress(ValueError):
            open_stream.close()


# Of the replies that are being made.  No finalizers of their streams: these would run, and could be
# interrupted, wherever a reply ends.
_open: set[Reader] = set()


@contextmanager
def closed_at_end(reader: Reader) -> Iterator[None]:
    """Ends the reply that is made in the block if Python ends first."""
    _open.add(reader)
    try:
        yield
    finally:
        _open.discard(reader)


@atexit.register
def close_all() -> None:
    """Ends what is still being made when Python ends; waits for a daemon thread's step.

    A thread that is cut off inside of XLA takes the whole process down.
    """
    deadline = time.monotonic() + _LAST_STEP_SECONDS
    for reader in tuple(_open):
        assert reader.stream is not None
        while _runs(reader.stream()) and time.monotonic() < deadline:
            time.sleep(0.01)
        close(reader.stream)


def _runs(stream: Stream | None) -> bool:
    return stream is not None and inspect.getgeneratorstate(stream) == inspect.GEN_RUNNING
