"""What no decoder of dense weights can beat: every token reads all of them from memory once."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import gemma_nb as gnb
from gemma_nb.checkpoints import catalog
from gemma_nb.cpu.storage import exact_layers
from tests.bench.names import GM, GM_STREAM, HF_BF16, HF_F32, LLAMA, OURS, OURS_INT8

_BYTES = 2**29
_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far a contestant is from its floor.

    Attributes:
      bytes: what each of its tokens reads: the weights, as it stores them.
      floor: milliseconds that reading them takes.
      taken: milliseconds that a token takes.
    """

    bytes: int
    floor: float
    taken: float

    @property
    def times(self) -> float:
        """`taken` by `floor`."""
        return self.taken / self.floor


def read_bandwidth() -> float:
    """Bytes per second that all cores together read from memory: the best of several rounds.

    Two ways of reading, sums of int64 and squares of float32 (BLAS): which one is the faster
    depends on the processor.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    data = np.ones(_BYTES // 8, np.int64)
    parts = np.array_split(data, cores or 1)
    floats = [part.view(np.float32) for part in parts]
    best = 0.0
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(_ROUNDS):
            # Both release the interpreter's lock.
            for run in (
                lambda: pool.map(np.add.reduce, parts),
                lambda: pool.map(np.dot, floats, floats),
            ):
                start = time.perf_counter()
                list(run())
                best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def sizes() -> dict[str, int]:
    """Bytes that every contestant reads for a token of the default model: its weights.

    Ours has the vocabulary in int8 with a float32 scale per row; of the embedding only one row and
    the shortlist's are read beside it: 0.3 MB.  Scales of layers and caches are not counted,
    neither ours nor anybody's.
    """
    config = gnb.presets.by_name("gemma3-270m")
    parts, _ = catalog.PACKAGES["gemma3-270m"].locate()
    weights = config.num_params()
    layers = weights - config.num_embed * config.embed_dim
    vocabulary = config.num_embed * (config.embed_dim + 4)
    # What is not quantised has two bytes a weight.
    exact = layers // config.num_layers * len(exact_layers(config.num_layers))
    return {
        OURS: 2 * layers + vocabulary,
        OURS_INT8: layers + exact + vocabulary,
        LLAMA: sum(part.stat().st_size for part in parts),
        **dict.fromkeys((HF_BF16, GM, GM_STREAM), 2 * weights),
        HF_F32: 4 * weights,
    }


def distances(
    bandwidth: float, sizes: Mapping[str, int], rates: Mapping[str, float]
) -> dict[str, Distance]:
    """Of every contestant.

    Args:
      bandwidth: of memory, in bytes per second.
      sizes: contestant -> bytes per token.
      rates: contestant -> tokens per second.
    """
    return {
        name: Distance(sizes[name], 1e3 * sizes[name] / bandwidth, 1e3 / rate)
        for name, rate in rates.items()
    }


def described(bandwidth: float, found: Mapping[str, Distance]) -> str:
    """Lines for people."""
    lines = [f"memory is read at {bandwidth / 1e9:.1f} GB/s; of the weights, a token"]
    lines += [
        f"  of {name} reads {d.bytes / 1e6:.0f} MB, {d.floor:.1f} ms at least, and takes "
        f"{d.taken:.1f} ms: {d.times:.2f} times its floor"
        for name, d in found.items()
    ]
    return "\n".join(lines)
