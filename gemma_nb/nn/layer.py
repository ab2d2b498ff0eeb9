"""One transformer layer."""

from __future__ import annotations

from flax import linen as nn

from gemma_nb.config import LayerSpec, TransformerConfig
from gemma_nb.nn.attention import Attention
from gemma_nb.nn.feed_forward import FeedForward
from gemma_nb.nn.layer_input import Carry, LayerInput
from gemma_nb.nn.norms import RMSNorm
from gemma_nb.nn.observe import observe
from gemma_nb.typing import LayerCache


class Block(nn.Module):
    """A layer: attention and feed-forward around the residual stream.

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
        self, carry: Carry, given: LayerInput, cache: LayerCache | None = None
    ) -> tuple[Carry, LayerCache | None]:
        """All that crosses to the next layer, and this layer's extended cache.

        Args:
          carry: from the layer before.
          given: see `LayerInput`.
          cache: keys and values of earlier tokens; None where the tokens see each other alone.
        """
        edit = given.edit
        x = observe(self, "residual_pre", carry.x, edit)
        y = observe(self, "attn_in", self.pre_attention_norm(x), edit)
        y, cache = self.attn(y, given, cache)
        if self.config.use_post_attn_norm:
            y = self.post_attention_norm(y)
        y = observe(self, "attn_out", y, edit)
        x = observe(self, "residual_mid", x + y, edit)

        y = self.mlp(observe(self, "mlp_in", self.pre_ffw_norm(x), edit), edit)
        if self.config.use_post_ffw_norm:
            y = self.post_ffw_norm(y)
        y = observe(self, "mlp_out", y, edit)
        return Carry(observe(self, "residual", x + y, edit)), cache
