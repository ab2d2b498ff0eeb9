"""A thousand turns in one session: memory, and the time of a turn of equal length.

    python -m tests.bench.long_session [--turns 1000] [--model M] [--tokens 16]

Without a model a tiny random one is used.  The oldest exchanges are dropped from the context when
it is full, never from the tree: what memory grows by is the conversation with its evidence.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import jax

import gemma_nb as gnb
from tests import tiny


def resident_bytes() -> int:
    """Memory of this process that is in RAM (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status holds no VmRSS")


def turn_seconds(chat: gnb.ChatSession, message: str) -> float:
    """Time of one exchange whose reply has exactly `max_new_tokens`."""
    start = time.perf_counter()
    turn = chat.chat(message)
    if len(turn.tokens) != chat.sampling.max_new_tokens:
        raise RuntimeError(f"{turn!r} is shorter than the others: {turn.finish_detail}")
    return time.perf_counter() - start


def session(model: Any, tokenizer: Any, *, tokens: int, cache_length: int) -> gnb.ChatSession:
    """A session whose replies never end early and that drops what is old."""
    template = gnb.ChatSession(model, tokenizer).template
    ends = tuple(sorted(template.stop_ids(tokenizer)))
    return gnb.ChatSession(
        model,
        tokenizer,
        template="none",
        cache_length=cache_length,
        when_full="drop_oldest",
        sampling=gnb.Sampling(seed=0, max_new_tokens=tokens, forbidden=ends),
    )


def measure(chat: gnb.ChatSession, turns: int, report_every: int = 100) -> list[dict[str, float]]:
    """Runs `turns` exchanges; medians and memory of each hundred."""
    rows: list[dict[str, float]] = []
    seconds: list[float] = []
    for count in range(1, turns + 1):
        seconds.append(turn_seconds(chat, f" Message {count % 10}."))
        if count % report_every == 0:
            gc.collect()
            rows.append(
                {
                    "turns": count,
                    "median_ms": 1e3 * statistics.median(seconds),
                    "resident_mb": resident_bytes() / 1e6,
                    "arrays": len(jax.live_arrays()),
                    "context": chat.context.used,
                }
            )
            print("  ".join(f"{name} {value:.5g}" for name, value in rows[-1].items()), flush=True)
            seconds = []
    return rows


def main() -> None:
    """Prints a row per hundred turns, and the growth after the first hundred."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--cache-length", type=int, default=1024)
    parser.add_argument("--model", help="as for gnb.load; a tiny random one without")
    given = parser.parse_args()
    if given.model:
        model, tokenizer = gnb.load(given.model)
    else:
        tokenizer = tiny.tokenizer()
        model = tiny.model(tokenizer.vocab_size)
    chat = session(model, tokenizer, tokens=given.tokens, cache_length=given.cache_length)
    rows = measure(chat, given.turns)
    first, last = rows[0], rows[-1]
    grown = last["resident_mb"] / first["resident_mb"] - 1
    slower = last["median_ms"] / first["median_ms"] - 1
    evidence = sum(len(turn.tokens) for turn in chat.tree)
    print(
        f"after the first hundred turns: memory {grown:+.1%}, time of a turn {slower:+.1%}; "
        f"{len(chat.tree)} turns and {evidence} tokens with their evidence are kept"
    )


if __name__ == "__main__":
    main()
