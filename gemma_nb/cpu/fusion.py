"""A boundary that XLA:CPU does not fuse across."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def materialize(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x itself, but computed once before whatever reads it; on a CPU.

    XLA's CPU fusion would otherwise inline the computation of x into each of its readers, and into
    the matrix-vector product that follows for every output row anew.  A conditional is the one
    boundary it keeps (`lax.optimization_barrier` is dropped before fusion); its predicate is not
    provable, but holds for every number but the largest, for which the other branch is right too.
    """
    if jax.default_backend() != "cpu":
        return x
    top = jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max
    return lax.cond(x[(0,) * x.ndim] < top, lambda a: a, lambda a: a + jnp.zeros((), a.dtype), x)
