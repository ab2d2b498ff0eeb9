"""The layers that hold parameters: linear maps, norms and the embedding table."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from gemma_nb.nn.blocks import takes_blocks, times_in_blocks
from gemma_nb.nn.storage import Stored, materialize, preparing, product, typical

# Parameters that nobody loads are only ever tested against themselves; a small normal keeps
# random models finite at any depth.
_INIT = nn.initializers.normal(0.02)


class Einsum(nn.Module):
    """A linear map `...in,w->...out` whose weight keeps its official shape and name.

    Attributes:
      eqn: the einsum; the output's weight axes stand in the weight's own order.
      shape: the weight's shape.
      weight_name: the parameter's name.
      joined: whether the module around it prepares the weight, as a part of a larger one.
    """

    eqn: str
    shape: tuple[int, ...]
    weight_name: str = "w"
    joined: bool = False

    def _axes(self) -> tuple[list[int], list[int]]:
        """Indices of the weight's output axes and of its input axes."""
        weight, out = self.eqn.split(",")[1].split("->")
        return (
            [i for i, axis in enumerate(weight) if axis in out],
            [i for i, axis in enumerate(weight) if axis not in out],
        )

    def stored(self, x: jax.Array) -> Stored:
        """The weight that the module was given, for `gemma_nb.nn.storage.pack`.

        In both layouts of `Stored`, in its own dtype; and how large its inputs `x` were.
        """
        w: jax.Array = self.get_variable("params", self.weight_name)
        out, inner = self._axes()
        size = math.prod(self.shape[axis] for axis in out)
        rows = w.transpose(*out, *inner).reshape(size, -1)
        if inner + out == list(range(len(self.shape))):
            columns = w  # the same array, not a copy of it
        else:
            columns = w.transpose(*inner, *out).reshape(-1, size)
        return Stored(rows=rows, inputs=typical(x.reshape(-1, rows.shape[1])), columns=columns)

    def wide(self, count: int) -> jax.Array | None:
        """(out, in) float32, where so many vectors are multiplied as columns to its right."""
        if not self.has_variable("prepared", self.weight_name):
            return None
        stored: Stored = self.get_variable("prepared", self.weight_name)
        return stored.wide if stored.turns(count) else None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the map; computes in x's dtype."""
        out, inner = self._axes()
        if self.has_variable("prepared", self.weight_name):
            stored: Stored = self.get_variable("prepared", self.weight_name)
            y = stored(x.reshape(*x.shape[: x.ndim - len(inner)], -1))
            return y.reshape(*y.shape[:-1], *(self.shape[axis] for axis in out))
        w = self.param(self.weight_name, _INIT, self.shape)
        if preparing(self) and not self.joined:
            self.put_variable("prepared", self.weight_name, self.stored(x))
        size = math.prod(self.shape[axis] for axis in inner)
        if not takes_blocks(x, size):
            return jnp.einsum(self.eqn, x, w.astype(x.dtype))
        columns = w.transpose(*inner, *out).reshape(size, -1)
        if w.dtype != x.dtype:  # once, and not in every block anew
            columns = materialize(columns.astype(x.dtype))
        y = times_in_blocks(x.reshape(*x.shape[: x.ndim - len(inner)], size), columns)
        return y.reshape(*y.shape[:-1], *(self.shape[axis] for axis in out))


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
        self.table = self.param("input_embedding", _INIT, (self.num_embed, self.embed_dim))

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
