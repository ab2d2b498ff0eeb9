"""What a user points at: a released name, a file or a folder, and which format it is in."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

from gemma_nb.cache import expanded
from gemma_nb.checkpoints import folders, gguf_split, orbax, safetensors
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


def resolve(source: str | os.PathLike[str], revision: str | None = None) -> Source:
    """The checkpoint that is meant.

    Raises:
      ModelNotInstalledError: a released model whose weights are not here.
      CheckpointError: there is nothing, or nothing that can be read.
      ValueError: a revision of something that has none.
    """
    path = expanded(source)
    if isinstance(source, str) and not _looks_like_path(source) and not _exists(path):
        return _released(source, revision)
    if revision is not None:
        raise ValueError(f"expected revision=None for a path, got {revision!r}: only hubs have any")
    return local(path)


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


def local(path: Path) -> Source:
    """A checkpoint on this machine, by what is there rather than by its name.

    Raises:
      CheckpointError: there is nothing, or nothing that can be read.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        problem = f"is {folders.kind_of(path)}" if path.exists() else "there is no such file"
        raise CheckpointError(
            f"{path}: {problem}; pass the path of {EXPECTED}, or a name from gnb.list_models()"
        )
    folders.refuse_pickle(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is one file of a Hugging Face checkpoint; pass the path of its folder, which "
            "has config.json and tokenizer.model as well"
        )
    return Source(str(path), "GGUF", tuple(gguf_split.siblings(path)))


def _folder(folder: Path) -> Source:
    name = str(folder)
    try:
        if orbax.is_checkpoint(folder):
            return Source(name, "Orbax", (folder,))
        if safetensors.is_folder(folder):
            return Source(name, "Hugging Face", (folder,))
        below = orbax.find(folder)
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
    raise CheckpointError(f"{folder} holds no checkpoint; pass the path of {EXPECTED}")
