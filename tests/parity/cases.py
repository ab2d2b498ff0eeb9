"""What is compared: the default model on a long text, and small random models of each family.

Random numbers come from raw PCG64 output, whose stream NumPy guarantees, through exact integer
arithmetic: weights and tokens are the same bits on every machine and with every NumPy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import numpy as np

from gemma_nb.config import Global, LayerSpec, TransformerConfig, interleave
from gemma_nb.model import GemmaTransformer

DATA = Path(__file__).parent / "data"
REAL = "gemma3-270m"


def uniform(shape: tuple[int, ...], *seed: int) -> np.ndarray:
    """float32 numbers in [-1, 1), multiples of 2^-23."""
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    return ((raw >> np.uint64(40)) * 2.0**-23 - 1).astype(np.float32).reshape(shape)


def signs(shape: tuple[int, ...], *seed: int) -> np.ndarray:
    """float64 numbers, each +1 or -1 (a Rademacher matrix)."""
    return np.where(uniform(shape, *seed) < 0, -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class RandomCase:
    """A small random model and a random text longer than its sliding window.

    Attributes:
      config: the model's numbers.
      seed: of weights and tokens.
      length: T, tokens in the text.
    """

    config: TransformerConfig
    seed: int
    length: int = 112

    def tokens(self) -> np.ndarray:
        """(T,) int32 token ids."""
        ids = (uniform((self.length,), self.seed, 0) + 1) / 2 * self.config.num_embed
        return ids.astype(np.int32)

    def params(self) -> dict[str, Any]:
        """The official tree, float32.

        Matrices keep the variance of what they multiply.  Norm scales are far from zero and make
        attention scores vary by several units, so that attention is far from uniform.
        """
        flat = flax.traverse_util.flatten_dict(GemmaTransformer.from_config(self.config).params)
        filled = {}
        for index, (path, leaf) in enumerate(sorted(flat.items())):
            x = uniform(leaf.shape, self.seed, 1 + index)
            if path[-1] == "scale":
                filled[path] = 0.75 * x + np.float32(0.5)
            else:
                filled[path] = x * np.float32(math.sqrt(3 / self._fan_in(path[-2:])))
        return flax.traverse_util.unflatten_dict(filled)

    def _fan_in(self, path: tuple[str, ...]) -> int:
        """Terms summed into one output of the matrix at `path`."""
        c = self.config
        if path[0] == "attn_vec_einsum":
            return c.num_heads * c.head_dim
        return c.hidden_dim if path[-1] == "linear" else c.embed_dim


def _small(num_heads: int, num_kv_heads: int, **changes: Any) -> TransformerConfig:
    numbers: dict[str, Any] = {
        "num_embed": 320,
        "embed_dim": 64,
        "hidden_dim": 96,
        "head_dim": 32,
        "layers": interleave(6, window=40, pattern=(False, False, True)),
        "query_pre_attn_scalar": 32,
    }
    return TransformerConfig(
        num_heads=num_heads, num_kv_heads=num_kv_heads, **{**numbers, **changes}
    )


def _gemma1(num_heads: int, num_kv_heads: int) -> TransformerConfig:
    return _small(
        num_heads,
        num_kv_heads,
        layers=(LayerSpec(Global()),) * 4,
        use_qk_norm=False,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        transpose_gating_einsum=False,
    )


def _gemma2(num_heads: int, num_kv_heads: int, **changes: Any) -> TransformerConfig:
    """Soft-caps so low that they bend attention scores and logits strongly."""
    numbers: dict[str, Any] = {
        "layers": interleave(4, window=40, pattern=(False, True), global_base=10_000.0),
        "use_qk_norm": False,
        "attn_logits_soft_cap": 2.0,
        "final_logit_soft_cap": 3.0,
    }
    return _small(num_heads, num_kv_heads, **{**numbers, **changes})


RANDOM: Mapping[str, RandomCase] = {
    "multi-query": RandomCase(_small(4, 1), seed=11),
    "grouped-query": RandomCase(_small(4, 2), seed=12),
    "multi-head": RandomCase(_small(4, 4), seed=13),
    # As in Gemma 3 27B: embed_dim / num_heads = 16, where head_dim is 32.
    "27B query scale": RandomCase(_small(4, 2, query_pre_attn_scalar=64 / 4), seed=14),
    # As in Gemma 3 4B and larger: positions of global layers are divided by 8.
    "RoPE scale 8": RandomCase(
        _small(4, 2, layers=interleave(6, window=40, pattern=(False, False, True), global_scale=8)),
        seed=15,
    ),
    "Gemma 1 multi-query": RandomCase(_gemma1(4, 1), seed=16),
    "Gemma 1 multi-head": RandomCase(_gemma1(4, 4), seed=17),
    "Gemma 2": RandomCase(_gemma2(4, 2, transpose_gating_einsum=False), seed=18),
    # As in Gemma 2 27B: embed_dim / num_heads = 16, where head_dim is 32.
    "Gemma 2 27B query scale": RandomCase(_gemma2(4, 2, query_pre_attn_scalar=64 / 4), seed=19),
}


def model_of(case: RandomCase) -> GemmaTransformer:
    """The case's model, with float32 weights."""
    return GemmaTransformer.from_config(case.config).replace(params=case.params())


def text() -> str:
    """The text that the default model is compared on: prose, code and several scripts."""
    return (DATA / "text.txt").read_text(encoding="utf-8")
