"""Several replies at once: each is what the conversation would have got alone."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_nb as gnb
from gemma_nb.chat import sampling_many
from gemma_nb.chat.sampling_many import fewest
from gemma_nb.errors import BusyError, ContextFullError, NonFiniteLogitsError, TextError
from gemma_nb.sampling import batch
from tests.chat.checks import SAMPLING

LONG = "A message that is longer than the window of eight tokens"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Replies are made at once from three on, whether or not that is faster here."""
    monkeypatch.setattr(sampling_many, "fewest", lambda: 3)


def assert_same_reply(ours, theirs):
    """Whether two replies are the same, with evidence as near as float32 rounds."""
    assert ours.text == theirs.text
    assert ours.ids == theirs.ids
    assert ours.finish_reason == theirs.finish_reason
    assert ours.finish_detail == theirs.finish_detail
    assert ours.sampling == theirs.sampling
    assert ours.context == theirs.context
    for a, b in zip(ours.tokens, theirs.tokens, strict=True):
        exact = ("index", "token_id", "text", "piece", "position", "rank", "key")
        assert [getattr(a, name) for name in exact] == [getattr(b, name) for name in exact]
        for name in ("logprob", "probability", "entropy"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=2e-5)
        ours_, theirs_ = ([x.logprob for x in t.alternatives] for t in (a, b))
        np.testing.assert_allclose(ours_, theirs_, atol=2e-5)


def alone(chat, prompt, n=1):
    """The replies that the conversation itself gives, one after another."""
    chat.chat(prompt)
    for _ in range(n - 1):
        chat.regenerate()
    replies = chat.siblings(chat.turns[-1])
    chat.undo()
    return replies


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.7, "forbidden": tuple(range(10, 60)), "max_new_tokens": 20},
        {"temperature": 0.0},
    ],
)
def test_replies_equal_those_made_one_after_another(make, changes):
    chat = make(sampling=dataclasses.replace(SAMPLING, **changes))
    chat.chat(LONG)
    before = chat.turns
    replies = chat.sample("And now?", n=4)
    assert chat.turns == before
    assert len(chat.tree) == 2
    assert not chat.busy
    assert {turn.id for turn in replies} == {0}
    for ours, theirs in zip(replies, alone(chat, "And now?", 4), strict=True):
        assert_same_reply(ours, theirs)
    if chat.sampling.temperature:
        assert len({turn.text for turn in replies}) == 4


def test_replies_end_each_at_its_own_stop_and_the_others_go_on(make):
    chat = make(sampling=dataclasses.replace(SAMPLING, max_new_tokens=40))
    texts = [turn.text for turn in chat.sample(LONG, n=4)]
    # A byte that comes early in one of them.
    stop = next(c for c in texts[2][2:] if c.isascii())
    chat.sampling = dataclasses.replace(chat.sampling, stop=(stop,))
    replies = chat.sample(LONG, n=4)
    assert len({len(turn.tokens) for turn in replies}) > 1
    for ours, theirs in zip(replies, alone(chat, LONG, 4), strict=True):
        assert_same_reply(ours, theirs)


def test_prompts_of_different_lengths_see_the_conversation_and_not_each_other(make):
    chat = make()
    chat.chat(LONG)
    prompts = ["Hello", "Hell", LONG * 3, ""]
    replies = chat.sample_each(prompts)
    for prompt, ours in zip(prompts, replies, strict=True):
        assert_same_reply(ours, alone(chat, prompt)[0])
    assert chat.sample_each([]) == []


def test_what_is_shared_is_computed_once(make):
    chat = make()
    chat.chat(LONG)
    replies = chat.sample("Hello", n=4)
    prompt = sum(turn.timing.prompt_tokens for turn in replies)
    # The last token of the first reply was never fed; then the message, its end four times.
    assert prompt <= 2 + len("Hello") + 4
    # What was cached serves the conversation on.
    assert chat.chat("Hello").timing.prompt_tokens <= 2


def test_the_cache_grows_and_lets_go_of_replies_that_have_ended(make, monkeypatch):
    monkeypatch.setattr(batch, "_SLOTS", 32)
    monkeypatch.setattr(batch, "_MORE", 2)
    chat = make(sampling=dataclasses.replace(SAMPLING, max_new_tokens=40, stop=("e", "\x0f")))
    replies = chat.sample("Hi", n=3)
    for ours, theirs in zip(replies, alone(chat, "Hi", 3), strict=True):
        assert_same_reply(ours, theirs)


def test_more_replies_than_a_batch_holds(make, monkeypatch):
    monkeypatch.setattr(sampling_many, "MOST", 3)
    chat = make()
    for ours, theirs in zip(chat.sample("Hi", n=4), alone(chat, "Hi", 4), strict=True):
        assert_same_reply(ours, theirs)


def test_replies_fill_the_context_as_one_does(make):
    chat = make(cache_length=20, sampling=dataclasses.replace(SAMPLING, max_new_tokens=100))
    for ours, theirs in zip(chat.sample("Hello", n=3), alone(chat, "Hello", 3), strict=True):
        assert_same_reply(ours, theirs)
        assert "context is full" in ours.finish_detail
    fits, too_long, _, _ = chat.sample_each(["Hello", LONG, "Hell", "Help"])
    assert fits.tokens
    assert (too_long.finish_reason, too_long.tokens) == ("length", ())
    chat.when_full = "error"
    with pytest.raises(ContextFullError):
        chat.sample(LONG)


def test_interventions_of_the_model_hold(tiny_model, make):
    model, tokenizer = tiny_model
    steer = gnb.Steer(1, np.random.default_rng(0).normal(size=32), scale=20.0)
    edits = (steer, gnb.AblateHeads({0: [1]}))
    made = []
    for m in (model, model.intervene(*edits)):
        chat = gnb.ChatSession(m, tokenizer, template="none", sampling=SAMPLING, cache_length=400)
        replies = chat.sample(LONG, n=3)
        for ours, theirs in zip(replies, alone(chat, LONG, 3), strict=True):
            assert_same_reply(ours, theirs)
            assert ours.interventions == theirs.interventions
        made.append(replies[0].tokens[0].logprob)
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("unit", "count", "batches"), [(True, 2, 0), (True, 3, 1), (False, 3, 0), (False, 4, 1)]
)
def test_replies_are_made_at_once_where_that_is_faster(make, monkeypatch, unit, count, batches):
    monkeypatch.setattr(sampling_many, "fewest", fewest)
    monkeypatch.setattr(sampling_many, "has_matrix_unit", lambda: unit)
    made = []

    def counted(*args, **kwargs):
        made.append(batch.Batch(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(sampling_many, "Batch", counted)
    chat = make()
    assert len(chat.sample("Hi", n=count)) == count
    assert len(made) == batches
    assert chat.turns == ()


def test_a_module_of_another_library_samples_one_after_another(make, monkeypatch):
    chat = make()
    expected = chat.sample("Hi", n=3)
    traits = dataclasses.replace(chat._decoder.traits, can_batch=False)
    monkeypatch.setattr(chat._decoder, "traits", traits)
    monkeypatch.setattr(sampling_many, "Batch", None)
    for ours, theirs in zip(chat.sample("Hi", n=3), expected, strict=True):
        assert_same_reply(ours, theirs)
    assert chat.turns == ()


@pytest.fixture
def after_steps(monkeypatch):
    """Calls something after so many steps of a batch."""

    def after(count, act):
        step, calls = batch.Batch.step, []

        def counted(self, tokens):
            calls.append(tokens)
            made = step(self, tokens)
            if len(calls) == count:
                act()
            return made

        monkeypatch.setattr(batch.Batch, "step", counted)

    return after


@pytest.mark.parametrize("reason", ["cancelled", "interrupted"])
def test_what_had_come_is_returned(make, after_steps, monkeypatch, reason):
    monkeypatch.setattr(sampling_many, "MOST", 3)
    chat = make()
    expected = chat.sample("Hi", n=3)
    acts = {"cancelled": chat.stop, "interrupted": lambda: os.kill(os.getpid(), signal.SIGINT)}
    after_steps(4, acts[reason])
    replies = chat.sample("Hi", n=4)
    assert [turn.finish_reason for turn in replies] == [reason] * 4
    assert [len(turn.tokens) for turn in replies] == [4, 4, 4, 0]
    for ours, theirs in zip(replies, expected, strict=False):
        assert [t.token_id for t in ours.tokens] == [t.token_id for t in theirs.tokens[:4]]
        assert theirs.text.startswith(ours.text.rstrip("\ufffd"))
    assert not chat.busy
    assert chat.chat("Hi").tokens


def test_what_is_refused(make):
    chat = make()
    with pytest.raises(ValueError, match="at least 1"):
        chat.sample("Hi", n=0)
    with pytest.raises(TypeError, match="list of messages"):
        chat.sample_each("Hi")
    with pytest.raises(TypeError, match="string"):
        chat.sample_each([None])
    with pytest.raises(TextError):
        chat.sample("lone \ud800 surrogate")
    stream = chat.stream("Hello")
    next(stream)
    with pytest.raises(BusyError):
        chat.sample("Hi")
    list(stream)


def test_seeds_are_drawn_where_there_is_none(make):
    chat = make()
    settings = dataclasses.replace(SAMPLING, seed=None, max_new_tokens=2)
    seeds = [turn.sampling.seed for turn in chat.sample("Hi", n=3, sampling=settings)]
    assert np.diff(seeds).tolist() == [1, 1]
    seeds = {turn.sampling.seed for turn in chat.sample_each(["Hi"] * 3, sampling=settings)}
    assert len(seeds) == 3


def test_nan_logits_are_refused(tiny_model):
    model, tokenizer = tiny_model
    broken = jax.tree.map(lambda x: x * jnp.nan, model.params["final_norm"])
    model = model.replace(params={**model.params, "final_norm": broken})
    chat = gnb.ChatSession(model, tokenizer, cache_length=100, template="none")
    with pytest.raises(NonFiniteLogitsError, match="position 5"):
        chat.sample("Hello", n=3)
    assert not chat.busy


@pytest.mark.real
def test_real_replies_equal_those_made_one_after_another(real_model):
    chat = gnb.ChatSession(*real_model, sampling=gnb.Sampling(seed=3, max_new_tokens=12))
    replies = chat.sample("Name a colour.", n=3)
    for ours, theirs in zip(replies, alone(chat, "Name a colour.", 3), strict=True):
        assert ours.text == theirs.text
        for a, b in zip(ours.tokens, theirs.tokens, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
