"""Attributions add up to what they attribute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.interp.heads import repeated_tokens
from tests.parity.cases import RANDOM, model_of


@pytest.fixture(scope="module", params=["grouped-query", "Gemma 1 multi-query", "Gemma 2"])
def traced(request):
    model = model_of(RANDOM[request.param])
    model = model.replace(params=jax.tree.map(jnp.asarray, model.params))
    return model, gnb.trace(model, RANDOM[request.param].tokens()[:50], sites=())


def uncapped(trace, token):
    logits = trace.get("logits").values[:, token].astype(np.float64)
    cap = trace.config.final_logit_soft_cap
    return logits if cap is None else cap * np.arctanh(logits / cap)


@pytest.mark.parametrize("by", ["component", "head"])
def test_direct_logit_attributions_add_up_to_the_logit(traced, by):
    _, trace = traced
    shares = gnb.direct_logit_attribution(trace, 7, by=by)
    np.testing.assert_allclose(shares.sum("component"), uncapped(trace, 7), atol=2e-4)
    assert shares.component.values[0] == "embed"
    difference = gnb.direct_logit_attribution(trace, 7, by=by, against=9)
    expected = uncapped(trace, 7) - uncapped(trace, 9)
    np.testing.assert_allclose(difference.sum("component"), expected, atol=3e-4)


def test_heads_and_source_tokens_add_up_to_layers(traced):
    _, trace = traced
    layers = gnb.direct_logit_attribution(trace, 7)
    heads = gnb.direct_logit_attribution(trace, 7, by="head")
    tokens = gnb.direct_logit_attribution(trace, 7, by="token", position=30)
    assert tokens.component.values.tolist() == heads.component.values.tolist()
    assert int(tokens["query"]) == 30
    np.testing.assert_allclose(tokens.sum("position"), heads.sel(position=30), atol=1e-4)
    assert (tokens.sel(position=slice(31, None)) == 0).all()
    for i in range(trace.config.num_layers):
        some = heads.sel(component=[n for n in heads.component.values if n.startswith(f"L{i}.H")])
        np.testing.assert_allclose(
            some.sum("component"), layers.sel(component=f"L{i}.attn"), atol=1e-4
        )


CHANGES = [
    gnb.AblateHeads({1: [2]}),
    gnb.ScaleHeads({1: {2: 3.0}}, positions=[4, 30]),
    gnb.Steer(2, np.linspace(-1, 1, 64), 5.0),
    gnb.Steer(None, np.ones(64), site="final"),
    gnb.Steer(1, np.linspace(-1, 1, 64), 5.0, site="attn_out"),
    gnb.AblateMLP(1),
    gnb.KnockOut(1, keys=[0]),
]


def assert_shares_add_up(changed):
    """Returns the shares by token, for what else is to be said of them."""
    expected = uncapped(changed, 7)
    for by in ("component", "head"):
        shares = gnb.direct_logit_attribution(changed, 7, by=by)
        np.testing.assert_allclose(shares.sum("component"), expected, atol=3e-4)
    tokens = gnb.direct_logit_attribution(changed, 7, by="token", position=30)
    np.testing.assert_allclose(tokens.sum(), expected[30], atol=3e-4)
    return tokens


def test_what_all_interventions_together_add_is_a_component(traced):
    model, trace = traced
    changed = gnb.trace(model.intervene(*CHANGES), trace.tokens, sites=())
    assert "interventions" in assert_shares_add_up(changed).component


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_an_intervention_adds_is_a_component(change):
    model = model_of(RANDOM["Gemma 2"])
    tokens = RANDOM["Gemma 2"].tokens()[:50]
    changed = gnb.trace(model.intervene(change), tokens, sites=())
    tokens = assert_shares_add_up(changed)
    between = change.sites and change.sites[0] in ("z", "residual", "final", "attn_out")
    assert ("interventions" in tokens.component) == bool(between)
    if change.sites == ("residual",):  # a part of its own, not hidden in another's
        plain = gnb.direct_logit_attribution(changed, 7).sel(component="interventions")
        direction = np.asarray(model.params["embedder"]["input_embedding"][7]) * (
            1 + np.asarray(model.params["final_norm"]["scale"])
        )
        share = 5 * np.linspace(-1, 1, 64) @ direction / changed.get("final_rms").values
        np.testing.assert_allclose(plain, share, atol=3e-4)


def test_tokens_are_named_by_their_text(tiny_model):
    model, tokenizer = tiny_model
    trace = gnb.trace(model, "Hi you", tokenizer=tokenizer, sites=())
    a, b = (tokenizer.encode(text)[0] for text in "ab")
    for call in (gnb.direct_logit_attribution, gnb.token_attribution):
        np.testing.assert_array_equal(call(trace, "a"), call(trace, a))
    shares = gnb.direct_logit_attribution(trace, "a", against="b")
    assert (shares.attrs["token_id"], shares.attrs["against_id"]) == (a, b)
    for wrong in ("ab", "", 10**6):
        with pytest.raises(ValueError, match=r"is [02] tokens|token ids must lie"):
            gnb.direct_logit_attribution(trace, wrong)


def test_rollout_rows_sum_to_one(traced):
    _, trace = traced
    rollout = gnb.attention_rollout(trace)
    np.testing.assert_allclose(rollout.sum("key"), 1, atol=1e-5)
    mean = trace.attention.mean("head").values
    expected = np.eye(50)
    for layer in mean[:2]:
        expected = (layer + np.eye(50)) / 2 @ expected
    np.testing.assert_allclose(rollout[1], expected, atol=1e-5)


def test_value_weighted_attention_is_the_norm_of_what_is_moved(traced):
    model, trace = traced
    found = gnb.value_weighted_attention(trace, layers=[1], heads=[0, 3])
    w = np.asarray(model.params["layer_1"]["attn"]["attn_vec_einsum"]["w"])
    for row, head in enumerate((0, 3)):
        group = int(trace.attention.kv_group[head])
        moved = trace.v.values[1][:, group] @ w[head]
        expected = trace.attention.values[1, head] * np.linalg.norm(moved, axis=-1)
        np.testing.assert_allclose(found[0, row], expected, atol=1e-5)


def test_gradients_say_what_a_small_change_does(traced):
    model, trace = traced
    shares = gnb.token_attribution(trace, 7, position=30)
    assert (shares.sel(position=slice(31, None)) == 0).all()
    token = int(trace.tokens[12])
    places = trace.tokens[:31] == token

    def logprob(scale):
        # Only the token's embedding as an input is scaled: the head keeps its row.
        x = np.array(trace.embed.values[:31])
        x[places] *= scale
        patch = gnb.Patch("embed", None, range(31), x)
        inputs = gnb.GemmaInputs(trace.tokens[:31])
        return float(jax.nn.log_softmax(model.intervene(patch)(inputs).values[30])[7])

    slope = (logprob(1.01) - logprob(0.99)) / 0.02
    assert float(shares.values[:31][places].sum()) == pytest.approx(slope, rel=0.05, abs=2e-3)


def test_integrated_gradients_add_up_to_the_difference_from_the_baseline(traced):
    _, trace = traced
    shares = gnb.token_attribution(trace, 7, position=20, method="integrated_gradients", steps=128)
    expected = shares.attrs["value"] - shares.attrs["baseline"]
    assert float(shares.sum()) == pytest.approx(expected, abs=0.005)
    assert shares.attrs["target_id"] == 7


def test_the_target_is_what_comes_next(traced):
    _, trace = traced
    assert gnb.token_attribution(trace, position=10).attrs["target_id"] == trace.tokens[11]
    best = int(trace.get("logits", positions=-1).values.argmax())
    assert gnb.token_attribution(trace).attrs["target_id"] == best


def test_head_statistics_count_what_they_say(tiny_model):
    model, _ = tiny_model
    ids = [2, 10, 11, 12, 10, 11, 30]
    trace = gnb.trace(model, ids)
    found = gnb.head_statistics(trace)
    a = trace.attention.values
    previous = np.mean([a[..., q, q - 1] for q in range(1, 7)], axis=0)
    np.testing.assert_allclose(found.previous_token, previous, atol=1e-6)
    np.testing.assert_allclose(found.bos_sink, a[..., 1:, 0].mean(-1), atol=1e-6)
    induction = (a[..., 4, 2] + a[..., 5, 3]) / 2
    np.testing.assert_allclose(found.induction, induction, atol=1e-6)
    assert np.isnan(gnb.head_statistics(gnb.trace(model, [2, 3, 4])).induction).all()
    with pytest.raises(ValueError, match="at least 2"):
        gnb.head_statistics(gnb.trace(model, [2]))


def test_repeated_tokens_repeat(tiny_model):
    ids = repeated_tokens(tiny_model[0], 20, seed=1)
    assert ids.shape == (41,)
    np.testing.assert_array_equal(ids[1:21], ids[21:])
    assert gnb.head_scores(tiny_model[0], length=20).attrs["repeated"] >= 20
