"""Products of float32 matrices from products of bfloat16 ones, which some processors do faster.

A number is split into bfloat16 terms (8 bits of significand each) that add up to it, and the
products of terms that matter are added in float32 (Henry, Tang and Heinecke 2019, arXiv:1904.06376,
"Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gemma_nb.cpu.products import bfloat16_terms, split_bfloat16
from gemma_nb.processor import has_matrix_unit


def pays() -> bool:
    """Whether products of bfloat16 terms are faster here than one of float32."""
    return jax.default_backend() == "cpu" and has_matrix_unit()


def is_exact(dtype: Any) -> bool:
    """Whether `product` with rows of `dtype` leaves nothing out."""
    return bool(dtype == jnp.bfloat16)


def product(flat: Float[Array, "states D"], dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """What multiplies rows (entries, D) of `dtype` with states: (entries, states) float32.

    bfloat16 rows are multiplied with three terms of each state, which is as exact as a product in
    float32.  Of float32 rows, two terms and two of the states are multiplied crosswise without the
    smallest product: up to 2^-17 of each summand is left out, with either sign; `lost` is that.
    """

    def dot(rows: jax.Array, x: jax.Array) -> jax.Array:
        axes = (((1,), (1,)), ((), ()))
        return lax.dot_general(rows, x, axes, preferred_element_type=jnp.float32)

    if is_exact(dtype):
        terms = jnp.concatenate(bfloat16_terms(flat))

        def exactly(rows: jax.Array) -> jax.Array:
            large, middle, small = jnp.split(dot(rows, terms), 3, axis=1)
            return small + middle + large

        return exactly
    first, second, _ = _terms(flat)
    both = jnp.concatenate([first, second])

    def nearly(rows: jax.Array) -> jax.Array:
        high, low, _ = _terms(rows)
        large, small = jnp.split(dot(high, both), 2, axis=1)
        return small + dot(low, first) + large

    return nearly


def lost(rows: Float[Array, "entries D"], x: Float[Array, "D states"]) -> jax.Array:
    """What `product` leaves out of the float32 product rows @ x, itself in float32."""
    high, low, rest = _terms(rows)
    _, x_low, x_rest = _terms(x)
    low, x_low = low.astype(jnp.float32), x_low.astype(jnp.float32)
    return rest @ x + (high.astype(jnp.float32) + low) @ x_rest + low @ x_low


def _terms(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Two bfloat16 terms of a float32 array, each rounded to the nearest, and the rest."""
    high, rest = split_bfloat16(x, rounded=True)
    low, rest = split_bfloat16(rest, rounded=True)
    return high, low, rest
