"""The compiled step: tokens in, the next one out, with what is known about the choice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.interventions import Interventions
from gemma_nb.nn import Output, Transformer
from gemma_nb.sampling.cache import StreamCache, smallest_window
from gemma_nb.sampling.choose import choose, exact_logit
from gemma_nb.sampling.head import Scores
from gemma_nb.sampling.methods import Controls
from gemma_nb.sampling.residuals import sown_residuals
from gemma_nb.sampling.weights import DecodingWeights
from gemma_nb.sites import SITES


def compiler_options() -> dict[str, Any] | None:
    """What XLA is told when it compiles a step.

    XLA:CPU uses half of AVX-512's width unless it is told otherwise: products of a matrix and a
    vector then take up to 1.7 times as long.
    """
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None


@flax.struct.dataclass
class Made:
    """What a step makes beside the cache.

    Attributes:
      token: (1, 1) int32, the chosen id, as the next step takes it.
      words: the evidence, packed.
      rows: the new tokens' keys and values on the layers whose cache is a ring, (layers, 2, T, K*H)
        float32; None where there are none.
      attention: see `sown_attention`, in float16; None where no layers were asked for.
      residuals: see `residuals.sown_residuals`; None where they are not kept.
    """

    token: jax.Array
    words: jax.Array
    rows: jax.Array | None
    attention: tuple[jax.Array | None, jax.Array | None] | None
    residuals: jax.Array | tuple[jax.Array, ...] | None


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted step and the weights that it is given.

    Attributes:
      run: takes `leaves`, a `StreamCache` and the tokens seen, both given away, tokens and
        positions (1, T), the index of the last token, `Controls` and `Interventions`; returns the
        cache, the tokens seen, and `Made`.
      leaves: the weights' arrays.
      structure: what makes `DecodingWeights` of them.
    """

    run: Any
    leaves: list[jax.Array]
    structure: Any

    @classmethod
    def of(
        cls,
        transformer: Any,
        weights: DecodingWeights,
        top_k: int,
        attention_layers: tuple[int, ...] = (),
        residuals: bool = False,
        first: bool = False,
    ) -> Program:
        """The step of a model; arguments as of `compiled`."""
        leaves, structure = jax.tree.flatten(weights)
        run = compiled(transformer, structure, top_k, attention_layers, residuals, first)
        return cls(run, leaves, structure)

    def compile(
        self,
        cache: StreamCache,
        seen: jax.ShapeDtypeStruct,
        length: int,
        controls: Controls,
        interventions: Interventions | None,
    ) -> None:
        """Compiles it for so many tokens at once, from shapes; nothing is allocated or run."""
        tokens = positions = np.zeros((1, length), np.int32)
        given = (cache, seen, tokens, positions, np.int32(0), controls, interventions)
        self.run.lower(self.leaves, *given).compile()


@functools.cache
def compiled(
    transformer: Transformer,
    weights: Any,
    top_k: int,
    attention_layers: tuple[int, ...],
    residuals: bool,
    first: bool = False,
) -> Any:
    """The jitted step of a model.

    All but the module (its configuration), the structure of the weights and what is captured is
    traced, so a compilation is made per (number of tokens, cache size) and no setting adds one.

    Args:
      transformer: the module.
      weights: the tree structure of its `DecodingWeights`.  The step takes their leaves, since
        flattening hundreds of arrays anew takes part of a millisecond.
      top_k: number of alternatives.
      attention_layers: whose attention weights come with a choice, ascending.
      residuals: whether the residual stream comes with the tokens.
      first: the cache that it is given is empty, so the tokens attend to each other alone (with
        Gemma 3 270M 16, 64 and 256 tokens take 0.90, 0.97 and 0.83 of the time).  For our own
        module only.
    """

    def step(leaves: Sequence[jax.Array], *args: Any) -> Any:
        own = jax.tree.unflatten(weights, leaves)
        return _step(
            *(transformer, own, *args),
            top_k=top_k,
            attention_layers=attention_layers,
            residuals=residuals,
            first=first,
        )

    return jax.jit(step, donate_argnums=(1, 2), compiler_options=compiler_options())


def _step(
    transformer: Transformer,
    weights: DecodingWeights,
    cache: StreamCache,
    seen: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    last: jax.Array,
    controls: Controls,
    interventions: Interventions | None,
    *,
    top_k: int,
    attention_layers: tuple[int, ...],
    residuals: bool,
    first: bool,
) -> tuple[StreamCache, jax.Array, Made]:
    """Feeds tokens (1, T), and chooses the one after index `last`."""
    observed = any(cache.rings) or bool(attention_layers) or residuals or first
    result = transformer.apply(
        weights.variables,
        tokens,
        cache=None if first else cache.to_model(transformer.config),
        positions=positions,
        return_hidden_states=True,
        interventions=interventions,
        mutable=["intermediates"] if observed else False,
    )
    output, rows, attention, streams = cast(Output, result), None, None, None
    if observed:
        output, state = cast(Any, result)
        sown = state["intermediates"]
        rows = _new_rows(sown, cache.rings) if any(cache.rings) else None
        if attention_layers:
            attention = sown_attention(sown, cache.rings, attention_layers, last, jnp.float16)
            if first:
                attention = _behind_ring(attention, smallest_window(transformer.config))
        if residuals:
            streams = sown_residuals(sown, len(cache.rings))
    if first:
        filled = cache.filled(transformer.config, sown, positions)
    else:
        assert output.cache is not None
        filled = cache.updated(output.cache)
    assert output.hidden_states is not None
    # Only the last token's logits: the vocabulary is most of a small model's work.
    hidden, forced_logit = output.hidden_states[0, last], None
    if weights.head is not None:
        cap = transformer.config.final_logit_soft_cap
        scores = weights.head.scores(hidden, weights.table, cap)
        forced_logit = exact_logit(controls.forced, hidden, weights.table, cap)
    else:
        logits = transformer.apply(weights.variables, hidden, method="unembed")
        scores = Scores.of(cast(jax.Array, logits))
    padded = jnp.where(positions[0] >= 0, tokens[0], seen.shape[0])
    seen = seen.at[padded].set(True, mode="drop")
    evidence = choose(scores, controls, seen, positions[0, last], top_k, forced_logit)
    made = Made(evidence.token.reshape(1, 1), evidence.pack(), rows, attention, streams)
    return filled, seen, made


def _behind_ring(
    found: tuple[jax.Array | None, jax.Array | None], window: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """`sown_attention` of a pass over T tokens without a cache, as over an empty one."""
    near, far = found
    # Up to a window, `rows.in_order` takes them in the order of positions as they are.
    if near is not None and near.shape[-1] > window:
        near = jnp.pad(near, ((0, 0), (0, 0), (window, 0)))
    return near, far


def _new_rows(sown: Any, rings: Sequence[bool]) -> jax.Array:
    """Keys and values (ring layers, 2, T, K*H) that a step has added, float32."""
    layers = [sown[f"layer_{i}"]["attn"] for i, ring in enumerate(rings) if ring]
    rows = [[layer[site][0][0] for site in ("k", "v")] for layer in layers]
    stacked = jnp.stack([jnp.stack(pair) for pair in rows])
    return stacked.reshape(*stacked.shape[:3], -1).astype(jnp.float32)


def sown_attention(
    sown: Any,
    rings: Sequence[bool],
    layers: Sequence[int],
    last: jax.Array | int,
    dtype: Any,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Attention weights of one query, in the layers' own order of keys.

    Args:
      sown: `intermediates` of a pass of T tokens over a `StreamCache`.
      rings: per layer of the model, whether its cache is a ring.
      layers: whose weights.
      last: index of the query among the tokens.
      dtype: of the result.

    Returns:
      Of the ring layers (L, N, W), or (L, N, W + T) for several tokens; of the others (L, N, S).
      `rows.Row.of` sorts them by position.  None where there are no such layers.
    """

    def stacked(are_rings: bool) -> jax.Array | None:
        which = [i for i in layers if rings[i] == are_rings]
        found = [SITES["attention"].value(sown, i)[0, last].astype(dtype) for i in which]
        return jnp.stack(found) if found else None

    return stacked(True), stacked(False)
