"""The order of the rooms: a module imports only from rooms above its own, or from its own.

Read from the source, so imports inside functions count too.  Two things do not: what only type
checkers import, and the lazy table of public names in `gemma_nb/__init__.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gemma_nb"
ROOMS = [
    *(
        "lazy",
        "errors",
        "settings",
        "ending",
        "expected",
        "typing",
        "summaries",
        "indices",
        "cache",
        "trust",
        "processor",
        "executables",
        "sites",
        "config",
        "presets",
        "axes",
        "cpu",
        "nn",
        "placement",
        "text",
        "checkpoints",
    ),
    *("structure", "inputs", "interventions", "edits", "model", "loading"),
    *("interp", "sampling", "chat", "plots", "widgets", "app", "cli", "__main__"),
]
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
)


def source(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, package: str, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Yields (dotted name, whether inside a function) for what `node` imports at run time."""
    if is_type_checking(node):
        return
    if isinstance(node, ast.Import):
        yield from ((name.name, lazy) for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")[: len(package.split(".")) + 1 - node.level]
        home = ".".join([*parts, node.module or ""]).strip(".") if node.level else node.module
        yield from ((f"{home}.{name.name}", lazy) for name in node.names)
    inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, package, inside)


def own_imports(module: str) -> list[tuple[str, bool]]:
    """(name below gemma_nb, lazy) of what a module imports from this package."""
    path = source(module)
    package = ".".join(["gemma_nb", *path.relative_to(PACKAGE).parts[:-1]])
    found = imports(ast.parse(path.read_text(encoding="utf-8")), package)
    names = [
        (name.removeprefix("gemma_nb").removeprefix("."), lazy)
        for name, lazy in found
        if name.partition(".")[0] == "gemma_nb"
    ]
    return [(name, lazy) for name, lazy in names if name != "__version__"]


def room(name: str) -> str:
    return name.partition(".")[0]


def violations(module: str) -> list[str]:
    here = ROOMS.index(room(module))
    wrong = []
    for name, _ in own_imports(module):
        if name == "":  # `import gemma_nb`: every public name at once
            if room(module) not in ("cli", "app", "__main__"):
                wrong.append("gemma_nb itself")
        elif room(name) not in ROOMS:
            wrong.append(f"{name}, which has no place in the order of rooms")
        elif ROOMS.index(room(name)) > here:
            wrong.append(name)
    return wrong


def test_every_module_has_its_place():
    assert {room(module) for module in MODULES} <= set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_rooms_above(module):
    assert violations(module) == []


def test_modules_of_a_room_do_not_import_each_other_in_a_circle():
    above: dict[str, set[str]] = {module: set() for module in MODULES}
    for module in MODULES:
        for name, lazy in own_imports(module):
            # `from gemma_nb.text import tokenizer` and `from gemma_nb.text.tokenizer import X`
            for target in (name, name.rpartition(".")[0]):
                if not lazy and target in above and target != module:
                    above[module].add(target)
    while ready := [module for module, targets in above.items() if not targets]:
        for module in ready:
            del above[module]
        for targets in above.values():
            targets.difference_update(ready)
    assert above == {}


@pytest.mark.parametrize("module", ["errors", "sites", "config", "presets"])
def test_top_rooms_import_no_jax_modules(module):
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    roots = {name.partition(".")[0] for name, _ in imports(tree, "gemma_nb")}
    assert not roots & {"jax", "flax"}


def test_the_reader_of_imports_sees_what_it_should(tmp_path, monkeypatch):
    """Absolute, relative and lazy imports are found; those for type checkers are not."""
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "bad.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "import gemma_nb\n"
        "from gemma_nb import app, __version__\n"
        "from . import tokenizer\n"
        "from ..chat.session import ChatSession\n"
        "if TYPE_CHECKING:\n"
        "    from gemma_nb.cli import main\n"
        "def later():\n"
        "    import gemma_nb.widgets\n"
    )
    assert own_imports("text.bad") == [
        ("", False),
        ("app", False),
        ("text.tokenizer", False),
        ("chat.session.ChatSession", False),
        ("widgets", True),
    ]
    assert violations("text.bad") == [
        *("gemma_nb itself", "app", "chat.session.ChatSession", "widgets")
    ]
