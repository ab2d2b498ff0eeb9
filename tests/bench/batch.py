"""How the throughput of decoding grows with the number of replies made at once.

    python -m tests.bench.batch [--rounds 5] [--tokens 32]

The same prompt, on the default model: one reply by `chat.chat`, and n by `chat.sample`, all with
full evidence and of so many tokens, in turns within each round.  Fewer replies than are faster at
once are made one after another, see `gemma_nb.chat.sampling_many.fewest`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import gemma_nb as gnb
from gemma_nb.sampling.batch import WIDTHS
from tests.bench.contestants import settle

PROMPT = "Tell me about the lighthouse at the end of the harbour."


def tokens_per_second(make: Callable[[], Sequence[gnb.Turn]]) -> float:
    """Of all replies together, the reading of the prompt included."""
    start = time.perf_counter()
    replies = make()
    seconds = time.perf_counter() - start
    return sum(turn.timing.new_tokens for turn in replies) / seconds


def main() -> None:
    """Prints medians of tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    # Without a template no reply ends early.
    chat = gnb.ChatSession(model, tokenizer, template="none")
    ends = tuple(sorted(chat.template.stop_ids(tokenizer)))
    settings = gnb.Sampling(seed=0, top_k=64, max_new_tokens=given.tokens, forbidden=ends)
    chat.sampling = settings

    def alone() -> float:
        speed = tokens_per_second(lambda: [chat.chat(PROMPT)])
        chat.undo()
        return speed

    def together(n: int) -> float:
        return tokens_per_second(lambda: chat.sample(PROMPT, n=n))

    alone()
    for width in WIDTHS:
        together(width)
    settle()
    single: list[float] = []
    found: dict[int, list[float]] = {width: [] for width in WIDTHS}
    for _ in range(given.rounds):
        single.append(alone())
        for width in WIDTHS:
            found[width].append(together(width))
    one = statistics.median(single)
    print(f"chat.chat         {one:7.1f} tokens/s")
    for width, speeds in found.items():
        ratio = statistics.median(x / y for x, y in zip(speeds, single, strict=True))
        speed = statistics.median(speeds)
        print(f"chat.sample n={width:<3} {speed:7.1f} tokens/s  {ratio:.2f} times chat.chat")


if __name__ == "__main__":
    main()
