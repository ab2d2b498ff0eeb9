"""A sweep in batches against one run a cell."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
from tests.parity.cases import RANDOM, model_of

LENGTH = 9


@pytest.fixture(scope="module", params=["grouped-query", "Gemma 2"])
def case(request):
    model = model_of(RANDOM[request.param])
    model = model.replace(params=jax.tree.map(jnp.asarray, model.params))
    rng = np.random.default_rng(2)
    texts = rng.integers(1, 320, (2, LENGTH))
    texts[1, :3] = texts[0, :3]
    return model, *texts


def one_by_one(model, clean, corrupted, site, cells, metric):
    """The metric of each (layer, positions, heads), by a run of its own."""
    trace = gnb.trace(model.intervene(), clean, sites=())
    found = []
    for layer, positions, heads in cells:
        patch = gnb.Patch.from_trace(trace, site, layer, positions, heads=heads)
        found.append(metric(model.intervene(patch)(gnb.GemmaInputs(corrupted)).values[-1]))
    return np.array(found)


def difference(logits):
    return logits[7] - logits[9]


METRIC = gnb.LogitDifference(7, 9)


@pytest.mark.parametrize("site", ["residual_pre", "attn_out"])
def test_layers_and_positions(case, site):
    model, clean, corrupted = case
    layers = (0, 2, model.config.num_layers - 1)
    found = gnb.activation_patching(model, clean, corrupted, METRIC, site=site, progress=False)
    assert found.dims == ("layer", "position")
    assert found.shape == (model.config.num_layers, LENGTH)
    cells = [(i, [p], None) for i, p in itertools.product(layers, (0, 3, 5, 8))]
    expected = one_by_one(model, clean, corrupted, site, cells, difference)
    got = [float(found.sel(layer=i, position=p[0])) for i, p, _ in cells]
    np.testing.assert_allclose(got, expected, atol=3e-5)
    ends = [difference(model(gnb.GemmaInputs(x)).values[-1]) for x in (clean, corrupted)]
    np.testing.assert_allclose([found.attrs["clean"], found.attrs["corrupted"]], ends, atol=3e-5)
    # The same tokens at the same places: there is nothing to patch.
    np.testing.assert_allclose(found.values[:, :3], ends[1], atol=3e-5)
    assert found.clean_token.values[4] == str(clean[4])
    assert found.attrs["site"] == site


def test_heads_and_any_metric(case):
    model, clean, corrupted = case
    found = gnb.activation_patching(
        *(model, clean, corrupted, lambda logits: jnp.max(logits) - logits[7]),
        over=("layer", "head"),
        progress=False,
    )
    assert (found.dims, found.attrs["site"]) == (("layer", "head"), "z")
    cells = [(i, None, [n]) for i, n in ((0, 1), (2, 3), (3, 0))]
    expected = one_by_one(
        model, clean, corrupted, "z", cells, lambda logits: logits.max() - logits[7]
    )
    got = [float(found.sel(layer=i, head=n[0])) for i, _, n in cells]
    np.testing.assert_allclose(got, expected, atol=3e-5)


def test_heads_at_positions_under_other_interventions(case):
    model, clean, corrupted = case
    model = model.intervene(gnb.ScaleHeads({1: {0: 2.0}}), gnb.KnockOut(2, keys=[0], queries=[7]))
    found = gnb.activation_patching(
        *(model, clean, corrupted, gnb.Logit(7)),
        over=("layer", "position", "head"),
        progress=False,
    )
    assert found.dims == ("layer", "position", "head")
    trace = gnb.trace(model, clean, sites=())
    for i, p, n in ((0, 4, 2), (3, 8, 1)):
        patch = gnb.Patch.from_trace(trace, "z", i, p, heads=[n])
        expected = model.intervene(patch)(gnb.GemmaInputs(corrupted)).values[-1, 7]
        assert float(found[i, p, n]) == pytest.approx(float(expected), abs=3e-5)
    assert len(found.attrs["interventions"].splitlines()) == 2


@pytest.mark.parametrize("over", [("position",), ("head",), ("position", "head")])
def test_without_layers_all_of_them_are_patched_at_once(case, over):
    model, clean, corrupted = case
    found = gnb.activation_patching(
        *(model, clean, corrupted, METRIC), over=over, site="z", progress=False
    )
    assert found.dims == over
    trace = gnb.trace(model, clean, sites=())
    for p, n in ((4, 1), (8, 3)):
        position, heads = (p if "position" in over else None), ([n] if "head" in over else None)
        patches = [
            gnb.Patch.from_trace(trace, "z", i, position, heads=heads)
            for i in range(model.config.num_layers)
        ]
        logits = model.intervene(*patches)(gnb.GemmaInputs(corrupted)).values[-1]
        got = found.sel({name: at for name, at in (("position", p), ("head", n)) if name in over})
        assert float(got) == pytest.approx(float(difference(logits)), abs=3e-5)


def test_metrics_are_of_tokens_by_id_or_text(tiny_model):
    model, tokenizer = tiny_model
    a, b = (tokenizer.encode(text)[0] for text in "ab")
    found = [
        gnb.activation_patching(
            *(model, "Hi you", "Hi yes", metric), tokenizer=tokenizer, progress=False
        )
        for metric in (gnb.LogitDifference("a", "b"), gnb.LogitDifference(a, b))
    ]
    np.testing.assert_array_equal(*found)
    names = [tokenizer.token_text(i) for i in (a, b)]
    for sweep in found:
        assert sweep.attrs["metric"] == "logit of {!r} minus logit of {!r}".format(*names)
    with pytest.raises(ValueError, match="'ab' is 2 tokens"):
        gnb.activation_patching(
            model, "Hi", "Ho", gnb.Logit("ab"), tokenizer=tokenizer, progress=False
        )


def test_a_sweep_compiles_each_kind_of_layer_once(case):
    from gemma_nb.interp import packing

    model, clean, corrupted = case
    gnb.activation_patching(model, clean, corrupted, METRIC, progress=False)
    compiled = packing.run_layer._cache_size()
    gnb.activation_patching(model, corrupted, clean, gnb.LogitDifference(3, 4), progress=False)
    assert packing.run_layer._cache_size() == compiled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupted": [1, 2]}, "one length, got 9 and 2"),
        ({"over": ("layer", "token")}, "some of layer, position, head"),
        ({"site": "q"}, "site must be one of residual_pre"),
        ({"over": ("layer", "head"), "site": "residual"}, "patches z"),
        ({"metric": gnb.Logit(320)}, "0 to 319, got 320"),
        ({"metric": gnb.LogitDifference(" a", 3)}, "needs a tokenizer"),
        ({"metric": "Paris"}, "a metric is"),
        ({"metric": lambda logits: logits[:2]}, "one number"),
    ],
)
def test_what_cannot_be_swept_is_refused(case, change, message):
    model, clean, corrupted = case
    call = {"clean": clean, "corrupted": corrupted, "metric": METRIC, "progress": False}
    with pytest.raises(ValueError, match=message):
        gnb.activation_patching(model, **{**call, **change})
