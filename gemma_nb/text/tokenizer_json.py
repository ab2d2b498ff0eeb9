"""A `tokenizer.json` with byte-pair encoding, as a vocabulary that SentencePiece can use.

Where no scores of pieces give what its merges give (see `merges`), the `tokenizers` library, which
wrote the file, encodes texts instead.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from gemma_nb.errors import CheckpointError
from gemma_nb.text import merges as merging
from gemma_nb.text.added import SPACE, AddedToken
from gemma_nb.text.files import TokenizerFiles
from gemma_nb.text.tokenizer import Encoder
from gemma_nb.text.vocabulary import (
    BYTE,
    BYTE_PIECES,
    CONTROL,
    LAST,
    NORMAL,
    UNKNOWN,
    UNUSED,
    Vocabulary,
    is_template_only,
    row_name,
)

JSON = "tokenizer.json"
ROLES = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
# Stands for an image's place in the text; only the models that see images have a row for it.
IMAGE = "<image_soft_token>"
REMEDY = "use the tokenizer's files of this checkpoint, all from one place"


def is_bpe(fields: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    model = fields.get("model")
    return isinstance(model, Mapping) and (
        model.get("type") == "BPE" or ("type" not in model and "merges" in model)
    )


class Bpe:
    """A `tokenizer.json` with byte-pair encoding.

    Attributes:
      ids: piece -> id of the model's own vocabulary.
      merges: pairs of pieces, the first to be joined first.
      added: added tokens, with the ids that the `tokenizers` library gives them.
      size: one more than the largest id of the vocabulary.
    """

    def __init__(self, files: TokenizerFiles, rows: int) -> None:
        assert files.json is not None
        self._fields, self._name = files.json, files.name
        self._model = files.json["model"]
        self._check_kind()
        self.ids = self._read_ids()
        if self.ids.get(IMAGE, 0) >= rows:
            self.ids = {piece: id_ for piece, id_ in self.ids.items() if piece != IMAGE}
        self.size = max(self.ids.values()) + 1
        if self.size > rows:
            self._fail(f"{self.size:,} pieces in model.vocab, but the embedding has {rows:,} rows")
        self.merges = self._read_merges()
        self.added = self._read_added()

    def _fail(self, problem: str) -> NoReturn:
        fail(self._name, f"{JSON}: {problem}")

    def _check_kind(self) -> None:
        kinds = _kinds(self._fields.get("normalizer")) | _kinds(self._fields.get("pre_tokenizer"))
        if "ByteLevel" in kinds:
            self._fail("byte-level byte-pair encoding, GPT-2's kind, expected Gemma's with pieces")
        if not self._model.get("byte_fallback"):
            self._fail("model.byte_fallback is not set, without which not every text is encodable")
        for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if self._model.get(field):
                self._fail(f"model.{field} is {self._model[field]!r:.40}, which no Gemma has")

    def _read_ids(self) -> dict[str, int]:
        given = self._model.get("vocab")
        if not isinstance(given, dict) or not given:
            self._fail("model.vocab is missing or empty")
        if not all(type(id_) is int and 0 <= id_ < 1 << 24 for id_ in given.values()):
            self._fail("model.vocab: expected whole numbers from 0 as ids")
        if len(set(given.values())) != len(given):
            self._fail("model.vocab gives one id to two pieces")
        return given

    def _read_merges(self) -> list[tuple[str, str]]:
        given, ids, pairs = self._model.get("merges"), self.ids, []
        if not isinstance(given, list):
            self._fail("model.merges is missing")
        for merge in given:
            try:  # half a million: what is wrong is found out when something is
                one, other = merge.split(" ") if type(merge) is str else merge
                known = one in ids and other in ids and one + other in ids
            except (TypeError, ValueError):
                self._fail(f"model.merges: expected two pieces, got {merge!r:.80}")
            if not known:
                self._fail(f"model.merges: {merge!r:.80} has a piece that model.vocab lacks")
            pairs.append((one, other))
        return pairs

    def _read_added(self) -> list[AddedToken]:
        """The library numbers what the vocabulary lacks anew, whatever the file says."""
        entries = self._fields.get("added_tokens") or []
        tokens: dict[str, AddedToken] = {}
        following, other = self.size, []
        for entry in list_of_objects(entries, self._name, f"{JSON}: added_tokens"):
            token = added_token(entry, entry.get("id"), self._name, JSON)
            if token.content in tokens:
                continue
            id_ = self.ids.get(token.content, following)
            following += id_ == following
            if id_ != token.id:
                other.append(f"{token.content!r} {id_} for {token.id}")
            tokens[token.content] = dataclasses.replace(token, id=id_)
        if other:
            warnings.warn(
                f"{self._name}: {JSON} numbers added tokens otherwise than the tokenizers library "
                f"does, whose numbers are used: {', '.join(other[:3])}",
                stacklevel=7,
            )
        return sorted(tokens.values(), key=lambda token: token.id)

    def difference(self, base: Vocabulary, added: Sequence[AddedToken]) -> str:
        """Where the vocabulary and a SentencePiece model differ, in words; "" for nowhere."""
        named = {token.id for token in added}
        size = max(self.size, len(base.pieces))
        pieces: list[str | None] = [None] * size
        for piece, id_ in self.ids.items():
            pieces[id_] = piece
        for id_, (one, other) in enumerate(
            zip(pieces, [*base.pieces, *[None] * (size - len(base.pieces))], strict=True)
        ):
            # Gemma 1 has no piece for the tab, and transformers puts it where its byte is.
            same = one == other or id_ in named or (one, other) == ("\t", BYTE_PIECES[9])
            if not same:
                return f"token {id_} is {one!r} in {JSON} and {other!r} in tokenizer.model"
        return ""

    def vocabulary(
        self, added: Sequence[AddedToken], found: Sequence[AddedToken]
    ) -> tuple[Vocabulary, Encoder | None]:
        """As a SentencePiece model, and what to encode with if that model would differ.

        Args:
          added: every added token.
          found: those that the model has to find in texts.
        """
        base = self._typed()
        base.add(added, found=bool(found))
        fixed = {token.piece for token in found}
        typed = zip(base.pieces, base.types, strict=True)
        apart = {piece for piece, kind in typed if kind != NORMAL} | fixed
        # Where a token is found, what holds it is never met.
        rest = [piece for piece in self.ids if piece not in apart]
        unmet = merging.holding(rest, fixed)
        pieces = {piece: self.ids[piece] for piece in rest if piece not in unmet}
        scores = merging.scores(pieces, self.merges) if self._is_plain(base) else None
        whole = (
            self._model.get("ignore_merges") and scores is not None and len(scores) < len(pieces)
        )
        if scores is None or whole:
            return base, self._library(base)
        for piece, score in scores.items():
            base.scores[pieces[piece]] = score
        # What SentencePiece would take apart again must not become part of one that it would not.
        unused = UNUSED in base.types
        for piece in {*pieces} - {*scores} | unmet:
            base.scores[self.ids[piece]] = LAST
            if unused and len(piece) > 1:
                base.types[self.ids[piece]] = UNUSED
        return base, None

    def _typed(self) -> Vocabulary:
        pieces: list[str | None] = [None] * self.size
        for piece, id_ in self.ids.items():
            pieces[id_] = piece
        if "\t" in self.ids and BYTE_PIECES[9] not in self.ids:
            pieces[self.ids["\t"]] = BYTE_PIECES[9]
        bytes_, unknown = frozenset(BYTE_PIECES), self._model.get("unk_token") or "<unk>"
        types = [
            BYTE
            if piece in bytes_
            else UNKNOWN
            if piece == unknown
            else CONTROL
            if piece is None or is_template_only(piece)
            else NORMAL
            for piece in pieces
        ]
        if UNKNOWN not in types:
            self._fail(f"the unknown token {unknown!r:.40} is not in model.vocab")
        filled = [row_name(id_) if piece is None else piece for id_, piece in enumerate(pieces)]
        base = Vocabulary(filled, [0.0] * len(filled), types)
        for role, name in ROLES.items():
            base.set_role(role, name)
        return base

    def _is_plain(self, base: Vocabulary) -> bool:
        """Whether all that happens to a text, but for merges, is that spaces become U+2581."""
        normalizers, pre = _steps(self._fields.get("normalizer")), self._fields.get("pre_tokenizer")
        replaced = len(normalizers) == 1 and _is_space_replacement(normalizers[0])
        steps = _steps(pre)
        if not normalizers and len(steps) == 1 and steps[0].get("type") == "Metaspace":
            step = steps[0]
            scheme = step.get("prepend_scheme", "always")
            replaced = step.get("replacement") == SPACE and scheme == "never"
            # Added tokens are looked for before that, where spaces still are spaces.
            replaced &= all(
                t.is_plain and SPACE not in t.content for t in self.added if t.normalized
            )
            steps = [] if step.get("split") is False else steps
        # Once there is no space, splitting at spaces does nothing.
        rest = [s for s in steps if s.get("type") != "Split" or _pattern(s) != " "]
        bytes_ = frozenset(BYTE_PIECES)
        merged = any(a in bytes_ or b in bytes_ or a + b in bytes_ for a, b in self.merges)
        tab = base.types[self.ids["\t"]] == BYTE if "\t" in self.ids else False
        merged |= tab and any("\t" in pair for pair in self.merges)
        return replaced and not rest and not merged

    def _library(self, base: Vocabulary) -> Encoder:
        """The `tokenizers` library, which never gives a control piece for text."""
        if self._model.get("ignore_merges"):
            self._fail("model.ignore_merges with pieces that no merges make, which no Gemma has")
        typed = zip(base.pieces, base.types, strict=True)
        control = {piece for piece, kind in typed if kind in (CONTROL, UNKNOWN)}
        added = [
            {**entry, "special": entry.get("content") in control}
            for entry in self._fields.get("added_tokens") or []
        ]
        pairs = [[a, b] for a, b in self.merges if a + b not in control]
        fields = {
            **self._fields,
            "added_tokens": added,
            "model": {**self._model, "merges": pairs},
            **dict.fromkeys(("truncation", "padding", "post_processor")),
        }
        return LibraryEncoder(json.dumps(fields), self._name)


class LibraryEncoder:
    """Encodes text with the `tokenizers` library, by the content of a tokenizer.json.

    Raises:
      CheckpointError: the library is not installed, or does not take the file.
    """

    def __init__(self, content: str, name: str) -> None:
        self._content, self._name = content, name
        try:
            import tokenizers
        except ImportError:
            raise CheckpointError(
                f"{name}: {JSON} joins pieces in an order that a SentencePiece model cannot have; "
                "the tokenizers library can: pip install tokenizers, and load again"
            ) from None
        try:
            self._library = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # it raises nothing narrower
            fail(name, f"{JSON}: the tokenizers library does not take it ({error})")
        self._library.encode_special_tokens = True  # as text

    def __reduce__(self) -> tuple[type[LibraryEncoder], tuple[str, str]]:
        return LibraryEncoder, (self._content, self._name)

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text, none of them a control piece."""
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids


def _steps(step: Any) -> list[Mapping[str, Any]]:
    """What a normalizer or pre-tokenizer does, step by step."""
    if not isinstance(step, Mapping):
        return []
    if step.get("type") != "Sequence":
        return [step]
    parts = step.get("normalizers") or step.get("pretokenizers") or []
    return [inner for part in parts for inner in _steps(part)]


def _kinds(step: Any) -> set[Any]:
    return {part.get("type") for part in _steps(step)}


def _pattern(step: Mapping[str, Any]) -> Any:
    pattern = step.get("pattern")
    if isinstance(pattern, Mapping):
        return pattern.get("String", pattern.get("Regex"))
    return pattern


def _is_space_replacement(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Replace" and (_pattern(step), step.get("content")) == (" ", SPACE)


def added_token(entry: Any, id_: Any, name: str, file: str) -> AddedToken:
    """An added token from its entry in a file, checked."""
    content = entry.get("content") if isinstance(entry, Mapping) else None
    digits = isinstance(id_, str) and id_.isascii() and id_.isdigit() and len(id_) < 10
    if digits:
        id_ = int(id_)
    if not isinstance(content, str) or not content:
        fail(name, f"{file}: an added token without content: {entry!r:.80}")
    if isinstance(id_, bool) or not isinstance(id_, int) or not 0 <= id_ < 1 << 31:
        fail(name, f"{file}: {content!r:.80} has the id {id_!r:.40}, expected a whole number")
    flags = {
        flag: bool(entry.get(flag, False))
        for flag in ("special", "normalized", "lstrip", "rstrip", "single_word")
    }
    return AddedToken(content, id_, **flags)


def list_of_objects(value: Any, name: str, what: str) -> list[Mapping[str, Any]]:
    """A value that has to be a list of JSON objects."""
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        fail(name, f"{what}: expected a list of objects")
    return value


def fail(name: str, problem: str) -> NoReturn:
    """Raises what is wrong with the files of a folder."""
    raise CheckpointError(f"{name}: {problem}; {REMEDY}")
