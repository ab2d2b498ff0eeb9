"""Several tokens fed layer by layer: layers of one kind are compiled once, and used one by one.

In one program a model's layers are all compiled, loaded and, by XLA:CPU's library for products of
matrices, planned, though they differ in their weights only: for Gemma 3 270M most of what a start
waits for.  To hand the residual stream from one program to the next takes some microseconds, which
several tokens do not notice; a single one does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.config import LayerSpec
from gemma_nb.executables import CachedJit
from gemma_nb.interventions import Interventions
from gemma_nb.nn import Transformer
from gemma_nb.nn.kv_cache import cache_of
from gemma_nb.nn.layer import Block
from gemma_nb.nn.layer_input import Carry, LayerInput
from gemma_nb.nn.rope import Rotation
from gemma_nb.sampling.cache import StreamCache, ring_layers, smallest_window
from gemma_nb.sampling.feed import Captured, StepJit, noted, rows_of
from gemma_nb.sampling.weights import Part
from gemma_nb.sites import SITES


class Layerwise:
    """`StepProgram.feed` of several tokens, for our own module on a single CPU.

    Called as a `CachedJit` is; its weights are those of the ends, and of each layer.
    """

    def __init__(
        self,
        transformer: Transformer,
        ends: Any,
        layers: tuple[Any, ...],
        captured: Captured,
        first: bool,
    ) -> None:
        """Nothing is compiled yet.

        Args:
          transformer: the module.
          ends: what makes `DecodingWeights` of the leaves of what is not in a layer.
          layers: the same of each layer.
          captured: what comes with the tokens.
          first: the cache is empty, see `StepProgram.layerwise_prefill`.
        """
        config = transformer.config
        self._rotations = tuple(map(config.rotation_of, config.layers))
        self._captured = captured
        self._enter = _compiled_enter(transformer, ends)
        self._window = smallest_window(config)
        windowed = (i for i, ring in enumerate(ring_layers(config)) if ring)
        within = config.layers[next(windowed, 0)]

        def compiled(specs: Sequence[LayerSpec]) -> list[CachedJit]:
            return [
                _compiled_layer(
                    Block(config, spec, parent=None),
                    structure,
                    i in captured.attention_layers,
                    first,
                )
                for i, (spec, structure) in enumerate(zip(specs, layers, strict=True))
            ]

        self._layers = compiled(config.layers)
        # Within a window a layer that looks further does the same: one kind less is compiled.
        self._near = compiled(
            [
                dataclasses.replace(
                    spec, kind=within.kind, rope_base=within.rope_base, rope_scale=within.rope_scale
                )
                for spec in config.layers
            ]
        )
        self._leave = _compiled_leave(transformer, ends, first)

    def __call__(self, weights: tuple[Part, Sequence[Part]], *given: Any) -> tuple[Any, ...]:
        """Feeds tokens, see `StepProgram.feed`."""
        ready: dict[Hashable, Any] = {}

        def run(program: CachedJit, kind: Hashable, *args: Any) -> Any:
            # A program takes long to look up, and layers of one kind share it.
            found = ready.get((program, kind))
            if found is None:
                found = ready[program, kind] = program.program(*args)
            return found(*args)

        return self._through(run, weights, *given)

    def compile(self, weights: tuple[Part, Sequence[Part]], *given: Any) -> None:
        """Compiles all of it for these shapes; nothing is allocated or run."""
        ready: dict[Hashable, Any] = {}

        def run(program: CachedJit, kind: Hashable, *args: Any) -> Any:
            result = ready.get((program, kind))
            if result is None:
                program.compile(*args)
                result = ready[program, kind] = program.jitted.eval_shape(*args)
            return result

        self._through(run, weights, *given)

    def count(self) -> int:
        """For how many shapes its programs were compiled."""
        programs = {self._enter, *self._layers, *self._near, self._leave}
        return sum(program.count() for program in programs)

    def _through(
        self,
        run: Callable[..., Any],
        weights: tuple[Part, Sequence[Part]],
        cache: StreamCache,
        seen: jax.Array,
        tokens: Any,
        positions: Any,
        last: np.int32,
        interventions: Interventions | None,
    ) -> tuple[Any, ...]:
        """All programs in turn; `run` is given each, the kind of its layer, and its arguments."""
        ends, layers = weights
        carry, rotations, positions = run(
            self._enter, None, ends.leaves, tokens, positions, interventions
        )
        k, v = list(cache.k), list(cache.v)
        held = {False: cache.positions, True: cache.ring_positions}
        after, end = dict(held), cache.end_index
        rows, residuals = [], []
        attention: dict[bool, list[jax.Array]] = {False: [], True: []}
        near = any(cache.rings) and cache.size < self._window
        programs = self._near if near else self._layers
        for i, (program, part) in enumerate(zip(programs, layers, strict=True)):
            ring = cache.rings[i]
            slots = cache.replace(  # type: ignore[attr-defined]
                k=(), v=(), positions=held[ring], ring_positions=None, rings=(ring or near,)
            )
            carry, residual, k[i], v[i], after[ring], end, new, weights_of_last = run(
                program,
                (ring or near, k[i].shape[0], part.dtypes),
                *(part.leaves, k[i], v[i], slots, carry, positions),
                *(rotations[self._rotations[i]], last),
                *(None if interventions is None else np.int32(i), interventions),
            )
            residuals.append(carry.x if residual is None else residual)
            if ring:
                rows.append(new)
            if weights_of_last is not None:
                attention[ring].append(weights_of_last)
        seen, state, stacked, shown = run(
            self._leave,
            None,
            *(ends.leaves, carry, seen, tokens, positions, last),
            *(rows, attention[True], attention[False], interventions),
        )
        filled = cache.replace(  # type: ignore[attr-defined]
            k=tuple(k),
            v=tuple(v),
            positions=after[False],
            ring_positions=after[True],
            end_index=end,
        )
        if not self._captured.attention_layers:
            shown = None
        kept = tuple(residuals) if self._captured.residuals else None
        return filled, seen, state, stacked, shown, kept


@functools.cache
def compiled_layerwise(
    transformer: Transformer, ends: Any, layers: tuple[Any, ...], captured: Captured, first: bool
) -> Layerwise:
    """One for all streams of such a model, see `Layerwise`."""
    return Layerwise(transformer, ends, layers, captured, first)


# Between programs, the one text of a stream stands without the axis of the batch.


def _bare(carry: Carry) -> Carry:
    return jax.tree.map(lambda a: a[0], carry)


def _batched(carry: Carry) -> Carry:
    return jax.tree.map(lambda a: a[None], carry)


# Static is what tells the parts of one model from those of others; all else is traced.


@functools.cache
def _compiled_enter(transformer: Transformer, weights: Any) -> CachedJit:
    """The first layer's carry without its batch, rotations, and the positions on the device."""

    def enter(
        leaves: Sequence[jax.Array], tokens: jax.Array, positions: jax.Array, interventions: Any
    ) -> Any:
        variables = jax.tree.unflatten(weights, leaves).variables
        given = (tokens, positions, interventions)
        carry, rotations = cast(Any, transformer.apply(variables, *given, method="enter"))
        return _bare(carry), rotations, positions

    return StepJit(enter, transformer, weights)


@functools.cache
def _compiled_layer(block: Block, weights: Any, shown: bool, first: bool) -> CachedJit:
    """One layer: the carry after it, without its batch, its cache, and what it shows."""

    def layer(
        leaves: Sequence[jax.Array],
        k: jax.Array,
        v: jax.Array,
        slots: StreamCache,
        carry: Carry,
        positions: jax.Array,
        rotation: Rotation,
        last: jax.Array,
        number: jax.Array | None,
        interventions: Interventions | None,
    ) -> Any:
        (ring,) = slots.rings
        held = slots.positions if ring else None
        alone = slots.replace(k=(k,), v=(v,), ring_positions=held)  # type: ignore[attr-defined]
        cache = alone.layer(0, block.config.axis_sizes(block.spec))
        given = LayerInput.of(number, positions, interventions, rotation=rotation)
        (batched, after), state = block.apply(
            jax.tree.unflatten(weights, leaves).variables,
            *(_batched(carry), given, None if first else cache),
            mutable=["intermediates"],
        )
        carry = _bare(batched)
        sown: Any = state["intermediates"]
        if first:
            new = {site: SITES[site].value(sown) for site in ("k", "v")}
            new["positions"] = positions
            after = cache_of(cache, block.spec.kind).append(new)[1].arrays
        filled = alone.updated({"layer_0": after})
        weights_of_last = SITES["attention"].value(sown)[0, last].astype(jnp.float16)
        return (
            carry,
            # In float32; an array of its own only where it must be.
            None if carry.x.dtype == jnp.float32 else carry.x.astype(jnp.float32),
            *(filled.k[0], filled.v[0]),
            filled.ring_positions if ring else filled.positions,
            filled.end_index,
            rows_of(sown) if ring else None,
            weights_of_last if shown else None,
        )

    return StepJit(layer, block, weights, shown, first, donate_argnums=(1, 2))


@functools.cache
def _compiled_leave(transformer: Transformer, weights: Any, first: bool) -> CachedJit:
    """The tokens seen, the last one's final-normed state, and what the layers show as one."""
    window = smallest_window(transformer.config)

    def leave(
        leaves: Sequence[jax.Array],
        carry: Carry,
        seen: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        last: jax.Array,
        rows: list[jax.Array],
        near: list[jax.Array],
        far: list[jax.Array],
        interventions: Interventions | None,
    ) -> Any:
        variables = jax.tree.unflatten(weights, leaves).variables
        given = (_batched(carry), positions, interventions)
        final = cast(jax.Array, transformer.apply(variables, *given, method="leave"))
        seen = noted(seen, tokens, positions)
        # As over an empty ring, and then these.  Up to a window, `rows.in_order` takes them in the
        # order of positions as they are.
        if first and near and near[0].shape[-1] > window:
            near = [jnp.pad(weights, ((0, 0), (window, 0))) for weights in near]
        stacked = [jnp.stack(arrays) if arrays else None for arrays in (rows, near, far)]
        return seen, (final[0, last], positions[0, last]), stacked[0], tuple(stacked[1:])

    return StepJit(leave, transformer, weights, first, donate_argnums=(2,))
