"""Pictures of what was computed: labelled data in, a matplotlib Figure out.

Every plot takes `ax=` to draw into a figure of yours, and returns the Figure.  None calls a model,
and none normalises: colours stand for the numbers as given, on the scale that the plot shows.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "attention": "gemma_nb.plots.heatmap",
    "attention_grid": "gemma_nb.plots.grid",
    "attention_lines": "gemma_nb.plots.lines",
}

__all__ = ["attention", "attention_grid", "attention_lines"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gemma_nb.plots' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from gemma_nb.plots.grid import attention_grid
    from gemma_nb.plots.heatmap import attention
    from gemma_nb.plots.lines import attention_lines
