"""One frozen configuration per released size, and what is recommended for it.

Sources: Gemma 3 technical report (arXiv:2503.19786), table 1; the configurations of
google-deepmind/gemma (`gm/nn/_gemma.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from gemma_nb.config import TransformerConfig, interleave

Tuning = Literal["base", "instruction"]

# Recommended for instruction-tuned Gemma 3 by its authors: temperature 1, top-k 64, top-p 0.95.
GEMMA3_SAMPLING: Mapping[str, float | int] = MappingProxyType(
    {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What is known about a checkpoint beside its numbers.

    Attributes:
      name: as in `gnb.load(name)`.
      title: for people.
      tuning: "base" (pretrained only) or "instruction".
      sampling: recommended fields of `gnb.Sampling`, as (name, value) pairs.
      source: where these weights came from.
      terms: licence or terms of use.
    """

    name: str
    title: str
    tuning: Tuning = "base"
    sampling: tuple[tuple[str, float | int], ...] = tuple(GEMMA3_SAMPLING.items())
    source: str = ""
    terms: str = ""


def _gemma3(
    num_layers: int,
    embed_dim: int,
    hidden_dim: int,
    heads: tuple[int, int],
    *,
    head_dim: int = 256,
    window: int = 1024,
    global_scale: float = 8.0,
    query_pre_attn_scalar: float | None = None,
    max_context: int = 131_072,
) -> TransformerConfig:
    return TransformerConfig(
        num_embed=262_144,
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        layers=interleave(num_layers, window=window, global_scale=global_scale),
        query_pre_attn_scalar=query_pre_attn_scalar or head_dim,
        max_context=max_context,
    )


GEMMA3_270M = _gemma3(18, 640, 2048, (4, 1), window=512, global_scale=1.0, max_context=32_768)
GEMMA3_1B = _gemma3(26, 1152, 6912, (4, 1), window=512, global_scale=1.0, max_context=32_768)
GEMMA3_4B = _gemma3(34, 2560, 10_240, (8, 4))
GEMMA3_12B = _gemma3(48, 3840, 15_360, (16, 8))
# The 27B scales queries by embed_dim / num_heads instead of head_dim.
GEMMA3_27B = _gemma3(62, 5376, 21_504, (32, 16), head_dim=128, query_pre_attn_scalar=5376 / 32)

PRESETS: Mapping[str, TransformerConfig] = MappingProxyType(
    {
        "gemma3-270m": GEMMA3_270M,
        "gemma3-1b": GEMMA3_1B,
        "gemma3-4b": GEMMA3_4B,
        "gemma3-12b": GEMMA3_12B,
        "gemma3-27b": GEMMA3_27B,
    }
)


def by_name(name: str) -> TransformerConfig:
    """The configuration of a released size.

    Raises:
      ValueError: an unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
