"""The lock of a session: one operation at a time, and none that an interrupt cuts in two."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gemma_nb.chat.interrupts import between_steps
from gemma_nb.errors import BusyError


class SessionLock:
    """Lets one operation of a session run at a time; others are refused, and do not wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether an operation is running."""
        return self._lock.locked()

    def refuse_if_busy(self) -> None:
        """Raises BusyError while a reply is being made."""
        if self.busy:
            raise BusyError(
                "a reply is being made in this session: wait for its end, or call chat.stop()"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the lock, and interrupts back."""
        with between_steps(), self.held():
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock; while interrupts are held back, or it might stay locked."""
        if not self._lock.acquire(blocking=False):
            self.refuse_if_busy()
            raise BusyError("the session is in use by another thread: try again")
        try:
            yield
        finally:
            self._lock.release()
