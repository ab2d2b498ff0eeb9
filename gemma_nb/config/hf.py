"""Reads the numbers of a Hugging Face `config.json`.

Released files leave out what the class of their time had as default, and the spelling of layer
types and RoPE changed over the years; all of it is understood here.  Defaults are those of
`GemmaConfig`, `Gemma2Config` and `Gemma3TextConfig` in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from gemma_nb.config import AttentionKind, Global, LayerSpec, Sliding, TransformerConfig

_MOST = 1 << 31
_MOST_LAYERS = 256  # the largest Gemma has 62

_LAYER_TYPES = ("full_attention", "sliding_attention")

_SHARED: dict[str, Any] = {"head_dim": 256, "rms_norm_eps": 1e-6}
# What each model_type has where its file says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {**_SHARED, "vocab_size": 256_000, "max_position_embeddings": 8192},
    "gemma2": {
        **_SHARED,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        **_SHARED,
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
}
# Fields that would change what is computed in a way that no released text model does.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "tie_word_embeddings": (True, None),
    "use_bidirectional_attention": (False, None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "quantization_config": (None,),
}


def read(config: Mapping[str, Any]) -> TransformerConfig:
    """The configuration; see `TransformerConfig.from_hf`."""
    if not isinstance(config, Mapping):
        raise ValueError(f"expected the content of a config.json, got {type(config).__name__}")
    kind = config.get("model_type")
    if kind == "gemma3":  # Gemma3ForConditionalGeneration
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ValueError("config.json of a 'gemma3' model has no 'text_config'")
        config, kind = text, "gemma3_text"
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise ValueError(
            f"config.json: model_type {kind!r} is not supported; expected 'gemma', 'gemma2', "
            "'gemma3' or 'gemma3_text'"
        )
    given = {name: value for name, value in config.items() if value is not None}
    # The soft-caps are the one pair of fields where null means "none", not "as usual".
    caps = {n: config[n] for n in config if n.endswith("_logit_softcapping")}
    return _Fields({**_DEFAULTS[kind], **given, **caps}, kind).config()


class _Fields:
    """The fields of one file over the defaults of its kind, checked as they are read."""

    def __init__(self, fields: Mapping[str, Any], kind: str) -> None:
        self._fields, self._kind = fields, kind

    def config(self) -> TransformerConfig:
        for name, allowed in _ONLY.items():
            value = self._fields.get(name)
            if value not in allowed:
                self._fail(name, f"expected {allowed[0]!r}, got {value!r:.60}")
        if self._number("rms_norm_eps") != 1e-6:
            self._fail("rms_norm_eps", f"expected 1e-06, got {self._fields['rms_norm_eps']!r}")
        first, heads = self._kind == "gemma", self._count("num_attention_heads")
        embed_dim, head_dim = self._count("hidden_size"), self._count("head_dim")
        return TransformerConfig(
            num_embed=self._count("vocab_size"),
            embed_dim=embed_dim,
            hidden_dim=self._count("intermediate_size"),
            num_heads=heads,
            num_kv_heads=self._count("num_key_value_heads"),
            head_dim=head_dim,
            layers=self._layers(),
            query_pre_attn_scalar=head_dim if first else self._positive("query_pre_attn_scalar"),
            use_qk_norm=self._kind == "gemma3_text",
            use_post_attn_norm=not first,
            use_post_ffw_norm=not first,
            attn_logits_soft_cap=None if first else self._cap("attn_logit_softcapping"),
            final_logit_soft_cap=None if first else self._cap("final_logit_softcapping"),
            # Only how the official tree keeps it: Gemma 1 and the 2B of Gemma 2 are older.
            transpose_gating_einsum=not (first or (self._kind == "gemma2" and embed_dim == 2304)),
            max_context=self._count("max_position_embeddings"),
        )

    def _layers(self) -> tuple[LayerSpec, ...]:
        specs = {
            "full_attention": LayerSpec(Global(), *self._rope("full_attention")),
            "sliding_attention": LayerSpec(self._window(), *self._rope("sliding_attention")),
        }
        return tuple(specs[name] for name in self._layer_types())

    def _window(self) -> AttentionKind:
        return Global() if self._kind == "gemma" else Sliding(self._count("sliding_window"))

    def _layer_types(self) -> list[str]:
        count = self._count("num_hidden_layers", most=_MOST_LAYERS)
        if self._kind == "gemma":
            return ["full_attention"] * count
        types = self._fields.get("layer_types")
        if types is None:
            name = "_sliding_window_pattern"
            every = self._count(name if name in self._fields else name[1:], most=_MOST_LAYERS)
            names = ["sliding_attention"] * (every - 1) + ["full_attention"]
            return [names[i % every] for i in range(count)]
        fits = isinstance(types, list) and len(types) == count
        if not fits or not all(name in _LAYER_TYPES for name in types):
            self._fail("layer_types", f"expected {count} of {_LAYER_TYPES}, got {types!r:.80}")
        return types

    def _rope(self, layer_type: str) -> tuple[float, float]:
        """Base and scale of the rotary frequencies in layers of one type.

        Sliding layers of Gemma 3 have a base of their own, and no scale but what an entry of their
        own says: whatever is said without a layer type is said of the others.
        """
        newer = self._rope_entry("rope_parameters", layer_type)  # transformers 5
        older = self._rope_entry("rope_scaling", layer_type)
        if self._kind != "gemma3_text":  # one embedding for all layers; either field describes it
            return self._rotation(
                {"rope_theta": self._base("rope_theta", 10_000.0)} | (older or newer)
            )
        if layer_type == "sliding_attention":
            base = self._base("rope_local_base_freq", 10_000.0)
        else:
            base = self._base("rope_theta", 1_000_000.0)
            if "rope_theta" in self._fields and not self._per_layer_type("rope_parameters"):
                newer.pop("rope_theta", None)
        return self._rotation({"rope_theta": base} | newer | older)

    def _base(self, name: str, default: float) -> float:
        return self._positive(name) if name in self._fields else default

    def _rope_entry(self, name: str, layer_type: str) -> dict[str, Any]:
        """What a field says of layers of one type, without nulls; `type` is spelled `rope_type`."""
        given = self._fields.get(name)
        if given is not None and self._per_layer_type(name):
            given = given.get(layer_type)
        elif self._kind == "gemma3_text" and layer_type == "sliding_attention":
            given = None
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            self._fail(name, f"expected an object, got {given!r:.60}")
        entry = {key: value for key, value in given.items() if value is not None}
        if "type" in entry:
            entry.setdefault("rope_type", entry.pop("type"))
        return entry

    def _per_layer_type(self, name: str) -> bool:
        """Whether a field has an entry for each type of layers, rather than one for all."""
        given = self._fields.get(name, {})
        if not isinstance(given, Mapping):
            self._fail(name, f"expected an object, got {given!r:.60}")
        entries = [key for key, value in given.items() if isinstance(value, Mapping)]
        if unknown := [key for key in entries if key not in _LAYER_TYPES]:
            self._fail(name, f"expected entries of {_LAYER_TYPES}, got {unknown[0]!r:.60}")
        return any(key in given for key in _LAYER_TYPES)

    def _rotation(self, entry: Mapping[str, Any]) -> tuple[float, float]:
        """Base and scale that an entry stands for."""
        kind, part = entry.get("rope_type", "default"), entry.get("partial_rotary_factor", 1)
        if kind not in ("default", "linear"):
            self._fail("rope_type", f"expected 'default' or 'linear', got {kind!r:.60}")
        if part != 1:
            self._fail("partial_rotary_factor", f"expected 1, got {part!r:.60}")
        fields = _Fields(entry, self._kind)
        scale = fields._positive("factor") if kind == "linear" else 1.0
        return fields._positive("rope_theta"), scale

    def _cap(self, name: str) -> float | None:
        return None if self._fields.get(name) is None else self._positive(name)

    def _number(self, name: str) -> float:
        value = self._fields.get(name)
        if value is None:
            self._fail(name, "is missing")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < math.inf:
            self._fail(name, f"expected a number, got {value!r:.60}")
        return value

    def _positive(self, name: str) -> float:
        value = self._number(name)
        if not 0 < value < 1e12:
            self._fail(name, f"expected a positive number, got {value!r:.60}")
        return value

    def _count(self, name: str, most: int = _MOST) -> int:
        value = self._number(name)
        if not isinstance(value, int) or not 1 <= value <= most:
            self._fail(name, f"expected a whole number from 1 to {most:,}, got {value!r:.60}")
        return value

    def _fail(self, name: str, problem: str) -> NoReturn:
        raise ValueError(f"config.json: field {name!r} of a {self._kind!r} model: {problem}")
