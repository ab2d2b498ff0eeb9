"""Text to token ids and back: SentencePiece, also rebuilt from the vocabulary of a GGUF file.

Two things differ from calling SentencePiece directly, and both concern what a user may type:

- Pieces that belong to the chat template (`<start_of_turn>`, `<unused7>`, ...) are never produced
  from text.  In the official model some of them match text that looks like them; here they are
  control pieces, and text that looks like them becomes ordinary pieces.
- U+2581, which SentencePiece uses for the space, is spelled with its three UTF-8 byte pieces where
  it occurs in the text itself, so that every text survives the round trip.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import sentencepiece

from gemma_nb.errors import CheckpointError, TextError

# SentencePiece's piece types (sentencepiece_model.proto); GGUF uses the same numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "\u2581"
_SPACE_BYTES = ("<0xE2>", "<0x96>", "<0x81>")  # U+2581 in UTF-8

_TEMPLATE_ONLY = frozenset(
    {
        "<mask>",
        "[multimodal]",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    }
)
_UNUSED_NAME = re.compile(r"<unused\d+>")


class Tokenizer:
    """A Gemma tokenizer.

    Attributes:
      vocab_size: V, number of pieces.
      bos_id, eos_id, pad_id, unk_id: ids of `<bos>`, `<eos>`, `<pad>`, `<unk>`; -1 where the
        vocabulary has no such piece.
      control: piece -> id, for every piece that only a template may emit.
      model_proto: the SentencePiece model, as bytes of a .model file.
    """

    def __init__(self, proto: bytes, *, name: str = "tokenizer") -> None:
        self._sp = _processor(proto, name)
        if self._matches_template_pieces():
            proto = _with_control_pieces(proto)
            self._sp = _processor(proto, name)
        self.model_proto = proto
        self.vocab_size: int = self._sp.vocab_size()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        self.pad_id: int = self._sp.pad_id()
        self.unk_id: int = self._sp.unk_id()
        self._byte_ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._byte_of = {id_: byte for byte, id_ in enumerate(self._byte_ids)}
        self._space_ids = [self._sp.piece_to_id(piece) for piece in _SPACE_BYTES]
        self._check(name)

    @classmethod
    def from_bytes(cls, proto: bytes) -> Tokenizer:
        """From the bytes of a SentencePiece .model file.

        Raises:
          CheckpointError: not a SentencePiece model, or not of Gemma's kind.
        """
        return cls(proto)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From a SentencePiece .model file; raises like `from_bytes`."""
        try:
            proto = Path(path).read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        return cls(proto, name=str(path))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], name: str = "GGUF file") -> Tokenizer:
        """From the `tokenizer.ggml.*` fields of a GGUF file.

        Raises:
          CheckpointError: a field is missing, or they contradict each other.
        """
        return cls(_proto_from_gguf(metadata, name), name=name)

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.vocab_size:,} pieces>"

    @functools.cached_property
    def control(self) -> Mapping[str, int]:
        """Piece -> id, for every piece that only a template may emit."""
        flags = self._sp.is_control(list(range(self.vocab_size)))
        ids = [id_ for id_, flag in enumerate(flags) if flag]
        return MappingProxyType(dict(zip(self._sp.id_to_piece(ids), ids, strict=True)))

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of `text`, led by `<bos>` if asked; never any other control piece.

        Raises:
          TextError: `text` holds a lone surrogate, which is no character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextError(
                f"character {error.start} of the text is the lone surrogate "
                f"U+{ord(text[error.start]):04X}, which stands for no character and cannot be "
                "tokenized; remove it, or decode the bytes it came from as UTF-8"
            ) from None
        ids = [self.bos_id] if bos else []
        first, *rest = text.split(_SPACE)
        ids += self._sp.encode(first)
        for part in rest:
            ids += self._space_ids
            ids += self._sp.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`.  Control pieces give nothing, each byte of broken UTF-8 U+FFFD.

        Raises:
          TextError: an id outside the vocabulary.
        """
        return self._sp.decode(self._checked(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The SentencePiece pieces, as the vocabulary spells them ("\u2581The", "<0xE2>")."""
        return self._sp.id_to_piece(self._checked(ids))

    def token_text(self, token_id: int) -> str:
        """What a lone token stands for: " The", "\\n", "<0xE2>" (part of a character), "<bos>"."""
        piece: str = self.pieces([token_id])[0]
        return piece.replace(_SPACE, " ")

    def byte_value(self, token_id: int) -> int | None:
        """The byte that a byte piece stands for; None for any other piece."""
        return self._byte_of.get(token_id)

    def save_model(self, path: str | os.PathLike[str]) -> Path:
        """Writes a .model file that `sentencepiece` reads."""
        path = Path(path)
        path.write_bytes(self.model_proto)
        return path

    def _checked(self, ids: Iterable[int]) -> list[int]:
        checked = [int(id_) for id_ in ids]
        for id_ in checked:
            if not 0 <= id_ < self.vocab_size:
                raise TextError(
                    f"token id {id_} is not in the vocabulary; expected 0 to {self.vocab_size - 1}"
                )
        return checked

    def _matches_template_pieces(self) -> bool:
        """Whether text could be taken for a template's piece."""
        for name in (*_TEMPLATE_ONLY, "<unused0>", "<unused99>"):
            id_ = self._sp.piece_to_id(name)
            if id_ != self._sp.unk_id() and not self._sp.is_control(id_):
                return True
        return False

    def _check(self, name: str) -> None:
        if not all(self._sp.is_byte(self._byte_ids)):
            _fail(
                name, "lacks some of the 256 byte pieces, without which not every text is encodable"
            )
        sample = "  a "
        round_trip = self.decode(self.encode(sample)) == sample
        if not round_trip or self.pieces(self.encode("a"))[0].startswith(_SPACE):
            _fail(name, "adds or removes spaces")


def _fail(name: str, problem: str) -> NoReturn:
    raise CheckpointError(
        f"{name}: this is not a Gemma tokenizer: {problem}; use the tokenizer that came with the "
        "checkpoint"
    )


def _processor(proto: bytes, name: str) -> Any:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        if proto:  # of nothing it makes a processor that complains of every call
            return processor
        problem = "it is empty"
    except RuntimeError as error:
        problem = str(error)
    raise CheckpointError(
        f"{name}: not a usable SentencePiece model ({problem}); put the tokenizer.model of a Gemma "
        "checkpoint in its place: download the file again"
    )


def _is_template_only(piece: str) -> bool:
    return piece in _TEMPLATE_ONLY or _UNUSED_NAME.fullmatch(piece) is not None


def _pb2() -> Any:
    """The protobuf messages; imported late, since a converted checkpoint needs none of them."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def _with_control_pieces(proto: bytes) -> bytes:
    """The same model with the template's pieces typed as control."""
    model = _pb2().ModelProto.FromString(proto)
    for entry in model.pieces:
        if entry.type == _USER_DEFINED and _is_template_only(entry.piece):
            entry.type = _CONTROL
    return model.SerializeToString()


def _proto_from_gguf(metadata: Mapping[str, Any], name: str) -> bytes:
    """A SentencePiece model with the official settings: BPE, byte fallback, text left as it is."""
    pb2 = _pb2()
    pieces, scores, types = _gguf_vocabulary(metadata, name)
    special = {
        role: _special_id(metadata, f"tokenizer.ggml.{key}_token_id", len(pieces), name)
        for role, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    model = pb2.ModelProto()
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = pb2.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    for role, id_ in special.items():
        setattr(trainer, f"{role}_id", id_)
        setattr(trainer, f"{role}_piece", pieces[id_])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    types[special["unk"]] = _UNKNOWN  # llama.cpp's converter types it as control
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        if kind == _USER_DEFINED:
            # The converter turned U+2581 into spaces in these, and only in these.
            piece = piece.replace(" ", _SPACE)
            kind = _CONTROL if _is_template_only(piece) else kind
        model.pieces.add(piece=piece, score=score, type=kind)
    return model.SerializeToString()


def _gguf_vocabulary(
    metadata: Mapping[str, Any], name: str
) -> tuple[list[str], list[float], list[int]]:
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "llama":  # llama.cpp's name for SentencePiece BPE
        _gguf_fail(name, "model", f"expected 'llama' (SentencePiece), got {kind!r}")
    pieces = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(pieces, list) or not pieces:
        _gguf_fail(name, "tokens", "is missing or empty")
    columns = []
    for key in ("scores", "token_type"):
        column = metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(column, np.ndarray) or len(column) != len(pieces):
            got = "none" if column is None else f"{np.size(column):,}"
            _gguf_fail(name, key, f"expected {len(pieces):,} entries, one per token, got {got}")
        columns.append(column.tolist())
    scores, types = columns
    if not set(types) <= {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE}:
        _gguf_fail(name, "token_type", f"expected types 1 to 6, got {sorted(set(types))}")
    return pieces, scores, types


def _special_id(metadata: Mapping[str, Any], key: str, size: int, name: str) -> int:
    id_ = metadata.get(key)
    if not isinstance(id_, int) or not 0 <= id_ < size:
        _gguf_fail(
            name, key.removeprefix("tokenizer.ggml."), f"expected 0 to {size - 1}, got {id_!r}"
        )
    return id_


def _gguf_fail(name: str, field: str, problem: str) -> NoReturn:
    raise CheckpointError(
        f"{name}: metadata field 'tokenizer.ggml.{field}': {problem}; use a GGUF file of a Gemma "
        "model as converted by llama.cpp"
    )
