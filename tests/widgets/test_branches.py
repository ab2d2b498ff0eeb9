"""Branching off from the panel, on a real session with a small model."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest

import gemma_nb as gnb
from gemma_nb.widgets.chat import ChatPanel
from tests.widgets.front_end import FrontEnd, wait_until


@pytest.fixture
def shown(tiny_model) -> Iterator[tuple[ChatPanel, FrontEnd]]:
    sampling = gnb.Sampling(seed=3, max_new_tokens=8)
    chat = gnb.ChatSession(*tiny_model, template="none", sampling=sampling, cache_length=256)
    panel = ChatPanel(chat)
    yield panel, FrontEnd(panel)
    panel.close()
    panel._runner.close(10)


def done(panel: ChatPanel) -> None:
    wait_until(lambda: panel._reply_job is None and panel.status["phase"] == "ready", 60)


def turns(front: FrontEnd) -> list[dict]:
    return copy.deepcopy(front.state["transcript"]["turns"])


def ids(turn: dict) -> list[int]:
    return [token["id"] for token in turn["tokens"]]


def test_a_reply_is_forked_at_an_alternative_and_branches_are_switched(shown) -> None:
    panel, front = shown
    front.run("send_message", text="hello")
    done(panel)
    user, first = turns(front)
    assert "beside" not in first
    at = min(2, len(first["tokens"]) - 1)
    other = next(a[0] for a in first["tokens"][at]["a"] if a[0] != first["tokens"][at]["id"])
    assert "error" not in front.run("fork", turn=first["id"], token=at, with_token=other)
    done(panel)
    second = turns(front)[-1]
    assert ids(second)[:at] == ids(first)[:at]
    assert ids(second)[at] == other
    assert second["beside"] == [first["id"], second["id"]]
    assert ids(second) == [token.token_id for token in panel.chat.turns[-1].tokens]

    front.run("select", turn=first["id"])
    assert ids(turns(front)[-1]) == ids(first)
    assert turns(front)[-1]["beside"] == second["beside"]
    assert turns(front)[0]["id"] == user["id"]
    assert front.gaps == 0
    assert front.state["transcript"] == panel.get_state("transcript")["transcript"]


def test_a_reply_gets_another_end_from_a_token_on(shown) -> None:
    panel, front = shown
    front.run("send_message", text="hello")
    done(panel)
    first = turns(front)[-1]
    front.run("fork", turn=first["id"], token=1)
    done(panel)
    assert ids(turns(front)[-1])[:2] == ids(first)[:2]
    assert len(turns(front)[-1]["beside"]) == 2


def test_an_earlier_message_is_edited_and_undone(shown) -> None:
    panel, front = shown
    for text in ("hello", "and then"):
        front.run("send_message", text=text)
        done(panel)
    before = turns(front)
    front.run("edit", turn=before[0]["id"], text="good bye")
    done(panel)
    now = turns(front)
    assert [turn["role"] for turn in now] == ["user", "model"]
    assert now[0]["text"] == "good bye"
    assert now[0]["beside"] == [before[0]["id"], now[0]["id"]]
    front.run("select", turn=before[0]["id"])
    assert [turn["id"] for turn in turns(front)] == [turn["id"] for turn in before]
    front.run("undo")
    assert [turn["id"] for turn in turns(front)] == [turn["id"] for turn in before[:2]]
    assert front.gaps == 0


def test_what_cannot_be_done_is_said(shown) -> None:
    panel, front = shown
    assert "nothing to undo" in front.run("undo")["error"]
    assert "empty" in front.run("edit", turn=1, text=" ")["error"]
    front.run("send_message", text="hello")
    done(panel)
    front.run("fork", turn=turns(front)[-1]["id"], token=99)
    done(panel)
    assert front.state["error"]
    assert len(turns(front)) == 2
    assert "not a turn" in front.run("select", turn=77)["error"]
