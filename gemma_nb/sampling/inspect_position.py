"""Inspection of one position of a stream: its attention and residual stream, from the cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.interventions import Interventions
from gemma_nb.nn import Transformer
from gemma_nb.sampling.cache import Archive, StreamCache, newest
from gemma_nb.sampling.feed import StepJit, sown_attention
from gemma_nb.sampling.rows import in_order, together
from gemma_nb.sampling.weights import DecodingWeights
from gemma_nb.sites import SITES
from gemma_nb.summaries import summary


@dataclasses.dataclass(frozen=True)
class InspectedPosition:
    """Attention and residual stream at one position p, on the host.

    Attributes:
      attention: (L, N, p + 1) float32, weights over the positions up to its own; 0 outside a
        sliding layer's window, as in `gnb.Trace`.
      residual: (L, D) float32, the residual stream after each layer.
      final: (D,) float32, after the final norm.
    """

    attention: np.ndarray
    residual: np.ndarray
    final: np.ndarray

    __repr__ = summary


@functools.cache
def compiled_inspection(transformer: Transformer, weights: Any) -> StepJit:
    """The jitted pass over one token that leaves the cache as it is.

    Static: the module and the structure of the weights.  Everything else is traced, so a
    compilation is made per cache size.

    Args:
      transformer: the module.
      weights: the tree structure of its `DecodingWeights`, whose leaves the pass takes.
    """

    def inspect(leaves: Sequence[jax.Array], *args: Any) -> Any:
        return _inspect(transformer, jax.tree.unflatten(weights, leaves), *args)

    return StepJit(inspect, transformer, weights)


def compile_inspection(
    program: StepJit,
    leaves: Sequence[jax.Array],
    cache: StreamCache,
    interventions: Interventions | None,
) -> None:
    """Compile a `compiled_inspection` for a cache of these shapes; nothing is allocated or run."""
    rows, positions, size = None, None, cache.ring_size
    if size:
        rows = jax.ShapeDtypeStruct(cache.ring_rows(size), np.float32)
        positions = jax.ShapeDtypeStruct((size,), np.int32)
    inputs = (rows, positions, np.int32(0), np.int32(0), interventions)
    program.compile(leaves, cache, *inputs)


def _inspect(
    transformer: Transformer,
    weights: DecodingWeights,
    cache: StreamCache,
    rows: jax.Array | None,
    ring_positions: jax.Array | None,
    token: jax.Array,
    position: jax.Array,
    interventions: Interventions | None,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array, jax.Array]:
    """Feed one token anew where it stands; later ones are not seen, since positions decide.

    Args:
      transformer: the module.
      weights: its weights.
      cache: holds this token and those before it, except on rings.
      rows: (ring layers, 2, W, K*H) keys and values of the rings as they were, by slot.
      ring_positions: (W,) their positions.
      token: () its id.
      position: () where it stands.
      interventions: what is changed in the model.

    Returns:
      Attention weights as of `sown_attention`; residual (L, D); final (D,).  All float32.
    """
    if rows is not None:
        cache = cache.with_ring_rows(rows)
    before = cache.replace(end_index=position, ring_positions=ring_positions)  # type: ignore[attr-defined]
    _, state = transformer.apply(
        weights.variables,
        token[None, None],
        cache=before.to_model(transformer.config),
        positions=position[None, None],
        interventions=interventions,
        mutable=["intermediates"],
    )
    sown: Any = state["intermediates"]

    residual = jnp.stack([SITES["residual"].value(sown, i)[0, 0] for i in range(len(cache.rings))])
    final = SITES["final"].value(sown)[0, 0]
    near, far = sown_attention(sown, cache.rings, range(len(cache.rings)), 0, jnp.float32)
    return near, far, residual.astype(jnp.float32), final.astype(jnp.float32)


def inspect_position(
    compiled: StepJit,
    leaves: Sequence[jax.Array],
    cache: StreamCache,
    archive: Archive,
    interventions: Interventions | None,
    token: int,
    position: int,
) -> InspectedPosition:
    """Run `compiled_inspection`, and sort what it shows by position.

    Args:
      compiled: the pass.
      leaves: of the decoding weights.
      cache: what the stream holds; it is left as it is.
      archive: keys and values of the ring layers.
      interventions: what is changed in the model.
      token: the id at `position`.
      position: of a token that the cache holds.
    """
    size = cache.ring_size
    rows, ring_positions = None, None
    if size:
        ring_positions = newest(size, position)
        rows = archive.rows(ring_positions)
    inputs = (rows, ring_positions, np.int32(token), np.int32(position), interventions)
    near, far, residual, final = jax.device_get(compiled(leaves, cache, *inputs))
    if near is not None:
        near = in_order(near, size, position, position)
    attention = together(near, far, cache.rings, position)
    return InspectedPosition(attention, residual, final)
