"""Reads the numbers of a `TransformerConfig` of google-deepmind/gemma (gm)."""

from __future__ import annotations

from typing import Any

from gemma_nb.config import Global, LayerSpec, Sliding, TransformerConfig

# What gm's configurations must have to be of Gemma 1, 2 or 3; those of Gemma 3n and 4 have more.
_REQUIRED = ("attention_types", "query_pre_attn_norm", "use_qk_norm", "transpose_gating_einsum")
_FOREIGN = ("use_altup", "use_laurel", "per_layer_input_dim", "kv_cache_sharing_config")


def read(config: Any) -> TransformerConfig:
    """The configuration; see `TransformerConfig.from_gm`."""
    missing = [name for name in _REQUIRED if not hasattr(config, name)]
    foreign = [name for name in _FOREIGN if getattr(config, name, None)]
    if missing or foreign:
        raise ValueError(
            f"{type(config).__module__}.{type(config).__name__} is not the configuration of a "
            f"Gemma 1, 2 or 3 model: it has {', '.join(foreign) or 'no ' + missing[0]}"
        )
    return TransformerConfig(
        num_embed=config.num_embed,
        embed_dim=config.embed_dim,
        hidden_dim=config.hidden_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        layers=tuple(_layer(config, kind.name) for kind in config.attention_types),
        query_pre_attn_scalar=_query_pre_attn_scalar(config),
        use_qk_norm=config.use_qk_norm,
        use_post_attn_norm=config.use_post_attn_norm,
        use_post_ffw_norm=config.use_post_ffw_norm,
        attn_logits_soft_cap=config.attn_logits_soft_cap,
        final_logit_soft_cap=config.final_logit_softcap,
        transpose_gating_einsum=config.transpose_gating_einsum,
        max_context=_max_context(config),
    )


def _layer(config: Any, kind: str) -> LayerSpec:
    if kind == "GLOBAL":
        base, scale = config.global_base_frequency, config.global_scale_factor
        return LayerSpec(Global(), float(base), float(scale))
    if kind != "LOCAL_SLIDING":
        raise ValueError(f"expected attention types GLOBAL and LOCAL_SLIDING, got {kind}")
    base, scale = config.local_base_frequency, config.local_scale_factor
    return LayerSpec(Sliding(config.sliding_window_size), float(base), float(scale))


def _query_pre_attn_scalar(config: Any) -> float:
    """gm keeps three named rules for the factor f of the queries; ours is 1 / f^2."""
    per_head = config.embed_dim // config.num_heads
    match config.query_pre_attn_norm.name:
        case "BY_ONE_OVER_SQRT_HEAD_DIM":
            return float(config.head_dim)
        case "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS":
            return float(per_head)
        case "BY_EMBED_DIM_DIV_NUM_HEADS":
            return float(per_head) ** -2
        case rule:
            raise ValueError(f"unknown query_pre_attn_norm {rule}")


def _max_context(config: Any) -> int:
    """What the model was trained for, which gm does not say: from the generation it is of."""
    if not config.use_qk_norm:
        return 8192  # Gemma 1 and 2
    # Gemma 3: 32k, and 128k where global positions are rescaled (arXiv:2503.19786, section 2).
    return 131_072 if config.global_scale_factor > 1 else 32_768
