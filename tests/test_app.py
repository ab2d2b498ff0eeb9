from __future__ import annotations

import subprocess
import sys

import nbformat
import pytest
from nbconvert import HTMLExporter

from gemma_nb.app import ChatApp
from tests.widgets.fakes import FakeSession
from tests.widgets.front_end import wait_until
from tests.widgets.test_attention import CONFIG


@pytest.fixture
def app():
    app = ChatApp(FakeSession(CONFIG))
    yield app
    app.close()
    for panel in (app.chat_panel, app.attention_panel):
        panel._runner.close(10)


def test_a_reply_is_followed_by_its_attention(app) -> None:
    app.chat_panel.send_message("What is the capital of France?")
    wait_until(lambda: app.attention_panel.status["phase"] == "ready")
    assert app.attention_panel.view["turn"] == str(app.chat.turns[-1].id)


def test_the_selection_is_shared_in_the_browser(app) -> None:
    assert app._link.source == (app.chat_panel, "selected")
    assert app._link.target == (app.attention_panel, "selected")


def test_it_is_one_widget_with_a_record(app) -> None:
    app.chat.chat("What is the capital of France?")
    data, _ = app._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == app.model_id
    assert "What is the capital of France?" in data["text/html"]
    assert "Attention" in data["text/html"]
    assert "<script" not in data["text/html"]
    assert data["text/plain"] == repr(app)
    assert len(repr(app)) < 200


def test_nbconvert_shows_the_conversation_without_a_kernel(app) -> None:
    app.chat.replies = [[" Say", " </script><b>x</b>"]]
    app.chat.chat("What is said?")
    app.attention_panel.attach(app.chat)
    wait_until(lambda: app.attention_panel.status["phase"] == "ready")
    data, _ = app._repr_mimebundle_()
    output = nbformat.v4.new_output("display_data", data=data)
    cell = nbformat.v4.new_code_cell("app", outputs=[output])
    page, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert "What is said?" in page
    assert "before the sampler" in page
    assert "&lt;/script&gt;&lt;b&gt;x&lt;/b&gt;" in page
    assert "</script><b>x" not in page


def test_waiting_returns_the_session(app) -> None:
    assert app.wait_until_ready(1) is app.chat


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="ChatApp got an unknown argument 'theme'"):
        ChatApp(FakeSession(CONFIG), theme="dark")


def test_importing_the_panels_starts_no_jax() -> None:
    code = "import gemma_nb.app, sys; print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
