"""Every compiled program of the package can be made for GPUs and TPUs, without having one.

`tests/lowered.py` uses the package on four kinds of model and lowers what ran.  The programs there
are, it finds by replacing `jax.jit`; the places where they are made are read from the source here,
so that a program that nothing of it runs fails a test.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "gemma_nb"
# The default model's structure, as a CPU and as an accelerator runs it; parameters spread over
# eight devices; and another library's module behind our interface.
KINDS = ("default", "accelerator", "mesh", "wrapped")
# What makes a program of the function that it is given, beside `jax.jit`.
MAKERS = {"Kept", "CachedJit"}
# Compiles once more, under another name, what a cache folder keeps; here there is none.
CACHING = "executables/"


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    """What tests/lowered.py prints, of each kind."""
    found = {}
    for kind in KINDS:
        flags = os.environ.get("XLA_FLAGS", "")
        if kind == "mesh":
            flags += " --xla_force_host_platform_device_count=8"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "tests.lowered", kind],
            cwd=REPO,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        found[kind] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_program_lowers_for_cuda_and_tpu(reports, kind):
    assert reports[kind]["failed"] == {}
    assert len(reports[kind]["lowered"]) >= 5


def test_every_program_was_run(reports):
    """Of all that were made on importing or using the package."""
    made, lowered = (
        {name for report in reports.values() for name in report[what]}
        for what in ("made", "lowered")
    )
    assert made - lowered == set(), "let tests/lowered.py run these"


def makers(path: Path) -> Iterator[ast.expr]:
    """The expressions of a module that make programs: calls, and decorators."""

    def makes(node: ast.expr) -> bool:
        name = ast.unparse(node)
        return name == "jax.jit" or name.rpartition(".")[2] in MAKERS

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield from filter(makes, node.decorator_list)
        if isinstance(node, ast.Call):
            bound = ast.unparse(node.func).endswith("partial")
            if makes(node.args[0] if bound and node.args else node.func):
                yield node


def test_every_place_where_programs_are_made_was_visited(reports):
    visited: dict[str, set[int]] = {}
    for report in reports.values():
        for file, line in (site.split(":") for site in report["sites"]):
            visited.setdefault(file, set()).add(int(line))
    found, missed = 0, []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if module.startswith(CACHING):
            continue
        for node in makers(path):
            found += 1
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 2)
            if not visited.get(module, set()).intersection(lines):
                missed.append(f"{module}:{node.lineno}: {ast.unparse(node)}")
    assert found > 20
    assert missed == [], "let tests/lowered.py run what is made here"
