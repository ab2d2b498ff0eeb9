"""Traces: the same numbers as the module's own, with labels that fit."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb


@pytest.fixture(scope="module")
def sown(tiny_model):
    model, _ = tiny_model
    ids = np.arange(10, 31)
    run = jax.jit(lambda p, t: model.transformer.apply({"params": p}, t, mutable=["intermediates"]))
    return ids, run(model.params, jnp.asarray(ids)[None])[1]["intermediates"]


@pytest.fixture(scope="module")
def trace(tiny_model, sown):
    model, tokenizer = tiny_model
    names = [site.name for site in gnb.list_sites(model)]
    return gnb.trace(model, sown[0], tokenizer=tokenizer, sites=names)


def test_every_site_holds_what_the_module_computed(trace, sown, tiny_model):
    """Padding inside `trace` changes nothing but the order of sums."""
    _, state = sown
    for site in gnb.list_sites(tiny_model[0]):
        if not site.per_layer:
            expected = site.value(state)[0]
        else:
            expected = np.stack([site.value(state, i)[0] for i in range(3)])
        if site.name == "attention":
            expected = np.swapaxes(expected, 1, 2)
        actual = trace.data[site.name]
        assert actual.shape == expected.shape, site.name
        # Float32 noise, relative to the largest value: residuals reach beyond one.
        noise = 2e-6 * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(actual.values, expected, rtol=0, atol=noise, err_msg=site.name)


def test_attention_is_a_labelled_map(trace):
    maps = trace.attention
    assert maps.dims == ("layer", "head", "query", "key")
    np.testing.assert_allclose(maps.sum("key"), 1, atol=1e-5)
    assert maps.layer_kind.values.tolist() == ["sliding 8", "sliding 8", "global"]
    assert maps.key_token.values.tolist() == list(trace.labels)
    assert maps.kv_group.values.tolist() == [0, 0]
    later = np.triu(np.ones((21, 21), bool), 1)
    assert (maps.values[..., later] == 0).all()
    assert (maps.sel(layer=0).values[:, 20, :13] == 0).all()
    assert (maps.sel(layer=2).values[:, 20, :13] > 0).all()


def test_positions_carry_tokens(trace):
    assert trace.residual.dims == ("layer", "position", "embedding")
    assert trace.residual.token.values.tolist() == list(trace.labels)
    assert trace.embed.dims == ("position", "embedding")
    assert trace.z.dims == ("layer", "position", "head", "head_dim")
    assert trace.k.dims == ("layer", "position", "kv_head", "head_dim")


def test_layers_are_selected(tiny_model, sown, trace):
    some = gnb.trace(tiny_model[0], sown[0], layers=[2, -3])
    assert some.attention.layer.values.tolist() == [0, 2]
    np.testing.assert_allclose(some.attention.sel(layer=2), trace.attention.sel(layer=2), atol=1e-6)
    assert some.labels[0] == "10"


def test_texts_begin_with_bos(tiny_model):
    model, tokenizer = tiny_model
    trace = gnb.trace(model, "Hi", tokenizer=tokenizer)
    assert trace.tokens.tolist() == tokenizer.encode("Hi", bos=True)
    assert trace.labels[0] == "<bos>"
    with pytest.raises(ValueError, match="tokenizer="):
        gnb.trace(model, "Hi")


def test_what_was_not_captured_says_how_to_get_it(tiny_model):
    trace = gnb.trace(tiny_model[0], [1, 2, 3])
    with pytest.raises(AttributeError, match=r"sites=\(\.\.\., 'residual'\)"):
        _ = trace.residual
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = trace.colour


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sites": ["attn"]}, "the sites are"),
        ({"sites": []}, "sites is empty"),
        ({"layers": [7]}, "layers 0 to 2"),
    ],
)
def test_unknown_requests_list_the_known_ones(tiny_model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        gnb.trace(tiny_model[0], [1, 2, 3], **kwargs)


@pytest.mark.parametrize("tokens", [[], [[1, 2]], [0.5], [-1], [10**9]])
def test_impossible_tokens_are_refused(tiny_model, tokens):
    with pytest.raises(ValueError, match="token ids"):
        gnb.trace(tiny_model[0], tokens)


def test_requests_that_cannot_fit_are_refused_first():
    model = gnb.GemmaTransformer.from_config(gnb.presets.GEMMA3_27B)
    with pytest.raises(ValueError, match=r"GiB.*layers=\[\.\.\.\] with at most 2"):
        gnb.trace(model, [1] * 4096)


def test_traces_copy_and_pickle(trace):
    for twin in (copy.copy(trace), pickle.loads(pickle.dumps(trace))):
        assert twin.labels == trace.labels
    assert len(repr(trace)) < 2000
