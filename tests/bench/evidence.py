"""What evidence costs: decoding with all of it beside decoding with the least there can be.

    python -m tests.bench.evidence [--rounds 15] [--tokens 32]

Sessions of one model in one process decode the same text by turns: with one alternative for each
token, with twenty, and with twenty and the attention rows of all layers.  The entropy comes with
each.  Ratios are those of turns next to each other: a slow moment of the machine is in both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

import gemma_nb as gnb
from tests.bench.contestants import PROMPT, settle

if TYPE_CHECKING:
    from gemma_nb.text.tokenizer import Tokenizer

KINDS = {
    "one alternative": gnb.Capture(top_k=1),
    "top 20": gnb.Capture(top_k=20),
    "top 20, all attention rows": gnb.Capture(top_k=20, attention_layers="all"),
}
# The local layers' window is full, as in any longer conversation.
_BEFORE = 600


class Stream:
    """One session's reply, read on whenever its turn comes."""

    def __init__(
        self, model: gnb.GemmaTransformer, tokenizer: Tokenizer, capture: gnb.Capture
    ) -> None:
        self.chat = gnb.ChatSession(model, tokenizer, template="none", capture=capture)
        ends = tuple(sorted(self.chat.template.stop_ids(tokenizer)))
        self.chat.sampling = gnb.Sampling(temperature=0, max_new_tokens=4000, forbidden=ends)
        ids = tokenizer.encode(PROMPT * 20)[:_BEFORE]
        self.events = self.chat.stream(tokenizer.decode(ids))
        self.text: list[int] = []

    def seconds_per_token(self, count: int) -> float:
        """Of the next `count` tokens."""
        self.text.append(next(self.events).token_id)  # the step ahead was not made just now
        start = time.perf_counter()
        for _ in range(count):
            self.text.append(next(self.events).token_id)
        return (time.perf_counter() - start) / count


def main() -> None:
    """Prints medians in milliseconds, and ratios."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.evidence", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    streams = {name: Stream(model, tokenizer, capture) for name, capture in KINDS.items()}
    for stream in streams.values():
        stream.seconds_per_token(2)
    settle()
    took: dict[str, list[float]] = {name: [] for name in KINDS}
    names = list(KINDS)
    for i in range(arguments.rounds):
        # Whoever comes first is another one each time.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            took[name].append(1e3 * streams[name].seconds_per_token(arguments.tokens))
    least = took[names[0]]
    for name, values in took.items():
        ratios = [value / other for value, other in zip(values, least, strict=True)]
        print(
            f"{name:28} {statistics.median(values):.2f} ms a token ({min(values):.2f} to "
            f"{max(values):.2f}); {100 * (statistics.median(ratios) - 1):+.1f} % over the least"
        )
    same = len({tuple(stream.text) for stream in streams.values()}) == 1
    print(f"the same text from all: {'yes' if same else 'no'}")
    print(streams[names[-1]].chat.attention_kept)
    for stream in streams.values():
        stream.events.close()


if __name__ == "__main__":
    main()
