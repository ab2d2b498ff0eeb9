"""What a Gemma model looks like, in numbers.  No JAX modules here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
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

# Base, scale and H: layers that agree in them share a rotary embedding.
RotationKind = tuple[float, float, int]


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The kind and the shape of one layer.

    Layers of one model may differ in shape: a layer that names no size of its own has the
    configuration's, see `TransformerConfig.axis_sizes`.

    Attributes:
      kind: `Global()` or `Sliding(window)`; a window exists on sliding layers only.
      rope_base: base of the rotary frequencies.
      rope_scale: positions are divided by it before rotation (linear RoPE scaling).
      head_dim: H of this layer.
      num_kv_heads: K of this layer.
      hidden_dim: F of this layer.
    """

    kind: AttentionKind
    rope_base: float = 10_000.0
    rope_scale: float = 1.0
    head_dim: int | None = None
    num_kv_heads: int | None = None
    hidden_dim: int | None = None

    @property
    def rotation(self) -> tuple[float, float]:
        """Base and scale, which set the angles of its rotary embedding."""
        return self.rope_base, self.rope_scale

    @property
    def own_sizes(self) -> dict[str, int]:
        """The sizes that this layer names for itself, by field."""
        named = {name: getattr(self, name) for name in _LAYER_SIZES.values()}
        return {name: size for name, size in named.items() if size is not None}

    def fields(self) -> dict[str, Any]:
        """All fields but the sizes that it leaves to the configuration."""
        return {
            "kind": self.kind,
            "rope_base": self.rope_base,
            "rope_scale": self.rope_scale,
            **self.own_sizes,
        }

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.fields().items())
        return f"LayerSpec({fields})"


# The axes that may be of another size in each layer, and the fields that say so.
_LAYER_SIZES: Mapping[str, str] = MappingProxyType(
    {"K": "num_kv_heads", "H": "head_dim", "F": "hidden_dim"}
)


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
      hidden_dim: F, width of the feed-forward layer, of layers that name none.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads, of layers that name none; N is a multiple of K.
      head_dim: H, of layers that name none.
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
        _check_sizes(self, ("num_embed", "embed_dim", "num_heads", *_LAYER_SIZES.values()))
        if not self.layers:
            raise ValueError("layers is empty: a model has at least one LayerSpec")
        for spec in dict.fromkeys(self.layers):
            _check_sizes(spec, spec.own_sizes)
            sizes = self.axis_sizes(spec)
            if sizes["N"] % sizes["K"]:
                raise ValueError(
                    f"num_heads ({sizes['N']}) must be a multiple of num_kv_heads ({sizes['K']}): "
                    "each key-value head serves the same number of query heads"
                )
            if sizes["H"] % 2:
                raise ValueError(f"head_dim must be even for rotary embeddings, got {sizes['H']}")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    def axis_sizes(self, layer: int | LayerSpec) -> dict[str, int]:
        """Sizes of all axes in one layer, by the letters of `gemma_nb.typing`: V, D, N, K, H, F.

        Args:
          layer: its index, or what it is.
        """
        spec = layer if isinstance(layer, LayerSpec) else self.layers[layer]
        own = {axis: getattr(spec, name) for axis, name in _LAYER_SIZES.items()}
        sizes = {
            axis: getattr(self, name) if own[axis] is None else own[axis]
            for axis, name in _LAYER_SIZES.items()
        }
        return {"V": self.num_embed, "D": self.embed_dim, "N": self.num_heads, **sizes}

    def rotation_of(self, layer: int | LayerSpec) -> RotationKind:
        """The kind of a layer's rotary embedding: its base, its scale and H."""
        spec = layer if isinstance(layer, LayerSpec) else self.layers[layer]
        return *spec.rotation, self.axis_sizes(spec)["H"]

    def shared_size(self, axis: str, layers: Iterable[int] | None = None) -> int:
        """The size that an axis has in all of some layers.

        Args:
          axis: its letter.
          layers: indices; None for all layers.

        Raises:
          ValueError: the layers differ in it; the message says which layers are alike.
        """
        alike: dict[int, list[int]] = {}
        for i in range(self.num_layers) if layers is None else layers:
            alike.setdefault(self.axis_sizes(i)[axis], []).append(i)
        if len(alike) > 1:
            which = ", ".join(f"{size} in layers {whose}" for size, whose in alike.items())
            raise ValueError(
                f"the layers differ in {_LAYER_SIZES[axis]} ({which}), so that one array cannot "
                "hold them: ask for layers of one size"
            )
        return next(iter(alike))

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

        each = map(self.axis_sizes, self.layers)
        shapes = [(batch_size, cache_length, sizes["K"], sizes["H"]) for sizes in each]
        return empty_cache(shapes, dtype, sharding)

    def num_params(self) -> int:
        """Total number of parameters, embedding included (the head is tied to it)."""
        total = self.num_embed * self.embed_dim + self.embed_dim
        norms = self.embed_dim * (2 + self.use_post_attn_norm + self.use_post_ffw_norm)
        for spec in self.layers:
            s = self.axis_sizes(spec)
            attention = s["D"] * s["H"] * (2 * s["N"] + 2 * s["K"])
            qk_norms = 2 * s["H"] * self.use_qk_norm
            total += attention + norms + qk_norms + 3 * s["D"] * s["F"]
        return total


def _check_sizes(holder: Any, names: Iterable[str]) -> None:
    for name in names:
        if getattr(holder, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(holder, name)}")


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
