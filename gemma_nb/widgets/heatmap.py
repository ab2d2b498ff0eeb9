"""Attention weights made small enough to travel: quantised, cropped, pooled.  Pure numpy.

Weights are quantised as round(255 * sqrt(weight)): a square root, because most weights are small;
the step at weight w is about sqrt(w) / 128.
"""

from __future__ import annotations

import dataclasses

import numpy as np

MAX_TRACE_BYTES = 256 * 2**20
WINDOW = 40
MAX_WINDOW = 512
THUMBNAIL = 32


@dataclasses.dataclass(frozen=True)
class Window:
    """Positions `first <= p < last` that a heatmap shows, as rows and as columns."""

    first: int
    last: int

    @property
    def size(self) -> int:
        """Rows, and columns, of the heatmap."""
        return self.last - self.first


def window_for(length: int, row: int | None, *, limit: int = WINDOW) -> Window:
    """The last `limit` of `length` positions, moved back so that `row` is among them."""
    size = min(length, limit)
    last = length
    if row is not None and 0 <= row < length - size:
        # Some context after the row, more before it: keys are what one looks for.
        last = min(length, max(size, row + 1 + size // 4))
    return Window(last - size, last)


def quantise(weights: np.ndarray) -> np.ndarray:
    """round(255 * sqrt(weights)) as uint8, any shape; weights outside [0, 1] are clipped."""
    return np.rint(255 * np.sqrt(np.clip(weights, 0.0, 1.0))).astype(np.uint8)


def crop(attention: np.ndarray, window: Window, *, hide_first: bool) -> tuple[bytes, bytes]:
    """One head's map inside `window`, and what each of its queries gives to earlier keys.

    Args:
      attention: float32 (T, T), query before key.
      window: the positions to show.
      hide_first: leave position 0 (the attention sink) out of both.

    Returns:
      uint8 (n, n) and uint8 (n,), quantised, as bytes.
    """
    rows = attention[window.first : window.last]
    inside = rows[:, window.first : window.last]
    before = rows[:, int(hide_first) : window.first].sum(axis=1)
    if hide_first and window.first == 0:
        inside = inside.copy()
        inside[:, 0] = 0
    return quantise(inside).tobytes(), quantise(before).tobytes()


def thumbnails(attention: np.ndarray, *, hide_first: bool) -> tuple[bytes, int]:
    """Max-pooled maps of every layer and head.

    Args:
      attention: float32 (L, N, T, T).
      hide_first: leave position 0 (the attention sink) out.

    Returns:
      uint8 (L, N, side, side) quantised, as bytes, and side <= 32.
    """
    length = attention.shape[-1]
    side = min(THUMBNAIL, length)
    edges = np.arange(side) * length // side
    pooled = np.empty((*attention.shape[:2], side, side), np.uint8)
    for layer in range(attention.shape[0]):  # layer by layer: no second copy of the whole
        maps = attention[layer]
        if hide_first:
            maps = maps.copy()
            maps[..., 0] = 0
        rows = np.maximum.reduceat(maps, edges, axis=-2)
        pooled[layer] = quantise(np.maximum.reduceat(rows, edges, axis=-1))
    return pooled.tobytes(), side


def strongest(row: np.ndarray, query: int, count: int, *, hide_first: bool) -> list[int]:
    """The `count` key positions that get most of float (T,) `row`, strongest first."""
    keys = np.arange(int(hide_first and query > 0), query + 1)
    order = np.argsort(row[keys], kind="stable")[::-1]
    return [int(key) for key in keys[order[:count]]]


def trace_bytes(layers: int, heads: int, length: int) -> int:
    """Memory of a float32 attention array (L, N, T, T)."""
    return layers * heads * length * length * 4
