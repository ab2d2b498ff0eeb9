"""A tiny Gemma 3 as a GGUF file: every kind of tensor and vocabulary entry, in some 100 KB."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma_nb.config import TransformerConfig, interleave

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<unused0>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
DEFINED = ["\n", "\n\n", "  ", "<b>", "<start_of_image>"]  # converters write spaces as spaces
NORMAL = ["th", "\u2581th", "\u2581the", "he", "\u2581", "t", "h", "e"]
PIECES = [*CONTROL, *BYTES, *DEFINED, *NORMAL]
TYPES = [3] * len(CONTROL) + [6] * len(BYTES) + [4] * len(DEFINED) + [1] * len(NORMAL)
SCORES = [0.0] * (len(PIECES) - len(NORMAL)) + [-float(i) for i in range(len(NORMAL))]

CONFIG = TransformerConfig(
    num_embed=len(PIECES),
    embed_dim=32,
    hidden_dim=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    layers=interleave(2, window=16),
    query_pre_attn_scalar=32.0,
    max_context=128,
)

FIELDS: dict[str, Any] = {
    "gemma3.context_length": CONFIG.max_context,
    "gemma3.embedding_length": CONFIG.embed_dim,
    "gemma3.block_count": CONFIG.num_layers,
    "gemma3.feed_forward_length": CONFIG.hidden_dim,
    "gemma3.attention.head_count": CONFIG.num_heads,
    "gemma3.attention.head_count_kv": CONFIG.num_kv_heads,
    "gemma3.attention.key_length": CONFIG.head_dim,
    "gemma3.attention.value_length": CONFIG.head_dim,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 16,
    "gemma3.rope.freq_base": 1e6,
}


def vocabulary() -> dict[str, Any]:
    """`tokenizer.ggml.*` as a parsed file gives them."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(PIECES),
        "tokenizer.ggml.scores": np.array(SCORES, np.float32),
        "tokenizer.ggml.token_type": np.array(TYPES, np.int32),
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
    }


def metadata() -> dict[str, Any]:
    """All metadata as a parsed file gives them."""
    return {"general.architecture": "gemma3", **FIELDS, **vocabulary()}


def tensors() -> dict[str, np.ndarray]:
    """float32 tensors under GGUF names; norms hold 1 + scale."""
    rng = np.random.default_rng(0)
    v, d, f, h = CONFIG.num_embed, CONFIG.embed_dim, CONFIG.hidden_dim, CONFIG.head_dim
    n, k = CONFIG.num_heads * h, CONFIG.num_kv_heads * h
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (v, d), "output_norm": (d,)}
    for i in range(CONFIG.num_layers):
        layer = {
            "attn_q": (n, d), "attn_k": (k, d), "attn_v": (k, d), "attn_output": (d, n),
            "attn_q_norm": (h,), "attn_k_norm": (h,), "attn_norm": (d,),
            "post_attention_norm": (d,), "ffn_norm": (d,), "post_ffw_norm": (d,),
            "ffn_gate": (f, d), "ffn_up": (f, d), "ffn_down": (d, f),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return {
        f"{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(
    path: Path,
    *,
    fields: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    quantize: bool = False,
    architecture: str = "gemma3",
) -> Path:
    """Writes the model with the gguf library; projections as Q8_0 if `quantize`."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (FIELDS if fields is None else fields).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    writer.add_token_types(TYPES)
    for role, id_ in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{role}_token_id")(id_)
    for name, array in (tensors() if arrays is None else arrays).items():
        if quantize and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
