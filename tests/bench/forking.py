"""How soon a fork gives its first new token, in steps of decoding.

    python -m tests.bench.forking

A reply of 600 tokens is forked at its token 300: at one of its alternatives, at a token that is
none of them, and at a text of three tokens.  What a fork takes is compared with the steps of the
same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import gemma_nb as gnb
from gemma_nb.chat.records import TokenRecord
from tests.bench.contestants import settle

TOKENS, AT, ROUNDS = 600, 300, 9


def unlikely(record: TokenRecord) -> int:
    """A token that the model did not consider."""
    known = {alternative.token_id for alternative in record.alternatives}
    return next(token for token in range(10_000, 11_000) if token not in known)


def first_new(chat: gnb.ChatSession, first: gnb.Turn, given: int | str, count: int) -> float:
    """Seconds until the first token after `count` given ones is there."""
    start = time.perf_counter()
    events = chat.stream_fork(first.tokens[AT], given, turn=first)
    for _ in range(count + 1):
        next(events)
    seconds = time.perf_counter() - start
    events.close()
    return seconds


def main() -> None:
    """Prints medians, in milliseconds and in steps."""
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    chat = gnb.ChatSession(model, tokenizer, template="none")
    ends = tuple(sorted(chat.template.stop_ids(tokenizer)))
    chat.sampling = gnb.Sampling(seed=0, top_k=64, max_new_tokens=TOKENS, forbidden=ends)
    first = chat.chat("The lighthouse at the end of the harbour had been dark for")
    assert len(first.tokens) == TOKENS
    at = first.tokens[AT]
    text = " of the sea"
    assert len(tokenizer.encode(text)) == 3
    forks: dict[str, Callable[[], float]] = {
        "an alternative": lambda: first_new(chat, first, at.alternatives[5].token_id, 1),
        "any other token": lambda: first_new(chat, first, unlikely(at), 1),
        "a text of three tokens": lambda: first_new(chat, first, text, 3),
    }
    for fork in forks.values():
        fork()
    settle()
    took: dict[str, list[float]] = {name: [] for name in forks}
    steps: dict[str, list[float]] = {name: [] for name in forks}
    for _ in range(ROUNDS):
        for name, fork in forks.items():
            # The cache holds the whole reply again, and its last steps are timed.
            chat.select(first)
            start = None
            for count, _ in enumerate(chat.stream_resume(first)):
                start = start or time.perf_counter()
                if count == 20:
                    break
            assert start is not None
            step = (time.perf_counter() - start) / 20
            chat.stop()
            time.sleep(0.3)  # nobody forks before the step that runs ahead is over
            seconds = fork()
            took[name].append(1e3 * seconds)
            steps[name].append(seconds / step)
    for name in forks:
        print(
            f"fork at token {AT} of {TOKENS}, {name:22} first new token after "
            f"{statistics.median(took[name]):.0f} ms, {statistics.median(steps[name]):.2f} steps "
            f"({min(steps[name]):.2f} to {max(steps[name]):.2f})"
        )


if __name__ == "__main__":
    main()
