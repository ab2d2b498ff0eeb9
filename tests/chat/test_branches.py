"""Forking, editing, resuming, taking back: what a branch keeps, and where it differs."""

import dataclasses

import jax
import numpy as np
import pytest

from gemma_nb.chat import branches
from gemma_nb.chat.events import Origin
from gemma_nb.errors import BusyError, TextError
from tests.chat.checks import SAMPLING, assert_parity


def evidence(record):
    """A record without what depends on its neighbours or on who put it there."""
    return dataclasses.replace(record, text="", key=None)


def ids(turn):
    return [record.token_id for record in turn.tokens]


def only(*allowed, chat):
    """The session's settings, with all but these tokens forbidden."""
    never = tuple(set(range(chat.tokenizer.vocab_size)) - set(allowed))
    return dataclasses.replace(chat.sampling, forbidden=never)


@pytest.fixture
def ended(make, tiny_model):
    """A session whose only reply the model ended, after five tokens, by <eos>."""
    _, tokenizer = tiny_model
    chat = make()
    first = chat.chat("Hello")
    turn = chat.fork(first.tokens[5], tokenizer.eos_id)
    assert (turn.finish_reason, len(turn.tokens), len(turn.ids)) == ("stop", 6, 5)
    return chat, turn


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
    plain = branches.score
    monkeypatch.setattr(branches, "score", lambda *args: passes.append(args) or plain(*args))
    fed = []
    step = chat._decoder._feed
    monkeypatch.setattr(
        chat._decoder, "_feed", lambda *args: fed.append(args[0].shape[1]) or step(*args)
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


# --- other replies, other messages ----------------------------------------------------------------


def test_any_message_can_be_replied_to_again(make, score):
    chat = make()
    first = chat.chat("Hello")
    chat.chat("More")
    asked = chat.turns[0]
    again = chat.regenerate(first)
    assert chat.turns == (asked, again)
    assert again.origin == Origin("regenerate", first.id)
    assert chat.regenerate(asked).origin == Origin("regenerate", again.id)
    assert len(chat.siblings(first)) == 3
    assert_parity(chat, again, score)


def test_an_edited_message_is_sent_again(make, score):
    chat = make()
    first, second = chat.chat("Hello"), chat.chat("More")
    asked = chat.turns[2]
    third = chat.edit(asked, "Less")
    assert [turn.text for turn in chat.turns if turn.role == "user"] == ["Hello", "Less"]
    assert chat.siblings(asked) == (asked, chat.turns[2])
    assert chat.turns[2].origin == Origin("edit", asked.id)
    assert chat.turns[1] is first
    chat.select(second)
    assert chat.turns[2] is asked
    fourth = chat.edit(chat.turns[0].id, "Hi")
    assert chat.turns == (chat.turns[0], fourth)
    for turn in (third, fourth):
        assert_parity(chat, turn, score)
    assert [turn.id for turn in chat.tree] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_an_edited_reply_keeps_what_it_shares_and_goes_on(make, score):
    chat = make(template="gemma")
    first = chat.chat("Hello")
    prefix = "".join(record.text for record in first.tokens[:4]).strip() or "x"
    edited = chat.edit(first, f"{prefix}, he said: é")
    assert (edited.finish_reason, edited.text) == ("edited", f"{prefix}, he said: é")
    assert edited.origin.kind == "edit"
    assert chat.tokenizer.decode(edited.ids) == edited.text
    assert chat.turns[-1] is edited
    assert all(r.key is None for r in edited.tokens[edited.origin.index :])
    resumed = chat.resume()
    assert resumed.tokens[: len(edited.tokens)] == edited.tokens
    assert resumed.text.startswith(edited.text)
    assert len(resumed.tokens) > len(edited.tokens)
    for turn in (edited, resumed, chat.chat("Go on")):
        assert_parity(chat, turn, score)
    with pytest.raises(ValueError, match=r"stream_resume\(\)"):
        chat.stream_edit(first, "x")
    with pytest.raises(TextError):
        chat.edit(first, "\ud800")


def test_an_edited_reply_may_hold_a_stop_string(make, score):
    chat = make(template="transcript", cache_length=1000)
    chat.chat("Hello")
    edited = chat.edit(chat.turns[-1], "One.\n\nTwo.")
    assert edited.text == "One.\n\nTwo."
    assert chat.resume().text.startswith("One.\n\nTwo.")


def test_an_empty_reply_can_be_written_and_resumed(make, score):
    chat = make()
    chat.chat("Hello")
    edited = chat.edit(chat.turns[-1], "")
    assert (edited.text, edited.tokens, edited.ids) == ("", (), ())
    assert_parity(chat, chat.resume(), score)


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 3, 10])
def test_a_stopped_reply_goes_on_as_it_would_have(make, score, index):
    whole = make().chat("Hello")
    chat = make()
    for event in chat.stream("Hello"):
        if event.index == index:
            chat.stop()
    stopped = chat.turns[-1]
    assert len(stopped.tokens) == index + 1
    resumed = chat.resume()
    assert resumed.tokens[:12] == whole.tokens
    assert resumed.origin == Origin("resume", stopped.id, index + 1)
    assert resumed.timing.prompt_tokens == 1
    assert chat.siblings(stopped) == (stopped, resumed)
    assert_parity(chat, resumed, score)


def test_a_reply_cut_by_its_limit_goes_on(make, score):
    short = make(sampling=dataclasses.replace(SAMPLING, max_new_tokens=5))
    whole = make().chat("Hello")
    turn = short.chat("Hello")
    assert turn.finish_reason == "length"
    assert short.resume().tokens == whole.tokens[:10]
    assert short.resume(turn).tokens == whole.tokens[:10]
    # Settings may be others, the seed stays.
    long = dataclasses.replace(SAMPLING, seed=None, max_new_tokens=7)
    assert short.resume(turn, sampling=long).tokens == whole.tokens


def test_a_reply_that_came_to_its_end_goes_on_without_it(ended, score):
    chat, turn = ended
    resumed = chat.resume()
    assert resumed.text.startswith(turn.text)
    assert ids(resumed)[5] not in chat.template.stop_ids(chat.tokenizer)
    assert resumed.origin == Origin("resume", turn.id, 5, 1)
    assert_parity(chat, resumed, score)


def test_a_reply_that_a_stop_string_ended_goes_on_before_it(make, score):
    whole = make().chat("Hello")
    stop = next(record.text for record in whole.tokens[3:] if record.text.strip())
    chat = make(sampling=dataclasses.replace(SAMPLING, stop=(stop,)))
    turn = chat.chat("Hello")
    assert turn.finish_reason == "stop"
    resumed = chat.resume()
    assert resumed.text.startswith(turn.text)
    count = resumed.origin.index
    assert ids(resumed)[: len(turn.ids)] == list(turn.ids)
    assert ids(resumed)[count] != ids(turn)[count]
    assert_parity(chat, resumed, score)


def test_only_replies_resume(make):
    chat = make()
    with pytest.raises(ValueError, match="no reply yet"):
        chat.resume()
    chat.chat("Hello")
    with pytest.raises(ValueError, match="expected a reply"):
        chat.resume(chat.turns[0])


# --- moving about ---------------------------------------------------------------------------------


def test_undo_hides_and_redo_shows(make, score):
    chat = make()
    with pytest.raises(ValueError, match="nothing to undo"):
        chat.undo()
    chat.chat("Hello")
    used = chat.cache_used
    chat.chat("More")
    whole = chat.turns
    assert chat.undo() == whole[2:]
    assert (chat.turns, chat.cache_used) == (whole[:2], used)
    assert chat.undo() == whole[:2]
    assert chat.turns == ()
    assert chat.redo() == whole[:2]
    assert chat.redo() == whole[2:]
    assert chat.turns == whole
    with pytest.raises(ValueError, match="nothing to redo"):
        chat.redo()
    chat.undo()
    turn = chat.chat("Other")
    with pytest.raises(ValueError, match="nothing to redo"):
        chat.redo()
    assert_parity(chat, turn, score)
    chat.select(whole[-1])
    assert chat.turns == whole
    assert len(chat.tree) == 6


def test_a_new_conversation_can_be_taken_back(make):
    chat = make()
    chat.chat("Hello")
    turns = chat.turns
    chat.new_conversation()
    assert chat.turns == ()
    assert chat.redo() == turns
    chat.new_conversation()
    chat.chat("Hi")
    assert chat.select(turns[0]) == turns


def test_selecting_shows_what_was_last_shown_below(make, score):
    chat = make()
    first = chat.chat("Hello")
    below = chat.chat("More")
    other = chat.regenerate(first)
    assert chat.turns[-1] is other
    assert chat.select(first)[-1] is below
    assert chat.tree.branches == (below, other)
    # What the cache holds of the branch is used again.
    turn = chat.chat("Go on")
    assert_parity(chat, turn, score)
    with pytest.raises(ValueError, match="not a turn"):
        chat.select(99)


def test_nothing_changes_while_a_reply_is_made(make):
    chat = make()
    first = chat.chat("Hello")
    stream = chat.stream("More")
    next(stream)
    asked = chat.turns[0]
    operations = [
        chat.undo,
        chat.redo,
        chat.resume,
        chat.replay,
        lambda: chat.select(first),
        lambda: chat.fork(first.tokens[0]),
        lambda: chat.edit(asked, "x"),
        lambda: chat.edit(first, "x"),
        lambda: chat.adopt(chat.tree),
    ]
    for operation in operations:
        with pytest.raises(BusyError):
            operation()
    stream.close()
    assert len(chat.tree) == 4


def test_the_making_of_a_reply_can_be_watched(make):
    chat = make()
    first = chat.chat("Hello")
    assert chat.making is None
    for event in chat.stream_regenerate():
        parent, partial = chat.making
        assert (parent, partial.id) == (chat.turns[0].id, 3)
        assert chat.turns == (chat.turns[0],)
        assert len(partial.tokens) > event.index
    assert chat.siblings(first)[-1] is chat.turns[-1]


def test_another_tree_can_be_adopted(make, score):
    chat, other = make(), make()
    turn = chat.chat("Hello")
    other.chat("Something else")
    other.adopt(chat.tree)
    assert other.turns == chat.turns
    assert_parity(other, other.fork(turn.tokens[4], 100), score)
    assert other.chat("More").id == 5


# --- differences ----------------------------------------------------------------------------------


def test_two_forks_are_seen_under_each_others_choice(make, score):
    chat = make()
    a = chat.chat("Hello")
    b = chat.fork(a.tokens[4], 100)
    diff = chat.diff(a, b)
    assert (diff.index, diff.shared) == (4, chat.turns[:1])
    assert (diff.a.turn, diff.b.reply) == (a, b)
    before = len(chat.tokens(a)) - len(a.tokens)
    for side, own, other in ((diff.a, a, b), (diff.b, b, a)):
        assert [t.token_id for t in side.tokens] == ids(own)[4:]
        swapped = chat.tokens(own)
        swapped[before + 4] = other.tokens[4].token_id
        here, there = score(chat.tokens(own)), score(swapped)
        for token, record in zip(side.tokens, own.tokens[4:], strict=True):
            row = record.position - 1
            assert token.piece == record.piece
            assert token.logprob == pytest.approx(record.logprob, abs=2e-5)
            assert token.logprob == pytest.approx(here[row, token.token_id], abs=2e-5)
            assert token.under_other == pytest.approx(there[row, token.token_id], abs=2e-5)
        # The token at the parting stands in the same place in both.
        assert side.tokens[0].logprob == pytest.approx(side.tokens[0].under_other, abs=1e-6)
        assert side.logprob == pytest.approx(sum(t.logprob for t in side.tokens))
    table = diff.table()
    assert len(table) == max(len(a.tokens), len(b.tokens)) - 4
    assert list(table["index"])[:2] == [4, 5]
    assert "in the place of the other" in repr(diff)
    assert "<table" in diff._repr_html_()


def test_two_messages_are_seen_under_each_other(make, score):
    chat = make()
    first = chat.chat("Hello")
    a = chat.chat("More")
    b = chat.edit(chat.turns[2], "Less of it")
    chat.chat("And on")
    diff = chat.diff(a, chat.turns[-1])
    assert (diff.index, diff.shared) == (0, chat.turns[:2])
    assert diff.shared[-1] is first
    assert (diff.a.turn.text, diff.b.turn.text) == ("More", "Less of it")
    assert (diff.a.reply, diff.b.reply) == (a, b)
    context = chat.tokens(b)[: -len(b.tokens)]
    under = score([*context, *ids(a)])
    for i, token in enumerate(diff.a.tokens):
        row = under[len(context) + i - 1]
        assert token.under_other == pytest.approx(row[token.token_id], abs=2e-5)
    # Messages stand for the replies that follow them.
    assert chat.diff(diff.a.turn, diff.b.turn).a == diff.a


def test_branches_that_do_not_part_have_no_difference(make):
    chat = make()
    first = chat.chat("Hello")
    second = chat.chat("More")
    for a, b in ((first, second), (second, first), (first, first)):
        with pytest.raises(ValueError, match="do not part"):
            chat.diff(a, b)
    stopped = chat.fork(second.tokens[3], chat.tokenizer.eos_id)
    diff = chat.diff(second, stopped)
    assert len(diff.b.tokens) == 1
    assert diff.b.tokens[0].token_id == chat.tokenizer.eos_id
    # One that goes on from where the other one stops.
    resumed = chat.resume(second)
    diff = chat.diff(second, resumed)
    assert (diff.index, diff.a.tokens) == (12, ())
    assert all(t.logprob == pytest.approx(t.under_other, abs=1e-6) for t in diff.b.tokens)
