"""What showing a reply in a notebook costs: tokens/s in a cell, and in the app of a browser.

    python -m tests.bench.browser

JupyterLab, a headless Chromium without a graphics processor and the model share this machine's
processors.  The same session makes the same reply, in turn for a cell that nobody watches and for
the app, with the pointer over it; the rates are the session's own.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect

from tests.ui.controls import Chat
from tests.ui.lab import Notebook, running_browser, running_lab

TOKENS, ROUNDS = 96, 5
PROMPT = "Tell me a long story about a sailor."
PATIENCE = 60_000  # milliseconds, for what the page should show
LIMIT = 900  # seconds, for all of it
SETUP = f"""
import gemma_nb as gnb
model, tokenizer = gnb.load("gemma3-270m", progress=False)
chat = gnb.ChatSession(model, tokenizer, template="none")
ends = tuple(sorted(chat.template.stop_ids(tokenizer)))
chat.sampling = gnb.Sampling(seed=0, top_k=64, max_new_tokens={TOKENS}, forbidden=ends)
chat.warmup()
app = gnb.ChatApp(chat)
app
"""
RATE = "import json; print(json.dumps(chat.turns[-1].timing.tokens_per_second))"


def in_a_cell(notebook: Notebook) -> float:
    """Tokens per second of a reply that no panel shows."""
    notebook.run_cell(f"chat.new_conversation(); chat.chat({PROMPT!r})")
    return float(json.loads(notebook.run_cell(RATE)))


def in_the_app(notebook: Notebook, chat: Chat) -> float:
    """Tokens per second of a reply that is asked for, and read, in the app."""
    chat.log.hover()  # it takes over what the cell said
    expect(chat.tokens).to_have_count(TOKENS)
    chat.new.click()
    expect(chat.tokens).to_have_count(0)
    notebook.page.wait_for_timeout(2000)
    chat.say(PROMPT)
    expect(chat.tokens).to_have_count(TOKENS)
    expect(chat.regenerate).to_be_enabled()
    notebook.page.wait_for_timeout(3000)  # the attention behind it is computed
    return float(json.loads(notebook.run_cell(RATE)))


def measure() -> None:
    """Prints medians of interleaved rounds, after one that warms up."""
    faulthandler.dump_traceback_later(LIMIT - 10)
    expect.set_options(timeout=PATIENCE)
    cell, app = [], []
    with tempfile.TemporaryDirectory() as home, running_lab(Path(home)) as lab:
        lab.write("browser.ipynb", [SETUP])
        with running_browser() as browser:
            page = browser.new_context(viewport={"width": 1500, "height": 1100}).new_page()
            page.set_default_timeout(PATIENCE)
            notebook, chat = Notebook(page, lab, "browser.ipynb"), Chat(page)
            notebook.open()
            notebook.run_all()
            expect(chat.log).to_be_visible()
            for _ in range(1 + ROUNDS):
                cell.append(in_a_cell(notebook))
                app.append(in_the_app(notebook, chat))
                print(f"{cell[-1]:.1f} in a cell, {app[-1]:.1f} in the app", file=sys.stderr)
    for name, rates in (("in a cell", cell[1:]), ("in the app", app[1:])):
        middle, low, high = statistics.median(rates), min(rates), max(rates)
        print(f"{name:12}{middle:5.1f} tokens/s ({low:.1f} to {high:.1f})")
    ratio = statistics.median(b / a for a, b in zip(cell[1:], app[1:], strict=True))
    print(f"in the app {ratio:.2f} of what it is in a cell")


def main() -> None:
    """Measures in a process of its own, which ends, with the server, if a browser does not."""
    command = [sys.executable, "-m", "tests.bench.browser", "measure"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        sys.exit(process.wait(LIMIT))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        raise


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["measure"] else main()
