"""GemmaTransformer: scoring with labelled axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb


def test_scores_carry_axes_and_agree_with_the_module(tiny_model):
    model, _ = tiny_model
    tokens = jnp.asarray([3, 1, 4, 1, 5])
    scores = model(gnb.GemmaInputs.from_basic_segments(tokens))
    assert scores.dims == ("seq", "vocabulary")
    expected = model.transformer.apply({"params": model.params}, tokens[None]).logits[0]
    np.testing.assert_allclose(scores.values, expected, atol=1e-6)


def test_batches_keep_their_axis(tiny_model):
    model, _ = tiny_model
    tokens = np.array([[3, 1, 4], [1, 5, 9]])
    scores = model(gnb.GemmaInputs.from_basic_segments(tokens))
    assert scores.dims == ("batch", "seq", "vocabulary")
    alone = model(gnb.GemmaInputs.from_basic_segments(tokens[1]))
    np.testing.assert_allclose(scores[1].values, alone.values, atol=1e-6)


def test_positions_and_masks_are_passed_on(tiny_model):
    model, _ = tiny_model
    tokens = jnp.asarray([3, 1, 4, 1])
    plain = model(gnb.GemmaInputs(tokens))
    # Rotary positions are relative: all of them shifted changes nothing.
    shifted = model(gnb.GemmaInputs(tokens, positions=jnp.arange(4) + 7))
    np.testing.assert_allclose(plain.values, shifted.values, atol=1e-5)
    blind = model(gnb.GemmaInputs(tokens, attention_mask=jnp.eye(4, dtype=bool)))
    assert np.abs(blind.values - plain.values)[1:].max() > 1e-3


@pytest.mark.parametrize("tokens", [[], [[[1]]], [10**6], [-1]])
def test_impossible_tokens_are_refused(tiny_model, tokens):
    model, _ = tiny_model
    with pytest.raises(ValueError, match=r"tokens? .*must"):
        model(gnb.GemmaInputs.from_basic_segments(jnp.asarray(tokens, jnp.int32)))


def test_a_model_is_a_pytree_of_its_parameters(tiny_model):
    model, _ = tiny_model
    doubled = jax.tree.map(lambda x: 2 * x, model)
    assert isinstance(doubled, gnb.GemmaTransformer)
    assert doubled.config is model.config
    assert len(repr(model)) < 200


def test_without_a_key_there_are_shapes_and_no_weights():
    model = gnb.GemmaTransformer.from_config(gnb.presets.GEMMA3_27B)
    leaf = model.params["embedder"]["input_embedding"]
    assert isinstance(leaf, jax.ShapeDtypeStruct)
    assert leaf.shape == (262_144, 5376)
