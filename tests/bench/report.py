"""Measurements as a table of medians, and of how many times better ours is."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from tests.bench.names import NAMES, OURS, installed


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


def record(quantities: Sequence[Quantity]) -> list[dict[str, object]]:
    """All rounds, medians and ratios, as JSON can hold them."""
    return [
        {
            "title": q.title,
            "higher_is_better": q.higher_is_better,
            "rounds": {name: list(values) for name, values in q.values.items() if values},
            "medians": {name: q.median(name) for name in q.values if q.values[name]},
            "gemma_nb is better": {name: q.advantage(name) for name in q.values if name != OURS},
        }
        for q in quantities
    ]


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def table(quantities: Sequence[Quantity]) -> str:
    """All quantities, two lines each: medians, and our advantage over each other contestant."""
    here = [name for name in NAMES if any(q.values.get(name) for q in quantities)]
    width = max(len(q.title) for q in quantities) + 2
    lines = [" " * width + "".join(f"{name:>12}" for name in here)]
    for q in quantities:
        cells = "".join(f"{_number(q.median(name)):>12}" for name in here)
        spread = f"   (rounds within {q.spread():.0%})" if len(q.values[OURS]) > 1 else ""
        lines.append(f"{q.title:<{width}}{cells}{spread}")
        ratios = [q.advantage(name) for name in here]
        if any(ratios):
            cells = "".join(f"{'' if r is None else f'{r:.2f}x':>12}" for r in ratios)
            lines.append(f"{'  gemma_nb is better':<{width}}{cells}")
    lines += [f"{name}: not installed" for name in NAMES if not installed(name)]
    return "\n".join(lines)
