"""Sources of a load: a released name, a file or a folder, and the format that it is in."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gemma_nb.cache import expanded
from gemma_nb.checkpoints import (
    adapters,
    folders,
    gguf_split,
    kinds,
    orbax_steps,
    orbax_tree,
    safetensors,
)
from gemma_nb.errors import CheckpointError
from gemma_nb.presets import ModelInfo

Format = Literal["GGUF", "Orbax", "Hugging Face"]

EXPECTED = (
    "a GGUF file, an official Orbax checkpoint folder, or a Hugging Face folder (config.json and "
    "*.safetensors)"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that exists.

    Attributes:
      name: for messages: the released name, or the path.
      format: how it is stored.
      files: the folder alone, or the GGUF files in order.
      sha256: what the files joined have to hash to, where their publisher says so.
      info: what is known about a released model.
    """

    name: str
    format: Format
    files: tuple[Path, ...]
    sha256: str | None = None
    info: ModelInfo | None = None


def resolve(
    source: str | os.PathLike[str], revision: str | None = None, step: int | None = None
) -> Source:
    """The checkpoint that is meant.

    Args:
      source: a released name, or a path.
      revision: of a released model at its hub.
      step: of a training, where `source` is what a `CheckpointManager` saves to.

    Raises:
      ModelNotInstalledError: a released model whose weights are not here.
      CheckpointError: there is nothing, or nothing that can be read.
      ValueError: a revision of something that has none.
    """
    path = expanded(source)
    if isinstance(source, str) and not _exists(path):
        from gemma_nb.checkpoints import spellings

        name, asked = spellings.released(source) or (source, None)
        if asked is not None and revision not in (None, asked):
            raise ValueError(
                f"expected revision=None or {asked!r} with {source!r}, got {revision!r}"
            )
        known = name != source or not _looks_like_path(source)
        if known or (spellings.looks_like_a_name(source) and not _exists(path.parent)):
            if step is not None:
                raise ValueError(f"expected step=None for a released name, got {step!r}")
            return _released(name, revision or asked)
    if revision is not None:
        raise ValueError(f"expected revision=None for a path, got {revision!r}: only hubs have any")
    return local(path, _step(step))


def _step(step: int | None) -> int | None:
    """A step as a plain number.

    Raises:
      ValueError: it is none.
    """
    with contextlib.suppress(TypeError):
        if step is None or (not isinstance(step, bool) and operator.index(step) >= 0):
            return step if step is None else operator.index(step)
    raise ValueError(f"expected the number of a step, from 0, as step, got {step!r:.60}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no name of a file, or in a folder that nobody may look into
        return False


def _looks_like_path(source: str) -> bool:
    suffix = source.endswith((".gguf", ".safetensors", ".ckpt", ".bin"))
    return suffix or "/" in source or os.sep in source or source in (".", "..")


def _released(name: str, revision: str | None) -> Source:
    from gemma_nb.checkpoints import catalog, hub

    hub.check_name(name)
    found = hub.locate(name, revision=revision)
    info = catalog.MODELS[name]
    if isinstance(found, Path):
        there = local(found)
        info = dataclasses.replace(info, source=str(found))
        return dataclasses.replace(there, name=f"{name} ({found})", info=info)
    parts, sha256 = found.locate()
    info = dataclasses.replace(info, source=f"package {found.pip_name}")
    return Source(name, "GGUF", tuple(parts), sha256, info)


def local(path: Path, step: int | None = None) -> Source:
    """A checkpoint on this machine, by what is there rather than by its name.

    Args:
      path: of a file or a folder.
      step: see `resolve`.

    Raises:
      CheckpointError: there is nothing, or nothing that can be read.
    """
    if path.is_dir():
        found = _folder(path, step)
        if step is not None and orbax_steps.step_of(found.files[0]) != step:
            raise ValueError(
                f"expected step=None, got {step}: {path} is no folder that a CheckpointManager "
                "saves steps to"
            )
        return found
    if not path.is_file():
        problem = f"is {folders.kind_of(path)}" if path.exists() else _missing(path)
        raise CheckpointError(
            f"{path}: {problem}; pass the path of {EXPECTED}, or a name from gnb.list_models()"
        )
    if path.suffix == ".gnb":
        raise CheckpointError(
            f"{path} is a conversation, not a model; load a model and pass it: "
            "gnb.ChatSession.load(path, model, tokenizer)"
        )
    adapters.refuse_file(path)
    kinds.refuse(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is one file of a Hugging Face checkpoint; pass the path of its folder, which "
            "has config.json and the tokenizer as well"
        )
    return Source(str(path), "GGUF", tuple(gguf_split.siblings(path)))


def _missing(path: Path) -> str:
    """That a file is not there, and what is beside it under a name much like it."""
    names = [other.name for other in _listed(path.parent)]
    near = difflib.get_close_matches(path.name, names, 1, 0.8)
    return "there is no such file" + (f", but {near[0]} beside it" if near else "")


def _folder(folder: Path, step: int | None) -> Source:
    name = str(folder)
    try:
        if orbax_tree.is_checkpoint(folder):
            return Source(name, "Orbax", (folder,))
        adapters.refuse(folder)
        if safetensors.is_folder(folder):
            return Source(name, "Hugging Face", (folder,))
        below = orbax_steps.find(folder, step)
        if below is not None:
            return Source(str(below), "Orbax", (below,))
        files = sorted(folder.glob("*.gguf"))
        if files and len(gguf_split.siblings(files[0])) == len(files):
            folders.member(folder, files[0].name)
            return Source(str(files[0]), "GGUF", tuple(gguf_split.siblings(files[0])))
        folders.refuse_pickles(folder)
    except OSError as error:
        raise folders.unreadable(folder, error) from error
    if files:
        raise CheckpointError(
            f"{folder} holds several models, {', '.join(f.name for f in files[:4])}; pass the path "
            "of one file"
        )
    raise CheckpointError(f"{folder} holds no checkpoint; {_where_then(folder)}")


def _where_then(folder: Path) -> str:
    """The place of the checkpoint that somebody may have meant, or what to pass."""
    for above in folder.absolute().parents[:2]:
        if orbax_tree.is_checkpoint(above) or (above / safetensors.CONFIG).is_file():
            return f"it is a part of the one in {above}: pass that path"
    below = sorted(_below(folder))
    if below:
        return f"pass the path of what is below it: {', '.join(map(str, below[:4]))}"
    for path in _listed(folder):
        if kinds.may_be_of_a_model(path.name) and (found := kinds.of_file(path)):
            return f"its file {path.name}: {found}"
    return f"pass the path of {EXPECTED}"


def _below(folder: Path) -> Iterator[Path]:
    """Checkpoints up to three folders further down, of the first thousand that are looked into."""
    level, left = [folder], 1000
    for _ in range(3):
        inside = (path for at in level for path in _listed(at))
        level = []
        for path in itertools.islice(inside, left):
            left -= 1
            if path.suffix == ".gguf" or (path.is_dir() and _is_one(path)):
                yield path
            elif path.is_dir() and not path.is_symlink():
                level.append(path)


def _is_one(folder: Path) -> bool:
    return orbax_tree.is_checkpoint(folder) or (folder / safetensors.CONFIG).is_file()


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
