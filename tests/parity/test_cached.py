"""Prefill and decoding with the cache against the forward pass without one, in float32.

Both are ours, and the uncached pass is held to the reference by `test_recorded`.  The tolerance is
three times the noise of the reference in float32 against itself in float64, at every position.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_nb.model import GemmaInputs, GemmaTransformer
from gemma_nb.nn import Transformer
from gemma_nb.sampling.cache import StreamCache, grow, rewind
from gemma_nb.sampling.feed import compiler_options
from gemma_nb.sampling.prefill import chunks
from gemma_nb.sampling.weights import DecodingWeights, decoding_weights
from tests.parity import recording
from tests.parity.cases import REAL
from tests.parity.measure import NOISE_FACTOR, logits_error

if TYPE_CHECKING:
    from gemma_nb.text.tokenizer import Tokenizer

# (tokens of the prompt, tokens of the reply) of three turns.  The first and the last prompt take
# several pieces, the second reply crosses the edge of the sliding window (512).
TURNS = ((350, 20), (125, 40), (140, 30))


# Compiled as the decoder's steps are.
@partial(jax.jit, static_argnums=0, donate_argnums=2, compiler_options=compiler_options())
def step(
    transformer: Transformer,
    weights: DecodingWeights,
    cache: StreamCache,
    tokens: jax.Array,
    positions: jax.Array,
) -> tuple[StreamCache, jax.Array]:
    """One step as the decoder makes it, with the logits of all its positions."""
    output = transformer.apply(
        weights.variables,
        tokens,
        cache=cache.to_model(transformer.config),
        positions=positions,
        return_hidden_states=True,
    )
    logits = transformer.apply(weights.variables, output.hidden_states[0], method="unembed")
    return cache.updated(output.cache), logits


def cached_logits(model: GemmaTransformer, ids: list[int]) -> Iterator[np.ndarray]:
    """Logits of every position of three turns, piece by piece."""
    cache = StreamCache.empty(model.config, 512, own=True)
    start = 0
    for prompt, reply in TURNS:
        pieces = list(chunks(ids[start : start + prompt], start))
        for position in range(start + prompt, start + prompt + reply):
            pieces += list(chunks(ids[position : position + 1], position))
        for tokens, positions, last in pieces:
            if positions.max() >= cache.size:
                cache = grow(cache, 1024, model.config)
            weights = decoding_weights(model)
            cache, logits = step(model.transformer, weights, cache, tokens, positions)
            yield np.asarray(logits[: last + 1])
        start += prompt + reply
        # As a stopped reply leaves it: one token too many, taken back.  A ring can give that back.
        cache, _ = step(model.transformer, weights, cache, np.array([[9]]), np.array([[start]]))
        cache = rewind(cache, jnp.int32(start))


@pytest.mark.real
def test_cached_decoding_equals_the_uncached_pass_at_every_position(
    float32_model: tuple[GemmaTransformer, Tokenizer],
) -> None:
    model, _ = float32_model
    recorded = recording.load(REAL)
    count = sum(map(sum, TURNS))
    ids = recorded.tokens[:count]
    assert len(ids) == count > 700
    uncached = model(GemmaInputs.from_basic_segments(ids)).values
    whole, anywhere, done = [], [], 0
    for logits in cached_logits(model, ids.tolist()):
        expected = uncached[done : done + len(logits)]
        one, worst = logits_error(logits, expected)
        whole.append(one**2 * len(logits))
        anywhere.append(worst)
        done += len(logits)
    assert done == count
    total = float(np.sqrt(sum(whole) / count))
    print(f"cached against uncached: {total:.2e} over the whole, {max(anywhere):.2e} at worst")
    assert total <= NOISE_FACTOR * recorded.noise["logits_whole"]
    assert max(anywhere) <= NOISE_FACTOR * recorded.noise["logits_anywhere"]
