"""gm's modules for our configurations."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gemma_nb.config import Global, LayerSpec, Sliding, TransformerConfig
from gemma_nb.text.tokenizer import Tokenizer


@functools.cache
def gm() -> Any:
    """The library; importing it takes seconds and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gemma import gm

        # Its names are imported on first use, which warns as well.
        for name in ("nn", "text"):
            for attribute in dir(getattr(gm, name)):
                getattr(getattr(gm, name), attribute)
    return gm


def _only(values: set[Any], default: Any) -> Any:
    assert len(values) <= 1, f"gm has one value for all such layers, got {values}"
    return values.pop() if values else default


def config(ours: TransformerConfig) -> Any:
    """`ours` in gm's words."""
    words = gm().nn.config
    rules = words.QueryPreAttentionNormalisation
    per_head = ours.embed_dim // ours.num_heads
    rule = {
        float(per_head): rules.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
        float(per_head) ** -2: rules.BY_EMBED_DIM_DIV_NUM_HEADS,
        float(ours.head_dim): rules.BY_ONE_OVER_SQRT_HEAD_DIM,
    }[float(ours.query_pre_attn_scalar)]
    kinds = {Global: words.AttentionType.GLOBAL, Sliding: words.AttentionType.LOCAL_SLIDING}
    sliding = [spec for spec in ours.layers if isinstance(spec.kind, Sliding)]
    full = [spec for spec in ours.layers if isinstance(spec.kind, Global)]
    return words.TransformerConfig(
        num_embed=ours.num_embed,
        embed_dim=ours.embed_dim,
        hidden_dim=ours.hidden_dim,
        num_heads=ours.num_heads,
        num_kv_heads=ours.num_kv_heads,
        head_dim=ours.head_dim,
        final_logit_softcap=ours.final_logit_soft_cap,
        attn_logits_soft_cap=ours.attn_logits_soft_cap,
        use_post_attn_norm=ours.use_post_attn_norm,
        use_post_ffw_norm=ours.use_post_ffw_norm,
        use_qk_norm=ours.use_qk_norm,
        attention_types=tuple(kinds[type(spec.kind)] for spec in ours.layers),
        query_pre_attn_norm=rule,
        sliding_window_size=_only({spec.kind.window for spec in sliding}, None),
        transpose_gating_einsum=ours.transpose_gating_einsum,
        **_rope("local", sliding),
        **_rope("global", full),
    )


def _rope(which: str, specs: list[LayerSpec]) -> dict[str, float]:
    return {
        f"{which}_base_frequency": _only({spec.rope_base for spec in specs}, 10_000),
        f"{which}_scale_factor": _only({spec.rope_scale for spec in specs}, 1.0),
    }


def module(ours: TransformerConfig) -> Any:
    """gm's transformer for `ours`, computing in float32."""
    return gm().nn.Transformer(config=config(ours), tokens="tokens", dtype=jnp.float32)


def causal(length: int) -> dict[str, jax.Array]:
    """Positions and mask of one text without padding.  gm takes token 0 for padding otherwise."""
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    return {"positions": jnp.arange(length)[None], "attention_mask": mask}


def tokenizer(ours: Tokenizer, folder: Path) -> Any:
    """gm's tokenizer of Gemma 3 with the vocabulary of `ours`.

    In a file of its own name: gm keeps downloaded ones by name, and would prefer such a one.
    """
    path = ours.save_model(folder / f"vocabulary-of-{ours.vocab_size}.model")
    return gm().text.Gemma3Tokenizer(path=str(path))
