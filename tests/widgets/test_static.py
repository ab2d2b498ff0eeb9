"""The front end is text that ships in the wheel: what must not be in it is checked here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gemma_nb.widgets
from gemma_nb.widgets.base import static_text

PANELS = ("chat", "attention")
STATIC = Path(gemma_nb.widgets.__file__).parent / "static"


@pytest.mark.parametrize("panel", PANELS)
def test_modules_are_self_contained_and_never_parse_html(panel: str) -> None:
    text = static_text(panel, ".js")
    assert not re.search(r"^\s*import\b|\bimport\(|\brequire\(", text, re.MULTILINE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser", text)
    assert not re.search(r"\beval\(|new Function", text)
    assert text.count("export default {") == 1


@pytest.mark.parametrize("panel", PANELS)
def test_files_of_a_panel_share_one_scope_without_a_name_twice(panel: str) -> None:
    files = [STATIC / "panel.js", *(STATIC / panel).glob("*.js")]
    assert all(file.read_text("utf-8").startswith("// @ts-check\n") for file in files)
    text = static_text(panel, ".js")
    assert all(file.read_text("utf-8") in text for file in files)
    names = re.findall(r"^(?:async )?(?:function|const|let|class) (\w+)", text, re.MULTILINE)
    assert len(names) == len(set(names)) > 5


@pytest.mark.parametrize("suffix", [".js", ".css"])
@pytest.mark.parametrize("panel", PANELS)
def test_nothing_is_fetched(panel: str, suffix: str) -> None:
    text = static_text(panel, suffix)
    assert not re.search(r"https?://|//cdn|@import|url\(|fetch\(|XMLHttpRequest|WebSocket", text)


@pytest.mark.parametrize("panel", PANELS)
def test_styles_stay_inside_the_panels(panel: str) -> None:
    text = re.sub(r"/\*.*?\*/", "", static_text(panel, ".css"), flags=re.DOTALL)
    for selectors in re.findall(r"([^{}]+)\{[^{}]*\}", text):
        if selectors.strip().startswith("@"):
            continue
        for selector in selectors.split(","):
            assert ".gnb" in selector, selector
