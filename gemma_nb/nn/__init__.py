"""Gemma as flax.linen modules, with the parameter names of the official checkpoints."""

from gemma_nb.nn.transformer import Info, Output, Transformer
from gemma_nb.nn.wrapped import Wrapped, adapt

__all__ = ["Info", "Output", "Transformer", "Wrapped", "adapt"]
