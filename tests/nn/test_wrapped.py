"""The adapter for other people's transformers, around our own; `tests/contract` has gm's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.nn import Transformer, Wrapped, adapt
from tests.nn.test_transformer import CONFIGS, LENGTH, assert_close, make


@dataclasses.dataclass(frozen=True)
class Plain:
    """A module that writes its cache as gm's do: at the end, padding too, shifted if need be."""

    ours: Transformer

    def apply(self, variables: Any, tokens: jax.Array, *, cache: Any, **call: Any) -> Any:
        if cache is None:
            return self.ours.apply(variables, tokens, cache=None, **call)
        real = call.pop("positions")
        counted = jnp.maximum(real, 0)
        output = self.ours.apply(variables, tokens, cache=cache, positions=counted, **call)
        at = (0, cache["layer_0"]["end_index"][0])
        for layer in output.cache.values():
            layer["positions"] = jax.lax.dynamic_update_slice(layer["positions"], real, at)
        return output


@pytest.fixture(scope="module", params=["gqa", "gemma2-like", "gemma1-like"])
def models(request):
    ours = make(CONFIGS[request.param])
    return ours, ours.replace(transformer=adapt(Plain(ours.transformer), ours.config))


def test_ours_need_no_adapter(models):
    ours, theirs = models
    assert adapt(ours.transformer) is ours.transformer
    assert adapt(theirs.transformer) is theirs.transformer
    assert isinstance(theirs.transformer, Wrapped)
    assert hash(theirs.transformer) == hash(adapt(Plain(ours.transformer), ours.config))


def test_scoring(models):
    ours, theirs = models
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 64, (2, LENGTH)), jnp.int32)
    inputs = gnb.GemmaInputs(tokens)
    assert_close(theirs(inputs).values, ours(inputs).values)


def test_padded_chunks_fill_the_cache_to_its_last_slot(models):
    """What gm's modules would write over the end of the cache finds room, and is cut off again."""
    ours, theirs = models
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 64, (1, LENGTH)), jnp.int32)
    expected = ours(gnb.GemmaInputs(tokens)).values
    cache = theirs.transformer.init_cache(batch_size=1, dtype=jnp.float32, cache_length=LENGTH)
    step = jax.jit(theirs.transformer.apply)
    for start, stop in ((0, 7), (7, 8), (8, LENGTH)):
        padding = 0 if stop == 8 else 4
        chunk = jnp.pad(tokens[:, start:stop], ((0, 0), (0, padding)))
        positions = start + jnp.arange(chunk.shape[1])[None]
        positions = jnp.where(positions < stop, positions, -1)
        output = step({"params": theirs.params}, chunk, cache=cache, positions=positions)
        cache = output.cache
        assert_close(output.logits[:, : stop - start], expected[:, start:stop])
        assert cache["layer_0"]["end_index"].tolist() == [stop]
    np.testing.assert_array_equal(cache["layer_1"]["positions"][0], np.arange(LENGTH))


def test_hidden_states_are_unembedded_as_ours_are(models):
    ours, theirs = models
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.float32)
    weights = {"params": ours.params, "prepared": theirs.transformer.prepare(ours.params)}
    expected = ours.transformer.apply({"params": ours.params}, hidden, method="unembed")
    assert_close(theirs.transformer.apply(weights, hidden, method="unembed"), expected)


def test_what_cannot_be_done_says_so(models):
    _, theirs = models
    cache = theirs.transformer.init_cache(batch_size=2, dtype=jnp.float32, cache_length=8)
    tokens = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match="one row at a time, got 2"):
        theirs.transformer.apply({"params": theirs.params}, tokens, cache=cache)
    with pytest.raises(ValueError, match="expected method None or 'unembed'"):
        theirs.transformer.apply({"params": theirs.params}, tokens, method="encode")
