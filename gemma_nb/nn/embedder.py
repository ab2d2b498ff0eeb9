"""The embedding table, which is the vocabulary head as well."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from gemma_nb.cpu.products import product
from gemma_nb.nn.linear import INIT


class Embedder(nn.Module):
    """The token embedding, which is the vocabulary head as well.

    Attributes:
      num_embed: V.
      embed_dim: D.
      dtype: of the activations.
    """

    num_embed: int
    embed_dim: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the one table."""
        self.table = self.param("input_embedding", INIT, (self.num_embed, self.embed_dim))

    def encode(self, tokens: Int[Array, "*lead"]) -> Float[Array, "*lead D"]:
        """Embeddings times sqrt(D), which is rounded to the table's dtype.

        bfloat16 rounds it by up to 0.4 %, and that is the number the models were trained with.
        """
        multiplier = jnp.asarray(math.sqrt(self.embed_dim), self.table.dtype)
        # numpy's arrays cannot be indexed with what is being traced.
        table = jnp.asarray(self.table)
        return table[tokens].astype(self.dtype) * multiplier.astype(self.dtype)

    def decode(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead V"]:
        """Logits of normalised hidden states, in float32."""
        return product(x.astype(jnp.float32), self.table)
