"""Lenses against whole logits, computed the plain way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.interp import vocabulary
from tests import tiny
from tests.parity.cases import RANDOM, model_of


@pytest.fixture(scope="module", params=["grouped-query", "Gemma 2"])
def lens(request):
    """A model, its trace and lens, and the logits after every layer (L, T, V)."""
    patch = pytest.MonkeyPatch()
    # Several stretches, of which the last overlaps; groups smaller than a stretch.
    patch.setattr(vocabulary, "_STRETCH", 192)
    patch.setattr(vocabulary, "_GROUP", 16)
    patch.setattr(vocabulary, "_POSITIONS", (1, 8, 16))
    model = model_of(RANDOM[request.param])
    model = model.replace(params=jax.tree.map(jnp.asarray, model.params))
    trace = gnb.trace(model, RANDOM[request.param].tokens()[:21], sites=())
    found = gnb.logit_lens(trace, 5, watch=[7, 300])
    logits = model.transformer.apply(
        {"params": model.params},
        jnp.stack([vocabulary.normalise(model, x) for x in trace.residual.values]),
        method="unembed",
    )
    yield model, trace, found, np.asarray(logits, np.float64)
    patch.undo()


def test_top_tokens_and_their_probabilities(lens):
    _, _, found, logits = lens
    order = np.argsort(-logits, axis=-1)[..., :5]
    np.testing.assert_array_equal(found.token_id, order)
    np.testing.assert_allclose(found.logit, np.take_along_axis(logits, order, -1), atol=2e-5)
    p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), order, -1)
    np.testing.assert_allclose(found.logprob, p, atol=2e-5)
    np.testing.assert_allclose(found.probability, np.exp(p), atol=2e-5)
    assert found.token.values[0, 0, 0] == str(order[0, 0, 0])


def test_entropy_and_divergence_from_the_output(lens):
    _, _, found, logits = lens
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p = np.exp(logp)
    np.testing.assert_allclose(found.entropy, -(p * logp).sum(-1), atol=5e-5)
    np.testing.assert_allclose(found.kl, (p[-1] * (logp[-1] - logp)).sum(-1), atol=5e-5)


def test_watched_tokens(lens):
    _, _, found, logits = lens
    for i, token in enumerate((7, 300)):
        rank = (logits > logits[..., token, None]).sum(-1)
        np.testing.assert_array_equal(found.watched_rank[..., i], rank)
        logp = np.asarray(jax.nn.log_softmax(logits))[..., token]
        np.testing.assert_allclose(found.watched_logprob[..., i], logp, atol=2e-5)


def test_the_last_layer_is_the_output(lens):
    model, trace, found, _ = lens
    output = model(gnb.GemmaInputs(trace.tokens)).values
    last = found.isel(layer=-1)
    np.testing.assert_array_equal(last.token_id, np.argsort(-output, axis=-1)[:, :5])
    np.testing.assert_allclose(last.logit, -np.sort(-output, axis=-1)[:, :5], atol=2e-5)
    np.testing.assert_allclose(last.kl, 0, atol=1e-5)


def test_layers_and_positions_are_selected(lens):
    _, trace, found, _ = lens
    some = gnb.logit_lens(trace, 5, layers=[0, 2], positions=[-1, 4], watch=[7, 300])
    expected = found.sel(layer=[0, 2], position=[4, 20])
    assert some.position.values.tolist() == [4, 20]
    for name in some:
        if name != "token":
            np.testing.assert_allclose(some[name], expected[name], atol=2e-5, err_msg=name)
    assert some.input_token.values.tolist() == [trace.labels[4], trace.labels[20]]
    with pytest.raises(ValueError, match="token ids must lie in 0 to 319"):
        gnb.logit_lens(trace, watch=[320])


def test_statistics_of_the_tokens_that_are_there(lens):
    _, trace, _, logits = lens
    found = gnb.token_statistics(trace)
    logp = np.asarray(jax.nn.log_softmax(logits[-1]))[np.arange(20), trace.tokens[1:]]
    np.testing.assert_allclose(found.logprob[1:], logp, atol=2e-5)
    assert np.isnan(found.logprob[0])
    at = logits[-1][np.arange(20), trace.tokens[1:]][:, None]
    assert found["rank"].values.tolist() == [-1, *(logits[-1, :20] > at).sum(-1)]
    assert found.token.values.tolist() == list(trace.labels)


def test_norms_of_the_residual_stream(lens):
    _, trace, _, _ = lens
    found = gnb.residual_norms(trace)
    expected = np.linalg.norm(trace.residual.values, axis=-1)
    np.testing.assert_allclose(found.residual, expected, rtol=1e-5)


def test_loaded_traces_have_no_model(lens, tmp_path):
    _, trace, _, _ = lens
    trace.save(tmp_path / "trace.nc")
    with pytest.raises(ValueError, match="without its model"):
        gnb.logit_lens(gnb.Trace.load(tmp_path / "trace.nc"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_sums_of_split_products_are_those_of_whole_ones(dtype, cap, monkeypatch):
    monkeypatch.setattr(vocabulary, "_STRETCH", 1536)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(4000, 64)), dtype)
    config = dataclasses.replace(tiny.model(4000).config, final_logit_soft_cap=cap)
    model = gnb.GemmaTransformer.from_config(config)
    model = model.replace(params={"embedder": {"input_embedding": table}})
    states = rng.normal(size=(3, 9, 64)).astype(np.float32) * [[[0.1]], [[3]], [[1]]]
    states = states.astype(np.float32)

    logits = states.astype(np.float64) @ np.asarray(table, np.float64).T
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    logsumexp = np.log(np.exp(logits).sum(-1))
    logp = logits - logsumexp[..., None]
    p = np.exp(logp)
    for split in (True, False):
        monkeypatch.setattr(vocabulary.split, "pays", lambda split=split: split)
        found = vocabulary.read(model, states, 5)
        np.testing.assert_allclose(found.logsumexp, logsumexp, rtol=2e-6)
        np.testing.assert_allclose(found.entropy, -(p * logp).sum(-1), 1e-5, 2e-5)
        np.testing.assert_allclose(found.kl, (p[-1] * (logp[-1] - logp)).sum(-1), 5e-6, 5e-5)
        np.testing.assert_array_equal(found.top_ids, np.argsort(-logits, axis=-1)[..., :5])


def test_watched_tokens_are_named_by_id_or_text(tiny_model):
    model, tokenizer = tiny_model
    trace = gnb.trace(model, "Hi you", tokenizer=tokenizer, sites=())
    (a,) = tokenizer.encode("a")
    by_text, by_id = (gnb.logit_lens(trace, 2, watch=watch) for watch in (["a", 9], [a, 9]))
    assert by_text.identical(by_id)
    assert gnb.logit_lens(trace, 2, watch="a").watched.values.tolist() == [a]
    with pytest.raises(ValueError, match="'ab' is 2 tokens"):
        gnb.logit_lens(trace, watch=["ab"])
    with pytest.raises(ValueError, match="k must be at least 1"):
        gnb.logit_lens(trace, k=0)


def test_what_is_labelled_is_saved_through_xarray(tiny_model, tmp_path):
    """Also what was computed under interventions, of which files take no list."""
    import xarray

    model, tokenizer = tiny_model
    model = model.intervene(gnb.AblateHeads({1: [0]}), gnb.Steer(1, np.ones(32)))
    trace = gnb.trace(model, "Hi you", tokenizer=tokenizer)
    trace.attention.to_netcdf(tmp_path / "map.nc", engine="scipy")
    found = xarray.load_dataarray(tmp_path / "map.nc", engine="scipy")
    np.testing.assert_array_equal(found, trace.attention)
    assert tuple(found.attrs["interventions"].splitlines()) == trace.interventions
    assert len(trace.interventions) == 2
    gnb.plots.attention(found, 1, 0)
    for values in (gnb.logit_lens(trace, 2), gnb.direct_logit_attribution(trace, 9)):
        values.to_netcdf(tmp_path / "more.nc", engine="scipy")
