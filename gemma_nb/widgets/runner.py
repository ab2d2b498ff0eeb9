"""One worker thread per panel, so that the kernel stays free while the model works."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class Job:
    """A piece of work that looks, between its steps, whether it was cancelled."""

    def __init__(self, work: Callable[[Job], Any]) -> None:
        self.work = work
        self.cancelled = threading.Event()
        self.finished = threading.Event()

    def cancel(self) -> None:
        """Asks the work to end; it looks between its steps."""
        self.cancelled.set()


class Runner:
    """Runs jobs one after another on a daemon thread that starts with the first of them.

    A worker thread never gets KeyboardInterrupt: jobs end through `Job.cancel` or `close`.

    Args:
      name: the thread's name, for debuggers.
      on_error: called, on the worker thread, with an exception that a job let through.
    """

    def __init__(self, name: str, on_error: Callable[[Exception], Any]) -> None:
        self._name = name
        self._on_error = on_error
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        with self._lock:
            return bool(self._jobs)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Queues `work(job)`.

        Raises:
          RuntimeError: the runner was closed.
        """
        job = Job(work)
        with self._lock:
            if self._closed:
                raise RuntimeError("this panel was closed; make a new one")
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
        self._queue.put(job)
        return job

    def close(self, timeout: float = 0.0) -> None:
        """Cancels every job and ends the thread; waits for it up to `timeout` seconds."""
        with self._lock:
            self._closed = True
            jobs, thread = list(self._jobs), self._thread
        for job in jobs:
            job.cancel()
        self._queue.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                if not self._closed:  # a job that was cancelled cleans up after itself
                    job.work(job)
            except Exception as error:
                self._on_error(error)
            finally:
                with self._lock:
                    self._jobs.remove(job)
                job.finished.set()
