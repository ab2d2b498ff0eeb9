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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import sentencepiece

from gemma_nb.errors import CheckpointError, TextError
from gemma_nb.text.added import SPACE, Finder
from gemma_nb.text.vocabulary import (
    BYTE,
    BYTE_PIECES,
    CONTROL,
    NORMAL,
    TEMPLATE_ONLY,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    is_template_only,
    looks_like_control,
    messages,
)

_SPACE_BYTES = ("<0xE2>", "<0x96>", "<0x81>")  # U+2581 in UTF-8

# Token ids of a text without U+2581, none of them a control piece.
Encoder = Callable[[str], list[int]]


class Tokenizer:
    """A Gemma tokenizer.

    Attributes:
      vocab_size: V, number of pieces.
      bos_id, eos_id, pad_id, unk_id: ids of `<bos>`, `<eos>`, `<pad>`, `<unk>`; -1 where the
        vocabulary has no such piece.
      control: piece -> id, for every piece that only a template may emit.
      model_proto: the SentencePiece model, as bytes of a .model file.
    """

    def __init__(
        self,
        proto: bytes,
        *,
        name: str = "tokenizer",
        finder: Finder | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        """Of a SentencePiece model.

        Args:
          proto: the model.
          name: for messages.
          finder: of added tokens that the model cannot find itself.
          encoder: what encodes text in place of the model, which then is the vocabulary only.
        """
        self._sp = _processor(proto, name)
        if self._matches_template_pieces():
            proto = _with_control_pieces(proto)
            self._sp = _processor(proto, name)
        self._name, self._finder, self._encoder = name, finder, encoder
        self.model_proto = proto
        self.vocab_size: int = self._sp.vocab_size()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        self.pad_id: int = self._sp.pad_id()
        self.unk_id: int = self._sp.unk_id()
        self._byte_ids = [self._sp.piece_to_id(piece) for piece in BYTE_PIECES]
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

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy is made of; what was computed from it is computed again."""
        make = functools.partial(
            Tokenizer, name=self._name, finder=self._finder, encoder=self._encoder
        )
        return make, (self.model_proto,)

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
        first, *rest = text.split(SPACE)
        ids += self._encode(first)
        for part in rest:
            ids += self._space_ids
            ids += self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        """Of a text without U+2581."""
        encode: Encoder = self._encoder or self._sp.encode
        if self._finder is None:
            return encode(text)
        ids: list[int] = []
        for part in self._finder.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += encode(part)
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
        return piece.replace(SPACE, " ")

    def byte_value(self, token_id: int) -> int | None:
        """The byte that a byte piece stands for; None for any other piece."""
        return self._byte_of.get(token_id)

    def save_model(self, path: str | os.PathLike[str]) -> Path:
        """Writes a .model file that `sentencepiece` reads.

        Raises:
          CheckpointError: such a file cannot encode what this tokenizer encodes.
        """
        if self._finder is not None or self._encoder is not None:
            what = "the order of its merges" if self._encoder else "how its added tokens are found"
            raise CheckpointError(
                f"{self._name}: a SentencePiece model cannot hold {what}; copy the checkpoint's "
                "tokenizer.json instead"
            )
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
        for name in (*TEMPLATE_ONLY, "<unused0>", "<unused99>"):
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
        encode: Encoder = self._encoder or self._sp.encode
        round_trip = self.decode(encode(sample)) == sample
        if not round_trip or self.pieces(encode("a"))[0].startswith(SPACE):
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
    if proto.lstrip().startswith(b"{"):
        problem = "it is JSON; gnb.load reads a folder that has a tokenizer.json"
    raise CheckpointError(
        f"{name}: not a usable SentencePiece model ({problem}); put the tokenizer.model of a Gemma "
        "checkpoint in its place: download the file again"
    )


def _with_control_pieces(proto: bytes) -> bytes:
    """The same model with the template's pieces typed as control."""
    model = messages().ModelProto.FromString(proto)
    for entry in model.pieces:
        if entry.type in (NORMAL, USER_DEFINED, UNUSED) and is_template_only(entry.piece):
            entry.type = CONTROL
    proto = model.SerializeToString()
    return proto


def _proto_from_gguf(metadata: Mapping[str, Any], name: str) -> bytes:
    """A SentencePiece model with the official settings."""
    pieces, scores, types = _gguf_vocabulary(metadata, name)
    special = {
        role: _special_id(metadata, f"tokenizer.ggml.{key}_token_id", len(pieces), name)
        for role, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    for id_, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if kind == USER_DEFINED:
            # The converter turned U+2581 into spaces in these, and only in these.
            pieces[id_] = piece.replace(" ", SPACE)
        if kind in (NORMAL, USER_DEFINED, UNUSED) and looks_like_control(pieces[id_], kind):
            types[id_] = CONTROL
    types[special["unk"]] = UNKNOWN  # llama.cpp's converter types it as control
    vocabulary = Vocabulary(pieces, scores, types)
    for role, id_ in special.items():
        vocabulary.set_role(role, pieces[id_])
    return vocabulary.proto()


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
    if not set(types) <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}:
        _gguf_fail(name, "token_type", f"expected types 1 to 6, got {sorted(set(types))}")
    return list(pieces), scores, types


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
