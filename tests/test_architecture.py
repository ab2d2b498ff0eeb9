"""The map of the package is true: rooms, walks, global state, and where things are."""

from __future__ import annotations

import ast
import re

import pytest

from tests.test_layering import MODULES, PACKAGE, ROOMS, own_imports, source

PAGE = (PACKAGE / "ARCHITECTURE.md").read_text(encoding="utf-8")
MOST = 12  # modules on the way to the compiled step
_PATH = re.compile(r"[\w./]*\w\.(?:py|js|css|md)|[\w/]+/")


def section(title: str) -> str:
    """The text under a heading, up to the next one of its kind."""
    level = title.partition(" ")[0]
    rest = PAGE.partition(f"\n{title}")[2]
    assert rest, f"{title!r} is not there"
    return re.split(rf"\n{level} ", rest)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def paths(text: str) -> list[str]:
    return [name for name in named(text) if _PATH.fullmatch(name)]


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_every_file_that_is_named_is_there():
    found = paths(PAGE)
    assert len(found) > 80
    for path in found:
        places = (PACKAGE / path, PACKAGE.parent / path)
        assert any(place.exists() for place in places), path


def test_rooms_are_those_of_the_layering():
    assert [name for row in rows(section("## Rooms")) for name in named(row[0])] == ROOMS


def imported(module: str) -> set[str]:
    """The modules that one imports, and what the packages among them hand on."""
    found: set[str] = set()
    for name, _ in own_imports(module):
        found |= {name, name.rpartition(".")[0]} & set(MODULES)
    packages = {name for name in found if source(name).name == "__init__.py"}
    return found | {name for package in packages if package != module for name in imported(package)}


WALKS = re.findall(r"\n### ([^\n]+)", section("## Four walks"))


def test_there_are_four_walks():
    assert len(WALKS) == 4


@pytest.mark.parametrize("walk", WALKS)
def test_walks_follow_imports_and_are_short(walk):
    steps = re.findall(r"\n\d+\. ([^\n]+)", section(f"### {walk}"))
    modules = [module_of(paths(step)[0]) for step in steps]
    for i, module in enumerate(modules[1:], 1):
        reachable = set().union(*(imported(before) for before in modules[:i]))
        assert module in reachable, f"{module} is imported by none of {modules[:i]}"
    compiled = [i for i, step in enumerate(steps, 1) if step.startswith("**")]
    assert (compiled or [len(steps)])[0] <= MOST
    assert len(set(modules)) == len(modules)


def mutable(module: str) -> set[str]:
    """Names at the top of a module that are no constants: written in small letters."""
    found = set()
    for node in ast.parse(source(module).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) and node.value else targets
        found |= {t.id for t in targets if isinstance(t, ast.Name) and t.id.islower()}
    return {name for name in found if not name.startswith("__")} - {"_log", "logger"}


def test_the_table_of_global_state_is_whole():
    told: dict[str, set[str]] = {}
    for row in rows(section("## Global state")):
        path, *names = named(row[0])
        told.setdefault(module_of(path), set()).update(names)
    there = {module: mutable(module) for module in MODULES}
    assert told == {module: names for module, names in there.items() if names}


def test_questions_are_answered_by_the_file_that_is_named():
    questions = rows(section("## Where is ...?"))
    assert len(questions) >= 20
    for question, file, name in questions:
        assert question.endswith("?")
        (path,), (word,) = named(file), named(name)
        assert word in (PACKAGE / path).read_text(encoding="utf-8"), question


def test_what_is_new_has_a_place():
    places = {row[0] for row in rows(section("## Where something new goes"))}
    assert {"a family of models", "a capture site", "a panel"} <= places
    assert {"a format of checkpoints", "an intervention"} <= places


def test_the_table_of_the_processor_names_what_is_there():
    table = rows((PACKAGE / "cpu" / "README.md").read_text(encoding="utf-8"))
    assert len(table) > 30
    for _, where, *_ in table:
        text = ""
        for name in named(where):
            words = name.split(".")
            if name.endswith(".py"):
                text = (PACKAGE / ("" if "/" in name else "cpu") / name).read_text(encoding="utf-8")
                continue
            if len(words) > 1:
                module = words.pop(0)
                text = (PACKAGE / "cpu" / f"{module}.py").read_text(encoding="utf-8")
            # A name in parentheses stands in the file before it.
            assert all(re.search(rf"\b{word}\b", text) for word in words), name
