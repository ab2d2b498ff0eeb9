"""notebooks/01_chat.ipynb on the real model: what someone sees who has just cloned the project."""

from __future__ import annotations

import shutil
import time

import pytest
from playwright.sync_api import expect

from tests.ui.controls import Chat, records, rows_match
from tests.ui.lab import ROOT

pytestmark = [pytest.mark.ui, pytest.mark.real]

STORY = "Tell me a long story about a sailor, a storm and an island."
COLD = 240_000  # milliseconds: weights are converted and everything compiles


def test_chatting_in_the_first_notebook(lab, open_notebook, screenshots) -> None:
    shutil.copy(ROOT / "notebooks" / "01_chat.ipynb", lab.folder / "01_chat.ipynb")
    notebook = open_notebook("01_chat.ipynb")
    notebook.run_all()
    chat = Chat(notebook.page)
    expect(chat.log).to_be_visible(timeout=COLD)
    assert notebook.page.locator('[data-mime-type*="stderr"]').count() == 0
    chat.log.scroll_into_view_if_needed()

    replies = chat.log.locator(".gnb-model")
    before = replies.count()
    # Greedy, so that the answer does not depend on luck.
    sampling = "import dataclasses as d; chat.sampling = d.replace(chat.sampling, {})"
    notebook.run_cell(sampling.format("temperature=0"))
    chat.say("What is the capital of France?")
    chat.wait_until_done()
    expect(replies).to_have_count(before + 1)
    last = replies.last
    expect(last).to_contain_text("Paris")

    kept = records(notebook)
    tokens = last.locator("[data-token-index]")
    assert tokens.count() == len(kept)
    for index in range(min(6, len(kept))):
        tokens.nth(index).hover()
        assert chat.rows.locator("visible=true").count() >= 5
        rows_match(chat, kept[index])
    expect(chat.attention).to_contain_text("the query position that chose", timeout=60_000)
    for dark in (False, True):
        notebook.theme(dark=dark)
        chat.log.scroll_into_view_if_needed()
        notebook.page.screenshot(path=screenshots / f"notebook_{'dark' if dark else 'light'}.png")

    # Stop ends a long reply at once, and the conversation goes on.  A new one, as what the notebook
    # drew by chance above decides how long the story gets.
    notebook.run_cell(sampling.format("max_new_tokens=400"))
    chat.new.click()
    expect(replies).to_have_count(0)
    chat.say(STORY)
    expect(replies).to_have_count(1)
    streamed = replies.last.locator("[data-token-index]")
    expect(streamed.nth(3)).to_be_visible(timeout=30_000)
    running, count = chat.stop.is_enabled(), streamed.count()
    began = time.monotonic()
    chat.stop.click()
    expect(chat.stop).to_be_disabled(timeout=5000)
    # 0.2 on a quiet machine, and a busy one must not fail the test; the story would go on for 10.
    assert time.monotonic() - began < 2
    assert running, "the reply was over before Stop"
    assert count >= 4
    assert notebook.run_cell("print(chat.turns[-1].finish_reason)").strip() == "cancelled"
    chat.say("What is the capital of Italy?")
    chat.wait_until_done()
    expect(replies.last).to_contain_text("capital of Italy")
    assert notebook.run_cell("print(chat.turns[-1].finish_reason)").strip() == "stop"
    assert notebook.problems == []
