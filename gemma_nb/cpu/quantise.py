"""Weights in int8, with a scale for each row and each input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from gemma_nb.executables import CachedJit

# How far the inputs of int8 layers are evened out, see `quantise`: by the weights, and by what is
# multiplied with them, to these powers.  Rounding is worst where a large activation meets a weight
# that is small in its row.  Powers for each kind of weight gain less than texts differ by.
BY_WEIGHTS = 0.5
_BY_ACTIVATIONS = 0.25


def quantise(
    rows: Float[Array, "out inner"],
    power: float = 1.0,
    activations: Float[Array, " inner"] | None = None,
) -> tuple[Int8[Array, "out inner"], Float[Array, " out"], Float[Array, " inner"]]:
    """Rows in int8: a weight is its int8 times its row's scale and its input's.

    A row's largest magnitude becomes 127 (symmetric).  Inputs are scaled first: otherwise a row's
    rounding step would be that of its largest entry, and the largest entries stand in few columns.
    That activations belong into the scales is due to AWQ (arXiv:2306.00978, section 3.2), where
    they stand alone.

    Args:
      rows: the weights.
      power: an input's scale is the root mean square of its weights to this power; 0 is none.
      activations: how large the inputs typically are, see `typical`; where they are given, the
        scale is divided by their fourth root.
    """
    inputs, inverse = _input_scales(rows, np.float32(power), activations)
    scale, inverse_scale = _row_scales(_largest(rows, inverse))
    return _rounded(rows, inverse, inverse_scale), scale, inputs


def typical(x: Float[Array, "T inner"]) -> Float[Array, " inner"]:
    """Root mean square of the vectors but the first, as float32; of a text's activations.

    Those of its first token are many times larger than, and unlike, all that follow
    (arXiv:2309.17453: attention sinks).  Of a single vector it is NaN: who prepares int8 weights
    gives more.
    """
    rest = x[1:].astype(jnp.float32)
    return jnp.sqrt(jnp.mean(rest * rest, axis=0))


# Several programs, where nothing around them is compiled: in one, XLA:CPU writes the weights in
# float32 to memory between them.  They are given reciprocals, since it would divide for every
# weight; and what else is done to a maximum, after it, keeps it from finding that in a hurry.


@CachedJit
def _input_scales(
    rows: jax.Array, power: jax.Array, activations: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    square = rows.astype(jnp.float32) ** 2
    inputs = jnp.sqrt(jnp.mean(square, axis=0)) ** power
    if activations is not None:
        # What is never there is not more important than all that is.
        least = jnp.maximum(1e-6 * activations.max(), np.finfo(np.float32).tiny)
        inputs = inputs / jnp.maximum(activations, least) ** _BY_ACTIVATIONS
    inputs = jnp.where(inputs == 0, 1.0, inputs)
    return inputs, 1 / inputs


@CachedJit
def _largest(rows: jax.Array, inverse: jax.Array) -> jax.Array:
    return jnp.abs(rows.astype(jnp.float32) * inverse).max(axis=-1)


@CachedJit
def _row_scales(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale = largest / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    return scale, 1 / scale


@CachedJit
def _rounded(rows: jax.Array, inverse: jax.Array, inverse_scale: jax.Array) -> jax.Array:
    scaled = rows.astype(jnp.float32) * inverse * inverse_scale[:, None]
    return jnp.round(scaled).astype(jnp.int8)
