"""A worker thread per panel, so that the kernel stays free while the model works."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from gemma_nb.ending import Ending


class Job:
    """A piece of work that looks, between its steps, whether it was cancelled."""

    def __init__(self, work: Callable[[Job], Any]) -> None:
        self.work = work
        self.cancelled = Ending()
        self.finished = threading.Event()

    def cancel(self) -> None:
        """Asks the work to end; it looks between its steps."""
        self.cancelled.set()


class Runner:
    """Runs jobs one after another on a thread that is there as long as there are any.

    A worker thread never gets KeyboardInterrupt: jobs end through `Job.cancel` or `close`, and when
    Python ends, which waits for them.

    Args:
      name: the thread's name, for debuggers.
      on_error: called, on the worker thread, with an exception that a job let through.
    """

    def __init__(self, name: str, on_error: Callable[[Exception], Any]) -> None:
        self._name = name
        self._on_error = on_error
        self._lock = threading.Lock()
        self._jobs: list[Job] = []  # the one that runs, and those that wait
        self._thread: threading.Thread | None = None
        self._closed = Ending()

    @property
    def busy(self) -> bool:
        """True while a job runs or waits."""
        with self._lock:
            return bool(self._jobs)

    @property
    def closed(self) -> bool:
        """True once `close` was called, or Python ends."""
        return self._closed.is_set()

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Queues `work(job)`.

        Raises:
          RuntimeError: the runner was closed.
        """
        job = Job(work)
        with self._lock:
            if self.closed:
                raise RuntimeError("this panel was closed; make a new one")
            self._jobs.append(job)
            if len(self._jobs) == 1:
                # Not a daemon: XLA must not be stopped in the middle of a step when Python ends.
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=False)
                self._thread.start()
        return job

    def close(self, timeout: float = 0.0) -> None:
        """Cancels every job and ends the thread; waits for it up to `timeout` seconds."""
        with self._lock:
            self._closed.set()
            jobs, thread = list(self._jobs), self._thread
        for job in jobs:
            job.cancel()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        """Runs jobs until none is left."""
        job: Job | None = self._jobs[0]
        while job is not None:
            try:
                if not self.closed:  # a job that was cancelled cleans up after itself
                    job.work(job)
            except Exception as error:
                self._on_error(error)
            except SystemExit:
                pass  # it ends the job, as it ends a thread
            finally:
                with self._lock:
                    self._jobs.remove(job)
                    following = self._jobs[0] if self._jobs else None
                job.finished.set()
            job = following
