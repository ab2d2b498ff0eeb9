from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from gemma_nb.config import TransformerConfig, interleave
from gemma_nb.widgets import heatmap
from gemma_nb.widgets.attention import AttentionPanel
from tests.widgets.fakes import FakeSession
from tests.widgets.front_end import FrontEnd, wait_until

CONFIG = TransformerConfig(
    num_embed=64,
    embed_dim=16,
    hidden_dim=32,
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
    layers=interleave(6, window=8),
    query_pre_attn_scalar=8,
    max_context=128,
)


@pytest.fixture
def session() -> FakeSession:
    session = FakeSession(CONFIG)
    session.chat("What is the capital of France?")
    return session


@pytest.fixture
def panel(session: FakeSession) -> Iterator[AttentionPanel]:
    panel = AttentionPanel(session)
    wait_until(lambda: panel.status["phase"] == "ready")
    yield panel
    panel.close()
    panel._runner.close(10)


def shown(panel: AttentionPanel) -> np.ndarray:
    size = panel.view["size"]
    return np.frombuffer(panel.head_map, np.uint8).reshape(size, size)


def test_it_shows_the_latest_reply(panel, session) -> None:
    length = session.turns[-1].tokens[-1].position + 1
    assert panel.view["length"] == length
    assert panel.view["first"] == 0
    assert panel.shape == {
        "layers": ["sliding 8"] * 5 + ["global"],
        "windows": [8] * 5 + [0],
        "heads": 4,
        "kv_heads": 1,
    }
    assert panel.layer == 5, "a global layer first"
    full = session.trace(session.turns[-1]).attention.values[5, 0].copy()
    full[:, 0] = 0
    np.testing.assert_array_equal(shown(panel), heatmap.quantise(full))
    assert len(panel.atlas) == 6 * 4 * panel.atlas_side**2


def test_one_head_travels_as_bytes(panel) -> None:
    front = FrontEnd(panel)
    before = shown(panel).copy()
    panel.set_state({"layer": 2, "head": 3})
    assert (panel.view["layer"], panel.view["head"]) == (2, 3)
    assert not np.array_equal(shown(panel), before)
    sent = [message for message in front.messages if "view" in message.get("state", {})]
    assert sent
    assert all("atlas" not in message["state"] for message in sent)
    assert all(["head_map"] in message["buffer_paths"] for message in sent)


def test_the_sink_can_be_shown(panel) -> None:
    assert not shown(panel)[:, 0].any()
    atlas = panel.atlas
    panel.set_state({"hide_bos": False})
    assert shown(panel)[:, 0].all()
    assert panel.atlas != atlas
    assert panel.view["hide_bos"] is False


def test_long_contexts_are_cropped_and_the_window_follows_the_selection(session) -> None:
    for _ in range(3):
        session.chat("and what else is there to say about it, if one has the time?")
    panel = AttentionPanel(session)
    wait_until(lambda: panel.status["phase"] == "ready")
    length = panel.view["length"]
    assert panel.view["size"] == heatmap.WINDOW
    assert panel.view["first"] == length - heatmap.WINDOW
    assert len(panel.labels) == heatmap.WINDOW
    assert len(panel.before) == heatmap.WINDOW
    panel.set_state({"selected": {"position": 12}})
    assert panel.view["first"] <= 11 < panel.view["first"] + panel.view["size"]
    panel.set_state({"show_all": True})
    assert panel.view["size"] == length
    assert panel.view["first"] == 0
    panel.close()
    panel._runner.close(10)


def test_rows_are_exact(panel, session) -> None:
    front = FrontEnd(panel)
    answer = front.run("row", query=12)["result"]
    weights = session.trace(session.turns[-1]).attention.values[panel.layer, panel.head, 12]
    best = max(range(1, 13), key=lambda key: weights[key])
    assert answer["rows"][0]["key"] == best
    assert answer["rows"][0]["weight"] == pytest.approx(float(weights[best]), rel=1e-5)
    assert "no attention" in front.run("row", query=10_000)["error"]


def test_a_new_reply_is_traced_once(panel, session) -> None:
    session.traced.clear()
    panel.refresh()
    assert session.traced == []
    turn = session.chat("And of Italy?")
    panel.refresh()
    panel.refresh()
    wait_until(lambda: panel.view["turn"] == str(turn.id))
    assert session.traced == [(turn.id, None)]


def test_it_waits_for_a_running_reply(session) -> None:
    session.delay = 0.01
    cell = threading.Thread(target=session.chat, args=("go on",))
    cell.start()
    wait_until(lambda: session.busy)
    panel = AttentionPanel(session)
    wait_until(lambda: panel.status["phase"] == "waiting")
    assert session.traced == []
    cell.join()
    wait_until(lambda: panel.status["phase"] == "ready")
    assert session.traced == [(session.turns[-1].id, None)]
    panel.close()
    panel._runner.close(10)


def test_a_trace_that_would_be_too_large_is_made_layer_by_layer(session, monkeypatch) -> None:
    monkeypatch.setattr(heatmap, "MAX_TRACE_BYTES", 1000)
    panel = AttentionPanel(session)
    wait_until(lambda: panel.status["phase"] == "ready")
    assert session.traced == [(session.turns[-1].id, [5])]
    assert panel.atlas == b""
    panel.set_state({"layer": 1})
    wait_until(lambda: panel.view["layer"] == 1)
    assert session.traced[-1] == (session.turns[-1].id, [1])
    assert len(panel.row(12)["rows"]) > 3
    panel.close()
    panel._runner.close(10)


def test_a_failing_trace_is_shown(session, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(session, "trace", fail)
    panel = AttentionPanel(session)
    wait_until(lambda: panel.error)
    assert panel.error == "MemoryError: no room"
    assert panel.status["phase"] == "error"
    panel.close()
    panel._runner.close(10)


def test_before_any_reply_it_says_so() -> None:
    panel = AttentionPanel(FakeSession(CONFIG))
    assert panel.status["phase"] == "idle"
    assert "no reply" in panel.static_html()
    panel.close()


def test_new_conversation_takes_the_picture_away(panel, session) -> None:
    session.new_conversation()
    panel.refresh()
    assert panel.head_map == b""
    assert panel.view == {}
    assert panel.status["phase"] == "idle"


def test_static_html_has_the_row_as_a_table(panel) -> None:
    html = panel.static_html()
    assert "<table>" in html
    assert "layer 5 (global), head 0" in html
    assert "<script" not in html
    assert len(repr(panel)) < 100


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="AttentionPanel got an unknown argument"):
        AttentionPanel(zoom=2)
