"""One layer's key-value cache, and how tokens are put into it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gemma_nb.config import AttentionKind, Sliding
from gemma_nb.typing import LayerCache


def is_ring(kind: AttentionKind, cache: LayerCache) -> bool:
    """Whether a layer's cache is one window long, so that more tokens go round in it."""
    return isinstance(kind, Sliding) and cache["positions"].shape[1] == kind.window


def extend_cache(
    cache: LayerCache, new: LayerCache, *, ring: bool = False
) -> tuple[LayerCache, LayerCache]:
    """What the new tokens attend to, and `cache` with their keys, values and positions.

    Tokens at position -1 are padding (on the right) and are not stored, so a padded prompt leaves
    the cache as the bare prompt does.

    A ring holds one window: token n lies in slot n % S, where it displaces the one that has just
    left the window.  Several tokens at once may displace keys that the first of them still needs,
    so they attend to the old and the new side by side.  In a cache that is not a ring, what does
    not fit is dropped: the caller counts.

    Args:
      cache: k and v (B, S, K, H), positions (B, S), end_index (B,).  A single stream's may hold vt
        (1, K, H, S) in place of v: a single query's sum of values then reads memory in order.
      new: k and v (B, T, K, H), positions (B, T).
      ring: whether the cache is a ring.

    Returns:
      k, v (of one token: vt, if the cache has it) and positions to attend to, over S slots or
      (several tokens, ring) S + T; and the cache.
    """
    if new["positions"].shape == (1, 1):
        return _extend_by_one(cache, new, ring)
    if "vt" in cache:
        return _extend_columns(cache, new, ring)

    end = cache["end_index"]
    batch, length = new["positions"].shape
    size = cache["positions"].shape[1]
    new = {name: value.astype(cache[name].dtype) for name, value in new.items()}
    real = new["positions"] >= 0
    added = real.sum(axis=1, dtype=end.dtype)
    index = jnp.arange(length, dtype=jnp.int32)
    slots = end[:, None] + index
    if ring:
        real = real & (index >= added[:, None] - size)  # the last of those that share a slot
        slots = slots % size
    slots = jnp.where(real, slots, size)  # `size`: dropped
    rows = jnp.arange(batch)[:, None]
    written = {n: cache[n].at[rows, slots].set(v, mode="drop") for n, v in new.items()}
    seen = _side_by_side(cache, new) if ring else written
    return seen, {**written, "end_index": end + added}


def _extend_columns(
    cache: LayerCache, new: LayerCache, ring: bool
) -> tuple[LayerCache, LayerCache]:
    """`extend_cache` by several tokens of one stream, whose values lie in columns.

    Each slot takes its token.  A scatter, which takes each token to its slot, would be given rows:
    all values would be turned round twice.
    """
    end, size = cache["end_index"][0], cache["positions"].shape[1]
    length = new["positions"].shape[1]
    added = jnp.sum(new["positions"] >= 0, dtype=end.dtype)
    if ring:
        start, count = jnp.zeros((), end.dtype), size
        token = (jnp.arange(size, dtype=jnp.int32) - end) % size
        # The last of those that share a slot.
        token += jnp.maximum(added - 1 - token, 0) // size * size
    else:
        # All slots that may take one; not beyond the last slot, where they would be moved.
        count = min(length, size)
        start = jnp.minimum(end, size - count)
        token = start - end + jnp.arange(count, dtype=jnp.int32)
    taken = (token >= 0) & (token < added)
    token = jnp.clip(token, 0, length - 1)

    def write(name: str, value: jax.Array) -> jax.Array:
        # As matrices, see `_extend_by_one`.
        last = name == "vt"
        held = cache[name].reshape((-1, size) if last else (size, -1))
        value = value.astype(held.dtype).reshape(length, -1)[token]
        value = value.T if last else value
        zero = np.zeros((), start.dtype)
        place = (zero, start) if last else (start, zero)
        old = lax.dynamic_slice(held, place, value.shape)
        value = jnp.where(taken if last else taken[:, None], value, old)
        return lax.dynamic_update_slice(held, value, place).reshape(cache[name].shape)

    written = {"vt" if name == "v" else name: x for name, x in new.items()}
    written = {name: write(name, value) for name, value in written.items()}
    extended = {**written, "end_index": cache["end_index"] + added}
    return _side_by_side(cache, new) if ring else in_rows(written), extended


def _side_by_side(cache: LayerCache, new: LayerCache) -> LayerCache:
    """What a ring holds, and the new tokens behind it."""
    old = in_rows(cache)
    pairs = ((name, old[name], value.astype(old[name].dtype)) for name, value in new.items())
    return {name: jnp.concatenate([held, value], axis=1) for name, held, value in pairs}


def _extend_by_one(cache: LayerCache, new: LayerCache, ring: bool) -> tuple[LayerCache, LayerCache]:
    """`extend_cache` by one token of one stream: in place, where a scatter would copy the cache."""
    end = cache["end_index"]
    size = cache["positions"].shape[1]
    slot = end[0] % size if ring else end[0]

    def write(name: str, value: jax.Array) -> jax.Array:
        # As matrices, which is how a stream's cache is kept: XLA's CPU backend copies what is
        # updated in another shape.
        held = cache[name]
        last = name == "vt"
        zero = np.zeros((), slot.dtype)
        shape, place = ((-1, size), (zero, slot)) if last else ((size, -1), (slot, zero))
        value = value.astype(held.dtype).reshape((-1, 1) if last else (1, -1))
        return lax.dynamic_update_slice(held.reshape(shape), value, place).reshape(held.shape)

    written = {"vt" if name == "v" and "vt" in cache else name: x for name, x in new.items()}
    written = {name: write(name, value) for name, value in written.items()}
    return written, {**written, "end_index": end + 1}


def in_rows(cache: LayerCache) -> LayerCache:
    """The same cache with its values as v (B, S, K, H)."""
    if "vt" not in cache:
        return cache
    rest = {name: value for name, value in cache.items() if name != "vt"}
    return {**rest, "v": jnp.moveaxis(cache["vt"], -1, 1)}
