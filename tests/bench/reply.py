"""What a reply took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """Seconds.

    Attributes:
      whole: from the prompt to the last token.
      per_token: of each token after the first one, which prefill makes.
    """

    whole: float
    per_token: float

    @classmethod
    def of(cls, start: float, times: Sequence[float], count: int) -> Reply:
        """From when it began and when each of its tokens was there, by `time.perf_counter`.

        Raises:
          RuntimeError: there are not `count` of them.
        """
        if len(times) != count:
            raise RuntimeError(f"asked for {count} tokens, got {len(times)}")
        return cls(times[-1] - start, (times[-1] - times[0]) / (count - 1))

    @classmethod
    def watched(cls, stream: Iterable[Any], count: int) -> Reply:
        """Of a stream that has not begun, and gives its tokens one by one."""
        start = time.perf_counter()
        return cls.of(start, [time.perf_counter() for _ in stream], count)


def seconds_of(run: Callable[[], Any]) -> float:
    """How long `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
