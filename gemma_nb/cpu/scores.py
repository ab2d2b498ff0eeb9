"""Logits of one choice, and the shortlist of the likeliest tokens."""

from __future__ import annotations

import flax
import jax
from jaxtyping import Array, Float

from gemma_nb.cpu.top_k import top_k

# How many of the likeliest tokens are known exactly, and in order.
SHORTLIST = 256


@flax.struct.dataclass
class Scores:
    """The logits of one choice.

    Attributes:
      logits: (V,) float32.
      values: (n,) float32, the largest of them in descending order; n <= SHORTLIST.
      ids: (n,) int32, whose they are.
    """

    logits: jax.Array
    values: jax.Array
    ids: jax.Array

    @classmethod
    def of(cls, logits: Float[Array, " V"]) -> Scores:
        """Scores of exact logits."""
        return cls(logits, *top_k(logits, min(SHORTLIST, logits.shape[0])))
