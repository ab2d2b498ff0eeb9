"""Files of autoencoders as SAELens, Gemma Scope and Gemma Scope 2 write them.

References: the formulas of SAELens (`sae_lens/saes/*.py`: `process_sae_in`, `encode`, `decode` of
each architecture), written anew in numpy, in float64.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import gemma_nb as gnb

D, F = 32, 50
RNG = np.random.default_rng(0)
X = RNG.normal(size=(9, D)).astype(np.float32)
P = {
    "W_enc": RNG.normal(size=(D, F)),
    "b_enc": RNG.normal(size=F),
    "W_dec": RNG.normal(size=(F, D)),
    "b_dec": RNG.normal(size=D),
    "threshold": np.abs(RNG.normal(size=F)),
    "b_gate": RNG.normal(size=F),
    "b_mag": RNG.normal(size=F),
    "r_mag": RNG.normal(scale=0.3, size=F),
    "W_skip": RNG.normal(size=(D, D)),
}
P = {name: value.astype(np.float32) for name, value in P.items()}
HOOK = "blocks.1.hook_resid_post"


def written(folder, names, config, *, name="sae_weights.safetensors", into="cfg.json"):
    folder.mkdir(exist_ok=True)
    save_file({n: P[n] for n in names}, folder / name)
    (folder / into).write_text(json.dumps(config))
    return folder


def relu(x):
    return np.maximum(x, 0)


def reference(config, x):
    """(features, what is rebuilt), as SAELens computes them."""
    p = {name: value.astype(np.float64) for name, value in P.items()}
    x, kind = x.astype(np.float64), config["architecture"]
    times, plus = 1.0, 0.0
    if config.get("normalize_activations") == "constant_norm_rescale":
        times = np.linalg.norm(x, axis=-1, keepdims=True) / D**0.5
        x = x / times
    if config.get("normalize_activations") == "layer_norm":
        plus = x.mean(axis=-1, keepdims=True)
        times = (x - plus).std(axis=-1, ddof=1, keepdims=True)
        x = (x - plus) / (times + 1e-5)
    if config.get("apply_b_dec_to_input", True):
        x = x - p["b_dec"]
    if kind == "gated":
        on = x @ p["W_enc"] + p["b_gate"] > 0
        f = on * relu(x @ (p["W_enc"] * np.exp(p["r_mag"])) + p["b_mag"])
    else:
        pre = x @ p["W_enc"] + p["b_enc"]
        f = relu(pre)
        norms = np.linalg.norm(p["W_dec"], axis=-1)
        rescaled = config.get("rescale_acts_by_decoder_norm")
        if rescaled:
            pre = pre * norms
        if kind == "jumprelu":
            f = f * (pre > p["threshold"])
        if k := config.get("k") or config.get("activation_fn_kwargs", {}).get("k"):
            f = np.where(pre >= np.sort(pre, axis=-1)[:, -k, None], relu(pre), 0)
        return f, (((f / norms) if rescaled else f) @ p["W_dec"] + p["b_dec"]) * times + plus
    return f, (f @ p["W_dec"] + p["b_dec"]) * times + plus


PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
GATED = ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")
OLD = {"hook_point": HOOK, "hook_point_layer": 1}
NEW = {"metadata": {"hook_name": HOOK, "sae_lens_version": "6.12.1"}}


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (PLAIN, {"architecture": "standard", **NEW}),
        (PLAIN, {"architecture": "standard", "apply_b_dec_to_input": False, **OLD}),
        ((*PLAIN, "threshold"), {"architecture": "jumprelu", "apply_b_dec_to_input": False, **NEW}),
        ((*PLAIN, "threshold"), {"architecture": "jumprelu", "hook_name": HOOK, "hook_layer": 1}),
        (GATED, {"architecture": "gated", **NEW}),
        (PLAIN, {"architecture": "topk", "k": 5, **NEW}),
        (
            PLAIN,
            {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True, **NEW},
        ),
        (
            PLAIN,
            {
                "architecture": "standard",
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": 7},
                **OLD,
            },
        ),
        (PLAIN, {"architecture": "standard", "normalize_activations": "layer_norm", **NEW}),
        (
            PLAIN,
            {"architecture": "standard", "normalize_activations": "constant_norm_rescale", **NEW},
        ),
    ],
)
def test_every_kind_of_saelens_is_its_formula(tmp_path, names, config):
    sae = gnb.SparseAutoencoder.load(written(tmp_path, names, config))
    features, rebuilt = reference(config, X)
    np.testing.assert_allclose(sae.encode(X), features, atol=2e-4)
    np.testing.assert_allclose(sae.reconstruct(X), rebuilt, atol=1e-3)
    assert (sae.layer, sae.site) == (1, "residual")
    if config.get("normalize_activations"):
        with pytest.raises(ValueError, match=r"call reconstruct\(x\)"):
            sae.decode(sae.encode(X))
    else:
        np.testing.assert_allclose(sae.decode(sae.encode(X)), rebuilt, atol=1e-3)


@pytest.mark.parametrize(
    ("hook", "layer", "site", "divided_by"),
    [
        ("blocks.2.hook_resid_pre", 2, "residual_pre", ""),
        ("blocks.0.hook_mlp_out", 0, "mlp_out", ""),
        ("blocks.0.attn.hook_z", 0, "z", ""),
        ("blocks.1.ln2.hook_normalized", 1, "residual_mid", "pre_ffw_rms"),
        ("hook_embed", None, "embed", ""),
        ("model.layers.12.output", 12, "residual", ""),
        ("model.language_model.layers.1.self_attn.o_proj.input", 1, "z", ""),
        ("model.layers.1.post_attention_layernorm.output", 1, "attn_out", ""),
    ],
)
def test_a_hook_point_says_the_layer_and_the_site(tmp_path, hook, layer, site, divided_by):
    config = {"architecture": "standard", "metadata": {"hook_name": hook}}
    sae = gnb.SparseAutoencoder.load(written(tmp_path, PLAIN, config) / "sae_weights.safetensors")
    assert (sae.layer, sae.site, sae.divided_by) == (layer, site, divided_by)
    with pytest.raises(ValueError, match="trained at layer"):
        gnb.SparseAutoencoder.load(tmp_path, layer=7)
    with pytest.raises(ValueError, match="trained at site"):
        gnb.SparseAutoencoder.load(tmp_path, site="mlp_in")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal' is not known"),
        ({"activation_fn": "tanh-relu"}, "activation function 'tanh-relu'"),
        ({"normalize_activations": "zscore"}, "normalize_activations is 'zscore'"),
        ({"architecture": "topk"}, "needs k, got None"),
        ({"architecture": "batchtopk"}, "chooses among all features of a batch"),
        ({"architecture": "jumprelu"}, "lacks threshold"),
        ({"architecture": "gated"}, "lacks b_gate, b_mag, r_mag"),
        ({"hook_name": "blocks.1.attn.hook_q"}, "is no site that is known"),
        ({"hook_layer": 0}, "not in hook_layer 0"),
        ({"hook_head_index": 3}, "reads a single head"),
        ({"architecture": "transcoder"}, r"gnb\.Transcoder\.load"),
        ({"hook_name_out": "blocks.1.hook_mlp_out"}, r"gnb\.Transcoder\.load"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, change, message):
    config = {"architecture": "standard", "hook_name": HOOK, **change}
    with pytest.raises(ValueError, match=message):
        gnb.SparseAutoencoder.load(written(tmp_path, PLAIN, config))


def test_inputs_that_were_scaled_by_a_factor_are_said(tmp_path):
    config = {"architecture": "standard", "normalize_activations": "expected_average_only_in"}
    folder = written(tmp_path, PLAIN, {**config, **NEW})
    with pytest.warns(UserWarning, match="a factor that the file does not hold"):
        sae = gnb.SparseAutoencoder.load(folder)
    np.testing.assert_allclose(sae.encode(X), reference(config, X)[0], atol=2e-4)


def test_damaged_configurations_are_said(tmp_path):
    folder = written(tmp_path, PLAIN, {})
    with pytest.raises(ValueError, match="does not say where it was trained"):
        gnb.SparseAutoencoder.load(folder)
    for text in ("{", "[1]", "[" * 100_000):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(ValueError, match=r"cfg\.json"):
            gnb.SparseAutoencoder.load(folder)


@pytest.mark.parametrize("affine", [False, True])
def test_transcoders_predict_the_output_from_the_input(tmp_path, tiny_model, affine):
    """As Gemma Scope 2's: JumpReLU, plus x times the affine part where there is one."""
    arrays = {n.lower(): P[n] for n in (*PLAIN, "threshold")}
    if affine:
        arrays["affine_skip_connection"] = P["W_skip"]
    save_file(arrays, tmp_path / "params.safetensors")
    layer = "model.layers.1"
    config = {
        "hf_hook_point_in": f"{layer}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": f"{layer}.post_feedforward_layernorm.output",
        "architecture": "jump_relu",
        "affine_connection": affine,
        "type": "transcoder",
        "width": F,
        "l0": 10,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"a transcoder.*gnb\.Transcoder\.load"):
        gnb.SparseAutoencoder.load(tmp_path, layer=1, site="mlp_in")
    coder = gnb.Transcoder.load(tmp_path)
    model, tokenizer = tiny_model
    trace = gnb.trace(model, "Hello there", tokenizer=tokenizer, sites=())
    x = trace.get("mlp_in", 1).values[0].astype(np.float64)
    pre = x @ P["W_enc"] + P["b_enc"]
    features = relu(pre) * (pre > P["threshold"])
    predicted = features @ P["W_dec"] + P["b_dec"] + (x @ P["W_skip"] if affine else 0)
    np.testing.assert_allclose(coder.features(trace), features, atol=2e-4)
    np.testing.assert_allclose(coder.reconstruct(x), predicted, atol=1e-3)
    y = trace.get("mlp_out", 1).values[0][1:]
    share = ((y - predicted[1:]) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert coder.unexplained(trace) == pytest.approx(share, rel=1e-3)
    assert (coder.steer(3, 1.0).site, int(coder.steer(3, 1.0).layer)) == ("mlp_out", 1)
    if affine:
        with pytest.raises(ValueError, match="skip connection"):
            coder.decode(features)
    else:
        np.testing.assert_allclose(coder.decode(features), predicted, atol=1e-3)


def test_saelens_keeps_a_skip_connection_transposed(tmp_path):
    config = {"architecture": "skip_transcoder", "apply_b_dec_to_input": False}
    hooks = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    folder = written(tmp_path, (*PLAIN, "W_skip"), {**config, "metadata": hooks})
    coder = gnb.Transcoder.load(folder)
    expected = relu(X @ P["W_enc"] + P["b_enc"]) @ P["W_dec"] + P["b_dec"] + X @ P["W_skip"].T
    np.testing.assert_allclose(coder.reconstruct(X), expected, atol=1e-3)
    assert (coder.site, coder.divided_by, coder.site_out) == (
        *("residual_mid", "pre_ffw_rms"),
        "mlp_out",
    )
    with pytest.raises(ValueError, match="an autoencoder of one site"):
        gnb.Transcoder.load(written(tmp_path, PLAIN, {"architecture": "standard", **NEW}))


def test_attention_autoencoders_read_all_heads_side_by_side(tmp_path, tiny_model):
    np.savez(tmp_path / "params.npz", **{n: P[n] for n in (*PLAIN, "threshold")})
    sae = gnb.SparseAutoencoder.load(tmp_path, layer=1, site="z")  # 2 heads of 16 numbers
    model, tokenizer = tiny_model
    trace = gnb.trace(model, "Hello there", tokenizer=tokenizer, sites=())
    z = trace.get("z", 1).values[0]
    pre = z.reshape(len(z), D) @ P["W_enc"] + P["b_enc"]
    np.testing.assert_allclose(sae.features(trace), relu(pre) * (pre > P["threshold"]), atol=2e-4)
    steered = gnb.trace(model.intervene(sae.steer(7, 2.0)), trace.tokens, sites=())
    moved = steered.get("z", 1).values[0] - z
    np.testing.assert_allclose(
        moved, np.broadcast_to(2 * P["W_dec"][7].reshape(2, 16), z.shape), atol=1e-5
    )


def test_what_is_divided_by_a_norm_is_read_so(tmp_path, tiny_model):
    config = {"architecture": "standard", "hook_name": "blocks.1.ln1.hook_normalized"}
    sae = gnb.SparseAutoencoder.load(written(tmp_path, PLAIN, config))
    model, tokenizer = tiny_model
    trace = gnb.trace(model, "Hello there", tokenizer=tokenizer, sites=())
    x = trace.get("attn_in", 1).values[0]
    x = x / (1 + np.asarray(model.params["layer_1"]["pre_attention_norm"]["scale"]))
    np.testing.assert_allclose(sae.features(trace), reference(config, x)[0], atol=1e-3)
    with pytest.raises(ValueError, match="no vector can be added"):
        sae.steer(0, 1.0)
