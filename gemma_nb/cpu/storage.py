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
class Stored:
    """A weight as (out, in) rows for one token, and once more for several.

    One token streams the weight from memory: XLA's CPU backend runs `x @ rows.T` near memory
    bandwidth when each output's inputs lie together, and several times slower otherwise.  Several
    tokens are a product of matrices, which it runs on the CPU's matrix unit when both are bfloat16
    and the weight lies in (in, out) columns; without such a unit, fastest from float32.

    Attributes:
      rows: (out, in), floating or int8; None where it is for several tokens only.
      scale: (out,) float32, of int8 rows: a weight is its int8 times its row's scale, times its
        input's in `inputs`.
      inputs: (in,) float32, of int8 rows.  Of a weight that is still to be packed, how large its
        inputs typically are, see `typical`.
      columns: (*in, *out) bfloat16, or as the parameter is.  Where the official parameter lies in
        this order, it is that parameter itself, not a copy.
      wide: (out, in) float32.  Without these two, several tokens are left to the rows.
      rounded: round the inputs of bfloat16 columns to bfloat16, too.
      streams: from how many places a thread reads the rows of one token at once; what is compiled
        for more than one needs `IN_STREAMS`.
    """

    rows: jax.Array | None
    scale: jax.Array | None = None
    inputs: jax.Array | None = None
    columns: jax.Array | None = None
    wide: jax.Array | None = None
    rounded: bool = flax.struct.field(pytree_node=False, default=False)
    streams: int = flax.struct.field(pytree_node=False, default=1)

    def turns(self, count: int) -> bool:
        """Whether so many vectors are multiplied as columns to the right of `wide`."""
        return self.wide is not None and 1 < count <= FEW

    def __call__(self, x: Float[Array, "*lead inner"]) -> Float[Array, "*lead out"]:
        """x times the weight, in x's dtype; sums are float32."""
        inner = x.shape[-1]
        lead, x = x.shape[:-1], x.reshape(-1, inner)
        if x.shape[0] > 1 and self.wide is not None:
            y = product(x, self.wide)
        elif x.shape[0] > 1 and self.columns is not None:
            y = times_columns(x, self.columns.reshape(inner, -1), rounded=self.rounded)
        else:
            y = x.astype(jnp.float32)
            y = y if self.inputs is None else y * self.inputs
            assert self.rows is not None
            y = product(y, self.rows, streams=self.streams)
            y = (y if self.scale is None else y * self.scale).astype(x.dtype)
        return y.reshape(*lead, -1)


def concatenate(parts: list[Stored]) -> Stored:
    """Floating weights of the same inputs as one: one product, one output behind the other."""
    columns = [part.columns for part in parts if part.columns is not None]
    return Stored(
        rows=jnp.concatenate([part.rows for part in parts if part.rows is not None]),
        inputs=parts[0].inputs,
        columns=jnp.concatenate(columns, axis=1) if columns else None,
    )


def preparing(module: nn.Module) -> bool:
    """Whether `module` is to put what it prepares into the collection."""
    # `init` makes every collection mutable, and must not fill this one.
    return module.is_mutable_collection("prepared") and not module.is_initializing()


def exact_layers(count: int) -> range:
    """Indices of the layers of so many that are not quantised where the others are: the last.

    It bears the most.  With it as it is, over 1,040 tokens of English with Gemma 3 270M and the
    int8 head, mean KL 2.2e-3, and the same first choice for 97.5 tokens in 100.
    """
    return range(count - 1, count)


def pack(prepared: Any, *, int8: bool, rounded: bool, columns: Any, streams: Streams) -> Any:
    """A collection of float `Stored` weights in the form that is kept.

    Args:
      prepared: as the modules of a layer put it.
      int8: quantise the rows.
      rounded: round what is multiplied with bfloat16 columns (over 1,040 tokens, mean KL 1.9e-4
        under the int8 head, whose own is 1.4e-4).
      columns: bfloat16 keeps columns for several tokens, float32 wide rows, None neither.
      streams: see `Stored`.
    """

    def one(stored: Stored) -> Stored:
        assert stored.rows is not None
        form = Stored(rows=stored.rows, rounded=rounded, streams=streams.floating)
        if columns == jnp.float32:
            form = form.replace(wide=stored.rows.astype(columns))  # type: ignore[attr-defined]
        elif columns is not None and stored.columns is not None:
            form = form.replace(columns=stored.columns.astype(columns))  # type: ignore[attr-defined]
        if not int8:
            return form
        rows, scale, inputs = quantise(stored.rows, BY_WEIGHTS, stored.inputs)
        return form.replace(  # type: ignore[attr-defined]
            rows=rows, scale=scale, inputs=inputs, streams=streams.int8
        )

    return jax.tree.map(one, prepared, is_leaf=lambda leaf: isinstance(leaf, Stored))
