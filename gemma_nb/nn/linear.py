"""Linear maps whose weights keep their official shapes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemma_nb.cpu.blocks import takes_blocks, times_in_blocks
from gemma_nb.cpu.fusion import materialize
from gemma_nb.cpu.quantise import typical
from gemma_nb.cpu.storage import Columns, FloatRows, Stored, preparing

# Parameters that nobody loads are only ever tested against themselves; a small normal keeps
# random models finite at any depth.
INIT = nn.initializers.normal(0.02)


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
        """The weight that the module was given, for `gemma_nb.cpu.storage.pack`.

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
        inputs = typical(x.reshape(-1, rows.shape[1]))
        return Stored(FloatRows(rows), Columns(columns), inputs)

    def wide(self, count: int) -> jax.Array | None:
        """(out, in) float32, where so many vectors are multiplied as columns to its right."""
        if not self.has_variable("prepared", self.weight_name):
            return None
        stored: Stored = self.get_variable("prepared", self.weight_name)
        return stored.few(count)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the map; computes in x's dtype."""
        out, inner = self._axes()
        if self.has_variable("prepared", self.weight_name):
            stored: Stored = self.get_variable("prepared", self.weight_name)
            y = stored(x.reshape(*x.shape[: x.ndim - len(inner)], -1))
            return y.reshape(*y.shape[:-1], *(self.shape[axis] for axis in out))
        w = self.param(self.weight_name, INIT, self.shape)
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
