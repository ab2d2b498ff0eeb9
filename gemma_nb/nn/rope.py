"""Rotary position embeddings."""

from __future__ import annotations

from typing import Any

import flax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemma_nb.config import LayerSpec
from gemma_nb.cpu.fusion import materialize


@flax.struct.dataclass
class Rotation:
    """By which angles each position's pairs are turned.

    Attributes:
      cos: (B, T, 1, H/2) float32.
      sin: (B, T, 1, H/2) float32.
    """

    # Not annotated as arrays, since programs are lowered from shapes of them, too.
    cos: Any
    sin: Any

    @classmethod
    def of(cls, positions: Int[Array, "B T"], head_dim: int, spec: LayerSpec) -> Rotation:
        """Angles position / scale * base^(-2i/H), the same in every head of such a layer.

        Source: RoFormer (arXiv:2104.09864), equation 34; dividing positions by `scale` is linear
        position interpolation (arXiv:2306.15595).

        They are computed in float32 whatever the activations' dtype: bfloat16 cannot tell positions
        apart beyond 256.
        """
        half = head_dim // 2
        # Rounded where the reference implementations round: the timescale to float32, then a
        # division.  One rounding of the exact frequency would be nearer the formula, but the angles
        # it gives at position 800 are 5e-5 away from those that every other Gemma computes.
        timescale = (spec.rope_base ** (np.arange(half) / half)).astype(np.float32)
        frequencies = np.float32(1) / timescale / np.float32(spec.rope_scale)
        angles = positions[..., None, None].astype(jnp.float32) * frequencies
        return cls(cos=jnp.cos(angles), sin=jnp.sin(angles))

    def materialize(self) -> Rotation:
        """The same, computed once and not anew by each of its readers."""
        return Rotation(cos=materialize(self.cos), sin=materialize(self.sin))


def apply_rope(x: Float[Array, "B T heads H"], rotation: Rotation) -> Float[Array, "B T heads H"]:
    """Turns each pair (x[i], x[i + H/2]) by its angle, in float32; x's dtype again.

    Source: RoFormer (arXiv:2104.09864), equation 34, in the half-split pairing that Gemma uses.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    cos, sin = (angle[..., None, :] for angle in (rotation.cos, rotation.sin))
    # One expression for both halves: XLA's CPU backend runs each part of a concatenation, and the
    # concatenation, on its own.
    turned = pairs * cos + pairs[..., ::-1, :] * (sin * np.array([[-1], [1]], np.float32))
    return turned.reshape(x.shape).astype(x.dtype)
