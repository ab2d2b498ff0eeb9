"""Checkpoint folders: what they hold, and what is not to be trusted in them."""

from __future__ import annotations

import collections
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_nb.checkpoints import kinds
from gemma_nb.errors import CheckpointError
from gemma_nb.text.files import TokenizerFiles

# Bytes of the files that are read whole: the index of the largest Gemma has 0.2 MB, Gemma 3's
# tokenizer.model 4.7 MB, its tokenizer.json 33 MB.
_MAX_JSON, _MAX_TOKENIZER = 1 << 24, 1 << 26
_MAX_DEPTH = 64  # of objects and lists in each other; configurations have some five levels
_TOKENIZER_JSON = "tokenizer.json"


def unreadable(what: object, error: OSError) -> CheckpointError:
    """The error to raise where the system does not let a file be read."""
    remedy = "check the disk it is on, or download the file again"
    if isinstance(error, PermissionError):
        remedy = "give yourself the right to read it (chmod u+r), or copy it to a folder of yours"
    return CheckpointError(f"cannot read {what}: {error.strerror or error}; {remedy}")


def member(folder: Path, name: str) -> Path:
    """The file `name` of a folder, which has to lie in it and to be a file.

    Symbolic links count as what they point at.  Those of the Hugging Face cache point from a
    snapshot into the same model's blobs, which is allowed.

    Raises:
      CheckpointError: there is no such file, it is somewhere else, or it is a pipe, a device or a
        folder, which could be read forever or not at all.
    """
    path = folder / name
    target = _inside(folder, path)
    if not regular(target):
        raise CheckpointError(
            f"{path} is {kind_of(target)}, expected a file; the checkpoint is damaged or has been "
            "tampered with: download it again"
        )
    return path


def _inside(folder: Path, path: Path) -> Path:
    """The file that `path` is or points at, in the same folder."""
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        why = kinds.unfinished(folder) or "the checkpoint is incomplete: download it again"
        raise CheckpointError(f"{path} is missing; {why}") from None
    except OSError as error:
        raise unreadable(path, error) from error
    except (RuntimeError, ValueError) as error:  # a link to itself; a name with a zero byte
        raise CheckpointError(f"cannot read {path}: {error}; download the file again") from error
    if not target.is_relative_to(_root(folder)):
        raise CheckpointError(
            f"{path} leads out of its folder, to {target}; put the file itself into {folder} if "
            "you trust it"
        )
    return target


def regular(path: Path) -> bool:
    """True where a path is a file with content: no pipe, device, socket or folder."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise unreadable(path, error) from error


def kind_of(path: Path) -> str:
    """The kind of something other than a file, for messages."""
    mode = path.stat().st_mode
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _root(folder: Path) -> Path:
    """The folder that the links of a checkpoint may point into."""
    above = folder.parent
    if above.name == "snapshots" and above.parent.name.startswith("models--"):
        return above.parent.resolve()
    return folder.resolve()


def check_members(folder: Path) -> None:
    """Refuse a folder that holds, at any depth, a link out of it, a pipe or a device."""

    def fail(error: OSError) -> None:
        raise unreadable(error.filename or folder, error) from error

    for at, below, files in os.walk(folder, onerror=fail):
        for name in below:
            if (path := Path(at, name)).is_symlink():
                _inside(folder, path)
        for name in files:
            member(folder, str(Path(at, name).relative_to(folder)))


def content(path: Path, most: int) -> bytes:
    """The bytes of a file, which has at most so many.

    Raises:
      CheckpointError: it cannot be read, or is larger.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) > most:
        raise CheckpointError(
            f"{path} has more than {most:,} bytes, which such a file never has; download it again"
        )
    return raw


def read_json(folder: Path, name: str, most: int = _MAX_JSON) -> dict[str, Any]:
    """A JSON object from a file of a folder.

    Raises:
      CheckpointError: missing, too large, no JSON object, or one that `parse_json` refuses.
    """
    path = member(folder, name)
    return parse_json(content(path, most), str(path))


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object that every reader understands alike, and that none runs out of its stack over.

    Args:
      raw: the text.
      what: it is, for messages.

    Raises:
      CheckpointError: no JSON object, one with a name twice, or one nested too deep.
    """
    remedy = "download the file again"
    try:
        value = json.loads(raw, object_pairs_hook=_once)
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        if found := kinds.of_bytes(raw[:4096], len(raw)):
            raise CheckpointError(f"{what} is not JSON: {found}") from error
        raise CheckpointError(f"{what} is not JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{what}: expected a JSON object, got {type(value).__name__}; {remedy}"
        )
    if len(value) <= 4:  # as many as a hub's answer has
        kinds.refuse_bytes(raw, what)
    return value


def _check_depth(value: Any) -> None:
    """Raise ValueError over what is nested deeper than any description of a model."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        parts = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for part in parts for x in part if isinstance(x, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers differ in which of two values under one name they take."""
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        [(twice, _)] = counts.most_common(1)
        raise ValueError(f"{twice!r:.80} is there twice")
    return value


def refuse_pickles(folder: Path) -> None:
    """Say why, where a folder holds its weights as pickles only."""
    for path in sorted(folder.iterdir()):
        if kinds.is_pickle_name(path.name):
            raise CheckpointError(f"{path}: {kinds.NO_PICKLES}")


def tokenizer_files(folder: Path) -> TokenizerFiles:
    """The tokenizer of a checkpoint: `tokenizer.model` or `tokenizer.json`, and what belongs to it.

    Any other name will do for a SentencePiece model if there is one of them.  It lies in the
    folder, or, as in the archives on Kaggle, beside it; of a step of a training also beside the
    step.

    Raises:
      CheckpointError: there is none, there are several, or one cannot be read.
    """
    for at, models in _models(folder):
        has_json = (at / _TOKENIZER_JSON).exists()
        if len(models) > 1:
            raise CheckpointError(
                f"{at} has several tokenizers, {', '.join(p.name for p in models)}; rename the "
                "right one to tokenizer.model"
            )
        if not models and not has_json:
            continue
        path = member(at, models[0].name) if models else None
        return TokenizerFiles(
            name=str(at),
            model_name=str(path or at / _TOKENIZER_JSON),
            model=_sentencepiece(path) if path else None,
            json=read_json(at, _TOKENIZER_JSON, _MAX_TOKENIZER) if has_json else None,
            config=_json_if_there(at, "tokenizer_config.json"),
            added=_json_if_there(at, "added_tokens.json"),
            special=_json_if_there(at, "special_tokens_map.json"),
        )
    raise CheckpointError(
        f"{folder} has neither tokenizer.model nor tokenizer.json; download one of them from where "
        "the checkpoint came from and put it into the folder"
    )


def _sentencepiece(path: Path) -> bytes:
    """The content of a tokenizer file; raises like `content`, and over what is none."""
    raw = content(path, _MAX_TOKENIZER)
    kinds.refuse_bytes(raw, path)
    return raw


def _json_if_there(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder, name) if (folder / name).exists() else {}


def text(folder: Path, name: str) -> str:
    """A text file of a folder, whatever its bytes are; raises like `content`."""
    return content(member(folder, name), _MAX_JSON).decode("utf-8", errors="replace")


def _models(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Folders where a tokenizer may lie, and the SentencePiece models there."""
    above = [folder, folder.parent]
    if re.fullmatch(r"(.+_)?\d+", folder.parent.name):  # an item of a step of a training
        above.append(folder.parents[1])
    for at in above:
        exact = at / "tokenizer.model"
        # Beside the folder, any other name could belong to anything.
        pattern = "*.model" if at == folder else "*token*.model"
        yield at, [exact] if exact.exists() else sorted(at.glob(pattern))


def looks_instruction_tuned(path: Path) -> bool:
    """True where a folder is named as instruction-tuned ("gemma3-1b-it", "2b_it")."""
    return any(re.search(r"[-_]it\b", part) for part in path.parts[-3:])
