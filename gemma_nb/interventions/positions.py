"""Positions, layers and heads as users name them, made into arrays of fixed lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeAlias

import flax
import jax
import numpy as np

from gemma_nb.indices import Indices, is_mask, listed, number
from gemma_nb.interventions.numbers import array, is_traced, known, padded, plain, short
from gemma_nb.interventions.pytrees import fill
from gemma_nb.summaries import summary

# Positions: None is all, a slice from start up to stop, a list of them, or a mask of a text.
Positions: TypeAlias = Indices

_LAST = 2**30  # a position that no text reaches


@flax.struct.dataclass
class Where:
    """Absolute positions: those listed, and all from `start` up to `stop`.

    Attributes:
      start: () int32.
      stop: () int32.
      listed: (P,) int32, padded; nothing but padding where a range says it all.
      mask: length of the mask that it was made from; None for others, and once JAX has rebuilt it.
    """

    start: jax.Array
    stop: jax.Array
    listed: jax.Array
    mask: ClassVar[int | None] = None

    def __repr__(self) -> str:
        return summary(self) if is_traced(self) else f"<{self}>"

    @classmethod
    def of(cls, positions: Positions) -> Where:
        """From what a user writes.

        Raises:
          ValueError: a step, positions counted from an end that is not known here, or none.
        """
        if positions is None:
            positions = slice(None)
        if isinstance(positions, slice):
            known("positions", (positions.start, positions.stop))
            ends = (positions.start, positions.stop)
            start, stop = (None if end is None else number(end, "positions") for end in ends)
            start, stop = start or 0, _LAST if stop is None else stop
            if positions.step not in (None, 1) or start < 0 or stop < 0:
                raise ValueError(
                    f"positions={positions} must count up from the beginning of the context, "
                    "one by one: slice(start, stop)"
                )
            return cls(array(start, np.int32), array(stop, np.int32), ints(()))
        at, mask = taken(positions, "positions")
        none = array(0, np.int32)
        found = cls(none, none, from_zero(at, positions))
        fill(found, mask=mask)
        return found

    def beyond(self, length: int) -> list[int]:
        """The positions named that a text of `length` tokens does not reach.

        Of a range only its start counts; one that holds no position has no other.
        """
        if at := plain(self.listed):
            return [p for p in at if p >= length]
        start, stop = int(self.start), int(self.stop)
        return [start] if start >= min(length, stop) else []

    def __call__(self, positions: jax.Array) -> jax.Array:
        """Bool, like `positions`."""
        ranged = (self.start <= positions) & (positions < self.stop)
        return ranged | (positions[..., None] == self.listed).any(axis=-1)

    @property
    def last(self) -> int:
        """The last position, -1 for none."""
        return max([*plain(self.listed), int(self.stop) - 1 if self.stop > self.start else -1])

    def __str__(self) -> str:
        if at := plain(self.listed):
            return f"positions {short(at)}"
        start, stop = int(self.start), int(self.stop)
        if start >= stop:
            return "no position"
        if (start, stop) == (0, _LAST):
            return "all positions"
        return f"positions {start} on" if stop == _LAST else f"positions {start} to {stop - 1}"


def taken(given: Any, argument: str) -> tuple[list[int], int | None]:
    """Indices into what is not known yet, and the length of the mask that they were, or None.

    Raises:
      ValueError: no indices, a slice without an end, or traced ones.
    """
    known(argument, given)
    if isinstance(given, slice):
        if given.stop is None:
            raise ValueError(f"{argument}={given} needs an end here: name the {argument}")
        ends = (given.start or 0, given.stop, 1 if given.step is None else given.step)
        given = range(*(number(end, argument) for end in ends))
    found = listed(given, argument)
    mask = len(found) if is_mask(found) else None
    return found if mask is None else [i for i, chosen in enumerate(found) if chosen], mask


def from_zero(positions: Sequence[int], given: Any, argument: str = "positions") -> jax.Array:
    """(P,) int32 absolute positions.

    Raises:
      ValueError: none, or one that is not from 0 on; the message shows what was `given`.
    """
    if not positions:
        raise ValueError(
            f"{argument} is empty, so that nothing would be changed: name at least one"
        )
    if min(positions) < 0:
        raise ValueError(f"{argument} must be whole numbers from 0 on, got {given!r:.80}")
    return ints(positions)


def ints(values: Iterable[int]) -> jax.Array:
    """(n,) int32, padded with `NOWHERE`."""
    return padded(np.array(list(values), np.int32), np.int32)


def single(given: Any, argument: str) -> jax.Array:
    """() int32 of an argument that names one thing.

    Raises:
      ValueError: no index, several, or a traced one.
    """
    return array(number(known(argument, given), argument, argument), np.int32)
