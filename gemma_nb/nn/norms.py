"""Normalisation."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, scaled by 1 + scale (arXiv:1910.07467; Gemma's offset).

    Computed in float32 whatever the activations are, and returned in their dtype.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """x / sqrt(mean(x^2) + epsilon) * (1 + scale) over the last axis."""
        scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],))
        y = x.astype(jnp.float32)
        square = jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon
        self.sow("intermediates", "rms", jnp.sqrt(square[..., 0]))
        y = y * lax.rsqrt(square)
        return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)
