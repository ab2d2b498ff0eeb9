"""Products with weights, of one vector and of several, as XLA's CPU backend makes them fast."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from gemma_nb.cpu.fusion import materialize

# So many vectors are few, see `product`.
FEW = 64

# Sums that one loop makes at once, see `times_rows`.
_SUMS = 8

# What XLA:CPU is told so that it adds up float32 rows in streams (see `times_rows`) in the order
# that is fast, as it does in a product of a matrix and a vector anyway: it may reassociate sums,
# and nothing else.
IN_STREAMS = {
    "xla_cpu_enable_fast_math": True,
    **dict.fromkeys(
        (f"xla_cpu_fast_math_honor_{what}" for what in ("nans", "infs", "division", "functions")),
        True,
    ),
}


def product(
    x: Float[Array, "*lead inner"], rows: jax.Array, *, streams: int = 1
) -> Float[Array, "*lead out"]:
    """x times the transpose of (out, in) rows, in x's dtype; sums are float32.

    `streams` is for a single vector, see `times_rows`.
    """
    lead, x32 = x.shape[:-1], x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if x32.shape[0] == 1:
        y = times_rows(x32, rows, streams=streams)
    elif len(x32) <= FEW and rows.dtype == jnp.float32:
        # Faster where the few are on the right; and XLA:CPU would turn them round.
        y = materialize(rows @ x32.T).T
    else:
        y = x32 @ rows.T.astype(jnp.float32)
    return y.reshape(*lead, -1).astype(x.dtype)


def times_rows(x: jax.Array, rows: jax.Array, *, streams: int = 1) -> jax.Array:
    """Few vectors x (n, in) times the transpose of (out, in) rows, which are read once for all.

    Args:
      x: float32, or int16 where rows are int8.
      rows: what is multiplied with it.
      streams: in so many equal parts, where `out` has such, each thread reads the rows side by
        side, which several rows one behind the other in memory would not do.  With float32 the
        program must be compiled with `IN_STREAMS`.

    Returns:
      (n, out) in the dtype of the sums: float32, or int32.
    """
    x = materialize(x)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    sums = jnp.float32 if floating else jnp.int32
    # A loop that reads from more than eight places, or adds to more sums, is slower again.
    count = min(streams, max(1, _SUMS // len(x)))
    count = count if len(rows) % count == 0 else 1
    if len(x) * count == 1 or jax.default_backend() != "cpu":
        columns = rows.T.astype(sums) if floating else rows.T
        if len(x) == 1:
            return jnp.dot(x[0], columns, preferred_element_type=sums)[None]
        return jnp.dot(x, columns, preferred_element_type=sums)
    parts = jnp.split(rows, count)
    terms = tuple(part.astype(sums) * vector.astype(sums) for vector in x for part in parts)

    # One loop over the inputs adds them all up: XLA:CPU makes no such thing of several products.
    def add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(map(jnp.add, a, b))

    found = lax.reduce(terms, (np.zeros((), sums),) * len(terms), add, (1,))
    return jnp.concatenate(found).reshape(len(x), -1)


def times_columns(
    x: Float[Array, "T inner"], columns: jax.Array, *, rounded: bool
) -> Float[Array, "T out"]:
    """x times an (in, out) matrix, in x's dtype; sums are float32.

    A float32 x over bfloat16 columns is split into three bfloat16 terms that add up to it (8 bits
    of significand each, 24 in all), so that the product is as exact as float32's and runs at the
    speed of bfloat16; unless it is to be `rounded`, which is one product instead of three.
    """
    if columns.dtype != jnp.bfloat16:
        return (x.astype(columns.dtype) @ columns).astype(x.dtype)
    if rounded or x.dtype == jnp.bfloat16:
        short = x.astype(jnp.bfloat16)
        return jnp.dot(short, columns, preferred_element_type=jnp.float32).astype(x.dtype)
    terms = jnp.concatenate(bfloat16_terms(materialize(x)))
    y = jnp.dot(terms, columns, preferred_element_type=jnp.float32)
    # Small terms first.
    return functools.reduce(jnp.add, reversed(jnp.split(y, 3)))


def bfloat16_terms(x: Float[Array, "*n"]) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is x (float32)."""
    # Cut off: three terms hold all 24 bits either way, and rounding takes longer.
    high, rest = split_bfloat16(x)
    middle, rest = split_bfloat16(rest)
    return [high, middle, split_bfloat16(rest)[0]]


def split_bfloat16(
    x: Float[Array, "*n"], *, rounded: bool = False
) -> tuple[jax.Array, Float[Array, "*n"]]:
    """A bfloat16 and what float32 x is more than it.

    Args:
      x: float32.
      rounded: take the nearest bfloat16, else the upper half of the bits, which is quicker.
    """
    # On bits, because XLA may drop a conversion to bfloat16 and back.
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    upper = (bits + np.uint32(0x8000) if rounded else bits) >> 16
    kept = lax.bitcast_convert_type(upper << 16, jnp.float32)
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16), x - kept
