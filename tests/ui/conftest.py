"""Fixtures that open notebooks in JupyterLab, in headless Chromium."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.ui.lab import Lab, Notebook, running_browser, running_lab


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def open_notebook(
    browser: Browser, lab: Lab, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Notebook]]:
    """`open_notebook(cells, width=..., height=...)`: writes, opens and returns a notebook."""
    contexts = []

    def open_one(cells: list[str] | str, width: int = 1500, height: int = 1100) -> Notebook:
        name = cells if isinstance(cells, str) else f"{request.node.name}.ipynb"
        if not isinstance(cells, str):
            lab.write(name, cells)
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        notebook = Notebook(context.new_page(), lab, name)
        notebook.open()
        return notebook

    yield open_one
    for context in contexts:
        for page in context.pages:
            # The kernel holds a model: it ends with the test.
            page.evaluate(
                "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()"
            )
        context.close()


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where pictures go: $GEMMA_NB_SCREENSHOTS, or the test's temporary folder."""
    folder = Path(os.environ.get("GEMMA_NB_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
