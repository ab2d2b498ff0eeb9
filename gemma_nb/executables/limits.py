"""Limit on the compiled programs of a process.

Each is a hundred memory mappings or more, of which Linux allows a process 65,530 by default; LLVM
ends the process when it gets no more.  Whoever compiles a program for each number of something (of
tokens, say) gets there within an hour.  So all are let go of before: what is needed again is
compiled, or loaded, once more.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

_MAPS, _MOST = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
_SHARE = 0.5  # of the mappings, at which programs are let go of
_EVERY = 24  # programs that are compiled between two counts of the mappings, which takes 20 ms

# What else holds programs, and lets go of them when it is called.
on_relief: list[Callable[[], None]] = []

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_new = 0  # programs since the last count


def note() -> None:
    """Note that a program was compiled or loaded."""
    global _new
    _new += 1


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    del duration_secs
    if event.endswith("backend_compile_duration"):
        note()


# Also what others compile takes mappings.
jax.monitoring.register_event_duration_secs_listener(_listen)


def relieve() -> None:
    """Let go of all compiled programs where there are nearly too many."""
    global _new
    if _new < _EVERY or _tracing() or not _lock.acquire(blocking=False):
        return
    try:
        _new = 0
        most = _allowed()
        if most is None or (held := _held()) < _SHARE * most:
            return
        _log.info("%d memory mappings of %d are in use: programs are let go of", held, most)
        for forget in on_relief:
            forget()
        jax.clear_caches()
    finally:
        _lock.release()


def _tracing() -> bool:
    """True where a program is being traced, whose parts are in use."""
    return isinstance(jax.device_put(np.int32(0)), jax.core.Tracer)


@functools.cache
def _allowed() -> int | None:
    """The number of mappings that a process may have; None where nobody says."""
    try:
        return int(_MOST.read_text())
    except (OSError, ValueError):
        return None


def _held() -> int:
    """The number of mappings of this process."""
    try:
        return _MAPS.read_bytes().count(b"\n")
    except OSError:
        return 0
