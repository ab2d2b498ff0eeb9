"""Compilation ahead of need, on a thread of its own."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from gemma_nb.ending import python_ends
from gemma_nb.executables import pinned

# The name of the threads.
COMPILING = "gemma-nb-compile"

_log = logging.getLogger(__name__)


def begin(jobs: Iterable[Callable[[], object]]) -> None:
    """Runs what compiles something, one after the other, while the caller goes on.

    JAX keeps what was compiled for some shapes, and a later call with such finds it.  A job that
    fails is logged, and the others are run: whoever needs what it should have compiled compiles it
    then, and is the one to be told why that cannot be done.
    """
    jobs = list(jobs)
    if jobs and not python_ends():
        # Not a daemon, whoever starts it: XLA must not be stopped in the middle of a compilation
        # when Python ends.
        threading.Thread(target=_run, args=(jobs,), name=COMPILING, daemon=False).start()


def _run(jobs: Iterable[Callable[[], object]]) -> None:
    for job in jobs:
        if python_ends():
            return
        try:
            pinned(job)()
        except Exception:  # whatever it is: nobody asked for this yet
            # No warning: it may be a setting of JAX's that holds for one thread only.
            _log.info("compiling ahead of need failed; it is done when needed", exc_info=True)
        _give_back()


def _give_back() -> None:
    """Returns to the system what compiling has left, which glibc keeps otherwise.

    After each job, so that none begins on top of what another has left: half a gigabyte of a step.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@functools.cache
def begun(program: Any) -> set[Any]:
    """For what a jitted function was compiled ahead, once for each process."""
    del program
    return set()
