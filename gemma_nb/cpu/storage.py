"""Other storages of the same weights: what is fast on a CPU, and exact.

A prepared weight stands in the linen collection `prepared`, beside the official parameter that it
was made from, and a linear map uses it where it is there.  So decoding, prefill and a forward pass
run the same modules.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from gemma_nb.cpu.products import FEW, product, times_columns
from gemma_nb.cpu.quantise import BY_WEIGHTS, quantise
from gemma_nb.processor import Streams


@flax.struct.dataclass
class FloatRows:
    """A weight as (out, in) rows: each output's inputs lie together in memory.

    Attributes:
      rows: (out, in), floating.
      streams: from how many places a thread reads the rows of one vector at once; what is compiled
        for more than one needs `gemma_nb.cpu.products.IN_STREAMS`.
    """

    rows: jax.Array
    streams: int = flax.struct.field(pytree_node=False, default=1)

    def one(self, x: Float[Array, "1 inner"]) -> Float[Array, "1 out"]:
        """The product with one vector, in its dtype; sums are float32."""
        return product(x, self.rows, streams=self.streams)

    def several(self, x: Float[Array, "T inner"]) -> Float[Array, "T out"]:
        """The products with several vectors, as `one`."""
        return product(x, self.rows, streams=self.streams)

    def materialise(self) -> Float[Array, "out inner"]:
        """The weight in float32."""
        return self.rows.astype(jnp.float32)

    def describe(self) -> str:
        """The storage in a word or two."""
        return f"{self.rows.dtype} rows"


@flax.struct.dataclass
class Int8Rows:
    """A weight as (out, in) rows in int8, see `gemma_nb.cpu.quantise.quantise`.

    Attributes:
      rows: (out, in) int8.
      scale: (out,) float32: a weight is its int8 times its row's scale, times its input's.
      inputs: (in,) float32, the scales of the inputs.
      streams: see `FloatRows`.
    """

    rows: jax.Array
    scale: jax.Array
    inputs: jax.Array
    streams: int = flax.struct.field(pytree_node=False, default=1)

    def one(self, x: Float[Array, "1 inner"]) -> Float[Array, "1 out"]:
        """The product with one vector, in its dtype; sums are float32."""
        y = product(x.astype(jnp.float32) * self.inputs, self.rows, streams=self.streams)
        return (y * self.scale).astype(x.dtype)

    def several(self, x: Float[Array, "T inner"]) -> Float[Array, "T out"]:
        """The products with several vectors, as `one`."""
        return self.one(x)

    def materialise(self) -> Float[Array, "out inner"]:
        """The weight in float32."""
        return self.rows.astype(jnp.float32) * self.scale[:, None] * self.inputs

    def describe(self) -> str:
        """The storage in a word or two."""
        return "int8 rows"


@flax.struct.dataclass
class Columns:
    """A weight as (in, out) columns, for products of matrices.

    Attributes:
      columns: (*in, *out) bfloat16, or as the parameter is.  Where the official parameter lies in
        this order, it is that parameter itself, not a copy.
      rounded: round the inputs of bfloat16 columns to bfloat16, too.
    """

    columns: jax.Array
    rounded: bool = flax.struct.field(pytree_node=False, default=False)

    def one(self, x: Float[Array, "1 inner"]) -> Float[Array, "1 out"]:
        """The product with one vector, as `several`."""
        return self.several(x)

    def several(self, x: Float[Array, "T inner"]) -> Float[Array, "T out"]:
        """The products with several vectors, in their dtype; sums are float32."""
        return times_columns(x, self.columns.reshape(x.shape[1], -1), rounded=self.rounded)

    def materialise(self) -> Float[Array, "inner out"]:
        """The weight in float32, as it lies."""
        return self.columns.astype(jnp.float32)

    def describe(self) -> str:
        """The storage in a word or two."""
        return f"{self.columns.dtype} columns"


@flax.struct.dataclass
class Stored:
    """A weight in the storage that is fast for one vector, and in one for several.

    Attributes:
      one: for one vector; None where the weight is for several only.
      several: for several vectors; None leaves them to `one`.
      typical: (in,) float32, of a weight that is still to be packed: how large its inputs typically
        are, see `gemma_nb.cpu.quantise.typical`.
    """

    one: FloatRows | Int8Rows | None
    several: FloatRows | Columns | None = None
    typical: jax.Array | None = None

    def few(self, count: int) -> jax.Array | None:
        """(out, in) float32, where so many vectors are multiplied as columns to its right."""
        if isinstance(self.several, FloatRows) and 1 < count <= FEW:
            return self.several.rows
        return None

    def __call__(self, x: Float[Array, "*lead inner"]) -> Float[Array, "*lead out"]:
        """x times the weight, in x's dtype; sums are float32."""
        lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        if len(x) > 1 and self.several is not None:
            y = self.several.several(x)
        else:
            assert self.one is not None
            y = self.one.one(x) if len(x) == 1 else self.one.several(x)
        return y.reshape(*lead, -1)

    def describe(self) -> str:
        """Both storages in a few words."""
        kinds = {"one vector": self.one, "several": self.several}
        return ", ".join(f"{kind.describe()} for {n}" for n, kind in kinds.items() if kind)


def concatenate(parts: list[Stored]) -> Stored:
    """Weights of the same inputs that are still to be packed, as one: their outputs in a row."""
    rows = [part.one.rows for part in parts if part.one is not None]
    columns = [part.several.columns for part in parts if isinstance(part.several, Columns)]
    return Stored(
        FloatRows(jnp.concatenate(rows)),
        Columns(jnp.concatenate(columns, axis=1)) if columns else None,
        parts[0].typical,
    )


def preparing(module: nn.Module) -> bool:
    """Whether `module` is to put what it prepares into the collection."""
    # `init` makes every collection mutable, and must not fill this one.
    return module.is_mutable_collection("prepared") and not module.is_initializing()


def exact_layers(count: int) -> range:
    """Indices of the layers of so many that are not quantised where the others are: the last.

    It bears the most.
    """
    return range(count - 1, count)


def pack(prepared: Any, *, int8: bool, rounded: bool, columns: Any, streams: Streams) -> Any:
    """A collection of float `Stored` weights in the form that is kept.

    Args:
      prepared: as the modules of a layer put it.
      int8: quantise the rows.
      rounded: round what is multiplied with bfloat16 columns.
      columns: bfloat16 keeps columns for several tokens, float32 wide rows, None neither.
      streams: see `FloatRows`.
    """

    def packed(stored: Stored) -> Stored:
        assert isinstance(stored.one, FloatRows)
        rows, several = stored.one.rows, stored.several
        if columns == jnp.float32:
            several = FloatRows(stored.one.materialise())
        elif columns is not None and isinstance(several, Columns):
            several = Columns(several.columns.astype(columns), rounded)
        else:
            several = None
        if int8:
            quantised = quantise(rows, BY_WEIGHTS, stored.typical)
            return Stored(Int8Rows(*quantised, streams=streams.int8), several)
        return Stored(FloatRows(rows, streams.floating), several)

    return jax.tree.map(packed, prepared, is_leaf=lambda leaf: isinstance(leaf, Stored))
