"""Compiled programs of a batch: tokens of several streams in, a choice for each out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from gemma_nb.cpu.scores import Scores
from gemma_nb.interventions import Interventions
from gemma_nb.nn import Output, Transformer
from gemma_nb.sampling.cache import StreamCache
from gemma_nb.sampling.draw import choose
from gemma_nb.sampling.evidence import Evidence
from gemma_nb.sampling.feed import compiler_options
from gemma_nb.sampling.filters import Controls
from gemma_nb.sampling.weights import DecodingWeights

# Whose token a slot holds: that of stream 0, 1, ...; or
EVERYBODYS, NOBODYS = -1, -2


@jax.jit
def gather(
    cache: StreamCache, slots: jax.Array, positions: jax.Array, count: jax.Array
) -> StreamCache:
    """A cache without rings whose slot i holds what stands in `slots[i]` of `cache`.

    In a ring that is slot `slots[i]` modulo its length: where slots are positions, the tokens that
    it still holds are in their places, and what stands elsewhere no window reaches.
    """

    def take(x: jax.Array) -> jax.Array:
        return x[slots % len(x)]

    return StreamCache(
        k=tuple(take(x) for x in cache.k),
        v=tuple(take(x.T if cache.columns else x) for x in cache.v),
        positions=positions,
        ring_positions=None,
        end_index=count,
        rings=(False,) * len(cache.rings),
    )


@functools.cache
def compiled_feed(transformer: Transformer, structure: Any) -> Any:
    """The jitted feeding of tokens; compiled per number of tokens and cache size."""

    def feed(
        leaves: Sequence[jax.Array],
        cache: StreamCache,
        tokens: jax.Array,
        positions: jax.Array,
        owners: jax.Array,
        slot_positions: jax.Array,
        slot_owners: jax.Array,
        interventions: Interventions | None,
    ) -> tuple[StreamCache, jax.Array]:
        weights: DecodingWeights = jax.tree.unflatten(structure, leaves)
        theirs = (slot_owners == EVERYBODYS) | (slot_owners == owners[:, None])
        mask = theirs & (slot_positions >= 0) & (slot_positions <= positions[0][:, None])
        output = cast(
            Output,
            transformer.apply(
                weights.variables,
                tokens,
                cache=cache.to_model(transformer.config),
                positions=positions,
                attention_mask=mask[None],
                return_hidden_states=True,
                interventions=interventions,
            ),
        )
        assert output.cache is not None
        assert output.hidden_states is not None
        return cache.updated(output.cache), output.hidden_states[0].astype(jnp.float32)

    return jax.jit(feed, donate_argnums=1, compiler_options=compiler_options())


@functools.cache
def compiled_choose(transformer: Transformer, structure: Any, top_k: int) -> Any:
    """The jitted choice of a token per stream; compiled per number of streams."""
    cap = transformer.config.final_logit_soft_cap

    def choose_each(
        leaves: Sequence[jax.Array],
        seen: jax.Array,
        hidden: jax.Array,
        alive: jax.Array,
        positions: jax.Array,
        keys: jax.Array,
        controls: Controls,
    ) -> tuple[jax.Array, Evidence]:
        weights: DecodingWeights = jax.tree.unflatten(structure, leaves)
        if weights.head is not None:
            rows = weights.head.sums(hidden)
        else:
            plain = transformer.apply(weights.variables, hidden, method="unembed")
            rows = cast(jax.Array, plain)

        def one(row: Any) -> Evidence:
            alive, state, logits, seen, position, key = row
            own = controls.replace(key=key)  # type: ignore[attr-defined]

            def chosen() -> Evidence:
                if weights.head is None:
                    scores = Scores.of(logits)
                else:
                    scores = weights.head.rescored(logits, state, weights.table, cap)
                return choose(scores, own, seen, position, top_k)

            shapes = jax.eval_shape(chosen)
            # Stream by stream, since under `vmap` both sides of a conditional are computed.
            return lax.cond(
                alive,
                chosen,
                lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            )

        evidence = lax.map(one, (alive, hidden, rows, seen, positions, keys))
        rows = jnp.arange(len(seen))
        return seen.at[rows, evidence.token].set(True), evidence

    return jax.jit(choose_each, donate_argnums=1, compiler_options=compiler_options())
