"""What the axes of every official parameter are, in the letters of `gemma_nb.typing`.

Where a model is split over devices and how it is shown in a notebook both follow from this table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

# Letter -> the name of the axis in labelled arrays and in what people read.
WORDS: Mapping[str, str] = MappingProxyType(
    {
        "B": "batch",
        "T": "seq",
        "V": "vocabulary",
        "D": "embedding",
        "N": "head",
        "K": "kv_head",
        "H": "head_dim",
        "F": "feed_forward",
    }
)

# The end of a parameter's path -> its axes.  "kv", "qkv" and "gate_up" are stacks of matrices that
# the official checkpoints keep as one array.
_DIMS: Mapping[tuple[str, ...], tuple[str, ...]] = MappingProxyType(
    {
        ("embedder", "input_embedding"): ("V", "D"),
        ("q_einsum", "w"): ("N", "D", "H"),
        ("kv_einsum", "w"): ("kv", "K", "D", "H"),
        ("qkv_einsum", "w"): ("qkv", "N", "D", "H"),
        ("attn_vec_einsum", "w"): ("N", "H", "D"),
        ("_query_norm", "scale"): ("H",),
        ("_key_norm", "scale"): ("H",),
        ("mlp", "gating_einsum"): ("gate_up", "F", "D"),
        ("mlp", "linear"): ("F", "D"),
        ("pre_attention_norm", "scale"): ("D",),
        ("post_attention_norm", "scale"): ("D",),
        ("pre_ffw_norm", "scale"): ("D",),
        ("post_ffw_norm", "scale"): ("D",),
        ("final_norm", "scale"): ("D",),
    }
)


def param_dims(path: Sequence[str], *, transpose_gating: bool = True) -> tuple[str, ...] | None:
    """The axes of the parameter at `path`, or None where the official text tree has none there.

    Args:
      path: names down the tree, for example ("layer_0", "mlp", "linear").
      transpose_gating: `TransformerConfig.transpose_gating_einsum`.
    """
    dims = _DIMS.get(tuple(path[-2:]))
    if dims == ("gate_up", "F", "D") and not transpose_gating:
        return ("gate_up", "D", "F")
    return dims


def word(dim: str) -> str:
    """What an axis is called: "D" is "embedding"; a stack keeps its name."""
    return WORDS.get(dim, dim)
