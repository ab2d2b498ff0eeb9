"""The collection `prepared`: every layer's weights once more, in the storages of `gemma_nb.cpu`."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from gemma_nb.cpu.calibration import SAMPLE
from gemma_nb.cpu.storage import exact_layers, pack
from gemma_nb.executables import CachedJit
from gemma_nb.nn.layer import Block
from gemma_nb.nn.layer_input import Carry, LayerInput
from gemma_nb.nn.rope import Rotation
from gemma_nb.processor import Streams
from gemma_nb.typing import Params


def prepare(
    transformer: Any, params: Params, *, int8: bool, columns: Any, streams: Streams
) -> Params:
    """The collection for `params`, see `gemma_nb.nn.Transformer.prepare`."""
    config = transformer.config
    # Layers of one shape alike, so that one trace does for all of them: their kinds make no
    # difference.
    blocks: dict[tuple[int, ...], Block] = {}
    exact = exact_layers(config.num_layers) if int8 else range(config.num_layers)
    carry, positions, rotations = None, None, {}
    if int8:
        ends = {"embedder": params["embedder"]}
        carry, positions, rotations = _compiled_sample(transformer)(ends)
    prepared = {}
    for i, spec in enumerate(config.layers):
        own = params[f"layer_{i}"]
        # Nothing that is quantised comes after the exact ones.
        given = (own, None, None, None)
        if i not in exact:
            given = (own, carry, positions, rotations[config.rotation_of(spec)])
        shape = tuple(config.axis_sizes(spec).values())
        block = blocks.setdefault(shape, Block(config, spec, parent=None))
        compiled = _compiled_prepare(block, i not in exact, int8, columns, streams)
        prepared[f"layer_{i}"], carry = compiled(*given)
    return prepared


@functools.cache
def _compiled_sample(transformer: Any) -> CachedJit:
    """The first layer's carry of the sample, its positions, and rotations by kind of layer."""

    def sample(params: Params) -> Any:
        tokens = jnp.array([SAMPLE], jnp.int32) % transformer.config.num_embed
        positions = jnp.arange(tokens.size, dtype=jnp.int32)[None]
        entered = transformer.apply({"params": params}, tokens, positions, method="enter")
        carry, rotations = cast(Any, entered)
        return carry, positions, rotations

    return CachedJit(sample, transformer)


@functools.cache
def _compiled_prepare(
    block: Block, int8: bool, rounded: bool, columns: Any, streams: Streams
) -> CachedJit:
    """`prepare` of one layer's params, see `pack`.

    With what the layer makes of the sample's carry, where that is given.
    """

    def prepare(
        params: Params,
        carry: Carry | None,
        positions: jax.Array | None,
        rotation: Rotation | None,
    ) -> tuple[Params, Carry | None]:
        before = Carry(jnp.zeros((1, 1, block.config.embed_dim))) if carry is None else carry
        where = jnp.zeros((1, 1), jnp.int32) if positions is None else positions
        given = LayerInput(where, rotation=rotation)
        (after, _), state = block.apply({"params": params}, before, given, mutable=["prepared"])
        found = cast(Params, state)["prepared"]
        packed = pack(found, int8=int8, rounded=rounded, columns=columns, streams=streams)
        return cast(Params, packed), None if carry is None else after

    return CachedJit(prepare, block, int8, rounded, columns, streams)
