"""What a Gemma model looks like, in numbers.  No JAX modules here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_nb.typing import KVCache


@dataclasses.dataclass(frozen=True)
class Global:
    """A layer that attends to every earlier position."""

    @property
    def label(self) -> str:
        """How the layer is named in labels and selectors."""
        return "global"


@dataclasses.dataclass(frozen=True)
class Sliding:
    """A layer whose query at position p attends to positions p - window < s <= p."""

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(
                f"a sliding layer needs a window of at least 1 position, got {self.window}"
            )

    @property
    def label(self) -> str:
        """How the layer is named in labels and selectors."""
        return f"sliding {self.window}"


AttentionKind = Global | Sliding


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer resolves to.

    Attributes:
      kind: `Global()` or `Sliding(window)`; a window exists on sliding layers only.
      rope_base: base of the rotary frequencies.
      rope_scale: positions are divided by it before rotation (linear RoPE scaling).
    """

    kind: AttentionKind
    rope_base: float = 10_000.0
    rope_scale: float = 1.0

    @property
    def rotation(self) -> tuple[float, float]:
        """What tells its rotary embedding from other layers'."""
        return self.rope_base, self.rope_scale


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """What google-deepmind/gemma's samplers ask a model about its inputs: text only.

    Attributes:
      support_images: whether the model sees images.
      num_tokens_per_image: how many positions an image takes.
      special_tokens: names of the image tokens; none are needed.
      already_expanded: whether tokens hold the image positions already.
    """

    support_images: bool = False
    num_tokens_per_image: int = 0
    special_tokens: Any = None
    already_expanded: bool = False


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A Gemma 1, 2 or 3 text model.

    Names follow google-deepmind/gemma's `TransformerConfig`.  Every number that differs between
    released models is a field; per-layer choices are resolved once, in `layers`.

    Attributes:
      num_embed: V, vocabulary size.
      embed_dim: D, width of the residual stream.
      hidden_dim: F, width of the feed-forward layer.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; N is a multiple of K.
      head_dim: H.
      layers: one `LayerSpec` per layer.
      query_pre_attn_scalar: queries are multiplied by its inverse square root.
      use_qk_norm: RMS-normalise queries and keys per head (Gemma 3).
      use_post_attn_norm: RMS-normalise attention's output before adding it (Gemma 2, 3).
      use_post_ffw_norm: RMS-normalise the feed-forward's output before adding it (Gemma 2, 3).
      attn_logits_soft_cap: attention scores become cap * tanh(score / cap) (Gemma 2: 50).
      final_logit_soft_cap: the same for the vocabulary logits (Gemma 2: 30).
      transpose_gating_einsum: `gating_einsum` is (2, F, D) as in Gemma 3 and the larger Gemma 2;
        (2, D, F) if False, as in Gemma 1 and Gemma 2 2B.
      max_context: positions the model was trained for.
    """

    num_embed: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    query_pre_attn_scalar: float
    use_qk_norm: bool = True
    use_post_attn_norm: bool = True
    use_post_ffw_norm: bool = True
    attn_logits_soft_cap: float | None = None
    final_logit_soft_cap: float | None = None
    transpose_gating_einsum: bool = True
    max_context: int = 32_768

    def __post_init__(self) -> None:
        for name in (
            "num_embed",
            "embed_dim",
            "hidden_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.layers:
            raise ValueError("layers is empty: a model has at least one LayerSpec")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads}): each key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by before they meet the keys."""
        return 1.0 / math.sqrt(self.query_pre_attn_scalar)

    @property
    def input_config(self) -> InputConfig:
        """What the model takes: text."""
        return InputConfig()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """The numbers in a Hugging Face `config.json` of Gemma 1, 2 or 3.

        Args:
          config: the parsed file; of `Gemma3ForConditionalGeneration`, its text part is read.

        Raises:
          ValueError: another architecture, or a field that is missing or cannot be right.
        """
        from gemma_nb.config.hf import read

        return read(config)

    @classmethod
    def from_gm(cls, config: Any) -> TransformerConfig:
        """The text part of a `gm.nn.config.TransformerConfig` (google-deepmind/gemma).

        Raises:
          ValueError: a configuration of another kind (Gemma 3n, Gemma 4).
        """
        from gemma_nb.config.gm import read

        return read(config)

    def init_cache(
        self, *, batch_size: int, dtype: Any, cache_length: int, sharding: Any = None
    ) -> KVCache:
        """An empty cache for `cache_length` positions.

        Args:
          batch_size: B.
          dtype: of keys and values.
          cache_length: S.
          sharding: where the arrays are placed; None leaves it to JAX.
        """
        from gemma_nb.typing import empty_cache

        shape = (batch_size, cache_length, self.num_kv_heads, self.head_dim)
        return empty_cache(self.num_layers, shape, dtype, sharding)

    def num_params(self) -> int:
        """Total number of parameters, embedding included (the head is tied to it)."""
        c = self
        attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        norms = c.embed_dim * (2 + c.use_post_attn_norm + c.use_post_ffw_norm)
        qk_norms = 2 * c.head_dim * c.use_qk_norm
        layer = attention + norms + qk_norms + 3 * c.embed_dim * c.hidden_dim
        return c.num_embed * c.embed_dim + c.num_layers * layer + c.embed_dim


def interleave(
    num_layers: int,
    *,
    window: int,
    pattern: Sequence[bool] = (False,) * 5 + (True,),
    local_base: float = 10_000.0,
    global_base: float = 1_000_000.0,
    global_scale: float = 1.0,
) -> tuple[LayerSpec, ...]:
    """Layers that repeat `pattern` (True: global), by default Gemma 3's five sliding, one global.

    Source: Gemma 3 technical report (arXiv:2503.19786), section 2: "5:1 interleaving of
    local/global layers", RoPE base 10k for local and 1M for global layers, global RoPE of the 4B
    and larger models rescaled by 8.
    """
    sliding = LayerSpec(Sliding(window), local_base)
    full = LayerSpec(Global(), global_base, global_scale)
    return tuple(full if pattern[i % len(pattern)] else sliding for i in range(num_layers))
