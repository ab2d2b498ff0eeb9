"""Pictures of what was computed: labelled data in, a matplotlib Figure or Axes out.

Every plot makes a Figure and returns it; with `ax=` it draws there, leaves the rest of that figure
alone, and returns the Axes.  Colours follow matplotlib's `vmin=`, `vmax=`, `norm=` and `cmap=`.
None calls a model, and none normalises: colours stand for the numbers as given, on the scale that
the plot shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_nb.lazy import attach

_PUBLIC = {
    "attention": "gemma_nb.plots.heatmap",
    "attention_grid": "gemma_nb.plots.grid",
    "attention_lines": "gemma_nb.plots.lines",
    "logit_lens": "gemma_nb.plots.lens",
    "entropy_curves": "gemma_nb.plots.curves",
    "residual_norms": "gemma_nb.plots.curves",
    "token_probabilities": "gemma_nb.plots.token_text",
    "token_strip": "gemma_nb.plots.token_text",
    "attribution_bars": "gemma_nb.plots.attributions",
    "attribution_matrix": "gemma_nb.plots.attributions",
    "patching": "gemma_nb.plots.sweeps",
    "head_statistics": "gemma_nb.plots.scatter",
}

__all__ = [
    "attention",
    "attention_grid",
    "attention_lines",
    "attribution_bars",
    "attribution_matrix",
    "entropy_curves",
    "head_statistics",
    "logit_lens",
    "patching",
    "residual_norms",
    "token_probabilities",
    "token_strip",
]
__getattr__, __dir__ = attach(__name__, globals(), _PUBLIC)

if TYPE_CHECKING:
    from gemma_nb.plots.attributions import attribution_bars, attribution_matrix
    from gemma_nb.plots.curves import entropy_curves, residual_norms
    from gemma_nb.plots.grid import attention_grid
    from gemma_nb.plots.heatmap import attention
    from gemma_nb.plots.lens import logit_lens
    from gemma_nb.plots.lines import attention_lines
    from gemma_nb.plots.scatter import head_statistics
    from gemma_nb.plots.sweeps import patching
    from gemma_nb.plots.token_text import token_probabilities, token_strip
