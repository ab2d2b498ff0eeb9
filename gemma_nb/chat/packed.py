"""Alternatives in a sixth of the memory: numbers as bytes, texts shared."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_nb.chat.events import Alternative


class Packed:
    """The descriptor of a record's field that holds a tuple of alternatives.

    A conversation keeps ten alternatives of each token, and reads those of the token that is looked
    at.  As objects of four objects each they take 1.4 kB, packed 0.3 kB.  What is read compares
    equal to what was set; it is a new tuple each time.
    """

    def __init__(self, slot: Any, kind: type[Alternative]) -> None:
        """Keeps what is packed in a slot.

        Args:
          slot: the descriptor of the record's own slot.
          kind: the class of what is packed.
        """
        self._slot = slot
        self._kind = kind
        # What was packed or unpacked last, and the same as it is kept: a token's record becomes
        # another, and then an event, before the next token's does.
        self._last: tuple[Any, Any] = (None, None)

    def __get__(self, record: Any, owner: Any = None) -> Any:
        if record is None:
            return self
        kept = self._slot.__get__(record)
        if not kept or type(kept[0]) is not bytes:
            return kept
        alternatives, last = self._last
        if kept is not last:
            alternatives = self._unpacked(*kept)
            self._last = alternatives, kept
        return alternatives

    def __set__(self, record: Any, alternatives: Any) -> None:
        last, kept = self._last
        if alternatives is not last:
            kept = self._packed(alternatives)
            self._last = alternatives, kept
        self._slot.__set__(record, kept)

    def _packed(self, given: Any) -> Any:
        """(bytes, text, text, ...), or what was given where that would not be the same."""
        if type(given) is not tuple or any(type(a) is not self._kind for a in given):
            return given
        numbers = (
            *(a.token_id for a in given),
            *(a.logprob for a in given),
            *(a.probability for a in given),
        )
        layout = _layout(len(given))
        try:
            data = layout.pack(*numbers)
        except (struct.error, OverflowError, TypeError):
            return given
        # What the model computes is float32.  Others (NaN too, as it differs from itself) stay.
        return (data, *(a.text for a in given)) if layout.unpack(data) == numbers else given

    def _unpacked(self, data: bytes, *texts: str) -> tuple[Alternative, ...]:
        n = len(texts)
        numbers = _layout(n).unpack(data)
        columns = (numbers[:n], texts, numbers[n : 2 * n], numbers[2 * n :])
        return tuple(map(self._kind, *columns))


@functools.cache
def _layout(count: int) -> struct.Struct:
    """Ids, log-probabilities, probabilities."""
    return struct.Struct(f"={count}I{2 * count}f")
