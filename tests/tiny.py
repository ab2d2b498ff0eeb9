"""The tests' small model: random weights, a tokenizer of bytes; it compiles in a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

import gemma_nb as gnb

if TYPE_CHECKING:
    from gemma_nb.config import TransformerConfig
    from gemma_nb.model import GemmaTransformer
    from gemma_nb.text.tokenizer import Tokenizer

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")


def tokenizer() -> Tokenizer:
    """Bytes and control pieces: one token per byte of UTF-8, except for spaces and line breaks."""
    from gemma_nb.text.tokenizer import Tokenizer

    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*CONTROL, *bytes_, "\u2581", "\n"]
    types = [3] * len(CONTROL) + [6] * len(bytes_) + [1] * 2  # control, byte, normal
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": np.zeros(len(pieces), np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
    }
    for id_, role in enumerate(("padding", "eos", "bos", "unknown")):
        metadata[f"tokenizer.ggml.{role}_token_id"] = id_
    return Tokenizer.from_gguf(metadata, name="tiny tokenizer")


def model(vocab_size: int) -> GemmaTransformer:
    """Two sliding layers and a global one, of random weights."""
    from gemma_nb.config import TransformerConfig, interleave

    config = TransformerConfig(
        num_embed=vocab_size,
        embed_dim=32,
        hidden_dim=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        layers=interleave(3, window=8, pattern=(False, False, True)),
        query_pre_attn_scalar=16,
        max_context=4096,
    )
    return random_model(config)


def random_model(config: TransformerConfig) -> GemmaTransformer:
    """Random weights, in every process the same to the last bit."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        return gnb.GemmaTransformer.from_config(config, key=jax.random.key(0))
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
