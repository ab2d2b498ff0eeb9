"""Forking and replaying: what a fork keeps, where it differs, and what drew it."""

import dataclasses

import jax
import numpy as np
import pytest

from gemma_nb.chat import scoring
from gemma_nb.chat.turns import Origin
from gemma_nb.errors import TextError
from tests.chat.checks import SAMPLING, assert_parity, evidence, ids

# --- forking --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 6, 11])
def test_the_same_token_and_seed_repeat_the_reply_bit_for_bit(make, index):
    chat = make()
    first = chat.chat("Hello")
    at = first.tokens[index]
    fork = chat.fork(at, at.token_id)
    assert list(map(evidence, fork.tokens[:12])) == list(map(evidence, first.tokens))
    assert [r.key for r in fork.tokens[:12]] == [None if r is at else r.key for r in first.tokens]
    assert fork.origin == Origin("fork", first.id, index, 1)
    assert chat.siblings(fork) == (first, fork)
    # Limits count what is drawn now.
    assert len(fork.tokens) == index + 1 + 12


def test_another_token_differs_from_there_on(make, score):
    chat = make()
    first = chat.chat("Hello")
    at = first.tokens[4]
    other = next(a for a in at.alternatives if a.token_id != at.token_id)
    fork = chat.fork(at, other.token_id)
    assert all(ours is theirs for ours, theirs in zip(fork.tokens[:4], first.tokens, strict=False))
    forced = fork.tokens[4]
    assert (forced.token_id, forced.logprob, forced.key) == (other.token_id, other.logprob, None)
    assert forced.probability == other.probability
    assert (forced.entropy, forced.alternatives) == (at.entropy, at.alternatives)
    assert [r.key for r in fork.tokens[5:12]] == [r.key for r in first.tokens[5:]]
    assert fork.timing.prompt_tokens == 1
    assert_parity(chat, fork, score)
    assert chat.turns == (chat.turns[0], fork)
    assert first in list(chat.tree)


def test_any_token_may_be_forced_and_has_its_own_evidence(make, score):
    chat = make(sampling=dataclasses.replace(SAMPLING, top_p=0.9, repetition_penalty=1.3))
    first = chat.chat("Hello")
    at = first.tokens[7]
    row = score(chat.tokens(first))[at.position - 1]
    token = int(np.argsort(-row)[40])
    assert token not in {a.token_id for a in at.alternatives}
    fork = chat.fork(at, token)
    assert fork.tokens[7].rank == 40
    assert fork.tokens[7].logprob == pytest.approx(row[token], abs=2e-5)
    for ours, theirs in zip(fork.tokens[7].alternatives, at.alternatives, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.probability == pytest.approx(theirs.probability, abs=1e-5)
    assert_parity(chat, fork, score)


def test_a_forced_token_costs_a_step_and_no_pass(make, score, monkeypatch):
    """The plain pass is for texts that are long beside what stands before them."""
    chat = make(sampling=dataclasses.replace(SAMPLING, max_new_tokens=30))
    first = chat.chat("Hello, this is longer than the window")
    passes = []
    plain = scoring.score
    monkeypatch.setattr(scoring, "score", lambda *args: passes.append(args) or plain(*args))
    fed = []
    step = chat._decoder._feed
    monkeypatch.setattr(
        chat._decoder,
        "_feed",
        lambda *args, **how: fed.append(args[0].shape[1]) or step(*args, **how),
    )
    row = score(chat.tokens(first))[first.tokens[20].position - 1]
    token = next(int(i) for i in np.argsort(-row)[40:] if i > 5)
    events = chat.stream_fork(first.tokens[20], token)
    assert next(events).token_id == token
    assert fed == [1]
    next(events)
    assert fed == [1, 1]
    events.close()
    fork = chat.fork(first.tokens[20], "none", sampling=SAMPLING)
    assert "none" in fork.text
    assert not passes
    assert_parity(chat, fork, score)
    fork = chat.fork(first.tokens[2], "a text that is long beside what stands before it")
    assert len(passes) == 1
    assert_parity(chat, fork, score)


def test_a_text_may_be_several_tokens(make, score):
    chat = make()
    first = chat.chat("Hello")
    fork = chat.fork(first.tokens[3], "né à 中")
    given = chat.tokenizer.encode("né à 中")
    assert ids(fork)[3 : 3 + len(given)] == given
    assert (fork.origin.index, fork.origin.given) == (3, len(given))
    assert "né à 中" in fork.text
    assert all(record.key is None for record in fork.tokens[3 : 3 + len(given)])
    assert_parity(chat, fork, score)


def test_without_a_token_the_rest_is_drawn_anew(make, score):
    chat = make()
    first = chat.chat("Hello")
    fork = chat.fork(first.tokens[4])
    assert ids(fork)[:5] == ids(first)[:5]
    assert ids(fork)[5:] != ids(first)[5:]
    assert fork.sampling.seed == SAMPLING.seed + 1
    assert fork.origin == Origin("fork", first.id, 5)
    assert_parity(chat, fork, score)
    assert chat.fork(first.tokens[4], sampling=SAMPLING).tokens[:12] == first.tokens


def test_forks_of_forks_and_of_hidden_branches(make, score):
    chat = make()
    first = chat.chat("Hello")
    fork = chat.fork(first.tokens[4])
    chat.chat("And on")
    again = chat.fork(first.tokens[8], 100)
    assert chat.turns[1:] == (again,)
    deeper = chat.fork(fork.tokens[9])
    assert deeper.origin.turn == fork.id
    assert deeper.tokens[:10] == fork.tokens[:10]
    for turn in (first, fork, again, deeper):
        assert_parity(chat, turn, score)
    assert len(chat.siblings(first)) == 4
    # A message's sibling has replies of its own.
    edited = chat.edit(chat.turns[0], "Hi")
    chat.select(first)
    below = chat.fork(edited.tokens[2], 99)
    assert chat.turns[0].text == "Hi"
    assert_parity(chat, below, score)


def test_a_shared_token_belongs_to_the_reply_that_is_shown(make):
    chat = make()
    first = chat.chat("Hello")
    fork = chat.fork(first.tokens[6], 100)
    assert chat.fork(first.tokens[2], 101).origin.turn == fork.id
    assert chat.fork(first.tokens[2], 101, turn=first).origin.turn == first.id
    assert chat.fork(2, 101, turn=first.id).origin.turn == first.id
    chat.select(first)
    assert chat.fork(3, 101).origin.turn == first.id


def test_an_event_stands_for_its_token(make):
    chat = make()
    events = list(chat.stream("Hello"))
    first = chat.turns[-1]
    assert chat.fork(events[5], 100).origin == Origin("fork", first.id, 5, 1)


def test_events_of_a_fork_are_those_of_the_new_tokens(make):
    chat = make()
    first = chat.chat("Hello")
    events = []
    for event in chat.stream_fork(first.tokens[4], 100):
        # What stands already shows in the partial reply.
        assert ids(chat.partial)[:4] == ids(first)[:4]
        events.append(event)
    turn = chat.turns[-1]
    assert [event.index for event in events] == list(range(4, len(turn.tokens)))
    assert "".join(r.text for r in turn.tokens[:4]) + "".join(e.text for e in events) == turn.text
    assert events[-1].finish_reason == turn.finish_reason


@pytest.mark.parametrize("end", ["é", "中", "😀"])
def test_a_fork_inside_a_character(make, score, end):
    chat = make()
    first = chat.chat("Hello")
    whole = chat.fork(first.tokens[2], f"a{end}b")
    size = len(end.encode())
    for inside in range(1, size):
        at = whole.tokens[3 + inside]
        assert at.text == (end if inside == size - 1 else "")
        # The character is left unfinished, and finished.
        broken = chat.fork(at, chat.tokenizer.encode("x")[0], turn=whole)
        assert "a" + "\ufffd" * inside + "x" in broken.text
        finished = chat.fork(at, at.token_id, turn=whole)
        assert inside < size - 1 or f"a{end}" in finished.text
        for turn in (broken, finished):
            assert chat.tokenizer.decode(turn.ids).startswith(turn.text.rstrip("\ufffd"))
            assert_parity(chat, turn, score)


def test_a_fork_at_the_end_refuses_that_end(ended, score):
    chat, turn = ended
    stops = chat.template.stop_ids(chat.tokenizer)
    fork = chat.fork(turn.tokens[-1])
    assert ids(fork)[:5] == ids(turn)[:5]
    assert ids(fork)[5] not in stops
    assert fork.origin == Origin("fork", turn.id, 5, 1)
    assert all(a.probability == 0 for a in fork.tokens[5].alternatives if a.token_id in stops)
    assert_parity(chat, fork, score)
    other = chat.fork(turn.tokens[-1], 100)
    assert other.text.startswith(turn.text)
    assert_parity(chat, other, score)


def test_impossible_forks_are_refused(make):
    chat = make()
    with pytest.raises(ValueError, match="no reply yet"):
        chat.fork(0)
    first = chat.chat("Hello")
    elsewhere = make(sampling=dataclasses.replace(SAMPLING, seed=9)).chat("Hello")
    with pytest.raises(ValueError, match="holds the token"):
        chat.fork(elsewhere.tokens[3], 100)
    with pytest.raises(ValueError, match="tokens 0 to 11"):
        chat.fork(12)
    with pytest.raises(ValueError, match="expected a reply"):
        chat.fork(0, turn=chat.turns[0])
    for token in (-1, 10_000, chat.tokenizer.bos_id):
        with pytest.raises(ValueError, match="stands for nothing"):
            chat.fork(first.tokens[3], token)
    with pytest.raises(ValueError, match="empty text"):
        chat.fork(first.tokens[3], "")
    with pytest.raises(TextError):
        chat.fork(first.tokens[3], "\ud800")
    assert len(chat.tree) == 2


# --- keys -----------------------------------------------------------------------------------------


def test_each_token_keeps_the_key_that_drew_it(make):
    chat = make()
    first = chat.chat("Hello")
    fork = chat.fork(first.tokens[4])
    assert {key for key, _ in (r.key for r in fork.tokens[:5])} == {first.sampling.seed}
    assert {key for key, _ in (r.key for r in fork.tokens[5:])} == {fork.sampling.seed}
    assert [fold for _, fold in (r.key for r in fork.tokens)] == [
        r.position - 1 for r in fork.tokens
    ]


def test_a_key_and_the_distribution_give_the_token(make, score):
    """With no truncation the draw is an inversion of the model's own distribution."""
    chat = make()
    turn = chat.chat("Hello")
    rows = np.exp(score(chat.tokens(turn)))
    never = list(chat.template.forbidden_ids(chat.tokenizer))
    for record in turn.tokens:
        seed, fold = record.key
        uniform = float(jax.random.uniform(jax.random.fold_in(jax.random.key(seed), fold)))
        row = rows[record.position - 1].copy()
        row[never] = 0
        running = np.cumsum(row / row.sum())
        assert running[record.token_id] + 1e-5 > uniform
        assert running[record.token_id - 1] - 1e-5 < uniform


def test_a_reply_is_replayed_bit_for_bit(make, ended):
    chat = make()
    for text in ("Hello", "A message that is longer than the window of eight"):
        turn = chat.chat(text)
        replayed = chat.replay(turn)
        assert replayed.tokens == turn.tokens
        assert (replayed.text, replayed.ids, replayed.id) == (turn.text, turn.ids, turn.id)
        assert replayed.finish_reason == turn.finish_reason
    for branch in (
        lambda: chat.fork(turn.tokens[5], 100),
        lambda: chat.fork(chat.turns[-1].tokens[8]),
        chat.resume,
        chat.regenerate,
    ):
        made = branch()
        assert chat.replay().tokens == made.tokens
    assert len(chat.tree) == 2 * 2 + 4
    with pytest.raises(ValueError, match="drawn"):
        chat.replay(chat.edit(turn, "By hand"))
    chat, turn = ended
    assert ids(chat.replay(chat.resume())) == ids(chat.turns[-1])


def test_a_replay_from_nothing_draws_the_same(make):
    chat = make()
    chat.chat("Hello")
    fork = chat.fork(chat.turns[-1].tokens[3], 100)
    chat.chat("More")
    chat._decoder.reset()
    replayed = chat.replay(fork)
    assert ids(replayed) == ids(fork)
    np.testing.assert_allclose(
        [r.logprob for r in replayed.tokens], [r.logprob for r in fork.tokens], atol=2e-5
    )
