"""The gated feed-forward layer."""

from __future__ import annotations

import math
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from gemma_nb.config import LayerSpec, TransformerConfig
from gemma_nb.cpu.feed_forward import geglu_of_few
from gemma_nb.nn.linear import Einsum
from gemma_nb.nn.observe import observe


class FeedForward(nn.Module):
    """GeGLU: linear(gelu(gate(x)) * up(x)) (arXiv:2002.05202), gelu in its tanh approximation.

    Attributes:
      config: the model's numbers.
      spec: this layer's shape.
    """

    config: TransformerConfig
    spec: LayerSpec

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], edit: Any = None) -> Float[Array, "B T D"]:
        """The layer's output before any post-norm."""
        sizes = self.config.axis_sizes(self.spec)
        f, d = sizes["F"], sizes["D"]
        if self.config.transpose_gating_einsum:
            gating = Einsum("...D,CFD->...CF", (2, f, d), "gating_einsum")
        else:
            gating = Einsum("...D,CDF->...CF", (2, d, f), "gating_einsum")
        linear = Einsum("...F,FD->...D", (f, d), "linear")
        # The official tree has the weights as leaves here (`mlp/linear`, not `mlp/linear/w`).
        nn.share_scope(self, gating)
        nn.share_scope(self, linear)
        count = math.prod(x.shape[:-1])
        first, second = gating.wide(count), linear.wide(count)
        if edit is None and first is not None and second is not None:
            gate, up, hidden, raw = geglu_of_few(x, first, second)
            observe(self, "mlp_up", up)
            observe(self, "mlp_gate", gate)
            observe(self, "mlp_hidden", hidden)
            return observe(self, "mlp_raw", raw)
        gate = gating(x)
        up = observe(self, "mlp_up", gate[..., 1, :], edit)
        hidden = nn.gelu(observe(self, "mlp_gate", gate[..., 0, :], edit)) * up
        hidden = observe(self, "mlp_hidden", hidden, edit)
        return observe(self, "mlp_raw", linear(hidden), edit)
