"""Tokenizers as Hugging Face folders hold them: `tokenizer.json`, `tokenizer.model`, added tokens.

What text is encoded with is a SentencePiece model wherever one gives the ids of the `tokenizers`
library (see `merges`), and that library otherwise.  Tokens that were added are control pieces where
a file calls them special, and text where none does:

    tokenizer.json           added_tokens, with ids and flags
    tokenizer_config.json    added_tokens_decoder, the same by id; names of <bos>, <eos>, <pad>
    added_tokens.json        ids by content
    special_tokens_map.json  names of special tokens, without ids
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from gemma_nb.checkpoints.folders import TokenizerFiles
from gemma_nb.errors import CheckpointError
from gemma_nb.text import merges as merging
from gemma_nb.text.added import SPACE, AddedToken, Finder, in_one_pass
from gemma_nb.text.tokenizer import Encoder, Tokenizer
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

JSON, CONFIG, ADDED, MAP = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
_ROLES = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
_SPECIAL = (*_ROLES, "sep", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Stands for an image's place in the text; only the models that see images have a row for it.
_IMAGE = "<image_soft_token>"
_REMEDY = "use the tokenizer's files of this checkpoint, all from one place"


def tokenizer(files: TokenizerFiles, rows: int) -> Tokenizer:
    """The tokenizer of a folder.

    Args:
      files: see `TokenizerFiles`.
      rows: of the embedding; tokens beyond them are left out, with a warning.

    Raises:
      CheckpointError: the files contradict each other, or hold a tokenizer of another kind.
    """
    about = (files.json, files.config, files.added, files.special)
    if files.model is not None and not any(about):
        return Tokenizer(files.model, name=files.model_name)
    bpe = _Bpe(files, rows) if files.json is not None and _is_bpe(files.json) else None
    if files.model is None and bpe is None:
        _refuse_kind(files)
    base = Vocabulary.from_model(files.model, files.model_name) if files.model is not None else None
    added = _with_rows(_added(files, base, bpe), base, bpe, rows, files.name)
    if base is not None and bpe is not None and (odd := bpe.difference(base, added)):
        warnings.warn(
            f"{files.name}: {odd}; {JSON} is used, as transformers does: remove the file that is "
            "not this checkpoint's",
            stacklevel=6,
        )
        base = None
    found = [token for token in added if token.is_found and not is_template_only(token.content)]
    ids = base.ids if base is not None else bpe.ids if bpe else {}
    clash = any(ids.get(t.piece, t.id) != t.id for t in found)
    finder = None
    if clash or not in_one_pass(found):
        named = {token.content for token in added}
        own = base.defined() if base is not None else []
        finder = Finder([*found, *(token for token in own if token.content not in named)])
    if base is not None:
        changed = base.add(added, found=finder is None)
        if not (_set_roles(base, files) or changed or finder):
            return Tokenizer(files.model or b"", name=files.model_name)
        return Tokenizer(base.proto(), name=files.model_name, finder=finder)
    assert bpe is not None
    base, library = bpe.vocabulary(added, found if finder is None else [])
    _set_roles(base, files)
    return Tokenizer(
        base.proto(), name=files.name, finder=None if library else finder, encoder=library
    )


# --- tokens that were added -----------------------------------------------------------------------


def _added(files: TokenizerFiles, base: Vocabulary | None, bpe: _Bpe | None) -> list[AddedToken]:
    """Every added token that a file names, in the order of ids."""
    found: dict[int, tuple[AddedToken, str]] = {}
    where: dict[str, tuple[int, str]] = {}

    def put(token: AddedToken, file: str) -> None:
        other, other_file = found.get(token.id, (token, file))
        if other.content != token.content:
            _contradiction(files, token.id, other.content, other_file, token.content, file)
        id_, id_file = where.get(token.content, (token.id, file))
        if id_ != token.id:
            raise CheckpointError(
                f"{files.name}: {token.content!r} is token {id_} in {id_file} and {token.id} in "
                f"{file}; {_REMEDY}"
            )
        found.setdefault(token.id, (token, file))
        where.setdefault(token.content, (token.id, file))

    if bpe is not None:
        for token in bpe.added:
            put(token, JSON)
    else:
        entries = (files.json or {}).get("added_tokens") or []
        for entry in _list_of_objects(entries, files.name, f"{JSON}: added_tokens"):
            put(_token(entry, entry.get("id"), files.name, JSON), JSON)
    decoder = files.config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        _fail(files.name, f"{CONFIG}: expected added_tokens_decoder to be an object")
    for id_, entry in decoder.items():
        put(_token(entry, id_, files.name, CONFIG), CONFIG)
    special = set(_special_names(files))
    for content, id_ in files.added.items():
        token = _token({"content": content}, id_, files.name, ADDED)
        if token.id not in found or found[token.id][0].content != content:
            put(dataclasses.replace(token, special=content in special), ADDED)
    known = {**(base.ids if base else {}), **(bpe.ids if bpe else {})}
    for content, (id_, file) in where.items():
        if known.get(content, id_) != id_:
            raise CheckpointError(
                f"{files.name}: {content!r} is token {id_} in {file} and {known[content]} in the "
                f"vocabulary; {_REMEDY}"
            )
    following = max((*known.values(), *found), default=-1) + 1
    for content in _special_names(files):
        if content not in where and content not in known:  # as transformers does: put behind
            put(AddedToken(content, following, special=True), MAP)
            following += 1
    return [found[id_][0] for id_ in sorted(found)]


def _contradiction(
    files: TokenizerFiles, id_: int, one: str, one_file: str, other: str, other_file: str
) -> NoReturn:
    raise CheckpointError(
        f"{files.name}: token {id_} is {one!r} in {one_file} and {other!r} in {other_file}; "
        f"{_REMEDY}"
    )


def _token(entry: Any, id_: Any, name: str, file: str) -> AddedToken:
    content = entry.get("content") if isinstance(entry, Mapping) else None
    digits = isinstance(id_, str) and id_.isascii() and id_.isdigit() and len(id_) < 10
    if digits:
        id_ = int(id_)
    if not isinstance(content, str) or not content:
        _fail(name, f"{file}: an added token without content: {entry!r:.80}")
    if isinstance(id_, bool) or not isinstance(id_, int) or not 0 <= id_ < 1 << 31:
        _fail(name, f"{file}: {content!r:.80} has the id {id_!r:.40}, expected a whole number")
    flags = {
        flag: bool(entry.get(flag, False))
        for flag in ("special", "normalized", "lstrip", "rstrip", "single_word")
    }
    return AddedToken(content, id_, **flags)


def _special_names(files: TokenizerFiles) -> list[str]:
    """Contents that the files name as special tokens, whatever for."""
    names: dict[str, None] = {}
    for fields in (files.config, files.special):
        values: list[Any] = [
            fields.get(f"{role}_token") for role in (*_ROLES, "sep", "cls", "mask")
        ]
        for key in _LISTS:
            given = fields.get(key) or []
            if not isinstance(given, list | Mapping):
                _fail(files.name, f"expected {key} to be a list or an object")
            values += list(given.values() if isinstance(given, Mapping) else given)
        names |= dict.fromkeys(filter(None, map(_content, values)))
    return list(names)


def _content(value: Any) -> str:
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else ""


def _set_roles(base: Vocabulary, files: TokenizerFiles) -> bool:
    """Which piece is `<bos>`, `<eos>` and `<pad>`, by the files; whether that is another one."""
    changed = False
    for role in _ROLES:
        names = [_content(fields.get(f"{role}_token")) for fields in (files.config, files.special)]
        name = next(filter(None, names), "")
        if name and name != base.roles.get(role) and base.set_role(role, name):
            changed = True
    return changed


def _with_rows(
    added: list[AddedToken], base: Vocabulary | None, bpe: _Bpe | None, rows: int, name: str
) -> list[AddedToken]:
    """Those that the embedding has a row for."""
    if added and added[-1].content == _IMAGE:
        size = max(len(base.pieces) if base else 0, bpe.size if bpe else 0)
        added = added[:-1] if added[-1].id >= size else added
    beyond = [token.content for token in added if token.id >= rows]
    if beyond:
        more = ", ..." if len(beyond) > 3 else ""
        warnings.warn(
            f"{name}: the embedding has {rows:,} rows and none for {len(beyond)} added tokens, "
            f"{', '.join(map(repr, beyond[:3]))}{more}: they are left out; if the model was "
            "trained with them, its embedding was not saved with them",
            stacklevel=7,
        )
    return [token for token in added if token.id < rows]


# --- tokenizer.json -------------------------------------------------------------------------------


def _is_bpe(fields: Mapping[str, Any]) -> bool:
    model = fields.get("model")
    return isinstance(model, Mapping) and (
        model.get("type") == "BPE" or ("type" not in model and "merges" in model)
    )


def _refuse_kind(files: TokenizerFiles) -> NoReturn:
    model = (files.json or {}).get("model")
    kind = model.get("type") if isinstance(model, Mapping) else None
    _fail(files.name, f"{JSON}: a tokenizer of the kind {kind!r:.40}, expected 'BPE'")


class _Bpe:
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
        if self.ids.get(_IMAGE, 0) >= rows:
            self.ids = {piece: id_ for piece, id_ in self.ids.items() if piece != _IMAGE}
        self.size = max(self.ids.values()) + 1
        if self.size > rows:
            self._fail(f"{self.size:,} pieces in model.vocab, but the embedding has {rows:,} rows")
        self.merges = self._read_merges()
        self.added = self._read_added()

    def _fail(self, problem: str) -> NoReturn:
        _fail(self._name, f"{JSON}: {problem}")

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
        for entry in _list_of_objects(entries, self._name, f"{JSON}: added_tokens"):
            token = _token(entry, entry.get("id"), self._name, JSON)
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
        for role, name in _ROLES.items():
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
        control = {p for p, kind in zip(base.pieces, base.types, strict=True) if kind == CONTROL}
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
            _fail(name, f"{JSON}: the tokenizers library does not take it ({error})")
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


def _list_of_objects(value: Any, name: str, what: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        _fail(name, f"{what}: expected a list of objects")
    return value


def _fail(name: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{name}: {problem}; {_REMEDY}")
