"""Whatever a front end sends, the app stays whole: values are put back, and errors are shown."""

from __future__ import annotations

import itertools

import pytest
import traitlets

from gemma_nb.app import ChatApp
from gemma_nb.widgets import AttentionPanel
from tests.widgets.fakes import FakeSession
from tests.widgets.front_end import FrontEnd, wait_until
from tests.widgets.test_attention import CONFIG

STRANGE = (
    *(None, True, -1, 99, 10**400, 1.5, float("nan"), float("inf"), "3", "", "x" * 1_000_000),
    *([], [1, 2], [[]], {}, {"position": "3"}, {"position": 1.5}, {"position": True}),
    *({"position": -7}, {"position": 10**30}, {"text": 5}, {"text": "x" * 1_000_000}),
    *({"temperature": "hot"}, {"temperature": None}, {"temperature": []}, {"seed": 10**400}),
    *({"top_k": {}}, {"nobody": 1}, {"self": 1}, {"stop": [1]}, {"": {}}, "<b>", "IPY_MODEL_x"),
)


@pytest.fixture(scope="module")
def app():
    app = ChatApp(FakeSession(CONFIG))
    app.chat_panel.send_message("What is the capital of France?")
    wait_until(lambda: app.attention_panel.status["phase"] == "ready")
    wait_until(lambda: app.chat_panel.status["phase"] == "ready")
    yield app
    app.close()


@pytest.fixture(autouse=True)
def no_errors_yet(app) -> None:
    app.chat_panel.dismiss_error()
    app.attention_panel.dismiss_error()


def receive(widget, **state) -> None:
    """As from the wire."""
    data = {"method": "update", "state": state, "buffer_paths": []}
    widget._handle_msg({"content": {"data": data}, "buffers": []})


def whole(app: ChatApp) -> bool:
    """Whether every display of the app still comes, with what was said and its attention."""
    page = app.static_html()
    data, _ = app._repr_mimebundle_()
    panel = app.attention_panel
    return (
        "What is the capital of France?" in page
        and "Attention of layer" in page
        and page in data["text/html"]
        and 0 <= panel.layer < CONFIG.num_layers
        and 0 <= panel.head < CONFIG.num_heads
        and panel.error + app.chat_panel.error == (panel.error + app.chat_panel.error)[:2000]
    )


def test_any_value_of_any_trait_leaves_the_app_whole(app) -> None:
    for widget in (app.attention_panel, app.chat_panel, app):
        for name, value in itertools.product(widget.keys, STRANGE):
            receive(widget, **{name: value})
        assert whole(app)
    assert app.chat_panel.comm is not None
    assert app.children[0].children == (app.chat_panel, app.attention_panel)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("layer", 99, "layer 99 is not here; the layers are 0 to 5"),
        ("layer", -1, "layer -1 is not here"),
        ("head", 4, "head 4 is not here; the heads are 0 to 3"),
        ("layer", "1", "expected an int, not the str '1'"),
        ("head", None, "expected an int"),
        ("hide_bos", "yes", "expected a boolean"),
        ("selected", {"position": "4"}, "a selection cannot have 'position': '4'"),
    ],
)
def test_what_cannot_be_is_put_back_and_said(app, name, value, said) -> None:
    panel = app.attention_panel
    front, before = FrontEnd(panel, acknowledges=False), getattr(panel, name)
    front.state[name] = value  # as the browser has it
    receive(panel, **{name: value})
    assert getattr(panel, name) == before
    assert front.state[name] == before
    assert said in front.state["error"]
    assert front.run("dismiss_error") == {"kind": "answer", "request": "test-0", "result": None}


def test_what_is_right_beside_it_is_taken_over(app) -> None:
    receive(app.attention_panel, layer=1, head=77, show_all=True)
    assert (app.attention_panel.layer, app.attention_panel.show_all) == (1, True)
    assert app.attention_panel.view["layer"] == 1
    assert app.attention_panel.head < CONFIG.num_heads


def test_what_python_publishes_is_not_for_the_browser_to_change(app) -> None:
    panel = app.chat_panel
    front, before = FrontEnd(panel, acknowledges=False), dict(panel.status)
    receive(panel, status={"phase": "error"}, error="<b>", transcript={"seq": 0}, cache_used=7)
    assert panel.status == before
    assert front.state["status"] == before
    assert panel.error == ""
    assert panel.cache_used == app.chat.cache_used


def test_settings_that_cannot_be_are_put_back(app) -> None:
    panel, before = app.chat_panel, dict(app.chat_panel.settings)
    for wrong in ({**before, "temperature": "hot"}, {**before, "stop": ["x"]}, {"top_k": [3]}):
        receive(panel, settings=wrong)
        assert panel.settings == before
        assert panel.error
        panel.dismiss_error()
    receive(panel, settings={**before, "temperature": 0.5})
    assert app.chat.sampling.temperature == 0.5
    assert panel.error == ""


@pytest.mark.parametrize(
    "data",
    [
        {"method": "no such method"},
        {"method": "custom"},
        {"method": "custom", "content": None},
        {"method": "custom", "content": {"kind": "command"}},
        {"method": "custom", "content": {"kind": "unknown", "name": "stop"}},
        {"method": "custom", "content": {"kind": "command", "name": ["stop"]}},
        {"method": "custom", "content": {"kind": "command", "name": "row", "args": "all"}},
        {"method": "update", "state": None},
        {"method": "update", "state": {"layer": 1}, "buffer_paths": [["layer", 0, "x"]]},
        {"method": "update", "state": [], "buffer_paths": 5},
        {},
        None,
    ],
)
def test_messages_of_no_known_kind_change_nothing(app, data) -> None:
    for panel in (app.chat_panel, app.attention_panel):
        panel._handle_msg({"content": {"data": data}, "buffers": []})
    assert whole(app)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("row", {"query": "3"}, "row: query must be int, got '3'"),
        ("row", {"query": None}, "row: query must be int, got None"),
        ("row", {"query": True}, "row: query must be int, got True"),
        ("row", {"query": 10**30}, "no attention was computed for query position 1000"),
        ("row", {"query": 3, "count": -1}, "count must be 0 or more"),
        ("row", {}, "row needs the argument 'query'"),
        ("row", {"query": 3, "layer": 1}, "row has no argument 'layer'; it takes query, count"),
        ("unknown" * 10**5, {}, "has no command 'unknown"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_commands_answer_what_is_wrong_with_their_arguments(app, name, args, said) -> None:
    answer = FrontEnd(app.attention_panel, acknowledges=False).run(name, **args)
    assert said in answer["error"]
    assert len(answer["error"]) < 400
    assert app.attention_panel.error == ""  # it is the asker's


def test_commands_of_the_chat_answer_as_well(app) -> None:
    front = FrontEnd(app.chat_panel)
    for name, args in [
        ("send_message", {"text": 5}),
        ("edit", {"turn": "1", "text": "x"}),
        ("fork", {"turn": 1, "token": None}),
        ("select", {"turn": []}),
    ]:
        assert f"{name}: " in front.run(name, **args)["error"]
    assert whole(app)


def test_a_wrong_index_from_python_says_which_there_are() -> None:
    panel = AttentionPanel(FakeSession(CONFIG))
    with pytest.raises(traitlets.TraitError, match="layer 99 is not here; the layers are 0 to 5"):
        panel.layer = 99
    panel.head = 1
    assert panel.head == 1
    panel.close()
