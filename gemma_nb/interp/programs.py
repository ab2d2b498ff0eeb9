"""The compiled parts of a pass: the embedding, one layer, the end."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from gemma_nb.cpu.storage import FloatRows, Stored
from gemma_nb.nn import Transformer, Wrapped
from gemma_nb.nn.attention import attend
from gemma_nb.nn.layer import Block
from gemma_nb.nn.layer_input import Carry, LayerInput
from gemma_nb.nn.masks import visible
from gemma_nb.nn.rope import Rotation
from gemma_nb.sites import Site
from gemma_nb.typing import EMPTY, LayerCache, Params


# Static: the module and the dtype.
@partial(jax.jit, static_argnums=(0, 3))
def unembed(transformer: Any, params: Params, hidden: jax.Array, dtype: str) -> jax.Array:
    """Logits of final-normed states."""
    return transformer.apply({"params": params}, hidden, method="unembed").astype(dtype)


# Static: the module.
@jax.jit(static_argnums=0)
def embed(
    transformer: Transformer,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    interventions: Any,
) -> Carry:
    """The carry of the first layer."""
    given = (tokens, positions, interventions)
    carry, _ = cast(Any, transformer.apply({"params": params}, *given, method="enter"))
    return cast(Carry, carry)


# Static: the module.
@jax.jit(static_argnums=0)
def finish(
    transformer: Transformer,
    params: Params,
    carry: Carry,
    positions: jax.Array,
    interventions: Any,
) -> tuple[jax.Array, jax.Array]:
    """Final-normed states (1, T, D) and what they were divided by (1, T)."""
    given = (carry, positions, interventions)
    final, state = transformer.apply(
        {"params": params}, *given, method="leave", mutable=["intermediates"]
    )
    return final, state["intermediates"]["final_norm"]["rms"][0]


# Static: the count.  Traced: where it begins, so all pieces of a stream share a compilation.
@jax.jit(static_argnums=2)
def piece(carry: Carry, start: jax.Array, count: int) -> Carry:
    """`count` positions of a carry from `start` on."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, count, axis=1), carry)


def _matrices(block: Block, params: Params) -> Params:
    """A layer's largest weight as a plain matrix, for the collection `prepared`.

    It is the weight itself, seen otherwise.  XLA's CPU backend would write an einsum's weight anew
    into (in, out) on each call, an eighth of the time of a pass over 512 tokens.  The other
    einsums stay as they are: the order of their sums is what the recorded parity was held with.
    """
    if not block.config.transpose_gating_einsum:
        return {}
    gating = params["mlp"]["gating_einsum"]
    return {"mlp": {"gating_einsum": Stored(FloatRows(gating.reshape(-1, gating.shape[-1])))}}


def _variables(block: Block, params: Params, alone: bool) -> dict[str, Params]:
    """What a block is applied to."""
    return {"params": params, "prepared": _matrices(block, params)} if alone else {"params": params}


def _rotation(block: Block, positions: jax.Array) -> Rotation:
    """Sines and cosines, which XLA would otherwise compute anew in every head."""
    return Rotation.of(
        positions, block.config.axis_sizes(block.spec)["H"], block.spec
    ).materialize()


# Static: the block (kind and sizes), the sites, the dtype, whether the stream goes on, and whether
# the weights are on one device.  Traced: parameters, the layer's number and all that is selected,
# so layers share a compilation.
@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnames=("cache",))
def run_block(
    block: Block,
    sites: tuple[Site, ...],
    dtype: str,
    advance: bool,
    alone: bool,
    params: Params,
    interventions: Any,
    layer: jax.Array,
    heads: jax.Array | None,
    carry: Carry,
    positions: jax.Array,
    cache: LayerCache | None,
    rows: jax.Array | None,
) -> tuple[Carry | None, LayerCache | None, dict[str, jax.Array]]:
    """(carry of T tokens, cache, site name -> (T, ...) or (T, N, S))."""
    rotation = _rotation(block, positions)
    given = LayerInput.of(layer, positions, interventions, rotation=rotation)
    (after, cache), state = block.apply(
        _variables(block, params, alone), carry, given, cache, mutable=["intermediates"]
    )
    sown, edit = state["intermediates"], given.edit
    # Where nothing edits the weights, those of other heads need not be computed.
    plain = edit is None or not edit.edits_attention

    def value(s: Site) -> jax.Array:
        if s.name == "head_out":
            array = head_outputs(params, sown["attn"]["z"][0])
        elif s.name == "scores":
            array = _scores(block, sown, positions, cache, edit)
        elif s.name == "attention" and heads is not None and plain:
            array = _pattern(block, sown, positions, cache, heads)
        else:
            array = s.value(sown)
        array = array[0]
        if rows is not None:
            array = array[rows]
        chosen = s.name == "attention" and plain
        if heads is not None and {"N", "K"} & set(s.dims) and not chosen:
            array = array[:, heads]
        return array.astype(dtype)

    return after if advance else None, cache, {s.name: value(s) for s in sites}


# Static: the block, how many positions, and whether the weights are on one device.
@partial(jax.jit, static_argnums=(0, 1, 2))
def extend(
    block: Block,
    count: int,
    alone: bool,
    params: Params,
    interventions: Any,
    layer: jax.Array,
    carry: Carry,
    after: Carry,
    positions: jax.Array,
    start: jax.Array,
) -> Carry:
    """The carry after a layer, of which the beginning is known, with `count` more positions.

    Args:
      block: the layer's kind and sizes.
      count: positions that go through the layer.
      alone: whether the weights are on one device.
      params: the layer's.
      interventions: what is changed in the model.
      layer: its number.
      carry: before it, at least up to the last of these positions.
      after: after it, up to `start`.
      positions: (1, T).
      start: () the first of these positions.
    """
    variables = _variables(block, params, alone)
    # Nothing but keys and values is asked for, so XLA drops the rest.
    whole = LayerInput.of(layer, positions, interventions)
    _, state = block.apply(variables, carry, whole, mutable=["intermediates"])
    sown = cast(Any, state)["intermediates"]["attn"]
    seen = jnp.arange(positions.shape[1]) < start
    cache = {
        "k": sown["k"][0],
        "v": sown["v"][0],
        "positions": jnp.where(seen, positions, EMPTY),
        "end_index": start[None],
    }
    at = lax.dynamic_slice_in_dim(positions, start, count, axis=1)
    given = LayerInput.of(layer, at, interventions)
    new, _ = cast(Any, block.apply(variables, piece(carry, start, count), given, cache))
    return jax.tree.map(
        lambda a, b: lax.dynamic_update_slice_in_dim(a, b, start, axis=1), after, new
    )


def head_outputs(params: Params, z: jax.Array) -> jax.Array:
    """(B, T, N, D): each head's part of attention's output before any post-norm.

    Args:
      params: of one layer.
      z: (B, T, N, H).
    """
    w = params["attn"]["attn_vec_einsum"]["w"]
    return jnp.einsum("BTNH,NHD->BTND", z, w.astype(z.dtype))


def _scores(
    block: Block,
    sown: Mapping[str, Any],
    positions: jax.Array,
    cache: LayerCache | None,
    edit: Any,
) -> jax.Array:
    """(B, T, N, S) float32 scores as the softmax sees them, -inf where it sees none."""
    q, k, keys = _queries_and_keys(sown, positions, cache)
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BTKGS", grouped, k).astype(jnp.float32)
    scores = scores.reshape(batch, length, heads, -1)
    cap = block.config.attn_logits_soft_cap
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    mask = visible(positions, keys, block.spec.kind)[:, :, None]
    mask = jnp.broadcast_to(mask, scores.shape)
    if edit is not None:
        mask = edit.edges(mask, keys)
    return jnp.where(mask, scores, -jnp.inf)


def _pattern(
    block: Block,
    sown: Mapping[str, Any],
    positions: jax.Array,
    cache: LayerCache | None,
    heads: jax.Array,
) -> jax.Array:
    """(B, T, len(heads), S) attention weights of some heads, the others never computed."""
    q, k, keys = _queries_and_keys(sown, positions, cache)
    q, k = q[:, :, heads], k[:, :, heads // (q.shape[2] // k.shape[2])]
    mask = visible(positions, keys, block.spec.kind)
    return attend(q, k, k, mask, soft_cap=block.config.attn_logits_soft_cap)[0]


def _queries_and_keys(
    sown: Mapping[str, Any], positions: jax.Array, cache: LayerCache | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q (B, T, N, H), k (B, S, K, H) and the positions (B, S) of the keys."""
    q = sown["attn"]["q"][0]
    if cache is None:
        return q, sown["attn"]["k"][0], positions
    return q, cache["k"].astype(q.dtype), cache["positions"]


# Static: the module, and what is captured, since both decide what is computed at all.
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def capture_wrapped(
    transformer: Wrapped,
    wanted: tuple[Site, ...],
    layers: tuple[int, ...],
    dtype: str,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
) -> dict[str, jax.Array]:
    """Of another library's module, in one pass: site name -> (layers, T, ...) or (T, ...)."""
    output, state = transformer.apply(
        {"params": params}, tokens, positions=positions, mutable=["intermediates"]
    )
    sown: Any = state["intermediates"]

    def value(s: Site, layer: int | None) -> jax.Array:
        array = s.value(sown, layer)[0]
        return array.transpose(1, 0, 2) if s.is_map else array

    def stacked(s: Site) -> jax.Array:
        if s.name == "logits":
            return output.logits[0]
        if not s.per_layer:
            return value(s, None)
        return jnp.stack([value(s, layer) for layer in layers])

    return {s.name: stacked(s).astype(dtype) for s in wanted}
