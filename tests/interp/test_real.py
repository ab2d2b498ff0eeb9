"""What the default model does, looked at from inside."""

import jax
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.interp.heads import repeated_tokens

pytestmark = pytest.mark.real

LENGTH = 40


def repeat_loss(model, ids):
    """Mean surprise, in nats, at the tokens that come for the second time."""
    statistics = gnb.token_statistics(gnb.trace(model, ids, sites=()))
    return -float(statistics.logprob[LENGTH + 2 :].mean())


def test_an_induction_head_is_found_by_its_score_and_confirmed_by_ablation(real_model):
    model, _ = real_model
    scores = gnb.head_scores(model, length=LENGTH).induction.stack(place=("layer", "head"))
    best = scores.isel(place=int(scores.values.argmax()))
    assert float(best) > 0.5
    layer, head = best.place.item()

    ids = repeated_tokens(model, LENGTH, seed=7)
    loss = repeat_loss(model, ids)
    rises = repeat_loss(model.intervene(gnb.AblateHeads({layer: [head]})), ids) - loss
    others = scores.drop_sel(place=(layer, head))
    drawn = np.random.default_rng(0).choice(others.sizes["place"], 7, replace=False)
    random = [
        repeat_loss(model.intervene(gnb.AblateHeads({int(i): [int(n)]})), ids) - loss
        for i, n in (others.place[j].item() for j in drawn)
    ]
    print(f"head {layer}.{head}: +{rises:.3f} nats; random heads: {np.round(random, 3)}")
    assert rises > 0.5
    # The median: a few heads matter to the repetition in other ways, as the previous-token heads
    # that an induction head reads do.
    assert rises > 4 * np.median(np.abs(random))


def test_identities_hold_on_the_default_model(real_model):
    model, tokenizer = real_model
    trace = gnb.trace(
        model, "The capital of France is Paris. The capital of Germany is", tokenizer=tokenizer
    )
    total = trace["embed"] + trace["attn_out"].sum("layer") + trace["mlp_out"].sum("layer")
    last = trace["residual"].isel(layer=-1)
    # Residuals of this model reach several thousands.
    np.testing.assert_allclose(total, last, atol=3e-6 * float(np.abs(last).max()))
    np.testing.assert_allclose(trace.attention.sum("key"), 1, atol=1e-5)

    berlin = tokenizer.encode(" Berlin")[0]
    lens = gnb.logit_lens(trace, 5, positions=-1, watch=[berlin])
    logits = trace.get("logits", positions=-1).values[0]
    order = np.argsort(-logits)[:5]
    np.testing.assert_array_equal(lens.token_id.values[-1, 0], order)
    np.testing.assert_allclose(lens.logit.values[-1, 0], logits[order], atol=1e-4)
    logprob = jax.nn.log_softmax(logits)[berlin]
    np.testing.assert_allclose(lens.watched_logprob.values[-1, 0, 0], logprob, atol=1e-4)
    for by in ("component", "head"):
        shares = gnb.direct_logit_attribution(trace, berlin, by=by)
        assert float(shares.sel(position=len(trace.tokens) - 1).sum()) == pytest.approx(
            float(logits[berlin]), abs=1e-3
        )
