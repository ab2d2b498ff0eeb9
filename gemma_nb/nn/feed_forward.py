"""The gated feed-forward layer."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from gemma_nb.config import TransformerConfig
from gemma_nb.nn.layers import Einsum
from gemma_nb.nn.observe import observe


class FeedForward(nn.Module):
    """GeGLU: linear(gelu(gate(x)) * up(x)) (arXiv:2002.05202), gelu in its tanh approximation.

    Attributes:
      config: the model's numbers.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], edit: Any = None) -> Float[Array, "B T D"]:
        """The layer's output before any post-norm."""
        c = self.config
        if c.transpose_gating_einsum:
            gating = Einsum("...D,CFD->...CF", (2, c.hidden_dim, c.embed_dim), "gating_einsum")
        else:
            gating = Einsum("...D,CDF->...CF", (2, c.embed_dim, c.hidden_dim), "gating_einsum")
        linear = Einsum("...F,FD->...D", (c.hidden_dim, c.embed_dim), "linear")
        # The official tree has the weights as leaves here (`mlp/linear`, not `mlp/linear/w`).
        nn.share_scope(self, gating)
        nn.share_scope(self, linear)
        gate = gating(x)
        up = observe(self, "mlp_up", gate[..., 1, :], edit)
        hidden = nn.gelu(observe(self, "mlp_gate", gate[..., 0, :], edit)) * up
        hidden = observe(self, "mlp_hidden", hidden, edit)
        return observe(self, "mlp_raw", linear(hidden), edit)
