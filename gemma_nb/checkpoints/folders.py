"""Checkpoint folders: what they hold, and what is not to be trusted in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_nb.errors import CheckpointError

_MAX_JSON = 1 << 26  # bytes; the index of the largest Gemma has 0.2 MB

# Files that only `pickle` can read, and pickle runs whatever code a file tells it to.
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_PICKLE_STARTS = (b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")
NO_PICKLES = (
    "a pickle file can run any code when it is opened, so gemma_nb never opens one; get the "
    "*.safetensors files of the same checkpoint, or convert it with transformers where you trust "
    "it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
)


def member(folder: Path, name: str) -> Path:
    """The file `name` of a folder, which has to lie in it.

    Symbolic links count as what they point at.  Those of the Hugging Face cache point from a
    snapshot into the same model's blobs, which is allowed.

    Raises:
      CheckpointError: there is no such file, or it is somewhere else.
    """
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; the checkpoint is incomplete: download it again"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not target.is_relative_to(_root(folder)):
        raise CheckpointError(
            f"{path} leads out of its folder, to {target}; put the file itself into {folder} if "
            "you trust it"
        )
    return path


def _root(folder: Path) -> Path:
    """What the links of a checkpoint may point into."""
    above = folder.parent
    if above.name == "snapshots" and above.parent.name.startswith("models--"):
        return above.parent.resolve()
    return folder.resolve()


def check_links(folder: Path) -> None:
    """Refuses a folder with a symbolic link, at any depth, that leads out of it."""
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(at, name)
            if path.is_symlink():
                member(folder, str(path.relative_to(folder)))


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of a folder.

    Raises:
      CheckpointError: missing, too large, or no JSON object.
    """
    path = member(folder, name)
    remedy = "download the file again"
    try:
        if (size := path.stat().st_size) > _MAX_JSON:
            raise CheckpointError(f"{path} has {size:,} bytes, expected at most {_MAX_JSON:,}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(value).__name__}; {remedy}"
        )
    return value


def refuse_pickles(folder: Path) -> None:
    """Says why, where a folder holds its weights as pickles only."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _PICKLES:
            raise CheckpointError(f"{path}: {NO_PICKLES}")


def refuse_pickle(path: Path) -> None:
    """The same for one file, by its name and by its first bytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if path.suffix in _PICKLES or start.startswith(_PICKLE_STARTS):
        raise CheckpointError(f"{path}: {NO_PICKLES}")


def tokenizer_model(folder: Path) -> Path:
    """The tokenizer file of a checkpoint: `tokenizer.model` or the one other SentencePiece model.

    It lies in the folder, or, as in the archives on Kaggle, beside it.

    Raises:
      CheckpointError: there is none, or there are several.
    """
    found = next((models for models in _models(folder) if models), None)
    if found is None:
        hint = ""
        if (folder / "tokenizer.json").exists():
            hint = " (tokenizer.json is another format, which gemma_nb does not read)"
        raise CheckpointError(
            f"{folder} has no tokenizer.model{hint}; download that file from where the checkpoint "
            "came from and put it into the folder"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{found[0].parent} has several tokenizers, {', '.join(p.name for p in found)}; rename "
            "the right one to tokenizer.model"
        )
    return member(found[0].parent, found[0].name)


def _models(folder: Path) -> Iterator[list[Path]]:
    for at in (folder, folder.parent):
        exact = at / "tokenizer.model"
        # Beside the folder, any other name could belong to anything.
        pattern = "*.model" if at == folder else "*token*.model"
        yield [exact] if exact.exists() else sorted(at.glob(pattern))


def looks_instruction_tuned(path: Path) -> bool:
    """Whether a folder is named like an instruction-tuned checkpoint ("gemma3-1b-it", "2b_it")."""
    return any(re.search(r"[-_]it\b", part) for part in path.parts[-3:])
