"""What is closed is let go of: sessions, traces, threads, and what else ipywidgets keeps."""

from __future__ import annotations

import gc
import threading
import types
import weakref

import IPython
import ipywidgets
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from gemma_nb.app import ChatApp
from gemma_nb.errors import GemmaNbError
from gemma_nb.widgets import AttentionPanel, ChatPanel, loading
from gemma_nb.widgets.rerun import close_earlier
from tests.widgets.fakes import FakeSession
from tests.widgets.front_end import wait_until
from tests.widgets.test_attention import CONFIG

REGISTRY = ipywidgets.widgets.widget._instances


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name in ("gemma_nb chat", "gemma_nb attention")]


def talk(app: ChatApp) -> None:
    """A message with its trace, so that both threads are there."""
    app.chat_panel.send_message("What is the capital of France?")
    wait_until(lambda: app.attention_panel.status["phase"] == "ready")


@pytest.mark.parametrize("way", ["app.close()", "Widget.close_all()"])
def test_a_closed_app_lets_go_of_everything_while_it_is_still_held(way) -> None:
    """IPython's `Out` holds what a cell showed, closed or not."""
    kept, sessions, traces = [], [], []
    widgets, running = set(REGISTRY), len(threads())
    for _ in range(3):
        app = ChatApp(FakeSession(CONFIG))
        talk(app)
        sessions.append(weakref.ref(app.chat))
        traces.append(weakref.ref(app.attention_panel._trace))
        if way == "app.close()":
            app.close()
        else:
            for widget in [w for key, w in list(REGISTRY.items()) if key not in widgets]:
                widget.close()  # what `Widget.close_all` does, without those of other tests
        kept.append(app)
    wait_until(lambda: len(threads()) == running)
    gc.collect()
    assert [ref() for ref in (*sessions, *traces)] == [None] * 6
    assert set(REGISTRY) == widgets
    for closed in kept:
        assert "capital of France" in closed.static_html()  # the record of what was said
        with pytest.raises(GemmaNbError, match="was closed; make a new one"):
            _ = closed.chat
        with pytest.raises(GemmaNbError, match="was closed"):
            closed.wait_until_ready(1)
        with pytest.raises(GemmaNbError, match="was closed"):
            closed.attention_panel.attach(FakeSession(CONFIG))


def test_closing_stops_the_reply_of_the_app_and_the_session_goes_on() -> None:
    session = FakeSession(CONFIG, replies=[[" word"] * 500], delay=0.002)
    app = ChatApp(session)
    app.chat_panel.send_message("Talk")
    wait_until(lambda: session.partial is not None and len(session.partial.tokens) > 3)
    app.close()
    wait_until(lambda: not session.busy)
    assert session.turns[-1].finish_reason == "cancelled"
    assert session.listeners == []
    session.replies = [[" Paris", "."]]
    assert session.chat("And now?").text == "Paris."


def test_closing_leaves_the_reply_of_a_cell_alone() -> None:
    session = FakeSession(CONFIG, replies=[[" word"] * 60], delay=0.002)
    panel = ChatPanel(session)
    events = session.stream("From a cell")
    next(events)
    panel.refresh()
    wait_until(lambda: panel.status["text"] == "Replying to a cell")
    panel.close()
    assert len(list(events)) == 59
    assert session.turns[-1].finish_reason == "stop"


def test_who_waits_for_a_closed_app_is_told(monkeypatch) -> None:
    started, go_on = threading.Event(), threading.Event()

    def load(self, source, job):
        started.set()
        go_on.wait(10)
        return FakeSession(CONFIG)

    monkeypatch.setattr(loading.Loader, "load", load)
    app = ChatApp("gemma3-270m")
    started.wait(10)
    app.close()
    with pytest.raises(GemmaNbError, match="was closed"):
        app.wait_until_ready(10)
    go_on.set()
    app.chat_panel._runner.close(10)
    assert app.chat_panel._session is None  # what came too late is not kept


# --- a source that was loaded already


@pytest.fixture
def loads(monkeypatch, tmp_path):
    """A file of weights that takes no loading, and how often it was loaded all the same."""
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"weights")
    count: list[str] = []

    class Thing:
        pass

    def load(source, progress):
        count.append(str(source))
        return Thing(), Thing()

    def session(model, tokenizer):
        made = FakeSession(CONFIG)
        made.model.params, made.tokenizer, made.loaded = {}, tokenizer, model
        return made

    def resolve(source):
        return types.SimpleNamespace(name=str(source), files=(path,))

    monkeypatch.setattr("gemma_nb.loading.load", load)
    monkeypatch.setattr("gemma_nb.checkpoints.sources.resolve", resolve)
    monkeypatch.setattr("gemma_nb.chat.session.ChatSession", session)
    return types.SimpleNamespace(path=path, count=count)


def test_apps_of_one_source_share_its_model_as_long_as_one_is_open(loads) -> None:
    first, second = ChatApp(loads.path), ChatApp(loads.path)
    models = [app.wait_until_ready(10).loaded for app in (first, second)]
    assert models[0] is models[1]
    model = weakref.ref(models.pop())
    models.clear()
    first.close()
    gc.collect()
    assert model() is not None
    second.close()
    gc.collect()
    wait_until(lambda: model() is None)
    third = ChatApp(loads.path)
    third.wait_until_ready(10)
    assert loads.count == [str(loads.path)] * 2
    third.close()


def test_a_file_that_was_replaced_is_read_again(loads) -> None:
    first = ChatApp(loads.path)
    old = first.wait_until_ready(10)
    loads.path.write_bytes(b"other weights")
    second = ChatApp(loads.path)
    assert second.wait_until_ready(10).loaded is not old.loaded
    first.close()
    second.close()


# --- cells that run again


class Notebook:
    """IPython's shell, told by requests which cell it runs, as a kernel's is."""

    def __init__(self) -> None:
        self.shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
        self.runs = 0
        self.shell.get_parent = lambda: self.parent
        self.parent: dict = {}

    def run(self, code: str, cell: str | None = None) -> None:
        self.runs += 1
        header = {"msg_type": "execute_request", "msg_id": f"run {self.runs}"}
        metadata = {"cellId": cell} if cell else {}
        self.parent = {"header": header, "metadata": metadata, "content": {"code": code}}
        self.shell.run_cell(code, store_history=True).raise_error()


@pytest.fixture
def notebook(monkeypatch):
    notebook = Notebook()
    monkeypatch.setattr(IPython, "get_ipython", lambda: notebook.shell)
    made: list[weakref.ref] = []
    names = {"AttentionPanel": AttentionPanel, "ChatPanel": ChatPanel, "ipywidgets": ipywidgets}

    def app():
        app = ChatApp(FakeSession(CONFIG))
        made.append(weakref.ref(app))
        return app

    notebook.shell.user_ns.update(names, made_app=app, session=FakeSession(CONFIG))
    notebook.open = lambda: [ref() for ref in made if ref() is not None and ref().comm is not None]
    before = set(REGISTRY)
    yield notebook
    for widget in [w for key, w in list(REGISTRY.items()) if key not in before]:
        widget.close()


@pytest.mark.parametrize("code", ["app = made_app()", "made_app();", "app = made_app(); app"])
@pytest.mark.parametrize("cell", ["a3f1", None], ids=["with ids", "without ids"])
def test_a_cell_that_runs_again_closes_its_last_app(notebook, code, cell) -> None:
    notebook.run(code, cell)
    widgets = len(REGISTRY)
    for _ in range(5):
        notebook.run(code, cell)
        assert len(notebook.open()) == 1
    assert len(REGISTRY) == widgets


def test_what_is_still_held_stays_open(notebook) -> None:
    notebook.run("apps = []", "1")
    for _ in range(2):
        notebook.run("app = made_app(); apps.append(app)", "2")
    assert len(notebook.open()) == 2
    notebook.run("other = apps[1]; box = ipywidgets.VBox([apps[0]]); apps.clear()", "3")
    notebook.run("app = made_app()", "2")
    assert len(notebook.open()) == 3
    notebook.run("del other; box.close(); del box", "3")
    notebook.run("app = made_app()", "2")
    assert len(notebook.open()) == 1


def test_one_run_may_make_several_and_other_cells_leave_them_alone(notebook) -> None:
    notebook.run("left, right = made_app(), made_app()", "1")
    notebook.run("made_app();", "2")
    assert len(notebook.open()) == 3
    notebook.run("1 / 1", "1")
    assert len(notebook.open()) == 3


def test_panels_of_their_own_are_closed_as_well(notebook) -> None:
    code = "chat = ChatPanel(session); attention = AttentionPanel(session)"
    notebook.run(code, "1")
    first = [notebook.shell.user_ns[name] for name in ("chat", "attention")]
    notebook.run(code, "1")
    assert all(panel.comm is None for panel in first)
    assert all(notebook.shell.user_ns[name].comm is not None for name in ("chat", "attention"))


def test_panels_of_an_app_that_is_held_stay_open(notebook) -> None:
    notebook.run("apps = [made_app()]", "1")
    notebook.run("apps = [*apps, made_app()]", "1")
    assert all(app.chat_panel.comm is not None for app in notebook.shell.user_ns["apps"])


def test_outside_of_a_cell_nothing_is_closed(notebook) -> None:
    """As in the handler of a button, whose message is no request to run anything."""
    notebook.parent = {"header": {"msg_type": "comm_msg", "msg_id": "1"}, "content": {}}
    widgets = [ChatPanel(FakeSession(CONFIG)), ChatPanel(FakeSession(CONFIG))]
    close_earlier(widgets[1])
    notebook.run("1 / 1")
    assert all(widget.comm is not None for widget in widgets)
