from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import threading
import time
import types
from collections.abc import Iterator

import pytest

from gemma_nb.errors import CheckpointError, GemmaNbError
from gemma_nb.widgets import conversation
from gemma_nb.widgets.chat import ChatPanel
from tests.widgets.fakes import FakeSession
from tests.widgets.front_end import FrontEnd, wait_until

LONG = [" word"] * 2000


@pytest.fixture
def panels() -> Iterator[list[ChatPanel]]:
    made: list[ChatPanel] = []
    yield made
    for panel in made:
        panel.close()
        panel._runner.close(10)


def connected(panels: list[ChatPanel], session: FakeSession, **options) -> tuple:
    panel = ChatPanel(session)
    panels.append(panel)
    return panel, FrontEnd(panel, **options)


def phase(panel: ChatPanel) -> str:
    return panel.status["phase"]


def replied(panel: ChatPanel, turns: int = 2) -> None:
    """Waits until the conversation has so many turns and nothing runs."""
    wait_until(
        lambda: (
            len(panel.chat.turns) == turns and panel._reply_job is None and phase(panel) == "ready"
        )
    )


def test_the_panel_says_how_far_a_long_prompt_is_read(panels) -> None:
    session = FakeSession(prefill=0.05)
    panel, front = connected(panels, session)
    texts: list[str] = []
    panel.observe(lambda change: texts.append(change["new"]["text"]), "status")
    front.run("send_message", text="Hello")
    replied(panel)
    read = "Reading the conversation"
    assert [text for text in texts if text.startswith(read)] == [
        read,
        f"{read}: 1,500 of 3,000 tokens",
    ]
    assert texts[-1] == "Ready"
    # A cell's replies are its own affair.
    session.chat("Hello")
    assert texts[-1] == "Ready"
    panel.close()
    assert session.listeners == []


def test_a_message_streams_into_the_transcript(panels) -> None:
    panel, front = connected(panels, FakeSession(delay=0.002))
    assert front.run("send_message", text="What is the capital of France?") == {
        "kind": "answer",
        "request": "test-0",
        "result": None,
    }
    replied(panel)
    shown = front.state["transcript"]["turns"]
    turn = panel.chat.turns[-1]
    assert [t["role"] for t in shown] == ["user", "model"]
    assert shown[0]["text"] == "What is the capital of France?"
    assert [t["id"] for t in shown[1]["tokens"]] == [t.token_id for t in turn.tokens]
    assert shown[1]["id"] == turn.id
    assert shown[1]["finish"] == "stop"
    assert front.state["cache_used"] == panel.chat.cache_used
    assert front.state["tokens_per_second"] > 0
    assert front.gaps == 0


def test_the_evidence_is_that_of_the_records(panels) -> None:
    panel, front = connected(panels, FakeSession())
    front.run("send_message", text="hi")
    replied(panel)
    for shown, kept in zip(
        front.state["transcript"]["turns"][1]["tokens"], panel.chat.turns[-1].tokens, strict=True
    ):
        assert len(shown["a"]) >= 5
        for (token_id, _, logprob, after), other in zip(shown["a"], kept.alternatives, strict=True):
            assert token_id == other.token_id
            assert math.isclose(math.exp(logprob), math.exp(other.logprob), rel_tol=1e-5)
            assert math.isclose(after, other.probability, rel_tol=1e-5)


def test_tokens_leave_as_deltas_and_never_the_whole_transcript(panels) -> None:
    panel, front = connected(panels, FakeSession(replies=[LONG[:300]], delay=0.001))
    front.run("send_message", text="go on")
    replied(panel)
    deltas = front.deltas()
    assert sum(len(delta["tokens"]) for delta in deltas) == 300
    assert len(deltas) < 60, "tokens were not coalesced"
    assert not any("transcript" in message.get("state", {}) for message in front.messages)
    assert front.state["transcript"] == panel.get_state("transcript")["transcript"]


def test_a_view_that_opens_while_tokens_come_sees_all_of_them(panels) -> None:
    panel, front = connected(panels, FakeSession(replies=[LONG[:120]], delay=0.005))
    front.run("send_message", text="go on")
    wait_until(lambda: panel._feed.turns and len(panel._feed.turns[-1]["tokens"]) > 20)
    late = FrontEnd(panel)  # as after a page reload: the full state, then deltas
    assert len(late.state["transcript"]["turns"][-1]["tokens"]) > 20
    wait_until(lambda: phase(panel) == "ready")
    assert late.gaps == 0
    assert late.state["transcript"] == panel.get_state("transcript")["transcript"]


def test_resync_sends_the_whole_transcript(panels) -> None:
    panel, front = connected(panels, FakeSession())
    front.run("send_message", text="hi")
    replied(panel)
    front.state["transcript"] = {"seq": 0, "turns": []}
    front.run("resync")
    assert len(front.state["transcript"]["turns"]) == 2


def test_the_saved_state_holds_the_conversation(panels) -> None:
    panel, front = connected(panels, FakeSession())
    front.run("send_message", text="hi")
    replied(panel)
    saved = json.loads(json.dumps(panel._get_embed_state()["state"]))
    assert saved["transcript"] == front.state["transcript"]
    assert saved["saved_bytes"] > 1000


def test_stop_ends_a_long_reply_from_the_thread_of_the_message(panels) -> None:
    panel, front = connected(panels, FakeSession(replies=[LONG], delay=0.005))
    front.run("send_message", text="go on")
    wait_until(lambda: panel._feed.turns and panel._feed.turns[-1]["tokens"])
    began = time.monotonic()
    front.run("stop")
    wait_until(lambda: phase(panel) == "ready")
    assert time.monotonic() - began < 2  # some 0.05 on a quiet machine
    last = front.state["transcript"]["turns"][-1]
    assert last["finish"] == "cancelled"
    assert "Stopped" in last["detail"]
    assert 0 < len(last["tokens"]) < len(LONG)
    front.run("send_message", text="and now?")
    wait_until(lambda: len(panel.chat.turns) == 4 or panel.chat.partial)
    front.run("stop")


def test_stop_before_the_first_token_counts(panels) -> None:
    panel, front = connected(panels, FakeSession(replies=[LONG], delay=0.002, prefill=0.2))
    front.run("send_message", text="go on")
    front.run("stop")
    wait_until(lambda: phase(panel) == "ready" and not panel.chat.busy, timeout=3)
    assert len(panel.chat.turns[-1].tokens if panel.chat.turns else ()) < 10


def test_a_second_message_is_refused_while_a_reply_runs(panels) -> None:
    panel, front = connected(panels, FakeSession(replies=[LONG], delay=0.005))
    front.run("send_message", text="go on")
    for name, args in (
        ("send_message", {"text": "more"}),
        ("regenerate", {}),
        ("new_conversation", {}),
    ):
        assert "still replying" in front.run(name, **args)["error"]
    assert panel.error == "", "a refusal is no error of the panel"
    front.run("stop")
    replied(panel)


def test_a_cell_that_chats_is_followed_and_can_be_stopped(panels) -> None:
    session = FakeSession(replies=[LONG], delay=0.005)
    panel, front = connected(panels, session)
    cell = threading.Thread(target=session.chat, args=("from a cell",))
    cell.start()
    wait_until(lambda: session.busy)
    assert "still replying" in front.run("send_message", text="me too")["error"]
    front.run("refresh")
    assert front.run("refresh").get("error") is None
    wait_until(lambda: len(front.state["transcript"]["turns"]) == 2)
    wait_until(lambda: len(front.state["transcript"]["turns"][1]["tokens"]) > 20)
    assert front.state["status"]["phase"] == "generating"
    front.run("stop")
    cell.join(5)
    replied(panel)
    assert front.state["transcript"]["turns"][1]["finish"] == "cancelled"
    assert front.state["transcript"]["turns"][0]["text"] == "from a cell"


def test_what_a_cell_said_is_there_when_the_panel_is_shown(panels) -> None:
    session = FakeSession()
    session.chat("before")
    panel, front = connected(panels, session)
    assert front.state["transcript"]["turns"][0]["text"] == "before"
    session.chat("after")
    assert "after" in panel._repr_mimebundle_()[0]["text/html"]
    assert len(front.state["transcript"]["turns"]) == 4


def test_regenerate_replaces_the_last_reply_only(panels) -> None:
    panel, front = connected(panels, FakeSession())
    for count, text in enumerate(("one", "two"), 1):
        front.run("send_message", text=text)
        replied(panel, 2 * count)
    before = [turn["id"] for turn in front.state["transcript"]["turns"]]
    front.run("regenerate")
    wait_until(lambda: phase(panel) == "ready" and panel.chat.turns[-1].id != before[-1])
    wait_until(lambda: front.state["transcript"]["turns"][-1]["id"] == panel.chat.turns[-1].id)
    assert [turn["id"] for turn in front.state["transcript"]["turns"]][:2] == before[:2]
    assert len(front.state["transcript"]["turns"]) == 4


def test_regenerate_without_a_reply_says_so(panels) -> None:
    _, front = connected(panels, FakeSession())
    assert "no reply" in front.run("regenerate")["error"]


def test_an_exception_while_generating_is_shown_and_the_chat_goes_on(panels) -> None:
    session = FakeSession(fail_at=3)
    panel, front = connected(panels, session)
    front.run("send_message", text="hi")
    wait_until(lambda: front.state["error"])
    assert "NaN logits at position" in front.state["error"]
    wait_until(lambda: phase(panel) == "ready")
    last = front.state["transcript"]["turns"][-1]
    assert last["finish"] == "error"
    assert len(last["tokens"]) == 3
    session.fail_at = None
    front.run("send_message", text="again")
    wait_until(lambda: len(session.turns) == 4 and phase(panel) == "ready")
    assert front.state["error"] == ""


def test_an_empty_message_and_an_unknown_command_are_answered(panels) -> None:
    _, front = connected(panels, FakeSession())
    assert "empty" in front.run("send_message", text="  \n")["error"]
    assert "no command 'close'" in front.run("close")["error"]
    assert "error" in front.run("send_message", nonsense=1)


def test_new_conversation_empties_the_transcript(panels) -> None:
    panel, front = connected(panels, FakeSession())
    front.run("send_message", text="hi")
    replied(panel)
    front.run("new_conversation")
    assert front.state["transcript"]["turns"] == []
    assert panel.chat.turns == ()
    assert front.state["selected"] == {}


def test_settings_reach_the_session_and_bad_ones_are_refused(panels) -> None:
    panel, front = connected(panels, FakeSession())
    good = {**panel.settings, "temperature": 0.0, "top_k": None, "max_new_tokens": 3}
    panel.set_state({"settings": good})
    assert panel.chat.sampling.temperature == 0.0
    assert panel.chat.sampling.top_k is None
    panel.set_state({"settings": {**good, "temperature": -1}})
    assert "temperature" in front.state["error"]
    assert panel.settings == good
    assert panel.chat.sampling.temperature == 0.0
    front.run("send_message", text="hi")
    replied(panel)
    assert panel.chat.turns[-1].finish_reason == "length"


def test_the_evidence_can_be_stripped(panels) -> None:
    panel, front = connected(panels, FakeSession())
    front.run("send_message", text="hi")
    wait_until(lambda: phase(panel) == "ready" and front.state["saved_bytes"])
    before = front.state["saved_bytes"]
    front.run("strip_evidence")
    assert front.state["saved_bytes"] < before
    assert all(token["a"] == [] for token in front.state["transcript"]["turns"][1]["tokens"])
    assert panel.chat.turns[-1].tokens[0].alternatives, "the session keeps its evidence"


def test_settings_made_in_a_cell_are_kept(panels) -> None:
    panel, front = connected(panels, FakeSession())
    panel.chat.sampling = dataclasses.replace(panel.chat.sampling, max_new_tokens=2)
    front.run("send_message", text="hi")
    replied(panel)
    assert panel.chat.turns[-1].finish_reason == "length"
    front.run("refresh")
    assert front.state["settings"]["max_new_tokens"] == 2


def test_a_heavy_transcript_loses_its_oldest_alternatives(panels, monkeypatch) -> None:
    monkeypatch.setattr(conversation, "MAX_SAVED_BYTES", 9000)
    panel, front = connected(panels, FakeSession())
    for count in (1, 2, 3):
        front.run("send_message", text="hi")
        replied(panel, 2 * count)
    turns = front.state["transcript"]["turns"]
    assert all(not token["a"] for token in turns[1]["tokens"])
    assert all(token["a"] for token in turns[5]["tokens"])
    assert front.state["transcript"] == panel.get_state("transcript")["transcript"]


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="ChatPanel got an unknown argument 'colour'"):
        ChatPanel(FakeSession(), colour="red")


def test_repr_is_short_and_the_bundle_has_text_and_html(panels) -> None:
    panel, _ = connected(panels, FakeSession(replies=[LONG]))
    panel.chat.chat("hi")
    assert len(repr(panel)) < 100
    data, metadata = panel._repr_mimebundle_()
    assert metadata == {}
    assert data["text/plain"] == repr(panel)
    assert "hi" in data["text/html"]
    assert "<script" not in data["text/html"]
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.model_id


def test_closing_stops_the_reply_and_ends_the_thread() -> None:
    session = FakeSession(replies=[LONG], delay=0.005)
    panel = ChatPanel(session)
    panel.send_message("go on")
    wait_until(lambda: session.partial is not None)
    thread = panel._runner._thread
    panel.close()
    wait_until(lambda: not session.busy, timeout=2)
    thread.join(2)
    assert not thread.is_alive()
    assert session.turns[-1].finish_reason == "cancelled"


# -- from a name


@pytest.fixture
def loadable(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    """Stands in for `load` and `ChatSession`: loading takes a moment and tells how far it is."""
    session = FakeSession(prefill=0.02)

    def load(source: str, progress) -> tuple[str, str]:
        if source == "missing":
            raise CheckpointError("no model is called 'missing'; there is gemma3-270m")
        for step in range(4):
            time.sleep(0.02)
            progress(step / 4, "Reading weights")
        return "model", "tokenizer"

    loading = types.SimpleNamespace(load=load)
    chatting = types.SimpleNamespace(ChatSession=lambda model, tokenizer: session)
    monkeypatch.setitem(sys.modules, "gemma_nb.loading", loading)
    monkeypatch.setitem(sys.modules, "gemma_nb.chat.session", chatting)
    return session


def test_a_source_is_loaded_in_the_background_and_a_message_waits(panels, loadable) -> None:
    panel = ChatPanel("gemma3-270m")
    panels.append(panel)
    front = FrontEnd(panel)
    assert phase(panel) == "loading"
    assert panel.about["title"] == "gemma3-270m"
    with pytest.raises(GemmaNbError, match="not ready"):
        _ = panel.chat
    assert "error" not in front.run("send_message", text="early")
    assert front.state["waiting"] == "early"
    assert "waiting for the model" in front.run("send_message", text="second")["error"]
    assert panel.wait_until_ready(10) is loadable
    # Who waited in a cell can chat now: the message that waited is answered.
    assert len(loadable.turns) == 2
    assert phase(panel) == "ready"
    states = [message.get("state", {}) for message in front.messages]
    phases = [state["status"]["phase"] for state in states if "status" in state]
    changes = [phase for phase, _ in itertools.groupby(phases)]
    assert changes == ["loading", "compiling", "ready", "generating", "ready"]
    assert loadable.turns[0].text == "early"
    assert front.state["waiting"] == ""


def test_stop_gives_a_waiting_message_back(panels, loadable) -> None:
    panel = ChatPanel("gemma3-270m")
    panels.append(panel)
    front = FrontEnd(panel)
    front.run("send_message", text="early")
    assert front.run("stop")["result"] == "early"
    panel.wait_until_ready(10)
    assert loadable.turns == ()
    assert front.state["waiting"] == ""


def test_a_model_that_cannot_be_loaded_says_why_and_can_be_tried_again(panels, loadable) -> None:
    panel = ChatPanel("missing")
    panels.append(panel)
    front = FrontEnd(panel)
    with pytest.raises(GemmaNbError, match="no model is called 'missing'"):
        panel.wait_until_ready(10)
    assert phase(panel) == "error"
    assert "there is gemma3-270m" in front.state["error"]
    assert "Retry" in front.run("send_message", text="hi")["error"]
    panel._source = "gemma3-270m"
    wait_until(lambda: not panel._runner.busy)
    front.run("retry")
    assert panel.wait_until_ready(10) is loadable
    assert front.state["error"] == ""


def test_waiting_has_a_limit(panels, loadable) -> None:
    panel = ChatPanel("gemma3-270m")
    panels.append(panel)
    with pytest.raises(TimeoutError, match="not ready after"):
        panel.wait_until_ready(0.001)
