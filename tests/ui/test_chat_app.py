"""ChatApp in JupyterLab, on a session that streams a script: what a person sees and does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.ui.controls import Chat, records, rows_match
from tests.ui.lab import Notebook

pytestmark = pytest.mark.ui

SETUP = """
from gemma_nb import presets
from gemma_nb.app import ChatApp
from tests.widgets.fakes import FakeSession, REPLIES
LONG = [" word"] * 1500
chat = FakeSession(presets.GEMMA3_270M, {options})
app = ChatApp(chat)
app
"""


PROMPT = 2.0  # seconds; some 0.2 on a quiet machine, and a busy one must not fail a test

TINY = """
import gemma_nb as gnb
from tests import tiny
tokenizer = tiny.tokenizer()
chat = gnb.ChatSession(
    tiny.model(tokenizer.vocab_size), tokenizer, template="none", cache_length=400,
    sampling=gnb.Sampling(seed=3, max_new_tokens=8),
)
app = gnb.ChatApp(chat)
app
"""


def cells(options: str = "delay=0.03", *more: str) -> list[str]:
    return [SETUP.format(options=options), *more]


@pytest.fixture
def start(open_notebook) -> Callable[..., tuple[Notebook, Chat]]:
    """Opens a notebook with the app in its first cell, runs that cell and checks the console."""
    opened: list[Notebook] = []

    def start_one(sources: list[str], run_all: bool = False, **size: int) -> tuple[Notebook, Chat]:
        notebook = open_notebook(sources, **size)
        opened.append(notebook)
        notebook.command("notebook:run-all-cells" if run_all else "notebook:run-cell")
        chat = Chat(notebook.page)
        expect(chat.log).to_be_visible(timeout=90_000)
        return notebook, chat

    yield start_one
    for notebook in opened:
        assert notebook.problems == []


def test_a_reply_streams_and_every_token_shows_its_alternatives(start) -> None:
    notebook, chat = start(cells("delay=0.15"))
    chat.log.evaluate(
        """log => {
            window.seen = new Set();
            const count = () => seen.add(log.querySelectorAll('[data-token-index]').length);
            new MutationObserver(count).observe(log, {childList: true, subtree: true});
        }"""
    )
    chat.say("What is the capital of France?")
    expect(chat.log).to_contain_text("What is the capital of France?")
    expect(chat.message).to_have_value("")
    chat.wait_until_done()
    seen = notebook.page.evaluate("[...seen]")
    assert len(seen) >= 5, "tokens should come one after another"
    expect(chat.log).to_contain_text("The capital of France is Paris.")
    expect(chat.context).to_contain_text(re.compile(r"\d+ of 4,096"))

    kept = records(notebook)
    assert chat.tokens.count() == len(kept)
    for index in (5, 0, len(kept) - 1):
        chat.tokens.nth(index).hover()
        expect(chat.rows.locator("visible=true").first).to_be_visible()
        assert chat.rows.locator("visible=true").count() >= 5
        rows_match(chat, kept[index])
        entropy = f"entropy {kept[index]['entropy']:.2f} nats"
        expect(chat.alternatives).to_contain_text(entropy)
        expect(chat.alternatives).to_contain_text(f"chosen rank {kept[index]['rank'] + 1}")


def test_stop_ends_a_long_reply_and_the_conversation_goes_on(start) -> None:
    notebook, chat = start(cells("replies=[LONG, *REPLIES], delay=0.01"))
    chat.say("go on for ever")
    expect(chat.tokens.nth(20)).to_be_visible()
    # A second message is refused where one looks, and stays in the box.
    chat.type("and another thing")
    expect(chat.log.page.get_by_text("still replying")).to_be_visible()
    expect(chat.message).to_have_value("and another thing")
    began = time.monotonic()
    chat.stop.click()
    expect(chat.stop).to_be_disabled(timeout=3000)
    assert time.monotonic() - began < PROMPT
    expect(chat.log).to_contain_text("Stopped before the reply was complete")
    unacknowledged = "print(app.chat_panel._feed.seq - app.chat_panel.ack)"
    assert int(notebook.run_cell(unacknowledged)) < 8
    assert notebook.run_cell("print(chat.turns[-1].finish_reason)").strip() == "cancelled"
    chat.send.click()
    expect(chat.message).to_have_value("")
    chat.wait_until_done()
    expect(chat.log).to_contain_text("and another thing")
    expect(chat.log.locator(".gnb-model")).to_have_count(2)

    # Regenerate replaces the last reply.
    expect(chat.log).not_to_contain_text("Eiffel Tower")
    chat.regenerate.click()
    expect(chat.log).to_contain_text("Eiffel Tower")
    chat.wait_until_done()
    expect(chat.log.locator(".gnb-model")).to_have_count(2)


def test_branching_off_with_the_keyboard(start) -> None:
    notebook, chat = start([TINY])
    page = notebook.page
    chat.say("hello")
    chat.wait_until_done()
    ids = chat.tokens.evaluate_all("tokens => tokens.map(token => token.dataset.tokenId)")
    chat.tokens.nth(3).focus()
    branch = chat.alternatives.get_by_role("button", name="Branch with")
    branch.first.focus()
    page.keyboard.press("Escape")
    expect(chat.tokens.nth(3)).to_be_focused()
    branch.first.focus()
    page.keyboard.press("ArrowDown")
    expect(branch.nth(1)).to_be_focused()
    expect(chat.alternatives.locator('[tabindex="0"]')).to_have_count(1)
    page.keyboard.press("ArrowUp")
    other = branch.first.evaluate("button => button.closest('[data-token-id]').dataset.tokenId")
    page.keyboard.press("Enter")
    expect(chat.log).to_contain_text("branch 2 of 2")
    chat.wait_until_done()
    now = chat.tokens.evaluate_all("tokens => tokens.map(token => token.dataset.tokenId)")
    assert now[:4] == [*ids[:3], other]
    page.get_by_role("button", name="Previous branch", exact=True).click()
    expect(chat.log).to_contain_text("branch 1 of 2")
    assert ids == chat.tokens.evaluate_all("tokens => tokens.map(token => token.dataset.tokenId)")

    chat.tokens.nth(1).click()
    page.get_by_role("button", name="Branch from here", exact=True).click()
    expect(chat.log).to_contain_text("branch 3 of 3")
    chat.wait_until_done()

    page.get_by_role("button", name="Edit", exact=True).click()
    box = page.get_by_role("textbox", name="Edit message")
    expect(box).to_be_focused()
    page.keyboard.press("Escape")
    expect(box).to_have_count(0)
    page.keyboard.press("Enter")  # the button has the focus again
    box.fill("good bye")
    box.press("Enter")
    expect(chat.log).to_contain_text("good bye")
    chat.wait_until_done()
    expect(chat.log).not_to_contain_text("hello")
    page.get_by_role("button", name="Undo", exact=True).click()
    expect(chat.tokens).to_have_count(0)
    assert notebook.run_cell("print(len(chat.tree.branches))").strip() == "4"


def test_send_and_stop_work_while_a_cell_runs(start) -> None:
    sleep = "import time\nfor _ in range(60):\n    time.sleep(0.2)\nprint('slept')"
    notebook, chat = start(cells("replies=[LONG], delay=0.01", sleep))
    expect(chat.context).to_contain_text("of 4,096")
    notebook.page.wait_for_timeout(500)
    notebook.command("notebook:move-cursor-down")
    notebook.command("notebook:run-cell")
    expect(notebook.page.locator(".jp-InputPrompt", has_text="[*]")).to_be_visible()
    chat.say("go on")
    expect(chat.tokens.nth(10)).to_be_visible(timeout=3000)
    began = time.monotonic()
    chat.message.press("Escape")
    expect(chat.stop).to_be_disabled(timeout=3000)
    assert time.monotonic() - began < PROMPT
    expect(notebook.page.locator(".jp-InputPrompt", has_text="[*]")).to_be_visible()
    notebook.command("notebook:interrupt-kernel")
    expect(notebook.page.locator(".jp-InputPrompt", has_text="[*]")).to_be_hidden()


def test_a_reply_that_a_cell_asked_for_is_shown_and_stopped(start) -> None:
    options = "replies=[LONG], delay=0.02"
    notebook, chat = start(cells(options, "turn = chat.chat('from a cell')"), run_all=True)
    chat.log.hover()  # who wants to see it, or to stop it, looks here
    expect(chat.tokens.nth(10)).to_be_visible(timeout=5000)
    began = time.monotonic()
    chat.stop.click()
    expect(chat.stop).to_be_disabled(timeout=3000)
    assert time.monotonic() - began < PROMPT
    expect(notebook.page.locator(".jp-InputPrompt", has_text="[*]")).to_be_hidden()
    assert notebook.run_cell("print(turn.finish_reason)").strip() == "cancelled"


def test_the_keyboard_reaches_everything_and_leaves_the_notebook_alone(start) -> None:
    notebook, chat = start(cells("delay=0.005"))
    before = notebook.cells()
    chat.message.click()
    chat.message.press_sequentially("abdd mxy")
    chat.message.press("Shift+Enter")
    chat.message.press_sequentially("second line")
    expect(chat.message).to_have_value("abdd mxy\nsecond line")
    chat.message.press("Enter")
    chat.wait_until_done()
    expect(chat.log).to_contain_text("abdd mxy\nsecond line", use_inner_text=True)
    # From the box backwards to the tokens: one tab stop, arrows between them.
    chat.tokens.nth(2).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        chat.log.page.keyboard.press(key)
    expect(chat.tokens.nth(3)).to_be_focused()
    expect(chat.alternatives).to_contain_text("After “The capital of”")
    expect(chat.log.locator('[tabindex="0"]')).to_have_count(1)
    chat.log.page.keyboard.press("Home")
    expect(chat.tokens.nth(0)).to_be_focused()
    for key in ("a", "b", "d", "d", "m", "x", "Shift+Enter"):
        chat.log.page.keyboard.press(key)
    assert notebook.cells() == before == 1
    assert notebook.run_cell("print(len(chat.turns))").strip() == "2"


def test_views_opened_later_and_a_reloaded_page_show_the_same(start) -> None:
    notebook, chat = start(cells("delay=0.005", "app.chat_panel"))
    for text in ("What is the capital of France?", "And its most famous building?"):
        chat.say(text)
        chat.wait_until_done()
    said = chat.log.inner_text()
    notebook.command("notebook:move-cursor-down")
    notebook.command("notebook:run-cell")
    second = Chat(notebook.output(1))
    expect(second.log).to_be_visible()
    assert second.log.inner_text() == said
    first = Chat(notebook.output(0))
    second.say("Once more")
    second.wait_until_done()
    expect(first.log).to_contain_text("Once more")
    said = first.log.inner_text()
    assert second.log.inner_text() == said

    notebook.command("docmanager:save")
    notebook.page.wait_for_timeout(1000)
    notebook.open()
    reloaded = Chat(notebook.output(0))
    expect(reloaded.log).to_contain_text("Once more", timeout=30_000)
    assert reloaded.log.inner_text() == said
    reloaded.tokens.nth(3).hover()
    assert reloaded.rows.locator("visible=true").count() >= 5
    reloaded.say("And again")
    reloaded.wait_until_done()


def test_attention_follows_the_choices_and_the_selected_token(start) -> None:
    notebook, chat = start(cells("delay=0.005"))
    chat.say("What is the capital of France?")
    chat.wait_until_done()
    layer = chat.attention.get_by_role("combobox", name="Layer")
    head = chat.attention.get_by_role("combobox", name="Head")
    expect(layer).to_be_visible(timeout=10_000)
    layer.select_option("5")
    head.select_option("3")
    code = "v = app.attention_panel.view; print(v['layer'], v['head'])"
    expect(chat.attention).to_contain_text("Hatched: can never be attended")
    notebook.page.wait_for_timeout(300)
    assert notebook.run_cell(code).split() == ["5", "3"]

    chat.tokens.nth(5).hover()  # " Paris"
    expect(chat.attention).to_contain_text("the query position that chose “Paris”")
    record = records(notebook)[5]
    chat.attention.get_by_role("button", name="Table").click()
    table = chat.attention.get_by_role("table")
    expect(table).to_contain_text(f"query {record['position'] - 1}")
    expect(table.locator("tbody td").nth(2)).to_have_text(re.compile(r"0\.\d{5}"))
    exact = notebook.run_cell(f"print(app.attention_panel.row({record['position'] - 1}))")
    strongest = float(table.locator("td[data-weight]").first.get_attribute("data-weight"))
    assert str(strongest) in exact

    # The heatmap's own cursor, by keyboard, with what it stands on in words.
    heatmap = chat.attention.get_by_role("application", name=re.compile("Layer 5, head 3"))
    heatmap.focus()
    heatmap.press("ArrowLeft")
    expect(chat.attention.locator(".gnb-readout")).to_contain_text("→")
    with notebook.page.expect_download() as download:
        chat.attention.get_by_role("button", name="PNG").click()
    assert download.value.suggested_filename == "attention_layer5_head3.png"
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def test_model_text_stays_text(start) -> None:
    evil = '["<img src=x onerror=window.evil=1>", "</script>", " <b>bold</b>"]'
    notebook, chat = start(cells(f"replies=[[' x', *{evil}]], delay=0.005"))
    chat.say("<b>hello</b>")
    chat.wait_until_done()
    expect(chat.log).to_contain_text("<b>hello</b>")
    expect(chat.log).to_contain_text("<b>bold</b>")
    assert notebook.page.evaluate("window.evil") is None
    assert chat.log.locator("img, script, b").count() == 0


def test_errors_are_seen_and_can_be_dismissed(start) -> None:
    _, chat = start(cells("fail_at=2, delay=0.005, cache_length=16"))
    chat.say("hello")
    expect(chat.context).to_contain_text("of 16, nearly full")
    expect(chat.alert.first).to_contain_text("NaN logits at position")
    chat.log.page.get_by_role("button", name="Dismiss", exact=True).first.click()
    expect(chat.log.page.get_by_text("NaN logits at position")).to_be_hidden()


def test_a_message_waits_while_the_model_loads(start) -> None:
    source = """
import sys, time, types
from gemma_nb import presets
from tests.widgets.fakes import FakeSession
chat = FakeSession(presets.GEMMA3_270M, delay=0.01, prefill=0.2)
def load(source, progress):
    for step in range(15):
        time.sleep(0.1)
        progress(step / 15, "Reading weights")
    return None, None
sys.modules["gemma_nb.loading"] = types.SimpleNamespace(load=load)
sys.modules["gemma_nb.chat.session"] = types.SimpleNamespace(ChatSession=lambda *a: chat)
from gemma_nb.app import ChatApp
app = ChatApp("gemma3-270m")
app
"""
    notebook, chat = start([source])
    progress = notebook.page.get_by_role("progressbar", name="Loading")
    expect(progress).to_be_visible()
    chat.say("early")
    expect(chat.log).to_contain_text("waits until the model is ready")
    expect(progress).to_be_hidden(timeout=20_000)
    chat.wait_until_done()
    expect(chat.log).to_contain_text("Paris")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_looks_right(start, screenshots: Path, dark: bool) -> None:
    notebook, chat = start(cells("delay=0.005"))
    notebook.theme(dark=dark)
    for text in ("What is the capital of France?", "And its most famous building?"):
        chat.say(text)
        chat.wait_until_done()
    expect(chat.attention).to_contain_text("Hatched")
    name = "dark" if dark else "light"
    app = notebook.page.locator(".gnb-app")
    app.screenshot(path=screenshots / f"app_{name}.png")
    left, right = chat.log.bounding_box(), chat.attention.bounding_box()
    assert right["x"] > left["x"] + left["width"] - 1, "two columns"
    # Text and background are apart, whatever the theme.
    apart = notebook.page.evaluate(
        """() => {
            const style = getComputedStyle(document.querySelector('.gnb-chat'));
            const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0);
            return Math.abs(light(style.color) - light(style.backgroundColor));
        }"""
    )
    assert apart > 400
    # A narrow page stacks the panels, and nothing is wider than the app.
    notebook.page.set_viewport_size({"width": 760, "height": 1500})
    notebook.command("application:toggle-left-area")
    notebook.page.wait_for_timeout(600)
    left, right = chat.log.bounding_box(), chat.attention.bounding_box()
    assert right["y"] > left["y"] + left["height"] - 1, "stacked"
    assert abs(right["x"] + right["width"] - left["x"] - left["width"]) < 3
    app.screenshot(path=screenshots / f"app_{name}_narrow.png")
