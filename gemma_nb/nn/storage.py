"""Other storages of the same weights: what is fast on a CPU, and exact.

A prepared weight stands in the linen collection `prepared`, beside the official parameter that it
was made from, and a linear map uses it where it is there.  So decoding, prefill and a forward pass
run the same modules.
"""

from __future__ import annotations

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int8

from gemma_nb.executables import CachedJit
from gemma_nb.processor import Streams

# How far the inputs of int8 layers are evened out, see `quantise`: by the weights, and by what is
# multiplied with them, to these powers.  Rounding is worst where a large activation
# meets a weight that is small in its row.  On Gemma 3 270M with all layers in int8, the mean KL
# divergence from float32 is 4.7e-3 without, 3.0e-3 by weights alone (1/2), and 2.3e-3 by both;
# powers of their own for each kind of weight gain less than texts differ by (2.2e-3).
_BY_WEIGHTS = 0.5
_BY_ACTIVATIONS = 0.25

# So many vectors are few, see `product`.  With Gemma 3 270M on two cores of an EPYC (Zen 4) the
# products of 64 vectors with all layers take 100 ms, 77 the other way round; of 256, 286 and 291.
_FEW = 64

# Sums that one loop makes at once, see `times_rows`.
_SUMS = 8

# What XLA:CPU is told so that it adds up float32 rows in streams (see `times_rows`) in the order
# that is fast, as it does in a product of a matrix and a vector anyway: it may reassociate sums,
# and nothing else.  Without, they take three times as long.
IN_STREAMS = {
    "xla_cpu_enable_fast_math": True,
    **dict.fromkeys(
        (f"xla_cpu_fast_math_honor_{what}" for what in ("nans", "infs", "division", "functions")),
        True,
    ),
}


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
        return self.wide is not None and 1 < count <= _FEW

    def __call__(self, x: Float[Array, "*lead inner"]) -> Float[Array, "*lead out"]:
        """x times the weight, in x's dtype; sums are float32."""
        inner = x.shape[-1]
        lead, x = x.shape[:-1], x.reshape(-1, inner)
        if x.shape[0] > 1 and self.wide is not None:
            y = product(x, self.wide)
        elif x.shape[0] > 1 and self.columns is not None:
            y = _times_columns(x, self.columns.reshape(inner, -1), rounded=self.rounded)
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


def quantise(
    rows: Float[Array, "out inner"],
    power: float = 1.0,
    activations: Float[Array, " inner"] | None = None,
) -> tuple[Int8[Array, "out inner"], Float[Array, " out"], Float[Array, " inner"]]:
    """Rows in int8: a weight is its int8 times its row's scale and its input's.

    A row's largest magnitude becomes 127 (symmetric).  Inputs are scaled first: otherwise a row's
    rounding step would be that of its largest entry, and the largest entries stand in few columns.
    That activations belong into the scales is due to AWQ (arXiv:2306.00978, section 3.2), where
    they stand alone.

    Args:
      rows: the weights.
      power: an input's scale is the root mean square of its weights to this power; 0 is none.
      activations: how large the inputs typically are, see `typical`; where they are given, the
        scale is divided by their fourth root.
    """
    inputs, inverse = _input_scales(rows, np.float32(power), activations)
    scale, inverse_scale = _row_scales(_largest(rows, inverse))
    return _rounded(rows, inverse, inverse_scale), scale, inputs


def typical(x: Float[Array, "T inner"]) -> Float[Array, " inner"]:
    """Root mean square of the vectors but the first, as float32; of a text's activations.

    Those of its first token are many times larger than, and unlike, all that follow
    (arXiv:2309.17453: attention sinks).  Of a single vector it is NaN: who prepares int8 weights
    gives more.
    """
    rest = x[1:].astype(jnp.float32)
    return jnp.sqrt(jnp.mean(rest * rest, axis=0))


# Several programs, where nothing around them is compiled: in one, XLA:CPU writes the weights in
# float32 to memory between them, and a vocabulary takes four times as long.  They are given
# reciprocals, since it would divide for every weight; and what else is done to a maximum, after it,
# keeps it from finding that in a hurry.


@CachedJit
def _input_scales(
    rows: jax.Array, power: jax.Array, activations: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    square = rows.astype(jnp.float32) ** 2
    inputs = jnp.sqrt(jnp.mean(square, axis=0)) ** power
    if activations is not None:
        # What is never there is not more important than all that is.
        least = jnp.maximum(1e-6 * activations.max(), np.finfo(np.float32).tiny)
        inputs = inputs / jnp.maximum(activations, least) ** _BY_ACTIVATIONS
    inputs = jnp.where(inputs == 0, 1.0, inputs)
    return inputs, 1 / inputs


@CachedJit
def _largest(rows: jax.Array, inverse: jax.Array) -> jax.Array:
    return jnp.abs(rows.astype(jnp.float32) * inverse).max(axis=-1)


@CachedJit
def _row_scales(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale = largest / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    return scale, 1 / scale


@CachedJit
def _rounded(rows: jax.Array, inverse: jax.Array, inverse_scale: jax.Array) -> jax.Array:
    scaled = rows.astype(jnp.float32) * inverse * inverse_scale[:, None]
    return jnp.round(scaled).astype(jnp.int8)


def product(
    x: Float[Array, "*lead inner"], rows: jax.Array, *, streams: int = 1
) -> Float[Array, "*lead out"]:
    """x times the transpose of (out, in) rows, in x's dtype; sums are float32.

    `streams` is for a single vector, see `times_rows`.
    """
    lead, x32 = x.shape[:-1], x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if x32.shape[0] == 1:
        y = times_rows(x32, rows, streams=streams)
    elif len(x32) <= _FEW and rows.dtype == jnp.float32:
        # XLA:CPU takes half the time where the few are on the right, and it would turn them round.
        y = materialize(rows @ x32.T).T
    else:
        y = x32 @ rows.T.astype(jnp.float32)
    return y.reshape(*lead, -1).astype(x.dtype)


def times_rows(x: jax.Array, rows: jax.Array, *, streams: int = 1) -> jax.Array:
    """Few vectors x (n, in) times the transpose of (out, in) rows, which are read once for all.

    Args:
      x: float32, or int16 where rows are int8.
      rows: what is multiplied with it.
      streams: in so many equal parts, where `out` has such, each thread reads the rows side by
        side, which several rows one behind the other in memory would not do.  With float32 the
        program must be compiled with `IN_STREAMS`.

    Returns:
      (n, out) in the dtype of the sums: float32, or int32.
    """
    x = materialize(x)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    sums = jnp.float32 if floating else jnp.int32
    # A loop that reads from more than eight places, or adds to more sums, is slower again.
    count = min(streams, max(1, _SUMS // len(x)))
    count = count if len(rows) % count == 0 else 1
    if len(x) * count == 1 or jax.default_backend() != "cpu":
        columns = rows.T.astype(sums) if floating else rows.T
        if len(x) == 1:
            return jnp.dot(x[0], columns, preferred_element_type=sums)[None]
        return jnp.dot(x, columns, preferred_element_type=sums)
    parts = jnp.split(rows, count)
    terms = tuple(part.astype(sums) * vector.astype(sums) for vector in x for part in parts)

    # One loop over the inputs adds them all up: XLA:CPU makes no such thing of several products.
    def add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(map(jnp.add, a, b))

    found = lax.reduce(terms, (np.zeros((), sums),) * len(terms), add, (1,))
    return jnp.concatenate(found).reshape(len(x), -1)


def _times_columns(
    x: Float[Array, "T inner"], columns: jax.Array, *, rounded: bool
) -> Float[Array, "T out"]:
    """x times an (in, out) matrix, in x's dtype; sums are float32.

    A float32 x over bfloat16 columns is split into three bfloat16 terms that add up to it (8 bits
    of significand each, 24 in all), so that the product is as exact as float32's and runs at the
    speed of bfloat16; unless it is to be `rounded`, which is one product instead of three.
    """
    if columns.dtype != jnp.bfloat16:
        return (x.astype(columns.dtype) @ columns).astype(x.dtype)
    if rounded or x.dtype == jnp.bfloat16:
        short = x.astype(jnp.bfloat16)
        return jnp.dot(short, columns, preferred_element_type=jnp.float32).astype(x.dtype)
    terms = jnp.concatenate(bfloat16_terms(materialize(x)))
    y = jnp.dot(terms, columns, preferred_element_type=jnp.float32)
    # Small terms first.
    return functools.reduce(jnp.add, reversed(jnp.split(y, 3)))


def bfloat16_terms(x: Float[Array, "*n"]) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is x (float32)."""
    # Cut off: three terms hold all 24 bits either way, and rounding takes longer.
    high, rest = split_bfloat16(x)
    middle, rest = split_bfloat16(rest)
    return [high, middle, split_bfloat16(rest)[0]]


def split_bfloat16(
    x: Float[Array, "*n"], *, rounded: bool = False
) -> tuple[jax.Array, Float[Array, "*n"]]:
    """A bfloat16 and what float32 x is more than it.

    Args:
      x: float32.
      rounded: take the nearest bfloat16, else the upper half of the bits, which is quicker.
    """
    # On bits, because XLA may drop a conversion to bfloat16 and back.
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    upper = (bits + np.uint32(0x8000) if rounded else bits) >> 16
    kept = lax.bitcast_convert_type(upper << 16, jnp.float32)
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16), x - kept


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
        rows, scale, inputs = quantise(stored.rows, _BY_WEIGHTS, stored.inputs)
        return form.replace(  # type: ignore[attr-defined]
            rows=rows, scale=scale, inputs=inputs, streams=streams.int8
        )

    return jax.tree.map(one, prepared, is_leaf=lambda leaf: isinstance(leaf, Stored))
