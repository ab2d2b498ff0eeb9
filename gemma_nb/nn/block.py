"""One transformer layer: attention and feed-forward around the residual stream."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from gemma_nb.config import LayerSpec, TransformerConfig
from gemma_nb.nn.attention import Attention
from gemma_nb.nn.feed_forward import FeedForward
from gemma_nb.nn.layers import RMSNorm
from gemma_nb.nn.observe import observe
from gemma_nb.nn.rope import Rotation
from gemma_nb.typing import LayerCache


class Block(nn.Module):
    """A layer.

    Attributes:
      config: the model's numbers.
      spec: this layer's kind and shape.
    """

    config: TransformerConfig
    spec: LayerSpec

    def setup(self) -> None:
        """Declares the sublayers under their official names."""
        self.pre_attention_norm = RMSNorm()
        self.attn = Attention(self.config, self.spec)
        if self.config.use_post_attn_norm:
            self.post_attention_norm = RMSNorm()
        self.pre_ffw_norm = RMSNorm()
        self.mlp = FeedForward(self.config, self.spec)
        if self.config.use_post_ffw_norm:
            self.post_ffw_norm = RMSNorm()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None,
        attention_mask: Bool[Array, "B T S"] | None,
        edit: Any = None,
        rotation: Rotation | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """The residual stream after this layer, and the layer's extended cache."""
        x = observe(self, "residual_pre", x, edit)
        y = observe(self, "attn_in", self.pre_attention_norm(x), edit)
        y, cache = self.attn(y, positions, cache, attention_mask, edit, rotation)
        if self.config.use_post_attn_norm:
            y = self.post_attention_norm(y)
        y = observe(self, "attn_out", y, edit)
        x = observe(self, "residual_mid", x + y, edit)

        y = self.mlp(observe(self, "mlp_in", self.pre_ffw_norm(x), edit), edit)
        if self.config.use_post_ffw_norm:
            y = self.post_ffw_norm(y)
        y = observe(self, "mlp_out", y, edit)
        return observe(self, "residual", x + y, edit), cache
