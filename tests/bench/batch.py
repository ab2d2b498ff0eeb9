"""How the throughput of decoding grows with the number of replies made at once.

    python -m tests.bench.batch [--rounds 5] [--tokens 32]

The same prompt, on the default model: one reply by `chat.chat`, and n by `chat.sample`, all with
full evidence and of exactly so many tokens, in turns within each round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import gemma_nb as gnb
from gemma_nb.sampling.batch import WIDTHS
from tests.bench.contestants import settle

PROMPT = "Tell me about the lighthouse at the end of the harbour."


def tokens_per_second(replies: Sequence[gnb.Turn]) -> float:
    """Of all replies together, from the first token to the last."""
    seconds = max(turn.timing.decode_seconds for turn in replies)
    return sum(turn.timing.new_tokens - 1 for turn in replies) / seconds


def main() -> None:
    """Prints medians of tokens per second, and what a step takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    chat = gnb.ChatSession(model, tokenizer)
    ends = tuple(sorted(chat.template.stop_ids(tokenizer)))
    settings = gnb.Sampling(seed=0, top_k=64, max_new_tokens=given.tokens, forbidden=ends)
    chat.sampling = settings

    def alone() -> float:
        turn = chat.chat(PROMPT)
        chat.undo()
        return tokens_per_second([turn])

    def together(n: int) -> float:
        return tokens_per_second(chat.sample(PROMPT, n=n))

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
    print(f"chat.chat         {one:7.1f} tokens/s  {1e3 / one:6.1f} ms a step")
    for width, speeds in found.items():
        ratio = statistics.median(x / y for x, y in zip(speeds, single, strict=True))
        speed = statistics.median(speeds)
        print(
            f"chat.sample n={width:<3} {speed:7.1f} tokens/s  {1e3 * width / speed:6.1f} ms a step "
            f" {ratio:.2f} times chat.chat"
        )


if __name__ == "__main__":
    main()
