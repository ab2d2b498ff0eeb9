"""The largest entries of a vocabulary-sized vector, faster than `lax.top_k` on a CPU."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_BLOCK = 32


def top_k(x: Float[Array, " V"], k: int) -> tuple[Float[Array, " k"], Int[Array, " k"]]:
    """Values and indices of the k largest entries of x, in descending order.  Exact.

    Only the k blocks with the largest maxima can hold one of the k largest entries, so the full
    sort that `lax.top_k` does runs over k * 32 candidates instead of V.
    """
    size = x.shape[0]
    if size <= k * _BLOCK or size % _BLOCK:
        values, indices = lax.top_k(x, k)
        return values, indices
    _, blocks = lax.top_k(x.reshape(-1, _BLOCK).max(axis=-1), k)
    # Ascending, so that ties go to the lowest index as in `lax.top_k`.
    blocks = jnp.sort(blocks)
    candidates = (blocks[:, None] * _BLOCK + jnp.arange(_BLOCK)).reshape(-1)
    # XLA's CPU backend knows a top-k by its slices [:k] of a sort.  A caller's slices, as of the
    # largest alone, would be joined with them, and it would sort all candidates: five times the
    # work of everything else here.  A conditional keeps them apart; its predicate always holds.
    values, which = lax.cond(
        blocks[0] >= 0,
        lambda: tuple(lax.top_k(x[candidates], k)),
        lambda: (x[:k], blocks),
    )
    return values, candidates[which]
