"""The capture sites add up: what a user can check, on Gemma 1, 2 and 3."""

import flax
import jax
import numpy as np
import pytest

import gemma_nb as gnb
from tests.parity.cases import RANDOM, model_of

CASES = ("grouped-query", "multi-head", "Gemma 1 multi-query", "Gemma 2")


@pytest.fixture(scope="module", params=CASES)
def traced(request):
    model = model_of(RANDOM[request.param])
    return model, gnb.trace(model, RANDOM[request.param].tokens()[:60], sites=())


def assert_close(actual, expected, factor=1.0):
    expected = np.asarray(expected)
    noise = factor * 3e-6 * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=noise)


def test_embedding_and_all_outputs_add_up_to_the_last_residual(traced):
    _, trace = traced
    total = trace.embed + trace.attn_out.sum("layer") + trace.mlp_out.sum("layer")
    assert_close(total, trace.residual.isel(layer=-1))


def test_each_residual_is_the_one_before_plus_what_is_added(traced):
    _, trace = traced
    assert_close(trace.residual_pre[0], trace.embed)
    assert_close(trace.residual_pre[1:], trace.residual[:-1])
    assert_close(trace.residual_mid, trace.residual_pre + trace.attn_out)
    assert_close(trace.residual, trace.residual_mid + trace.mlp_out)


def test_heads_add_up_to_attention(traced):
    model, trace = traced
    assert_close(trace.head_out.sum("head"), trace.attn_raw)
    if model.config.use_post_attn_norm:
        layers = [model.params[f"layer_{i}"] for i in range(model.config.num_layers)]
        scale = 1 + np.stack([layer["post_attention_norm"]["scale"] for layer in layers])
        frozen = trace.head_out / trace.post_attention_rms * scale[:, None, None]
        assert_close(frozen.sum("head"), trace.attn_out)
    else:
        assert_close(trace.attn_raw, trace.attn_out, factor=0)


def test_attention_is_the_softmax_of_the_scores(traced):
    _, trace = traced
    np.testing.assert_allclose(trace.attention.sum("key"), 1, atol=1e-6)
    scores = trace.scores.values
    assert_close(jax.nn.softmax(scores, axis=-1), trace.attention)
    never = trace.attention.values == 0
    assert np.isneginf(scores[never]).all()
    cap = trace.config.attn_logits_soft_cap
    assert cap is None or np.abs(scores[np.isfinite(scores)]).max() <= cap


def test_attention_times_values_is_z(traced):
    _, trace = traced
    values = trace.v.values[:, :, trace.attention.kv_group.values]  # (layer, key, head, head_dim)
    assert_close(np.einsum("LNQS,LSNH->LQNH", trace.attention.values, values), trace.z)


def test_norms_divide_by_their_scale(traced):
    model, trace = traced
    for site, of, scale in (
        ("attn_in", "residual_pre", "pre_attention"),
        ("mlp_in", "residual_mid", "pre_ffw"),
    ):
        for i in range(trace.config.num_layers):
            weight = 1 + model.params[f"layer_{i}"][f"{scale}_norm"]["scale"]
            x = trace[of].sel(layer=i) / trace[f"{scale}_rms"].sel(layer=i)
            assert_close(x.values * weight, trace[site].sel(layer=i))
    weight = 1 + model.params["final_norm"]["scale"]
    assert_close((trace.residual[-1] / trace.final_rms).values * weight, trace.final)


def test_feed_forward_is_gelu_of_the_gate_times_up(traced):
    _, trace = traced
    assert_close(jax.nn.gelu(trace.mlp_gate.values) * trace.mlp_up.values, trace.mlp_hidden)


def test_logits_are_the_models(traced):
    model, trace = traced
    assert_close(trace.logits, model(gnb.GemmaInputs(trace.tokens)).values, factor=10)


def test_a_model_lists_the_sites_it_has(traced):
    model, _ = traced
    names = [s.name for s in gnb.list_sites(model)]
    assert ("query_rms" in names) == model.config.use_qk_norm
    assert ("post_ffw_rms" in names) == model.config.use_post_ffw_norm
    assert [s.name for s in gnb.list_sites(model.config)] == names
    for name in {"query_rms", "post_ffw_rms"} - set(names):
        with pytest.raises(ValueError, match=f"no site '{name}'.*its sites are embed"):
            gnb.trace(model, [1, 2], sites=name)
    with pytest.raises(ValueError, match="the sites are embed"):
        gnb.trace(model, [1, 2], sites="attn_probs")


# --- the field's other words

WORDS = {
    "resid_pre": "residual_pre",
    "resid_mid": "residual_mid",
    "resid_post": "residual",
    "pattern": "attention",
}


def test_sites_say_their_other_words(traced):
    model, _ = traced
    assert {s.alias: s.name for s in gnb.list_sites(model) if s.alias} == WORDS


@pytest.mark.parametrize("word", WORDS)
def test_a_site_is_had_by_either_word(traced, word):
    """Everywhere that a site is named; what comes back carries one name, and is held once."""
    model, before = traced
    trace = gnb.trace(model, before.tokens, sites=word)
    assert list(trace.data) == [WORDS[word]]
    assert getattr(trace, word) is trace[word] is trace[WORDS[word]]
    assert trace[word].name == WORDS[word]
    part = trace.get(word, layers=1, positions=[3])
    np.testing.assert_array_equal(part, before.get(WORDS[word], layers=1, positions=[3]))
    assert hasattr(trace, word)
    assert not hasattr(trace, "hook_" + word)


def test_changes_act_at_a_site_by_either_word(traced):
    model, trace = traced
    ids, width = trace.tokens, model.config.embed_dim
    ours = model.intervene(gnb.Steer(1, np.ones(width), site="resid_mid"))
    theirs = model.intervene(gnb.Steer(1, np.ones(width), site="residual_mid"))
    assert ours.interventions.describe() == theirs.interventions.describe()
    assert jax.tree.structure(ours.interventions) == jax.tree.structure(theirs.interventions)
    patch = gnb.Patch.from_trace(trace, "resid_post", 0, [2])
    assert patch.site == gnb.Patch("resid_post", 0, [2], np.ones(width)).site == "residual"
    values = [gnb.trace(m, ids, sites="residual").residual.values for m in (ours, theirs)]
    np.testing.assert_array_equal(*values)
    with pytest.raises(ValueError, match=r"what can be is .*residual \(resid_post\)"):
        gnb.Patch("pattern", 0, [2], np.ones(width))


def test_an_intervention_of_ones_own_may_use_either_word(traced):
    model, trace = traced
    changed = model.intervene(Doubled())
    ours = gnb.trace(changed, trace.tokens, sites="resid_post").resid_post
    assert_close(ours[0], 2 * trace.residual[0])


@flax.struct.dataclass
class Doubled(gnb.interventions.Intervention):
    """The residual stream after layer 0, twice."""

    @property
    def sites(self):
        return ("resid_post",)

    def apply(self, value, layer, positions, keys):
        del positions, keys
        return jax.numpy.where(layer == 0, 2 * value, value)


def test_sweeps_and_vectors_name_sites_by_either_word(traced):
    model, trace = traced
    ids = trace.tokens[:6]
    other = (ids + 1) % model.config.num_embed
    both = [
        gnb.activation_patching(
            *(model, ids, other, gnb.Logit(3)), site=site, over=["layer"], progress=False
        )
        for site in ("resid_mid", "residual_mid")
    ]
    assert both[0].attrs == both[1].attrs
    np.testing.assert_array_equal(*both)
    with pytest.raises(ValueError, match=r"site must be one of residual_pre \(resid_pre\)"):
        gnb.activation_patching(model, ids, other, gnb.Logit(3), site="pattern")


def test_ids_are_had_by_either_word(traced):
    _, trace = traced
    assert trace.token_ids is trace.tokens
