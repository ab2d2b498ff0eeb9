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
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

from gemma_nb.errors import CheckpointError
from gemma_nb.text.added import AddedToken, Finder, in_one_pass
from gemma_nb.text.files import TokenizerFiles
from gemma_nb.text.tokenizer import Tokenizer
from gemma_nb.text.tokenizer_json import (
    IMAGE,
    JSON,
    REMEDY,
    ROLES,
    Bpe,
    added_token,
    fail,
    is_bpe,
    list_of_objects,
)
from gemma_nb.text.vocabulary import Vocabulary, is_template_only

CONFIG, ADDED, MAP = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
_SPECIAL = (*ROLES, "sep", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


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
    bpe = Bpe(files, rows) if files.json is not None and is_bpe(files.json) else None
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


def _added(files: TokenizerFiles, base: Vocabulary | None, bpe: Bpe | None) -> list[AddedToken]:
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
                f"{file}; {REMEDY}"
            )
        found.setdefault(token.id, (token, file))
        where.setdefault(token.content, (token.id, file))

    if bpe is not None:
        for token in bpe.added:
            put(token, JSON)
    else:
        entries = (files.json or {}).get("added_tokens") or []
        for entry in list_of_objects(entries, files.name, f"{JSON}: added_tokens"):
            put(added_token(entry, entry.get("id"), files.name, JSON), JSON)
    decoder = files.config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        fail(files.name, f"{CONFIG}: expected added_tokens_decoder to be an object")
    for id_, entry in decoder.items():
        put(added_token(entry, id_, files.name, CONFIG), CONFIG)
    special = set(_special_names(files))
    for content, id_ in files.added.items():
        token = added_token({"content": content}, id_, files.name, ADDED)
        if token.id not in found or found[token.id][0].content != content:
            put(dataclasses.replace(token, special=content in special), ADDED)
    known = {**(base.ids if base else {}), **(bpe.ids if bpe else {})}
    for content, (id_, file) in where.items():
        if known.get(content, id_) != id_:
            raise CheckpointError(
                f"{files.name}: {content!r} is token {id_} in {file} and {known[content]} in the "
                f"vocabulary; {REMEDY}"
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
        f"{REMEDY}"
    )


def _special_names(files: TokenizerFiles) -> list[str]:
    """Contents that the files name as special tokens, whatever for."""
    names: dict[str, None] = {}
    for fields in (files.config, files.special):
        values: list[Any] = [fields.get(f"{role}_token") for role in (*ROLES, "sep", "cls", "mask")]
        for key in _LISTS:
            given = fields.get(key) or []
            if not isinstance(given, list | Mapping):
                fail(files.name, f"expected {key} to be a list or an object")
            values += list(given.values() if isinstance(given, Mapping) else given)
        names |= dict.fromkeys(filter(None, map(_content, values)))
    return list(names)


def _content(value: Any) -> str:
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else ""


def _set_roles(base: Vocabulary, files: TokenizerFiles) -> bool:
    """Which piece is `<bos>`, `<eos>` and `<pad>`, by the files; whether that is another one."""
    changed = False
    for role in ROLES:
        names = [_content(fields.get(f"{role}_token")) for fields in (files.config, files.special)]
        name = next(filter(None, names), "")
        if name and name != base.roles.get(role) and base.set_role(role, name):
            changed = True
    return changed


def _with_rows(
    added: list[AddedToken], base: Vocabulary | None, bpe: Bpe | None, rows: int, name: str
) -> list[AddedToken]:
    """Those that the embedding has a row for."""
    if added and added[-1].content == IMAGE:
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


def _refuse_kind(files: TokenizerFiles) -> NoReturn:
    model = (files.json or {}).get("model")
    kind = model.get("type") if isinstance(model, Mapping) else None
    fail(files.name, f"{JSON}: a tokenizer of the kind {kind!r:.40}, expected 'BPE'")
