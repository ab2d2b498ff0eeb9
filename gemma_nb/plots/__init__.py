"""Pictures of what was computed: labelled data in, a matplotlib Figure out."""

from gemma_nb.plots.attention import attention

__all__ = ["attention"]
