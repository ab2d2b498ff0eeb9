"""The chat on the real default model: what it says, and that the evidence is the model's own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb

pytestmark = pytest.mark.real

# The head of a decode step is exact for the likeliest tokens only, see
# `tests/sampling/test_faithful.py`: what it is off by, all log-probabilities share.
HEAD = 1e-3

QUESTIONS = [
    ("What is the capital of France?", "Paris"),
    ("What colour is the sky?", "blue"),
    ("What do bees make?", "honey"),
    ("What is water made of?", "hydrogen"),
    ("Who painted the Mona Lisa?", "Leonardo"),
]


@pytest.fixture(scope="module")
def chat(real_model):
    return gnb.ChatSession(*real_model, cache_length=1024)


def test_the_base_model_speaks_in_a_transcript(chat):
    assert chat.template.name == "transcript"
    assert chat.model.config == gnb.presets.GEMMA3_270M
    assert chat.sampling.temperature < 1


def ask(chat, question, **changes):
    chat.new_conversation()
    chat.sampling = gnb.Sampling.recommended(chat.model, max_new_tokens=60, **changes)
    return chat.chat(question)


@pytest.mark.parametrize(("question", "answer"), QUESTIONS)
def test_simple_questions_are_answered_briefly(chat, question, answer):
    turn = ask(chat, question, seed=0, temperature=0.0)
    assert re.search(answer, turn.text, re.IGNORECASE)
    assert turn.finish_reason == "stop"
    assert len(turn.tokens) <= 30
    assert "User:" not in turn.text


@pytest.mark.parametrize("seed", range(8))
def test_the_recommended_sampling_finds_paris(chat, seed):
    turn = ask(chat, "What is the capital of France?", seed=seed)
    assert "Paris" in turn.text
    assert turn.finish_reason == "stop"


def test_evidence_is_a_softmax_of_the_full_logits(chat):
    """Of the same bfloat16 weights, by the plain pass without a cache."""
    chat.new_conversation()
    chat.sampling = gnb.Sampling.recommended(chat.model, seed=3)
    chat.chat("What is the capital of Italy?")
    turn = chat.chat("And what is its most famous building?")
    ids = chat.tokens(turn)
    run = jax.jit(lambda p, t: chat.model.transformer.apply({"params": p}, t).logits[0])
    logits = np.asarray(run(chat.model.params, jnp.asarray([ids])), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for record in turn.tokens:
        row = log_p[record.position - 1]
        order = np.argsort(-row)
        assert [a.token_id for a in record.alternatives] == order[:10].tolist()
        np.testing.assert_allclose(
            [a.logprob for a in record.alternatives], row[order[:10]], atol=HEAD
        )
        assert record.logprob == pytest.approx(row[record.token_id], abs=HEAD)
        assert record.entropy == pytest.approx(-(np.exp(row) * row).sum(), abs=5 * HEAD)
        assert record.rank == int((row > row[record.token_id]).sum())


def test_traces_see_the_same_choice(chat):
    """The final state of a trace, unembedded, puts the chosen tokens where the evidence does."""
    turn = next(turn for turn in reversed(chat.turns) if turn.role == "model")
    trace = chat.trace(turn, sites=("attention", "final"))
    assert trace.attention.shape == (18, 4, *(2 * [len(trace.tokens)]))
    np.testing.assert_allclose(trace.attention.sum("key"), 1, atol=1e-4)
    rows = [record.position - 1 for record in turn.tokens]
    weights = {"params": chat.model.params}
    logits = chat.model.transformer.apply(
        weights, jnp.asarray(trace.final.values[rows]), method="unembed"
    )
    log_p = np.asarray(jax.nn.log_softmax(logits))
    chosen = [record.token_id for record in turn.tokens]
    np.testing.assert_allclose(
        log_p[np.arange(len(rows)), chosen], [r.logprob for r in turn.tokens], atol=HEAD
    )


def test_kept_attention_is_that_of_the_trace(chat):
    kept = gnb.ChatSession(
        *(chat.model, chat.tokenizer),
        sampling=gnb.Sampling.recommended(chat.model, seed=0, max_new_tokens=6),
        capture=gnb.Capture(attention_layers="all"),
    )
    turn = kept.chat("What is the capital of France?")
    trace = kept.trace(turn)
    for record in turn.tokens:
        p = record.position - 1
        expected = trace.attention.sel(query=p, key=slice(0, p))
        # Both are within this of float32, see `tests/parity`.
        np.testing.assert_allclose(record.attention, expected, atol=2e-3)
    assert kept.attention_kept.tokens == len(turn.tokens)


def test_text_is_not_broken(chat):
    """Emoji and CJK come in several byte tokens; none is shown before it is whole."""
    chat.new_conversation()
    chat.sampling = gnb.Sampling.recommended(chat.model, seed=0, max_new_tokens=40)
    chat.system = "Each line is a row of emoji.\n\n😀😃😄😁😆😅🤣😂🙂🙃😉😊\n🐶🐱🐭🐹🐰🦊🐻🐼"
    events = list(chat.stream("🍏🍎🍐🍊🍋🍌🍉🍇🍓🫐🍈🍒"))
    chat.system = None
    text = "".join(event.text for event in events)
    assert "\ufffd" not in text[:-1]
    assert chat.turns[-1].text == text.lstrip()
