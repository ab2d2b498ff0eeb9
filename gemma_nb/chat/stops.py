"""Ending a reply at a stop string, token by token, without ever showing a part of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Holds tokens back while their text may be the beginning of a stop string.

    Feed it each token's text in order.  It hands the texts back, in order, once they are certain;
    after a match, tokens of the stop string come back with what stands before it, or with "".

    Attributes:
      matched: the stop string that ended the text, or None.
    """

    def __init__(self, stops: Sequence[str], *, skip_leading_space: bool = False) -> None:
        self._stops = tuple(stops)
        self._skip = skip_leading_space
        self._held: list[str] = []
        self.matched: str | None = None

    def feed(self, text: str) -> list[str]:
        """Takes the next token's text; returns the texts of the tokens that are now certain."""
        if self._skip:
            # White space before the first word is not yet the reply, so nothing can end in it.
            if not text.strip():
                return [text]
            self._skip = False
        self._held.append(text)
        held = "".join(self._held)
        found = [(held.find(stop), stop) for stop in self._stops if stop in held]
        if found:
            at, self.matched = min(found, key=lambda hit: hit[0])
            return self._cut(at)
        return self._release(len(held) - self._pending(held))

    def resume(self, texts: Sequence[str]) -> list[str]:
        """Takes the texts of tokens that stand already; returns those that are certain.

        They end nothing, whatever they hold; but their end may begin a stop string.
        """
        text = "".join(texts)
        if self._skip and text.strip():
            self._skip = False
        self._held = list(texts)
        return self._release(len(text) if self._skip else len(text) - self._pending(text))

    def flush(self) -> list[str]:
        """The texts still held, when no more tokens come."""
        texts, self._held = self._held, []
        return texts

    def _pending(self, held: str) -> int:
        """Length of the longest end of `held` that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(held)), 0, -1):
            if any(stop.startswith(held[-size:]) for stop in self._stops):
                return size
        return 0

    def _release(self, certain: int) -> list[str]:
        """Tokens that end within the first `certain` characters held."""
        released: list[str] = []
        end = 0
        while self._held and end + len(self._held[0]) <= certain:
            end += len(self._held[0])
            released.append(self._held.pop(0))
        return released

    def _cut(self, at: int) -> list[str]:
        """All held tokens, their text cut at character `at`."""
        texts, start = [], 0
        for text in self._held:
            texts.append(text[: max(at - start, 0)])
            start += len(text)
        self._held = []
        return texts
