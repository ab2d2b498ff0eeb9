"""What a long context costs: the time of a step, and memory.

    python -m tests.bench.long_context [--length 32768] [--at 500,16000,32600] [--steps 40]

Random tokens are fed to the default model up to each place, and steps are timed there.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import numpy as np

import gemma_nb as gnb
from gemma_nb.sampling.decode import Decoder
from tests.bench.contestants import settle


def step_ms(decoder: Decoder, steps: int) -> float:
    """Median time of a step, with nothing compiling beside it."""
    times = []
    for i in range(steps + 5):
        if i == 5:  # the first ones may compile, also for the next cache size
            settle()
        start = time.perf_counter()
        decoder.step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[5:])


def main() -> None:
    """Prints a row per place, and the peak of the memory in use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--at", default="500,16000,32600")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    decoder = Decoder(model, limit=given.length, top_k=10)
    drawn = np.random.default_rng(0).integers(1000, tokenizer.vocab_size, given.length)
    ids, first = drawn.tolist(), None
    for place in map(int, given.at.split(",")):
        start = time.perf_counter()
        rest = decoder.begin(ids[:place], gnb.Sampling(seed=0))
        decoder.prefill(rest)
        seconds = time.perf_counter() - start
        ms = step_ms(decoder, given.steps)
        first = first or ms
        # Linux counts in KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{place:6} tokens: {len(rest)} of them prefilled in {seconds:.1f} s, a step "
            f"{ms:.1f} ms ({ms / first:.2f} times the first), peak memory {peak:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
