"""Panels of a model that is still to be loaded, by its name."""

from __future__ import annotations

import itertools
import sys
import time
import types

import pytest

from gemma_nb.errors import CheckpointError, GemmaNbError
from gemma_nb.widgets.chat import ChatPanel
from tests.widgets.fakes import FakeSession
from tests.widgets.front_end import FrontEnd, wait_until


def phase(panel: ChatPanel) -> str:
    return panel.status["phase"]


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
