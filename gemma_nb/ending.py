"""The end of Python, which waits for the threads that compute.

A thread that is cut off inside of XLA takes the whole process down.  So none that computes is a
daemon, and all look, between their steps, whether Python ends.
"""

from __future__ import annotations

import threading


class Ending(threading.Event):
    """An event that is set from the moment on when Python ends, too, on any but its main thread."""

    def is_set(self) -> bool:
        """True where it was set, or Python ends."""
        on_main_thread = threading.current_thread() is threading.main_thread()
        return super().is_set() or (python_ends() and not on_main_thread)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for at most so many seconds; see `is_set`."""
        return super().wait(timeout) or self.is_set()


def python_ends() -> bool:
    """True where Python ends: it waits for threads, or what is to run at its end runs."""
    return not threading.main_thread().is_alive()
