"""Measurements as a table of medians, and of how many times better ours is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from tests.bench.names import GM, NAMES, OURS, gm_python, installed

RESULTS = Path(__file__).parents[2] / "assets" / "benchmarks.json"

DECODE = "decode, tokens/s"


def prefill_of(tokens: int) -> str:
    """The title of how fast a prompt of so many tokens is read."""
    return f"prefill of {tokens}, tokens/s"


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One row.

    Attributes:
      title: what was measured, with its unit.
      values: contestant -> one number per round; a contestant without a number is left out.
      higher_is_better: of rates; False for durations.
    """

    title: str
    values: Mapping[str, Sequence[float]]
    higher_is_better: bool

    def median(self, name: str) -> float | None:
        """Of a contestant's rounds."""
        return statistics.median(self.values[name]) if self.values.get(name) else None

    def medians(self) -> dict[str, float]:
        """Of everybody who was measured."""
        return {name: statistics.median(values) for name, values in self.values.items() if values}

    def advantage(self, name: str) -> float | None:
        """How many times better ours is than `name`: above 1 is in our favour."""
        ours, theirs = self.median(OURS), self.median(name)
        if ours is None or theirs is None or name == OURS:
            return None
        return ours / theirs if self.higher_is_better else theirs / ours

    def spread(self) -> float:
        """Largest distance of one of our rounds from their median, relative to it."""
        middle = self.median(OURS)
        return max(abs(x / middle - 1) for x in self.values[OURS]) if middle else 0.0


def conditions() -> str:
    """On what, and with what, this is measured."""
    packages = []
    for name in ("jax", "torch", "transformers", "llama-cpp-python", "transformer-lens"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if installed(GM):
        theirs = {d.name: d.version for d in distributions(path=_packages_of(gm_python()))}
        packages.append(f"gemma {theirs.get('gemma')} with jax {theirs.get('jax')}")
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{_processor()}, {os.cpu_count()} cores{load}; {', '.join(packages)}"


def _packages_of(python: Path) -> list[str]:
    return [str(path) for path in python.parents[1].glob("lib/python*/site-packages")]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def keep(results: Mapping[str, Any]) -> None:
    """Writes results into RESULTS, beside what other benchmarks have there under other keys."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, **results}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {RESULTS.name}")


def record(quantities: Sequence[Quantity]) -> list[dict[str, object]]:
    """All rounds, medians and ratios, as JSON can hold them."""
    return [
        {
            "title": q.title,
            "higher_is_better": q.higher_is_better,
            "rounds": {name: list(values) for name, values in q.values.items() if values},
            "medians": q.medians(),
            "gemma_nb is better": {name: q.advantage(name) for name in q.values if name != OURS},
        }
        for q in quantities
    ]


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def table(quantities: Sequence[Quantity], names: Sequence[str] = NAMES) -> str:
    """All quantities, two lines each: medians, and our advantage over each other contestant."""
    here = [name for name in names if any(q.values.get(name) for q in quantities)]
    width = max(len(q.title) for q in quantities) + 2
    wide = max(12, *(len(name) + 2 for name in here))
    lines = [" " * width + "".join(f"{name:>{wide}}" for name in here)]
    for q in quantities:
        cells = "".join(f"{_number(q.median(name)):>{wide}}" for name in here)
        spread = f"   (rounds within {q.spread():.0%})" if len(q.values[OURS]) > 1 else ""
        lines.append(f"{q.title:<{width}}{cells}{spread}")
        ratios = [q.advantage(name) for name in here]
        if any(ratios):
            cells = "".join(f"{'' if r is None else f'{r:.2f}x':>{wide}}" for r in ratios)
            lines.append(f"{'  gemma_nb is better':<{width}}{cells}")
    lines += [f"{name}: not installed" for name in names if not installed(name)]
    return "\n".join(lines)
