"""Holding the kernel's interrupt back while something changes that must change as a whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_came = False  # whether SIGINT came while it was held back


def _remember(signum: int, frame: FrameType | None) -> None:
    global _came
    _came = True


@contextmanager
def between_steps() -> Iterator[Callable[[], bool]]:
    """Delays SIGINT to the end of the block, where it raises KeyboardInterrupt.

    Whatever changes a session does so inside of such a block: an interrupt in the middle of a step
    would leave a cache that nobody can trust, and one between two lines a lock that nobody opens.
    Inside of another block, an inner one's end is where it is raised: so many steps that belong
    together end between any two.

    Elsewhere than on the main thread there is nothing to delay: no other one is interrupted.

    Yields:
      Whether SIGINT came meanwhile, for a block of many steps that can end between any two.
    """
    global _came
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if on_main_thread else None
    if not callable(before):
        yield lambda: False
        return
    outermost = before is not _remember
    if outermost:
        _came = False
        signal.signal(signal.SIGINT, _remember)
    try:
        yield lambda: _came
    finally:
        if outermost:
            signal.signal(signal.SIGINT, before)
    if _came:
        _came = False
        raise KeyboardInterrupt
