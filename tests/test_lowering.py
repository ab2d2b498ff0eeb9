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
UNVISITED = {"executables/kept.py"}


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
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield from (d for d in node.decorator_list if ast.unparse(d) == "jax.jit")
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            of = ast.unparse(node.args[0]) if name.endswith("partial") and node.args else name
            if of == "jax.jit" or of in MAKERS:
                yield node


@pytest.mark.parametrize(
    "module", sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
)
def test_every_place_where_programs_are_made_was_visited(reports, module):
    visited = {
        int(line)
        for report in reports.values()
        for file, line in (site.split(":") for site in report["sites"])
        if file == module
    }
    missed = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in makers(PACKAGE / module)
        if not visited.intersection(range(node.lineno, (node.end_lineno or node.lineno) + 2))
    ]
    assert missed == [] or module in UNVISITED, "let tests/lowered.py run what is made here"
