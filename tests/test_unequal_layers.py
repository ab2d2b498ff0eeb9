"""A model whose layers differ in shape scores, decodes, is traced and patched as any other."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
import tests.tiny
from gemma_nb import presets
from gemma_nb.checkpoints.infer import from_json, to_json
from gemma_nb.checkpoints.layout import leaves
from gemma_nb.config import Global, LayerSpec, Sliding, TransformerConfig, interleave
from gemma_nb.interventions.checks import shape_of
from gemma_nb.sampling.cache import ring_layers
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.settings import Sampling

LOCAL, WIDE = Sliding(6), {"head_dim": 12, "num_kv_heads": 2, "hidden_dim": 40}
CONFIG = TransformerConfig(
    *(60, 16, 24, 2, 1, 8),
    layers=(
        LayerSpec(LOCAL),
        LayerSpec(LOCAL, **WIDE),
        LayerSpec(Global(), 1e6, **WIDE),
        LayerSpec(LOCAL),
        LayerSpec(Global(), 1e6, 2.0, head_dim=4),
    ),
    query_pre_attn_scalar=8,
    final_logit_soft_cap=30.0,
)
IDS = np.random.default_rng(0).integers(1, 60, 15).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return tests.tiny.random_model(CONFIG)


def norm(x, params=None):
    y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return y if params is None else y * (1 + params["scale"])


def turned(x, base, scale):
    """RoPE of (T, heads, H)."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] / scale * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference(params, ids):
    """(T, V) logits in float64, from the formulas."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = p["embedder"]["input_embedding"][ids] * np.sqrt(CONFIG.embed_dim)
    at = np.arange(len(ids))
    for i, spec in enumerate(CONFIG.layers):
        layer = p[f"layer_{i}"]
        attn, y = layer["attn"], norm(x, layer["pre_attention_norm"])
        if "qkv_einsum" in attn:
            q, k, v = np.einsum("TD,CNDH->CTNH", y, attn["qkv_einsum"]["w"])
        else:
            q = np.einsum("TD,NDH->TNH", y, attn["q_einsum"]["w"])
            k, v = np.einsum("TD,CKDH->CTKH", y, attn["kv_einsum"]["w"])
        q = turned(norm(q, attn["_query_norm"]), *spec.rotation) / np.sqrt(8)
        k = turned(norm(k, attn["_key_norm"]), *spec.rotation)
        k, v = (np.repeat(each, 2 // each.shape[1], axis=1) for each in (k, v))
        scores = np.einsum("TNH,SNH->TNS", q, k)
        window = getattr(spec.kind, "window", len(ids))
        seen = (at <= at[:, None]) & (at > at[:, None] - window)
        weights = np.exp(np.where(seen[:, None], scores, -np.inf))
        z = np.einsum("TNS,SNH->TNH", weights / weights.sum(-1, keepdims=True), v)
        y = np.einsum("TNH,NHD->TD", z, attn["attn_vec_einsum"]["w"])
        x = x + norm(y, layer["post_attention_norm"])
        gate, up = np.einsum(
            "TD,CFD->CTF", norm(x, layer["pre_ffw_norm"]), layer["mlp"]["gating_einsum"]
        )
        x = x + norm((gelu(gate) * up) @ layer["mlp"]["linear"], layer["post_ffw_norm"])
    logits = norm(x, p["final_norm"]) @ p["embedder"]["input_embedding"].T
    return 30 * np.tanh(logits / 30)


def test_sizes_are_the_layers_own_or_the_configurations():
    sizes = [CONFIG.axis_sizes(i) for i in range(5)]
    assert [(s["K"], s["H"], s["F"]) for s in sizes] == [
        *((1, 8, 24), (2, 12, 40), (2, 12, 40), (1, 8, 24), (1, 4, 24))
    ]
    assert {(s["V"], s["D"], s["N"]) for s in sizes} == {(60, 16, 2)}
    assert CONFIG.axis_sizes(CONFIG.layers[1]) == sizes[1]
    assert CONFIG.shared_size("N") == 2
    assert CONFIG.shared_size("H", [1, 2]) == 12
    with pytest.raises(ValueError, match=r"differ in head_dim \(8 in layers \[0, 3\], 12 in"):
        CONFIG.shared_size("H", [0, 1, 3])


def test_layers_without_sizes_are_written_as_before():
    """Chat files hold a digest of it, so that `repr` must not change."""
    one = LayerSpec(Sliding(8), 1e4)
    assert repr(one) == "LayerSpec(kind=Sliding(window=8), rope_base=10000.0, rope_scale=1.0)"
    assert repr(CONFIG.layers[4]).endswith("rope_scale=2.0, head_dim=4)")
    config = TransformerConfig(60, 16, 24, 2, 1, 8, interleave(2, window=8), 8)
    assert config == TransformerConfig(60, 16, 24, 2, 1, 8, interleave(2, window=8), 8)
    assert config != dataclasses.replace(config, layers=(one, LayerSpec(Sliding(8), head_dim=4)))
    assert to_json(config)["layers"][0] == {"window": 8, "rope_base": 1e4, "rope_scale": 1.0}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"head_dim": 5}, "even"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
    ],
)
def test_impossible_layers_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, layers=(LayerSpec(Global(), **own),))


def test_configurations_go_to_json_and_back():
    assert from_json(json.loads(json.dumps(to_json(CONFIG))), "it") == CONFIG
    assert from_json(to_json(presets.GEMMA3_1B), "it") == presets.GEMMA3_1B


def test_parameters_have_their_layers_shapes(model):
    flat = {leaf.path: leaf.shape for leaf in leaves(CONFIG)}
    for path, shape in flat.items():
        found = model.params
        for name in path:
            found = found[name]
        assert found.shape == shape, path
    assert sum(x.size for x in jax.tree.leaves(model.params)) == CONFIG.num_params()


def test_scores_are_those_of_the_formulas(model):
    logits = model.transformer.apply({"params": model.params}, jnp.asarray(IDS[None])).logits[0]
    np.testing.assert_allclose(logits, reference(model.params, IDS), atol=2e-5)


@pytest.mark.parametrize("size", [6, 20])
def test_a_cache_of_each_layers_shape_gives_the_same(model, size):
    """Also where a layer's cache is one window long, which makes it a ring."""
    cache = model.transformer.init_cache(batch_size=1, dtype=jnp.float32, cache_length=20)
    assert cache["layer_1"]["k"].shape == (1, 20, 2, 12)
    assert cache["layer_4"]["k"].shape == (1, 20, 1, 4)
    for i, spec in enumerate(CONFIG.layers):
        if spec.kind == LOCAL:
            layer = cache[f"layer_{i}"]
            cut = {name: layer[name][:, :size] for name in ("k", "v", "positions")}
            cache[f"layer_{i}"] = layer | cut
    step = jax.jit(
        lambda tokens, cache: model.transformer.apply({"params": model.params}, tokens, cache=cache)
    )
    found = []
    for start, stop in ((0, 9), *((i, i + 1) for i in range(9, 15))):
        output = step(IDS[None, start:stop], cache)
        cache, found = output.cache, [*found, *output.logits[0]]
    np.testing.assert_allclose(np.stack(found), reference(model.params, IDS), atol=2e-5)


def test_rings_are_of_one_shape():
    assert ring_layers(CONFIG) == (True, False, False, True, False)


@pytest.mark.parametrize("storage", ["exact", "bfloat16", "int8"])
def test_decoding_follows_the_scores(model, storage):
    if storage != "exact":
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
        model = gnb.GemmaTransformer.from_pretrained(rounded, config=CONFIG)
    if storage == "int8":
        model = dataclasses.replace(model, storage="int8")
    decoder = Decoder(model, limit=64, top_k=3)
    prompt = IDS.tolist()
    rest = decoder.begin(prompt, Sampling(temperature=0, seed=0))
    evidence, ids = decoder.prefill(rest), list(prompt)
    tolerance = {"exact": 1e-4, "bfloat16": 3e-3, "int8": 0.3}[storage]
    for _ in range(8):
        token = int(evidence.token)
        logits = reference(model.params, np.array(ids))[-1]
        expected = logits - np.log(np.exp(logits).sum())
        np.testing.assert_allclose(evidence.logprob, expected[token], atol=tolerance)
        assert logits[token] >= logits.max() - tolerance
        ids.append(token)
        evidence = decoder.step()
    # A text that goes on from an earlier place takes tokens back.
    evidence = decoder.prefill(decoder.begin([*ids[:12], 5], Sampling(temperature=0, seed=0)))
    logits = reference(model.params, np.array([*ids[:12], 5]))[-1]
    assert logits.max() - logits[int(evidence.token)] <= tolerance


def test_traces_hold_layers_of_one_shape(model, tmp_path):
    trace = gnb.trace(model, IDS, sites=("attention", "residual", "q_pre"), layers=[1, 2])
    assert dict(trace.q_pre.sizes) == {"layer": 2, "position": 15, "head": 2, "head_dim": 12}
    assert trace.attention.kv_group.values.tolist() == [0, 1]
    every = gnb.trace(model, IDS)
    assert every.attention.shape == (5, 2, 15, 15)
    assert "kv_group" not in every.attention.coords
    np.testing.assert_allclose(every.get("logits").values, reference(model.params, IDS), atol=2e-5)
    for site in ("k", "z", "mlp_hidden"):
        with pytest.raises(ValueError, match=f"{site} cannot be stacked: the layers differ in"):
            every.get(site)
        shapes = {i: every.get(site, i).shape[2:] for i in (0, 2)}
        assert shapes == {i: shape_of(site, CONFIG, i) for i in (0, 2)}
    trace.save(tmp_path / "it.nc")
    assert gnb.Trace.load(tmp_path / "it.nc").config == CONFIG


def test_long_traces_go_through_layers_in_pieces(model, monkeypatch):
    monkeypatch.setattr("gemma_nb.interp.passes.LENGTHS", (8,))
    monkeypatch.setattr("gemma_nb.interp.passes.PIECE", 512)
    trace = gnb.trace(model, IDS, sites=("residual",))
    plain = reference(model.params, IDS)
    np.testing.assert_allclose(trace.get("logits").values, plain, atol=2e-5)


def test_sweeps_and_gradients_go_through_unequal_layers(model):
    other = IDS.copy()
    other[3] = 7
    metric = gnb.LogitDifference(3, 4)
    cells = gnb.activation_patching(model, IDS, other, metric, progress=False)
    # All of the last position, before the last layer, decides.
    np.testing.assert_allclose(cells[:, 2], cells.attrs["corrupted"], atol=1e-5)
    logits = reference(model.params, IDS)[-1]
    np.testing.assert_allclose(cells.attrs["clean"], logits[3] - logits[4], atol=1e-4)
    gnb.activation_patching(model, IDS, other, metric, over=("layer", "head"), progress=False)
    shares = gnb.token_attribution(gnb.trace(model, IDS), 3)
    expected = logits[3] - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(shares.attrs["value"], expected, atol=1e-4)


def test_interventions_know_their_layers_shape(model):
    model.intervene(gnb.Patch("k", 1, 3, np.zeros((2, 12))))
    with pytest.raises(ValueError, match=r"\(1, 8\)"):
        model.intervene(gnb.Patch("k", 0, 3, np.zeros((2, 12))))
    model.intervene(gnb.EditNeuron(1, 39, 1.0))
    with pytest.raises(ValueError, match="neurons 0 to 23"):
        model.intervene(gnb.EditNeuron(0, 39, 1.0))
