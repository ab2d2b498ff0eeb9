"""What no decoder of dense weights can beat: every token reads all of them from memory once."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 2**29
_ROUNDS = 5


def read_bandwidth() -> float:
    """Bytes per second that all cores together read from memory: the best of several rounds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    data = np.ones(_BYTES // 8, np.int64)
    parts = np.array_split(data, cores or 1)
    best = 0.0
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.add.reduce, parts))  # releases the interpreter lock
            best = max(best, data.nbytes / (time.perf_counter() - start))
    return best
