"""Corrections of GGUF metadata: what files leave unsaid or say in other words.

llama.cpp's loader fills most of its fields in, and other programs write names of their own: Ollama,
the files of whose first year lack numbers that its engine knows by heart; candle.  Everything here
is found in public sources of these programs; what they disagree in is decided for the numbers of
the released models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_nb.checkpoints.gguf_header import TensorInfo

ARCHITECTURES = ("gemma", "gemma2", "gemma3")

# Other names of a field, Ollama's, candle's and llama.cpp's older one.
_ALIASES = {
    "rope.global.freq_base": "rope.freq_base",
    "rope.local.freq_base": "rope.freq_base_swa",
    "rope.local_freq_base": "rope.freq_base_swa",
    "rope.scale_linear": "rope.scaling.factor",
}
# What only Ollama writes, as its own detection has it.
_OLLAMA = (
    *("mm.tokens_per_image", "vision.block_count"),
    *("rope.global.freq_base", "rope.local.freq_base"),
)
_OLLAMA_TOKENIZER = (*("tokenizer.ggml.add_padding_token", "tokenizer.ggml.add_unknown_token"),)
# Layers of the sizes of Gemma 3 whose numbers Ollama's engine corrects: the 1B has no soft-cap,
# the larger ones rotate eight times slower in global layers.
_OLLAMA_CAPPED, _OLLAMA_UNSCALED = 26, (34, 48, 62)

_ROLES = {
    "bos_token_id": "<bos>",
    "eos_token_id": "<eos>",
    "padding_token_id": "<pad>",
    "unknown_token_id": "<unk>",
}
_END_OF_TURN = "<end_of_turn>"
_NO_ID = (-1, (1 << 32) - 1)
# Types of pieces by their names; of Gemma 3's 262,144 these are the types in the released files.
_BYTES = re.compile(r"<0x[0-9A-F]{2}>")
_CONTROL = re.compile(r"<unused\d+>|<(?:pad|eos|bos|unk|mask|start_of_turn|end_of_turn)>")
_USER_DEFINED = re.compile(r"\n+|\t+|(?: |\u2581){2,}|</?[a-z]\w*>|\[multimodal\]")
_MOST_ENTRIES = 1024  # of an array that describes layers

_SAYS = {
    "general.name": "name",
    "general.author": "author",
    "general.organization": "organization",
    "general.quantized_by": "quantized by",
    "general.repo_url": "from",
}


def complete(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo] | None = None
) -> dict[str, Any]:
    """The metadata with what follows from the rest of the file, under llama.cpp's names.

    Args:
      metadata: of a file, or of its converted weights.
      tensors: of the file, whose shapes tell sizes that are not said.
    """
    fields = dict(metadata)
    named = [name for name in ARCHITECTURES if f"{name}.block_count" in fields]
    if len(named) == 1:
        fields.setdefault("general.architecture", named[0])
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str):
        return fields
    prefix = f"{architecture}."
    for other, usual in _ALIASES.items():
        if prefix + other in fields:
            fields.setdefault(prefix + usual, fields[prefix + other])
    if architecture == "gemma3" and _by_ollama(metadata):
        _correct_ollama(fields)
    if tensors is not None:
        _take_sizes(fields, prefix, {name: info.shape for name, info in tensors.items()})
    _complete_vocabulary(fields)
    for key, value in fields.items():  # a converted file keeps lists, and no arrays
        if key.startswith(prefix) and isinstance(value, np.ndarray) and value.size < _MOST_ENTRIES:
            fields[key] = value.tolist()
    return fields


def origin(metadata: Mapping[str, Any]) -> str:
    """Who made a file, as far as it says so, for the end of a message."""
    said = [f"{what} {metadata[key]!r:.80}" for key, what in _SAYS.items() if key in metadata]
    said += ["written by Ollama"] if _by_ollama(metadata) else []
    return f" (the file says: {', '.join(said)})" if said else ""


def _by_ollama(metadata: Mapping[str, Any]) -> bool:
    prefix = f"{metadata.get('general.architecture')}."
    return any(key in metadata for key in (*(prefix + key for key in _OLLAMA), *_OLLAMA_TOKENIZER))


def _correct_ollama(fields: dict[str, Any]) -> None:
    """Correct what Ollama's converter has left wrong, as its engine does."""
    names = ("block_count", "attention.sliding_window", "context_length")
    layers, window, context = (fields.get(f"gemma3.{name}") for name in names)
    if not (isinstance(layers, int) and isinstance(window, int) and isinstance(context, int)):
        return
    if window >= context:
        return
    if layers == _OLLAMA_CAPPED:
        fields.pop("gemma3.final_logit_softcapping", None)
    elif layers in _OLLAMA_UNSCALED and "gemma3.rope.scaling.type" not in fields:
        fields.setdefault("gemma3.rope.scaling.factor", 8.0)


def _take_sizes(fields: dict[str, Any], prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Sizes that are not said, from shapes (out, in)."""
    if len(embedding := shapes.get("token_embd.weight", ())) == 2:
        _shorten_vocabulary(fields, embedding[0])
        _fill(fields, f"{prefix}embedding_length", embedding[1])
    layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    _fill(fields, f"{prefix}block_count", len(layers) or None)
    _fill(fields, f"{prefix}feed_forward_length", _rows(shapes, "ffn_gate"))
    queries, keys = _rows(shapes, "attn_q"), _rows(shapes, "attn_k")
    heads = fields.get(f"{prefix}attention.head_count")
    if isinstance(heads, int) and heads > 0 and queries and queries % heads == 0:
        _fill(fields, f"{prefix}attention.key_length", queries // heads)
    head_dim = fields.get(f"{prefix}attention.key_length")
    if isinstance(head_dim, int) and head_dim > 0:
        _fill(fields, f"{prefix}attention.head_count", queries and queries // head_dim)
        _fill(fields, f"{prefix}attention.head_count_kv", keys and keys // head_dim)


def _rows(shapes: Mapping[str, tuple[int, ...]], name: str) -> int | None:
    return next(iter(shapes.get(f"blk.0.{name}.weight", ())), None)


def _fill(fields: dict[str, Any], key: str, value: Any) -> None:
    if value is not None:
        fields.setdefault(key, value)


def _shorten_vocabulary(fields: dict[str, Any], rows: int) -> None:
    """Ollama lists tokens of images behind those that the embedding has rows for."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or rows >= len(tokens) or not _by_ollama(fields):
        return
    for name in ("tokens", "scores", "token_type"):
        column = fields.get(f"tokenizer.ggml.{name}")
        if isinstance(column, list | np.ndarray) and len(column) == len(tokens):
            fields[f"tokenizer.ggml.{name}"] = column[:rows]


def _complete_vocabulary(fields: dict[str, Any]) -> None:
    """Ids of the pieces with a role by their names; scores and types where there are none at all.

    llama.cpp takes ids of LLaMA's vocabulary and scores of 0 instead, which Gemma's is not made
    for: its pieces are listed by their score.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return
    fields.setdefault("tokenizer.ggml.model", "llama")
    for role, piece in _ROLES.items():
        id_ = fields.get(key := f"tokenizer.ggml.{role}")
        if (id_ is None or (isinstance(id_, int) and id_ in _NO_ID)) and piece in tokens:
            fields[key] = tokens.index(piece)
    eos = fields.get("tokenizer.ggml.eos_token_id")
    if isinstance(eos, int) and 0 <= eos < len(tokens) and tokens[eos] == _END_OF_TURN:
        # Both end a reply; the one that ends a turn is found by its name.
        fields["tokenizer.ggml.eos_token_id"] = tokens.index("<eos>") if "<eos>" in tokens else eos
    if "tokenizer.ggml.scores" not in fields:
        fields["tokenizer.ggml.scores"] = -np.arange(len(tokens), dtype=np.float32)
    if "tokenizer.ggml.token_type" not in fields:
        types = [_type(piece) for piece in tokens]
        fields["tokenizer.ggml.token_type"] = np.array(types, np.int32)


def _type(piece: str) -> int:
    """The kind of a piece of Gemma's vocabulary, by its name."""
    if _BYTES.fullmatch(piece):
        return 6
    if _CONTROL.fullmatch(piece):
        return 3
    return 4 if _USER_DEFINED.fullmatch(piece) else 1
