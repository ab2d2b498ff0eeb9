"""Rotary position embeddings."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def apply_rope(
    x: Float[Array, "B T heads H"],
    positions: Int[Array, "B T"],
    *,
    base: float,
    scale: float = 1.0,
) -> Float[Array, "B T heads H"]:
    """Rotates each pair (x[i], x[i + H/2]) by the angle position / scale * base^(-2i/H).

    Source: RoFormer (arXiv:2104.09864), equation 34, in the half-split pairing that Gemma uses;
    dividing positions by `scale` is linear position interpolation (arXiv:2306.15595).

    Angles are computed in float32 whatever x's dtype: bfloat16 cannot tell positions apart
    beyond 256.
    """
    half = x.shape[-1] // 2
    # Rounded where the reference implementations round: the timescale to float32, then a division.
    # One rounding of the exact frequency would be nearer the formula, but the angles it gives at
    # position 800 are 5e-5 away from those that every other Gemma computes.
    timescale = (base ** (np.arange(half) / half)).astype(np.float32)
    frequencies = np.float32(1) / timescale / np.float32(scale)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # (B, T, 1, H/2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
