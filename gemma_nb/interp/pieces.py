"""What a pass is asked for, gathered from the pieces that the device computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gemma_nb.interventions.numbers import room
from gemma_nb.sites import Site


@dataclasses.dataclass(frozen=True)
class Selection:
    """What of a site is wanted; None means all.

    Attributes:
      positions: absolute positions (of queries, on maps).
      heads: indices of query heads, or of key-value heads where a site has these.
      dtype: of the result.
    """

    positions: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    dtype: str = "float32"


class Pieces:
    """Arrays that are filled while the device computes on.

    XLA computes on threads of its own once it is asked.  What came of a piece is therefore copied
    when the next one is under way: `catch_up` after asking for it, then `add` what will come of it.

    Attributes:
      select: what is wanted of each site.
      found: site name -> (layers, T, ...) or (layers, N, T, S); whole after the last `catch_up`.
    """

    def __init__(self, layers: int, length: int, select: Selection) -> None:
        """Arrays of `layers` layers of a text of `length` tokens; only what `select` says."""
        self.found: dict[str, np.ndarray] = {}
        self._layers, self._length, self.select = layers, length, select
        self._waiting: list[Callable[[], None]] = []

    def rows(self, start: int, stop: int) -> np.ndarray | None:
        """Rows of a piece to return, as many for every piece; None for all.

        Some are returned twice, so that few counts of them are compiled.
        """
        positions = self.select.positions
        if positions is None:
            return None
        inside = [p - start for p in positions if start <= p < stop]
        count = min(room(len(positions)), stop - start)
        rows = np.full(count, inside[0] if inside else 0, np.int32)
        rows[: len(inside)] = inside
        return rows

    def heads(self) -> np.ndarray | None:
        """Heads to return; None for all.  Some twice, as of `rows`, but never twice as many."""
        heads = self.select.heads
        if heads is None:
            return None
        count = 1 << (len(heads) - 1).bit_length()
        return np.array([*heads, *heads[:1] * (count - len(heads))], np.int32)

    def add(self, s: Site, row: int, read: Callable[[], Any], start: int, stop: int) -> None:
        """Notes what a site is from `start` up to `stop`, in the layer that comes `row`-th.

        Args:
          s: the site.
          row: index of the layer among those that are wanted.
          read: waits for it: (rows, ...), or (rows, N, S) of a map.
          start: position of the piece's first token.
          stop: position behind its last one.
        """
        done, count = self._count(0, start), self._count(start, stop)
        if count:
            self._waiting.append(partial(self._put, s, row, read, slice(done, done + count)))

    def catch_up(self) -> None:
        """Copies everything that was added; waits for what is not computed yet."""
        waiting, self._waiting = self._waiting, []
        for put in waiting:
            put()

    def _count(self, start: int, stop: int) -> int:
        """How many of the wanted positions lie from `start` up to `stop`."""
        positions = self.select.positions
        if positions is None:
            return max(0, min(stop, self._length) - start)
        return sum(start <= p < stop for p in positions)

    def _put(self, s: Site, row: int, read: Callable[[], Any], at: slice) -> None:
        """Puts a piece's rows in their place, which is made at the first piece."""
        cut = np.asarray(read())[: at.stop - at.start]
        if self.select.heads is not None and {"N", "K"} & set(s.dims):
            cut = cut[:, : len(self.select.heads)]
        axis = 0
        if s.is_map:
            # The model keeps queries in front; a map is read head by head.  XLA would take two
            # copies to turn it; here it is a view, and one copy to where it is kept.
            cut, axis = cut[..., : self._length].transpose(1, 0, 2), 1
        if s.name not in self.found:
            shape = [self._layers, *cut.shape]
            shape[1 + axis] = self._count(0, self._length)
            self.found[s.name] = np.empty(shape, self.select.dtype)
        self.found[s.name][row][(slice(None),) * axis + (at,)] = cut
