"""Gemma as flax.linen modules, with the parameter names of the official checkpoints."""

from gemma_nb.nn.transformer import Output, Transformer

__all__ = ["Output", "Transformer"]
