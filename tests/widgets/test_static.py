"""The front end is text that ships in the wheel: what must not be in it is checked here."""

from __future__ import annotations

import re

import pytest

from gemma_nb.widgets.base import static_text

SCRIPTS = ("chat.js", "attention.js")


@pytest.mark.parametrize("name", SCRIPTS)
def test_modules_are_self_contained_and_never_parse_html(name: str) -> None:
    text = static_text(name)
    assert not re.search(r"^\s*import\b|\bimport\(|\brequire\(", text, re.MULTILINE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser", text)
    assert not re.search(r"\beval\(|new Function", text)
    assert text.startswith("// @ts-check")
    assert "export default {" in text


@pytest.mark.parametrize("name", [*SCRIPTS, "chat.css", "attention.css"])
def test_nothing_is_fetched(name: str) -> None:
    text = static_text(name)
    assert not re.search(r"https?://|//cdn|@import|url\(|fetch\(|XMLHttpRequest|WebSocket", text)


@pytest.mark.parametrize("name", ["chat.css", "attention.css"])
def test_styles_stay_inside_the_panels(name: str) -> None:
    text = re.sub(r"/\*.*?\*/", "", static_text(name), flags=re.DOTALL)
    for selectors in re.findall(r"([^{}]+)\{[^{}]*\}", text):
        if selectors.strip().startswith("@"):
            continue
        for selector in selectors.split(","):
            assert ".gnb" in selector, selector
