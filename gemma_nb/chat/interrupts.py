"""Holding the kernel's interrupt back until a compiled step is over."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def between_steps() -> Iterator[Callable[[], bool]]:
    """Delays SIGINT to the end of the block, where it raises KeyboardInterrupt.

    A step that is torn in the middle would leave a cache that nobody can trust.  Elsewhere than on
    the main thread there is nothing to delay: only the main thread is interrupted.

    Yields:
      Whether SIGINT came meanwhile, for a block of many steps that can end between any two.
    """
    before = signal.getsignal(signal.SIGINT)
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or not callable(before):
        yield lambda: False
        return
    came = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
