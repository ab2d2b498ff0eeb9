"""The browser's side of a panel, in Python: it gets the messages, and sends commands."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], Any], timeout: float = 10.0) -> None:
    """Waits for `condition`, which another thread brings about."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def apply_delta(transcript: dict[str, Any], delta: dict[str, Any]) -> bool:
    """What `applyDelta` of static/chat/transcript.js does."""
    if delta["seq"] <= transcript["seq"]:
        return True
    turns = transcript["turns"]
    if delta["seq"] != transcript["seq"] + 1 or delta["at"] > len(turns):
        return False
    tokens = turns[delta["at"]]["tokens"][: delta["start"]] if delta["start"] else []
    if delta["start"] > len(tokens):
        return False
    transcript["seq"] = delta["seq"]
    del turns[delta["length"] :]
    if delta["turn"] is not None:
        at = delta["at"]
        turns[at : at + 1] = [{**delta["turn"], "tokens": [*tokens, *delta["tokens"]]}]
    return True


class FrontEnd:
    """Receives what `panel` sends from now on; acknowledges deltas unless told not to."""

    def __init__(self, panel: Any, *, acknowledges: bool = True) -> None:
        self.panel = panel
        self.acknowledges = acknowledges
        self.messages: list[dict[str, Any]] = []
        self.answers: dict[Any, dict[str, Any]] = {}
        self.gaps = 0
        # As in a browser nothing is lost that is sent while the state is on its way.
        early: list[dict[str, Any]] = []
        lock = threading.Lock()
        opened = False

        def receive(message: dict[str, Any], buffers: Any = None) -> None:
            message = copy.deepcopy(message)
            with lock:
                if not opened:
                    early.append(message)
                    return
            self._receive(message)

        panel._send = receive
        self.state = copy.deepcopy(panel.get_state())
        with lock:
            # Without an answer: the panel may be waiting for this lock.
            self.acknowledges = False
            for message in early:
                self._receive(message)
            opened, self.acknowledges = True, acknowledges
        if early and acknowledges and "transcript" in self.state:
            panel.set_state({"ack": self.state["transcript"]["seq"]})

    def _receive(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        if message["method"] == "custom":
            self.answers[message["content"]["request"]] = message["content"]
            return
        if message["method"] != "update":
            return
        self.state.update(message["state"])
        delta = message["state"].get("delta")
        if not delta:
            return
        if not apply_delta(self.state["transcript"], delta):
            self.gaps += 1
        elif self.acknowledges:
            self.panel.set_state({"ack": delta["seq"]})

    def run(self, name: str, **args: Any) -> dict[str, Any]:
        """Sends a command; returns its answer."""
        request = f"test-{len(self.answers)}"
        content = {"kind": "command", "request": request, "name": name, "args": args}
        self.panel._handle_custom_msg(content, [])
        return self.answers[request]

    def deltas(self) -> list[dict[str, Any]]:
        states = [message.get("state", {}) for message in self.messages]
        return [state["delta"] for state in states if "delta" in state]
