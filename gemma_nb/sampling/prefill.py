"""Pieces of a prompt, each of which is a compiled step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gemma_nb.typing import EMPTY

# Called after each piece of a prompt with how many tokens were fed so far, and of how many; False
# ends the prefill there, where there is more to feed.
Between = Callable[[int, int], bool]

# Prompt lengths that are compiled.  Few, since each costs seconds the first time.
BUCKETS = (16, 64, 256)
_SMALL = 64

# From here on small pieces: each of a piece's tokens has a score for every slot of the cache, in
# every head, and these are held several times over.
_FAR = 16_384


def chunks(ids: Sequence[int], start: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Cut a prompt into padded pieces.

    Args:
      ids: the prompt's token ids, at least one.
      start: position of the first.

    Yields:
      tokens (1, T) int32, positions (1, T) int32 with -1 on padding, and the index of the last
      real token; T is 1 or one of `BUCKETS`.
    """
    done = 0
    while done < len(ids):
        size = _piece(len(ids) - done, _SMALL if start + done >= _FAR else BUCKETS[-1])
        count = min(size, len(ids) - done)
        tokens = np.zeros((1, size), np.int32)
        positions = np.full((1, size), EMPTY, np.int32)
        tokens[0, :count] = ids[done : done + count]
        positions[0, :count] = start + done + np.arange(count)
        yield tokens, positions, count - 1
        done += count


def _piece(left: int, most: int) -> int:
    """Size of the next piece, at most `most`.

    What fits into a small bucket is padded to it: one more piece costs more than the padding, and
    a start from nothing compiles one program less.  Otherwise the largest bucket that is at most a
    quarter padding.
    """
    if left == 1:
        return 1
    small = next((size for size in BUCKETS if left <= size <= _SMALL), None)
    if small is not None:
        return small
    sizes = (size for size in reversed(BUCKETS) if size <= most and 4 * left >= 3 * size)
    return next(sizes, BUCKETS[0])
