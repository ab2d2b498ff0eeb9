"""Tokenizer files of Hugging Face folders, of the tiny vocabulary, and what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from gemma_nb.text import hugging_face
from gemma_nb.text.files import TokenizerFiles
from gemma_nb.text.tokenizer import Tokenizer
from tests.checkpoints import tiny

PIECES = [piece.replace("  ", "\u2581\u2581") for piece in tiny.PIECES]
SIZE = len(PIECES)
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def added(content: str, id_: int, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    return {"id": id_, "content": content, **dict.fromkeys(FLAGS, False), **flags}


def decoder(*entries: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that lists added tokens."""
    return {"added_tokens_decoder": {str(entry["id"]): dict(entry) for entry in entries}}


def every_split(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Merges as transformers writes them for a SentencePiece model: by the piece they make."""
    known = set(pieces)
    splits = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p))]
    return [(one, other) for one, other in splits if one in known and other in known]


def tokenizer_json(
    *,
    more: Sequence[Mapping[str, Any]] = (),
    merges: Sequence[Any] | None = None,
    pieces: Sequence[str] = PIECES,
    normalizer: Any = REPLACE,
    pre_tokenizer: Any = SPLIT,
    **model: Any,
) -> dict[str, Any]:
    """As transformers writes it for Gemma: what SentencePiece finds in texts are added tokens."""
    special = [added(p, i, special=True) for i, p in enumerate(pieces[: len(tiny.CONTROL)])]
    defined = [p.replace("  ", "\u2581\u2581") for p in tiny.DEFINED]
    plain = [added(piece, pieces.index(piece)) for piece in defined if piece in pieces]
    if merges is None:
        # Scores of the tiny vocabulary, the best first; then what SentencePiece finds itself.
        merges = every_split(tiny.NORMAL)
        merges += [("\u2581", "\u2581"), ("\n", "\n")]
    known = {m["content"] for m in more}
    return {
        "version": "1.0",
        "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0}
        | {"direction": "Right"},
        "padding": None,
        "added_tokens": [*(e for e in [*special, *plain] if e["content"] not in known), *more],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: id_ for id_, piece in enumerate(pieces)},
            "merges": [list(merge) if isinstance(merge, tuple) else merge for merge in merges],
            **model,
        },
    }


def read(rows: int = SIZE + 100, **files: Any) -> Tokenizer:
    """The tokenizer of a folder with these files, and the tiny model unless there is a json."""
    if "json" not in files:
        files.setdefault("model", Tokenizer.from_gguf(tiny.vocabulary()).model_proto)
    return hugging_face.tokenizer(TokenizerFiles("folder", "folder/file", **files), rows)


class Reference:
    """The `tokenizers` library, as far as a text's ids are to be its own.

    Control pieces are text to it, `<unused0>` too, and U+2581 in a text is spelled in bytes.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        control = {*tiny.CONTROL, "<start_of_image>"}
        entries = [
            {**entry, "special": entry["special"] or entry["content"] in control}
            for entry in fields["added_tokens"]
        ]
        fields = {**fields, "added_tokens": entries, "truncation": None}
        self._library = tokenizers.Tokenizer.from_str(json.dumps(fields))
        self._library.encode_special_tokens = True

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(text.split("\u2581")):
            ids += [PIECES.index(f"<0x{byte:02X}>") for byte in "\u2581".encode()] if i else []
            ids += self._library.encode(part, add_special_tokens=False).ids
        return ids
