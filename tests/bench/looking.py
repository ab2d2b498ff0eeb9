"""How soon a token of a chat is seen from the inside, while the cache holds it.

    python -m tests.bench.looking

After a conversation of some 700 tokens, tokens all over it are looked at: all attention weights and
residuals of one position (`chat.look`), and the ten best tokens after each layer (`chat.lens`).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import gemma_nb as gnb
from tests.bench.contestants import PROMPT, settle

TOKENS, ROUNDS = 300, 21


def main() -> None:
    """Prints medians in milliseconds."""
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    chat = gnb.ChatSession(model, tokenizer, template="none")
    ends = tuple(sorted(chat.template.stop_ids(tokenizer)))
    chat.sampling = gnb.Sampling(seed=0, top_k=64, max_new_tokens=TOKENS, forbidden=ends)
    times = [[time.perf_counter() for _ in chat.stream(text)] for text in (PROMPT, " Then")]
    replies = [turn for turn in chat.turns if turn.role == "model"]
    settle()
    took: dict[str, list[float]] = {"look": [], "lens": []}

    def timed(name: str, run: Callable[[], Any]) -> None:
        start = time.perf_counter()
        run()
        took[name].append(1e3 * (time.perf_counter() - start))

    for compiling in (True, False):
        for i in range(2 if compiling else ROUNDS):
            turn, index = replies[i % 2], (37 * i) % TOKENS
            timed("look", lambda index=index, turn=turn: chat.look(index, turn=turn))
            timed("lens", lambda index=index, turn=turn: chat.lens(index, turn=turn))
        if compiling:
            first = {name: values[0] for name, values in took.items()}
            took = {name: [] for name in took}
    steps = [1e3 * (b - a) for reply in times for a, b in itertools.pairwise(reply)]
    print(f"a step of decoding: {statistics.median(steps):.0f} ms")
    for name, values in took.items():
        print(
            f"chat.{name}: {statistics.median(values):.0f} ms "
            f"({min(values):.0f} to {max(values):.0f}); the first one {first[name]:.0f}"
        )


if __name__ == "__main__":
    main()
