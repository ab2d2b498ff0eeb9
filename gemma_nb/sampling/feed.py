"""Tokens fed through the whole model in one program, and what it shows of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from gemma_nb.cpu.products import IN_STREAMS
from gemma_nb.executables import CachedJit
from gemma_nb.interventions import Interventions
from gemma_nb.nn import Output, Transformer
from gemma_nb.processor import streams
from gemma_nb.sampling.cache import StreamCache
from gemma_nb.sampling.residuals import sown_residuals
from gemma_nb.sampling.weights import DecodingWeights
from gemma_nb.sites import SITES


def compiler_options() -> dict[str, Any] | None:
    """Options that XLA compiles a step with.

    XLA:CPU uses half of AVX-512's width unless it is told otherwise: products of a matrix and a
    vector then take up to 1.7 times as long.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_cpu_prefer_vector_width": 512, **(IN_STREAMS if max(streams()) > 1 else {})}


class StepJit(CachedJit):
    """A `CachedJit` that is compiled with `compiler_options`.

    Under interventions it is the plain jitted function: they may be of anybody's classes, and no
    stored program is found by the code of these.
    """

    def __init__(self, function: Callable[..., Any], *static: object, **options: Any) -> None:
        super().__init__(function, *static, compiler_options=compiler_options(), **options)

    def program(self, *args: Any) -> Any:
        """The program of calls with such arguments, see `CachedJit.program`."""
        if any(isinstance(arg, Interventions) for arg in args):
            return self.jitted
        return super().program(*args)


@dataclasses.dataclass(frozen=True)
class Captured:
    """Selection of what comes out of a step beside the choice.

    Attributes:
      attention_layers: whose attention weights come with a choice, ascending.
      residuals: whether the residual stream comes with the tokens.
    """

    attention_layers: tuple[int, ...] = ()
    residuals: bool = False


def feed(
    transformer: Transformer,
    weights: DecodingWeights,
    cache: StreamCache,
    seen: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    last: jax.Array,
    interventions: Interventions | None,
    *,
    captured: Captured,
) -> tuple[Any, ...]:
    """Feed tokens (1, T); see `StepProgram.feed`."""
    layers, residuals = captured.attention_layers, captured.residuals
    observed = any(cache.rings) or bool(layers) or residuals
    result = transformer.apply(
        weights.variables,
        tokens,
        cache=cache.to_model(transformer.config),
        positions=positions,
        return_hidden_states=True,
        interventions=interventions,
        mutable=["intermediates"] if observed else False,
    )
    output, rows, attention, streams = cast(Output, result), None, None, None
    if observed:
        output, collections = cast(Any, result)
        sown = collections["intermediates"]
        rows = _new_rows(sown, cache.rings) if any(cache.rings) else None
        if layers:
            attention = sown_attention(sown, cache.rings, layers, last, jnp.float16)
        if residuals:
            streams = sown_residuals(sown, len(cache.rings))
    assert output.cache is not None
    assert output.hidden_states is not None
    seen = noted(seen, tokens, positions)
    state = output.hidden_states[0, last], positions[0, last]
    return cache.updated(output.cache), seen, state, rows, attention, streams


def noted(seen: jax.Array, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """The tokens seen (V,), with those of (1, T) that are not padding."""
    padded = jnp.where(positions[0] >= 0, tokens[0], seen.shape[0])
    return seen.at[padded].set(True, mode="drop")


def _new_rows(sown: Any, rings: Sequence[bool]) -> jax.Array:
    """Keys and values (ring layers, 2, T, K*H) that a step has added, float32."""
    return jnp.stack([rows_of(sown[f"layer_{i}"]) for i, ring in enumerate(rings) if ring])


def rows_of(sown: Any) -> jax.Array:
    """Keys and values (2, T, K*H) float32 of a layer, whose `intermediates` these are."""
    pair = jnp.stack([SITES[site].value(sown)[0] for site in ("k", "v")])
    return pair.reshape(*pair.shape[:2], -1).astype(jnp.float32)


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
