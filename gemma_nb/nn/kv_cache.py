"""One layer's key-value cache: it appends tokens, takes them back, and knows their positions.

A growing cache takes tokens from the left, and what does not fit is dropped: the caller counts.

    slot          0    1    2    3    4    5
    after 4      p0   p1   p2   p3    -    -       end_index 4

A ring holds one window, of W tokens.  Token n lies in slot n % W, where it displaces the one that
has just left the window:

    slot          0    1    2    3
    after 4      p0   p1   p2   p3                 end_index 4
    after 6      p4   p5   p2   p3                 end_index 6

Tokens at position -1 are padding (on the right) and are not stored, so a padded prompt leaves a
cache as the bare prompt does.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gemma_nb.config import AttentionKind, Sliding
from gemma_nb.typing import EMPTY, LayerCache


@dataclasses.dataclass(frozen=True)
class GrowingCache:
    """A cache whose slots are filled one after the other.

    Attributes:
      arrays: k and v (B, S, K, H), positions (B, S), end_index (B,).  A single stream's may hold vt
        (1, K, H, S) in place of v: a single query's sum of values then reads memory in order.
    """

    arrays: LayerCache

    @property
    def positions(self) -> jax.Array:
        """(B, S) int32, by slot; -1 where it is empty."""
        return self.arrays["positions"]

    @property
    def size(self) -> int:
        """S."""
        return self.positions.shape[1]

    def append(self, new: LayerCache) -> tuple[LayerCache, GrowingCache]:
        """Keys and values that new tokens attend to, and the cache with those of the new ones.

        Args:
          new: k and v (B, T, K, H), positions (B, T).

        Returns:
          k, v (of one token: vt, if the cache has it) and positions to attend to, over S slots or
          (several tokens, ring) S + T; and the cache.
        """
        added: jax.Array | int
        if new["positions"].shape == (1, 1):
            written, added = self._with_one(new), 1
            seen = written
        else:
            with_several = self._with_columns if "vt" in self.arrays else self._with_rows
            written, added = with_several(new)
            seen = self._seen(new, written)
        end = self.arrays["end_index"] + added
        return seen, dataclasses.replace(self, arrays={**written, "end_index": end})

    def rewind(self, length: jax.Array) -> GrowingCache:
        """The cache with only its first `length` tokens in use.

        A ring lacks what later tokens have displaced: whoever takes back more tokens than it has
        free slots writes those anew.
        """
        end = jnp.minimum(self.arrays["end_index"], length)
        cut = before(self.positions, length)
        return dataclasses.replace(self, arrays=self.arrays | {"positions": cut, "end_index": end})

    def _slot(self, number: jax.Array) -> jax.Array:
        """The slot of the token of a number."""
        return number

    def _stays(self, real: jax.Array, index: jax.Array, added: jax.Array) -> jax.Array:
        """Whether new tokens are still there when all are, of (B, T) that are no padding."""
        del index, added
        return real

    def _tokens(self, end: jax.Array, added: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
        """The first slot that may take one of `length` new tokens, and of it and each after it
        the index of the token that it takes, outside of 0 to `added` where it takes none.
        """
        del added
        # Not beyond the last slot, where they would be moved.
        count = min(length, self.size)
        start = jnp.minimum(end, self.size - count)
        return start, start - end + jnp.arange(count, dtype=jnp.int32)

    def _seen(self, new: LayerCache, written: LayerCache) -> LayerCache:
        """Keys and values that several new tokens attend to."""
        del new
        return in_rows(written)

    def _with_one(self, new: LayerCache) -> LayerCache:
        """One token of one stream written in place, where a scatter would copy the cache."""
        size, slot = self.size, self._slot(self.arrays["end_index"][0])

        def write(name: str, value: jax.Array) -> jax.Array:
            # As matrices, which is how a stream's cache is kept: XLA's CPU backend copies what is
            # updated in another shape.
            held = self.arrays[name]
            last = name == "vt"
            zero = np.zeros((), slot.dtype)
            shape, place = ((-1, size), (zero, slot)) if last else ((size, -1), (slot, zero))
            value = value.astype(held.dtype).reshape((-1, 1) if last else (1, -1))
            return lax.dynamic_update_slice(held.reshape(shape), value, place).reshape(held.shape)

        return {name: write(name, value) for name, value in self._renamed(new).items()}

    def _with_rows(self, new: LayerCache) -> tuple[LayerCache, jax.Array]:
        """Several tokens written, and how many of each row (B,) are real."""
        cache, end = self.arrays, self.arrays["end_index"]
        batch, length = new["positions"].shape
        new = {name: value.astype(cache[name].dtype) for name, value in new.items()}
        real = new["positions"] >= 0
        added = real.sum(axis=1, dtype=end.dtype)
        index = jnp.arange(length, dtype=jnp.int32)
        slots = self._slot(end[:, None] + index)
        # `size`: dropped.
        slots = jnp.where(self._stays(real, index, added[:, None]), slots, self.size)
        rows = jnp.arange(batch)[:, None]
        return {n: cache[n].at[rows, slots].set(v, mode="drop") for n, v in new.items()}, added

    def _with_columns(self, new: LayerCache) -> tuple[LayerCache, jax.Array]:
        """Several tokens of one stream, whose values lie in columns, and how many are real.

        Each slot takes its token.  A scatter, which takes each token to its slot, would be given
        rows: all values would be turned round twice.
        """
        cache, size, end = self.arrays, self.size, self.arrays["end_index"][0]
        length = new["positions"].shape[1]
        added = jnp.sum(new["positions"] >= 0, dtype=end.dtype)
        start, token = self._tokens(end, added, length)
        taken = (token >= 0) & (token < added)
        token = jnp.clip(token, 0, length - 1)

        def write(name: str, value: jax.Array) -> jax.Array:
            # As matrices, see `_with_one`.
            last = name == "vt"
            held = cache[name].reshape((-1, size) if last else (size, -1))
            value = value.astype(held.dtype).reshape(length, -1)[token]
            value = value.T if last else value
            zero = np.zeros((), start.dtype)
            place = (zero, start) if last else (start, zero)
            old = lax.dynamic_slice(held, place, value.shape)
            value = jnp.where(taken if last else taken[:, None], value, old)
            return lax.dynamic_update_slice(held, value, place).reshape(cache[name].shape)

        return {name: write(name, value) for name, value in self._renamed(new).items()}, added

    def _renamed(self, new: LayerCache) -> LayerCache:
        """New tokens' arrays under the names of those that take them."""
        return {"vt" if n == "v" and "vt" in self.arrays else n: x for n, x in new.items()}


class RingCache(GrowingCache):
    """A sliding layer's cache of one window, in which more tokens go round.

    Several tokens at once may displace keys that the first of them still needs, so they attend to
    the old and the new side by side.
    """

    def _slot(self, number: jax.Array) -> jax.Array:
        return number % self.size

    def _stays(self, real: jax.Array, index: jax.Array, added: jax.Array) -> jax.Array:
        return real & (index >= added - self.size)  # the last of those that share a slot

    def _tokens(self, end: jax.Array, added: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
        del length
        token = (jnp.arange(self.size, dtype=jnp.int32) - end) % self.size
        # The last of those that share a slot.
        token += jnp.maximum(added - 1 - token, 0) // self.size * self.size
        return jnp.zeros((), end.dtype), token

    def _seen(self, new: LayerCache, written: LayerCache) -> LayerCache:
        del written
        old = in_rows(self.arrays)
        pairs = ((name, old[name], value.astype(old[name].dtype)) for name, value in new.items())
        return {name: jnp.concatenate([held, value], axis=1) for name, held, value in pairs}


def cache_of(arrays: LayerCache, kind: AttentionKind) -> GrowingCache:
    """The cache of a layer of some kind: a ring where its arrays are one window long."""
    ring = isinstance(kind, Sliding) and arrays["positions"].shape[1] == kind.window
    return (RingCache if ring else GrowingCache)(arrays)


def before(positions: jax.Array, length: jax.Array) -> jax.Array:
    """Positions by slot, empty from position `length` on."""
    return jnp.where(positions < length, positions, EMPTY)


def in_rows(cache: LayerCache) -> LayerCache:
    """The same arrays with the values as v (B, S, K, H)."""
    if "vt" not in cache:
        return cache
    rest = {name: value for name, value in cache.items() if name != "vt"}
    return {**rest, "v": jnp.moveaxis(cache["vt"], -1, 1)}
