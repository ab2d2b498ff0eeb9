"""Attention of one text, as products of plain matrices and vectors."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gemma_nb.cpu.fusion import materialize

# Of so many keys a single query's heads are computed one after the other.
SHORT = 2048


# XLA's CPU backend transposes what an einsum of five axes makes.


def scores(q: Float[Array, "1 T K G H"], k: Float[Array, "1 S K H"]) -> Float[Array, "1 T N S"]:
    """Scores of grouped queries."""
    parts = [_times(q[0, :, g], k[0, :, g].T) for g in range(k.shape[2])]
    return jnp.concatenate(parts, axis=1)[None]


def gather(
    weights: Float[Array, "1 T K G S"], v: Float[Array, "1 S K H"]
) -> Float[Array, "1 T N H"]:
    """The values that weights of grouped queries gather."""
    parts = [_times(weights[0, :, g], v[0, :, g]) for g in range(v.shape[2])]
    return jnp.concatenate(parts, axis=1)[None]


def _times(x: Float[Array, "T G inner"], y: Float[Array, "inner out"]) -> Float[Array, "T G out"]:
    length, heads, _ = x.shape
    if length == 1 and max(y.shape) <= SHORT:
        # Products of a matrix and a vector stay on this thread; handing one of them to another
        # thread would take longer than it does.
        return jnp.stack([x[0, n] @ y for n in range(heads)])[None]
    return (x.reshape(length * heads, -1) @ y).reshape(length, heads, -1)


def attend_by_one(
    q: Float[Array, "1 1 N H"],
    k: Float[Array, "1 S K H"],
    vt: Float[Array, "1 K H S"],
    mask: Bool[Array, "1 1 S"],
    weigh: Callable[[Float[Array, "N S"]], Float[Array, "N S"]],
) -> tuple[Float[Array, "1 1 N S"], Float[Array, "1 1 N H"]]:
    """Attention of a single query: its weights, and the values that they gather.

    Args:
      q: query, already scaled.
      k: keys.
      vt: values.
      mask: which keys the query sees; at least one.
      weigh: makes weights of the masked scores.
    """
    kv_heads = k.shape[2]
    grouped = materialize(q.astype(jnp.float32)).reshape(kv_heads, -1, q.shape[-1])
    allowed = mask[0]
    # What is not seen has weight 0, and is zeroed all the same: XLA's CPU backend runs a product of
    # a matrix and a vector on all threads only where something is computed on the way.  On one, the
    # other threads would fall asleep meanwhile, and waking up delays them in all large products up
    # to the next attention.
    k, vt = k.astype(jnp.float32), vt.astype(jnp.float32)
    keys = [jnp.where(allowed[0, :, None], k[0, :, g], 0).T for g in range(kv_heads)]
    scores = jnp.stack([query @ keys[g] for g in range(kv_heads) for query in grouped[g]])
    weights = materialize(weigh(scores))
    values = [jnp.where(allowed, vt[0, g], 0).T for g in range(kv_heads)]
    group = len(weights) // kv_heads
    z = jnp.concatenate([row @ values[n // group] for n, row in enumerate(weights)])
    return weights[None, None].astype(q.dtype), z.reshape(q.shape).astype(q.dtype)
