"""Files of an Orbax checkpoint that list its parameters, read without the library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_nb.checkpoints import folders, layout
from gemma_nb.errors import CheckpointError

STRUCTURE, _ABOUT = "_METADATA", "_CHECKPOINT_METADATA"
OURS = "gemma_nb"  # our entry in the checkpoint's custom metadata
REMEDY = "the checkpoint is incomplete or damaged: download it again"

_MAX_ARRAYS = 1 << 14  # a training state of the largest Gemma has some 3,000
_OF_OPTIMIZERS = frozenset({"opt_state", "optimizer", "optimizer_state", "mu", "nu", "grads"})


def is_checkpoint(folder: Path) -> bool:
    """True where a folder is one Orbax checkpoint."""
    names = (STRUCTURE, "manifest.ocdbt", "checkpoint")
    return any((folder / name).is_file() for name in names)


def is_listed(folder: Path) -> bool:
    """True where a checkpoint has the file that lists its parameters."""
    return (folder / STRUCTURE).exists()


def lists_a_model(folder: Path) -> bool:
    """True where a checkpoint has the embedding of a model among its parameters."""
    try:
        structure = folders.read_json(folder, STRUCTURE) if is_listed(folder) else {}
        stored = list(_stored_keys(structure, str(folder)))
    except CheckpointError:
        return False
    return any(layout.split(keys)[-2:] == layout.EMBEDDING for keys in stored)


def custom_metadata(folder: Path) -> dict[str, Any]:
    """The metadata that `save_params` stored beside the arrays; empty for others' checkpoints."""
    if not (folder / _ABOUT).exists():
        return {}
    custom = folders.read_json(folder, _ABOUT).get("custom_metadata")
    ours = custom.get(OURS) if isinstance(custom, dict) else None
    return ours if isinstance(ours, dict) else {}


def parameter_keys(structure: Mapping[str, Any], name: str) -> dict[layout.Path, tuple[str, ...]]:
    """Official path -> keys in the checkpoint, of the text model's parameters.

    Names are checked here, before any becomes the name of a file.
    """
    found: dict[layout.Path, tuple[str, ...]] = {}
    stored = list(_stored_keys(structure, name))
    around = _around_the_model(stored, name)
    for keys in stored:
        whole = layout.split(keys)
        if whole[: len(around)] != around and not any("lora" in part for part in whole):
            continue
        path = layout.official_path(whole[len(around) :])
        if path is None:
            continue
        if any(part in ("", ".", "..") or not _is_name(part) for part in path):
            raise CheckpointError(
                f"{name}: parameter {'/'.join(keys)!r:.200} has a name that leads out of its "
                "folder or is none; the checkpoint has been tampered with: download it again, from "
                "where you trust"
            )
        if path in found:
            raise CheckpointError(
                f"{name}: parameter {'/'.join(path)} is there twice, as {'/'.join(found[path])} "
                f"and {'/'.join(keys)}; {REMEDY}"
            )
        found[path] = keys
    return found


def _around_the_model(stored: Sequence[tuple[str, ...]], name: str) -> layout.Path:
    """The names in front of every parameter of the one text model in a training state.

    Optimizers keep trees of the same names; those do not count.
    """
    paths = [layout.split(keys) for keys in stored]
    around = {path[:-2] for path in paths if path[-2:] == layout.EMBEDDING}
    models = {path for path in around if not _OF_OPTIMIZERS & set(path)}
    if len(models) > 1 and (plain := {path for path in models if layout.is_wrapper(path)}):
        models = plain
    if len(models) > 1:
        listed = ", ".join(sorted("/".join(path) or "the top" for path in models))
        raise CheckpointError(
            f"{name}: there are several models in it, at {listed}; save the one that is meant by "
            "itself, with gnb.save_params or as an item of its own, and pass its folder"
        )
    return next(iter(models), ())


def _is_name(part: str) -> bool:
    """True where a parameter's name can be a file's."""
    return part.isprintable() and len(part) < 256 and "\\" not in part


def _stored_keys(structure: Mapping[str, Any], name: str) -> Iterator[tuple[str, ...]]:
    if not structure:
        raise CheckpointError(f"{name}: its file {STRUCTURE} is missing; {REMEDY}")
    tree = structure.get("tree_metadata")
    entries: list[Any] = list(tree.values()) if isinstance(tree, dict) else [None]
    if len(entries) > _MAX_ARRAYS:
        raise CheckpointError(
            f"{name}: {STRUCTURE} lists {len(entries):,} parameters, expected at most "
            f"{_MAX_ARRAYS:,}; {REMEDY}"
        )
    for entry in entries:
        try:
            keys = tuple(part["key"] for part in entry["key_metadata"])
        except (TypeError, KeyError):
            keys = ()
        if not keys or not all(isinstance(key, str) for key in keys):
            raise CheckpointError(f"{name}: {STRUCTURE} does not list parameters; {REMEDY}")
        yield keys
