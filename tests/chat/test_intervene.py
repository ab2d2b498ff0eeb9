"""A reply beside itself under interventions."""

import numpy as np
import pytest

import gemma_nb as gnb


@pytest.fixture
def chat(tiny_model):
    model, tokenizer = tiny_model
    sampling = gnb.Sampling(temperature=1.0, seed=3, max_new_tokens=8)
    return gnb.ChatSession(model, tokenizer, template="gemma", sampling=sampling, cache_length=128)


def test_a_sibling_with_the_same_seed_from_a_token_on(chat):
    baseline = chat.chat("Hi")
    vector = np.random.default_rng(0).normal(size=32)
    turn = chat.intervene(gnb.Steer(1, vector, scale=20.0), at=3)
    assert chat.siblings(turn) == (baseline, turn)
    assert turn.tokens[:3] == baseline.tokens[:3]
    assert turn.sampling.seed == baseline.sampling.seed
    assert turn.tokens[3].logprob != baseline.tokens[3].logprob
    start = turn.tokens[3].position - 1
    assert turn.interventions[0].endswith(f"from position {start} on")
    assert turn.interventions[0].startswith("steer residual of layer 1 by 20 times a vector")
    assert (turn.origin.kind, turn.origin.index, turn.origin.turn) == ("intervene", 3, baseline.id)
    assert baseline.interventions == ()

    # What was drawn is what the full pass under the same interventions computes.
    trace = chat.trace(turn, sites=("residual",))
    assert trace.interventions == turn.interventions
    found = gnb.token_statistics(trace)
    for record in turn.tokens[3:]:
        logprob = float(found.logprob.sel(position=record.position))
        assert logprob == pytest.approx(record.logprob, abs=1e-4)
    assert chat.trace(baseline).interventions == ()


def test_neutral_interventions_repeat_the_reply(chat):
    baseline = chat.chat("Hi")
    turn = chat.intervene(gnb.ScaleHeads({0: {0: 1.0}}))
    assert [r.token_id for r in turn.tokens] == [r.token_id for r in baseline.tokens]
    assert [r.key for r in turn.tokens] == [r.key for r in baseline.tokens]


def test_later_messages_are_answered_by_the_model_itself(chat):
    chat.chat("Hi")
    chat.intervene(gnb.AblateMLP([0, 1, 2]))
    reply = chat.chat("And now?")
    assert reply.interventions == ()
    found = gnb.token_statistics(chat.trace(reply))
    for record in reply.tokens:
        logprob = float(found.logprob.sel(position=record.position))
        assert logprob == pytest.approx(record.logprob, abs=1e-4)


def test_traces_of_a_chat_know_who_speaks(chat):
    reply = chat.chat("Hi")
    trace = chat.trace(reply)
    first = reply.tokens[0].position
    assert trace.roles[0] == "template"
    assert set(trace.roles[first:]) <= {"model", "template"}
    assert trace.turns[first:].tolist() == [1] * len(reply.tokens)
    hi = trace.tokens.tolist().index(chat.tokenizer.encode("Hi")[-1])
    assert (trace.roles[hi], trace.turns[hi]) == ("user", 0)
    assert trace.attention.key_role.values[hi] == "user"


def test_what_cannot_be_done_says_so(chat):
    chat.chat("Hi")
    with pytest.raises(ValueError, match="at least one intervention"):
        chat.intervene()
    with pytest.raises(ValueError, match="layers 0 to 2"):
        chat.intervene(gnb.AblateHeads({9: [0]}))
    assert len(chat.turns) == 2
