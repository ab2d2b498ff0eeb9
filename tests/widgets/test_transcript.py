from __future__ import annotations

import dataclasses
import json
import math

from gemma_nb.widgets.transcript import TranscriptFeed, encode_head, encode_token, number
from tests.widgets.fakes import FakeSession, TokenRecord, Turn, evidence
from tests.widgets.front_end import apply_delta


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def feed_and_copy(**options: float) -> tuple[TranscriptFeed, dict, list[dict], Clock]:
    clock, sent = Clock(), []
    transcript = {"seq": 0, "turns": []}

    def send(delta: dict) -> None:
        sent.append(json.loads(json.dumps(delta)))
        assert apply_delta(transcript, sent[-1])

    return TranscriptFeed(send, clock=clock, **options), transcript, sent, clock


def tokens(count: int) -> list[dict]:
    return [encode_token(TokenRecord(**evidence(" a", i, i, 0))) for i in range(count)]


def test_tokens_that_come_fast_travel_together() -> None:
    feed, transcript, sent, clock = feed_and_copy(interval=0.04)
    feed.place(0, {"id": 1, "role": "model"})
    feed.acknowledge(feed.seq)
    for token in tokens(100):
        clock.now += 0.01
        feed.append(token)
        feed.acknowledge(feed.seq)
    feed.flush(force=True)
    assert len(sent) <= 2 + 100 * 0.01 / 0.04
    assert sum(len(delta["tokens"]) for delta in sent) == 100, "a token was sent twice"
    assert transcript == feed.snapshot()


def test_without_acknowledgements_the_feed_holds_back_but_does_not_stop() -> None:
    feed, transcript, sent, clock = feed_and_copy(interval=0.04, window=4, hold=0.5)
    feed.place(0, {"id": 1, "role": "model"})
    for token in tokens(400):
        clock.now += 0.01
        feed.append(token)
    # 4 deltas of the window, then one every half second of the 4 seconds.
    assert 8 <= len(sent) <= 14
    feed.acknowledge(feed.seq)
    clock.now += 0.05
    assert feed.flush() is False or transcript == feed.snapshot()


def test_a_browser_gets_ten_deltas_a_second_and_tells_of_every_eighth() -> None:
    feed, transcript, sent, clock = feed_and_copy()
    feed.place(0, {"id": 1, "role": "model"})
    told, waited = 0, 0.0
    for token in tokens(200):
        before = len(sent)
        clock.now += 0.025  # forty tokens a second, for five seconds
        feed.append(token)
        waited = 0.0 if len(sent) > before else waited + 0.025
        assert waited < 0.13, "held back"
        if feed.seq >= told + 8:
            told = feed.seq
            feed.acknowledge(told)
    assert len(sent) <= 2 + 5 / 0.1
    feed.flush(force=True)
    assert transcript == feed.snapshot()


def test_a_new_turn_drops_what_came_after_its_place() -> None:
    feed, transcript, _, _ = feed_and_copy()
    feed.place(0, {"id": 1, "role": "user", "text": "hi"})
    feed.place(1, {"id": 2, "role": "model"}, tokens(3))
    feed.place(1, {"id": 3, "role": "model"})
    assert [turn["id"] for turn in transcript["turns"]] == [1, 3]
    assert transcript["turns"][1]["tokens"] == []
    feed.truncate(1)
    assert [turn["id"] for turn in transcript["turns"]] == [1]
    feed.truncate(0)
    assert transcript == feed.snapshot() == {"seq": feed.seq, "turns": []}


def test_a_head_changes_without_sending_the_tokens_again() -> None:
    feed, transcript, sent, _ = feed_and_copy()
    feed.place(0, {"id": -2, "role": "model"}, tokens(5))
    feed.rehead({"id": 7, "role": "model", "finish": "stop", "detail": ""})
    assert sent[-1]["tokens"] == []
    assert sent[-1]["start"] == 5
    assert transcript == feed.snapshot()
    assert transcript["turns"][0]["finish"] == "stop"


def test_the_head_of_an_earlier_turn_changes_and_the_later_ones_stay() -> None:
    feed, transcript, sent, _ = feed_and_copy()
    feed.place(0, {"id": -1, "role": "user", "text": "hi"})
    feed.place(1, {"id": -2, "role": "model"}, tokens(2))
    feed.append(tokens(1)[0])
    feed.rehead({"id": 4, "role": "user", "text": "hi"}, at=0)
    assert (sent[-1]["at"], sent[-1]["length"], sent[-1]["tokens"]) == (0, 2, [])
    assert transcript == feed.snapshot()
    assert [(turn["id"], len(turn["tokens"])) for turn in transcript["turns"]] == [(4, 0), (-2, 3)]


def test_a_snapshot_does_not_change_with_later_tokens() -> None:
    feed, _, _, _ = feed_and_copy()
    feed.place(0, {"id": 1, "role": "model"})
    before = feed.snapshot()
    feed.append(tokens(1)[0])
    assert before["turns"][0]["tokens"] == []


def test_stripping_takes_the_alternatives_and_keeps_the_rest() -> None:
    feed, _, _, _ = feed_and_copy()
    feed.place(0, {"id": 1, "role": "model"}, tokens(20))
    feed.place(1, {"id": 2, "role": "model"}, tokens(20))
    heavy = feed.weight()
    feed.strip_alternatives(keep_turns=1)
    first, second = feed.turns
    assert feed.weight() < 0.7 * heavy
    assert all(token["a"] == [] and token["lp"] is not None for token in first["tokens"])
    assert all(token["a"] for token in second["tokens"])


def test_tokens_are_rounded_and_finite() -> None:
    token = encode_token(TokenRecord(**evidence(" Paris", 0, 12, 3)))
    for _, _, logprob, after in token["a"]:
        assert logprob == round(logprob, 6)
        assert after == float(f"{after:.6g}")
    assert number(-math.inf) is None
    assert number(math.nan) is None
    assert "w" not in token, "the label is only sent where it is not the text"
    assert encode_token(TokenRecord(**evidence("<end_of_turn>", 0, 12, 3)))["w"] == "<end_of_turn>"


def test_only_turns_without_tokens_carry_their_text() -> None:
    session = FakeSession()
    session.chat("hello")
    user, reply = (encode_head(turn) for turn in session.turns)
    assert user == {"id": session.turns[0].id, "role": "user", "text": "hello"}
    assert "text" not in reply
    assert reply["finish"] == "stop"
    failed = encode_head(
        Turn(1, "model", "", finish_reason="error", finish_detail="The prompt is too long.")
    )
    assert failed["detail"] == "The prompt is too long."
    assert failed["text"] == ""


def test_following_a_session_sends_only_what_differs() -> None:
    feed, transcript, sent, _ = feed_and_copy()
    session = FakeSession()
    session.chat("one")
    feed.follow(session.turns)
    assert [turn["id"] for turn in transcript["turns"]] == [turn.id for turn in session.turns]
    before = len(sent)
    feed.follow(session.turns)
    assert len(sent) == before, "nothing had changed"
    session.chat("two")
    feed.follow(session.turns)
    assert sum(len(delta["tokens"]) for delta in sent[before:]) == len(session.turns[-1].tokens)
    # A reply that is being made grows.
    partial = dataclasses.replace(session.turns[3], finish_reason=None)
    begun = dataclasses.replace(partial, id=99, tokens=partial.tokens[:2])
    feed.follow([*session.turns, begun])
    before = len(sent)
    feed.follow([*session.turns, dataclasses.replace(begun, tokens=partial.tokens[:5])])
    assert sum(len(delta["tokens"]) for delta in sent[before:]) == 3
    feed.follow(session.turns[:2])
    assert transcript == feed.snapshot()
    assert len(transcript["turns"]) == 2
