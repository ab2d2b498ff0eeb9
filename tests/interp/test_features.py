"""Neurons over texts, and sparse autoencoders made for the purpose."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import gemma_nb as gnb

TEXTS = ["Hello there", "A bird in the hand", "is worth two"]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {
        "W_enc": rng.normal(size=(32, 50)).astype(np.float32),
        "b_enc": rng.normal(size=50).astype(np.float32),
        "W_dec": rng.normal(size=(50, 32)).astype(np.float32),
        "b_dec": rng.normal(size=32).astype(np.float32),
        "threshold": np.full(50, 0.7, np.float32),
    }


@pytest.fixture(params=[".npz", ".safetensors"])
def sae(request, arrays, tmp_path):
    path = tmp_path / f"params{request.param}"
    if request.param == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name.lower(): value for name, value in arrays.items()}, path)
    return gnb.SparseAutoencoder.load(path, layer=1)


@pytest.fixture(scope="module")
def trace(tiny_model):
    model, tokenizer = tiny_model
    return gnb.trace(model, TEXTS[0], tokenizer=tokenizer, sites=())


def test_features_are_the_formula(sae, arrays, trace):
    found = sae.features(trace)
    pre = trace.residual.values[1] @ arrays["W_enc"] + arrays["b_enc"]
    expected = np.where(pre > 0.7, pre, 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dims == ("position", "feature")
    assert found.token.values.tolist() == list(trace.labels)
    some = sae.features(trace, positions=[2, -1])
    np.testing.assert_allclose(some, expected[[2, -1]], atol=1e-5)
    top = sae.top_features(trace, 3)
    np.testing.assert_array_equal(top.feature, np.argsort(-expected, kind="stable")[:, :3])
    np.testing.assert_allclose(top.activation, -np.sort(-expected)[:, :3], atol=1e-5)
    rebuilt = expected[1:] @ arrays["W_dec"] + arrays["b_dec"]
    x = trace.residual.values[1][1:]
    share = ((x - rebuilt) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert sae.unexplained(trace) == pytest.approx(share, rel=1e-4)


def test_steering_by_a_feature_adds_its_decoder_row(sae, arrays, tiny_model, trace):
    model, _ = tiny_model
    steered = model.intervene(sae.steer(7, 2.0, positions=[3]))
    after = gnb.trace(steered, trace.tokens, sites="residual").residual.values[1]
    expected = trace.residual.values[1].copy()
    expected[3] += 2 * arrays["W_dec"][7]
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_texts_that_activate_a_feature(sae, arrays, tiny_model):
    model, tokenizer = tiny_model
    found = sae.top_activations(model, tokenizer, TEXTS, 7, k=4)
    best = []
    for number, text in enumerate(TEXTS):
        traced = gnb.trace(model, text, tokenizer=tokenizer, sites=())
        values = sae.features(traced).values[:, 7]
        best += [(v, number, p) for p, v in enumerate(values) if p and v > 0]
    best.sort(key=lambda row: -row[0])
    np.testing.assert_allclose(found.activation, [v for v, _, _ in best[:4]], atol=1e-5)
    assert int(found.text[0]) == best[0][1]


def test_texts_that_activate_a_neuron(tiny_model):
    model, tokenizer = tiny_model
    found = gnb.top_activations(model, tokenizer, TEXTS, layer=2, neuron=11, k=5)
    values = np.concatenate(
        [
            gnb.trace(model, t, tokenizer=tokenizer, sites=()).mlp_hidden.values[2][1:, 11]
            for t in TEXTS
        ]
    )
    np.testing.assert_allclose(found.activation, -np.sort(-values)[:5], atol=1e-6)
    text, position = TEXTS[int(found.text[0])], int(found.position[0])
    assert tokenizer.encode(text, bos=True)[position] == int(found.token_id[0])
    assert found.token.values[0] == tokenizer.token_text(int(found.token_id[0]))
    assert found.context.values[0]
    one = gnb.top_activations(model, tokenizer, TEXTS[0], layer=2, neuron=11, k=2)
    assert one.text.values.tolist() == [0, 0]  # a text, not its letters
    changed = model.intervene(gnb.AblateMLP(0))
    under = gnb.top_activations(changed, tokenizer, TEXTS, layer=2, neuron=11, k=1)
    assert under.attrs["interventions"] == "ablate MLPs 0 (zero) at all positions"
    with pytest.raises(ValueError, match="k must be at least 1"):
        gnb.top_activations(model, tokenizer, TEXTS, layer=2, neuron=11, k=0)
    for change in ({"neuron": 64}, {"layer": 3}, {"texts": []}, {"site": "q"}):
        call = {"texts": TEXTS, "layer": 0, "neuron": 0, **change}
        with pytest.raises(ValueError, match=r"does not exist|is empty|one vector"):
            gnb.top_activations(model, tokenizer, **call)


def test_first_positions_and_repeated_texts_are_no_examples(tiny_model):
    """As SAELens and Neuronpedia count: <bos> is the same in every text and floods every list."""
    model, tokenizer = tiny_model
    ids = tokenizer.encode("ab", bos=True)
    # A neuron that is most active at <bos>, of texts that are packed one behind the other.
    traced = gnb.trace(model, [*ids, *ids], sites=())
    hidden = traced.mlp_hidden.values[0]
    neuron = int((hidden[0] - hidden[1:3].max(axis=0)).argmax())
    call = {"layer": 0, "neuron": neuron, "k": 9}
    packed = gnb.top_activations(model, tokenizer, [[*ids, *ids]], **call)
    assert sorted(packed.position.values) == [1, 2, 4, 5]
    everything = gnb.top_activations(model, tokenizer, [[*ids, *ids]], **call, include_first=True)
    assert set(everything.position.values) >= {0, 3}
    assert everything.sizes["rank"] == 6
    twice = gnb.top_activations(model, tokenizer, ["ab", "cd", "ab"], **call)
    assert sorted(zip(twice.text.values, twice.position.values, strict=True)) == [
        *((0, 1), (0, 2)),
        *((1, 1), (1, 2)),
    ]
    with pytest.raises(ValueError, match="no position but the first"):
        gnb.top_activations(model, tokenizer, [""], **call)


def test_a_feature_that_is_never_on_has_no_examples(sae, tiny_model):
    model, tokenizer = tiny_model
    off = dataclasses.replace(sae, threshold=jnp.full(50, 1e9))
    assert off.top_activations(model, tokenizer, TEXTS, 7).sizes["rank"] == 0


def test_equal_activations_come_in_the_order_of_the_texts(sae, tiny_model):
    model, tokenizer = tiny_model
    same = dataclasses.replace(sae, w_enc=jnp.zeros((32, 50)), b_enc=jnp.ones(50))
    found = same.top_activations(model, tokenizer, TEXTS, 7, k=3)
    assert found.text.values.tolist() == [0, 0, 0]
    assert found.position.values.tolist() == [1, 2, 3]


def test_files_that_are_no_autoencoder_are_refused(arrays, tmp_path, trace):
    np.savez(tmp_path / "short.npz", W_enc=arrays["W_enc"])
    with pytest.raises(ValueError, match="lacks b_dec, b_enc, w_dec"):
        gnb.SparseAutoencoder.load(tmp_path / "short.npz", layer=0)
    np.savez(tmp_path / "wrong.npz", **{**arrays, "W_dec": arrays["W_enc"]})
    with pytest.raises(ValueError, match=r"w_dec is \(32, 50\), expected \(50, 32\)"):
        gnb.SparseAutoencoder.load(tmp_path / "wrong.npz", layer=0)
    for name in ("text.npz", "text.safetensors"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(ValueError, match=f"{name} cannot be read as a file of arrays"):
            gnb.SparseAutoencoder.load(tmp_path / name, layer=0)
    np.savez(tmp_path / "number.npz", **{**arrays, "b_dec": np.float32(3)})
    with pytest.raises(ValueError, match=r"number\.npz: w_enc is \(32, 50\), expected \(1, 50\)"):
        gnb.SparseAutoencoder.load(tmp_path / "number.npz", layer=0)
    with pytest.raises(FileNotFoundError, match=r"none\.npz does not exist"):
        gnb.SparseAutoencoder.load(tmp_path / "none.npz", layer=0)
    with pytest.raises(ValueError, match=r"\.npz or \.safetensors"):
        gnb.SparseAutoencoder.load(tmp_path / "x.pt", layer=0)
    narrow = gnb.SparseAutoencoder(
        *(jnp.zeros((8, 5)), jnp.zeros(5), jnp.zeros((5, 8)), jnp.zeros(8), jnp.zeros(5)), layer=0
    )
    with pytest.raises(ValueError, match="vectors of 8 numbers, residual has 32"):
        narrow.features(trace)
    with pytest.raises(ValueError, match="feature 5 does not exist"):
        narrow.steer(5, 1.0)
