"""The pieces of a vocabulary, their scores and types, and the SentencePiece model made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from gemma_nb.errors import CheckpointError
from gemma_nb.text.added import AddedToken

# SentencePiece's piece types (sentencepiece_model.proto); GGUF uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

LAST = -1e9  # a score below all

BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))

TEMPLATE_ONLY = frozenset(
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

# What llama.cpp's loader takes for ends of a text or a turn, or for marks of code to be filled in,
# whatever a file says their type is.  Without "</s>", which is a tag of HTML in Gemma.
_LLAMA_CPP_CONTROL = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>"),
        *("<|calls|>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
        *("<|end_of_text|>", "<end_of_utterance>", "<turn|>", "<|tool_response>", "[e~["),
        *("<｜end▁of▁sentence｜>", "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>"),
        *("<｜fim▁begin｜>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>"),
        *("<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|suffix|>"),
        *("<|code_suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>"),
        *("<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>"),
        *("<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
        *("<REPO>", "<reponame>", "<|file_sep|>"),
    }
)
_ROLE_NAMES = frozenset({"<bos>", "<eos>", "<pad>"})
_MARK = re.compile(r"<\|[^|]+\|>|<｜[^｜]+｜>")


def is_template_only(piece: str) -> bool:
    """Whether a piece belongs to Gemma's chat template, or is held back for such use."""
    return piece in TEMPLATE_ONLY or _UNUSED_NAME.fullmatch(piece) is not None


def looks_like_control(piece: str, kind: int) -> bool:
    """Whether a piece of a GGUF file is a control piece whatever the file says.

    Converters before llama.cpp's of 2024 typed Gemma's turns as text; its loader corrects that.
    """
    if is_template_only(piece) or piece in _ROLE_NAMES or piece in _LLAMA_CPP_CONTROL:
        return True
    return kind == NORMAL and _MARK.fullmatch(piece) is not None


def row_name(id_: int) -> str:
    """Stands for a row that no token is known for."""
    return f"<row {id_}>"


def messages() -> Any:
    """The protobuf messages; imported late, since a converted checkpoint needs none of them."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


class Vocabulary:
    """Pieces by id.

    Attributes:
      pieces: as SentencePiece spells them.
      scores: of neighbours, those whose joint piece has the highest are joined first.
      types: NORMAL, CONTROL, ...
      ids: piece -> id.
      roles: "unk", "bos", "eos", "pad" -> piece.
    """

    def __init__(
        self, pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
    ) -> None:
        self.pieces, self.scores, self.types = list(pieces), list(scores), list(types)
        self.roles: dict[str, str] = {}
        self.ids = {piece: id_ for id_, piece in enumerate(self.pieces)}
        self._model: Any = None  # whose other settings are taken over

    @classmethod
    def from_model(cls, proto: bytes, name: str) -> Vocabulary:
        """Of a SentencePiece model.

        Raises:
          CheckpointError: not a SentencePiece model.
        """
        try:
            model = messages().ModelProto.FromString(proto)
        except Exception as error:  # protobuf's own kind of errors
            raise CheckpointError(
                f"{name}: not a usable SentencePiece model ({error}); download the file again"
            ) from error
        found = cls(
            [entry.piece for entry in model.pieces],
            [entry.score for entry in model.pieces],
            [entry.type for entry in model.pieces],
        )
        spec = model.trainer_spec
        found.roles = {
            role: getattr(spec, f"{role}_piece") for role in ("unk", "bos", "eos", "pad")
        }
        found._model = model
        return found

    def proto(self) -> bytes:
        """The SentencePiece model; with the official settings, unless it was made from one.

        They are BPE, byte fallback, and text left as it is.
        """
        pb2 = messages()
        model = pb2.ModelProto()
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        trainer.model_type = pb2.TrainerSpec.BPE
        trainer.byte_fallback = True
        normalizer.name = "identity"
        normalizer.add_dummy_prefix = False
        normalizer.remove_extra_whitespaces = False
        normalizer.escape_whitespaces = True
        if self._model is not None:
            trainer.CopyFrom(self._model.trainer_spec)
            normalizer.CopyFrom(self._model.normalizer_spec)
        trainer.vocab_size = len(self.pieces)
        for role, piece in self.roles.items():
            setattr(trainer, f"{role}_id", self.ids.get(piece, -1))
            setattr(trainer, f"{role}_piece", piece)
        for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True):
            model.pieces.add(piece=piece, score=score, type=kind)
        return model.SerializeToString()

    def set_role(self, role: str, piece: str) -> bool:
        """Makes a piece the "bos", "eos", "pad" or "unk"; False if the vocabulary lacks it."""
        id_ = self.ids.get(piece)
        if id_ is None:
            return False
        self.roles[role] = piece
        if self.types[id_] in (NORMAL, USER_DEFINED, UNUSED):
            self.types[id_] = CONTROL
        return True

    def add(self, tokens: Iterable[AddedToken], *, found: bool) -> bool:
        """Takes over tokens that were added, by ascending id; whether anything changed.

        Args:
          tokens: new ones, other names for old ones, or old ones that are not of their old type.
          found: the model finds those that texts can hold; False if they are found before it.
        """
        changed = False
        for token in tokens:
            while len(self.pieces) < token.id:  # no token is known for these
                self._put(len(self.pieces), row_name(len(self.pieces)), CONTROL)
            old = self.pieces[token.id] if token.id < len(self.pieces) else None
            same = old in (token.piece, token.content)
            if not same and token.content == "\t" and old == BYTE_PIECES[9]:
                continue  # as transformers has Gemma 1, where the tab is spelled by its byte
            before = self.types[token.id] if same else None
            kind = self._kind(token, before, found)
            if old is None or not same:
                self._put(token.id, token.content if self.clashes(token) else token.piece, kind)
                changed = True
            elif kind != before:
                self.types[token.id], changed = kind, True
        return changed

    def defined(self) -> list[AddedToken]:
        """The pieces that SentencePiece finds in texts, as if they had been added."""
        rows = enumerate(zip(self.pieces, self.types, strict=True))
        tokens = [AddedToken(piece, id_) for id_, (piece, kind) in rows if kind == USER_DEFINED]
        return [t for t in tokens if t.is_found and not is_template_only(t.content)]

    def clashes(self, token: AddedToken) -> bool:
        """Whether a new token, " the", would have the piece of an old one, "\u2581the".

        It is kept with its spaces then, as which SentencePiece never finds it.
        """
        return self.ids.get(token.piece, token.id) != token.id and token.piece != token.content

    def _kind(self, token: AddedToken, before: int | None, found: bool) -> int:
        if before in (CONTROL, UNKNOWN, BYTE):
            return before
        if token.special or is_template_only(token.content):
            return CONTROL
        if token.is_found and found:
            return USER_DEFINED
        # Of a new one, SentencePiece shall not make it of its parts.
        return UNUSED if before is None else before

    def _put(self, id_: int, piece: str, kind: int) -> None:
        if self.ids.get(piece, id_) != id_:
            raise CheckpointError(
                f"{piece!r} is token {self.ids[piece]} of the vocabulary and was added as token "
                f"{id_}; use the tokenizer's files of this checkpoint, all from one place"
            )
        if id_ == len(self.pieces):
            self.pieces.append(piece)
            # What SentencePiece makes of its parts only to take it apart again, it shall make last.
            self.scores.append(LAST if kind == UNUSED else 0.0)
            self.types.append(kind)
        else:
            self.ids.pop(self.pieces[id_], None)
            self.pieces[id_], self.types[id_] = piece, kind
        self.ids[piece] = id_
