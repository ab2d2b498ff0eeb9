"""Official checkpoints: Orbax folders, read one parameter at a time, written as they were released.

Written by `orbax`.  Read by `tensorstore`, which is what Orbax keeps its arrays with: Orbax itself
restores many arrays at once, and where one is damaged the others report to an event loop that is
gone.  Names and whereabouts of the arrays are in the checkpoint's own `_METADATA`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_nb.checkpoints import arrays, folders, infer, kinds, layout
from gemma_nb.config import TransformerConfig
from gemma_nb.errors import CheckpointError
from gemma_nb.presets import Tuning

_STRUCTURE, _ABOUT = "_METADATA", "_CHECKPOINT_METADATA"
_OURS = "gemma_nb"  # our entry in the checkpoint's custom metadata
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_MAX_ARRAYS = 1 << 14  # a training state of the largest Gemma has some 3,000
_MAX_CHUNKS = 1 << 16  # of one array: one for each device that it was spread over, or a few
_MAX_ABOUT = 1 << 24  # bytes of a file that describes arrays
_MAX_DESCRIPTION = 1 << 16  # bytes of a file that describes one array: some 400
_TOO_LONG = slice(_MAX_DESCRIPTION, _MAX_DESCRIPTION + 1)
_PIECE = 1 << 26  # bytes read together, or one chunk where that is more
_OF_OPTIMIZERS = frozenset({"opt_state", "optimizer", "optimizer_state", "mu", "nu", "grads"})
_REMEDY = "the checkpoint is incomplete or damaged: download it again"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one Orbax checkpoint."""
    names = (_STRUCTURE, "manifest.ocdbt", "checkpoint")
    return any((folder / name).is_file() for name in names)


def is_listed(folder: Path) -> bool:
    """Whether a checkpoint has the file that lists its parameters."""
    return (folder / _STRUCTURE).exists()


def lists_a_model(folder: Path) -> bool:
    """Whether a checkpoint has the embedding of a model among its parameters."""
    try:
        structure = folders.read_json(folder, _STRUCTURE) if is_listed(folder) else {}
        stored = list(_stored_keys(structure, str(folder)))
    except CheckpointError:
        return False
    return any(layout.split(keys)[-2:] == layout.EMBEDDING for keys in stored)


class OrbaxFolder:
    """An Orbax checkpoint of official params.

    Nothing but names and shapes is read before `params` is called.

    Attributes:
      name: of the folder, for messages.
      tuning: "instruction" where the folder is named so, as the released ones are, else "base".
      config: the model's numbers, as stored by `save_params` or told by names and shapes.

    Raises:
      CheckpointError: the folder is damaged, or is no Gemma 1, 2 or 3 text model.
    """

    def __init__(self, folder: Path, config: TransformerConfig | None = None) -> None:
        folders.check_members(folder)
        self.name = str(folder)
        if not self.name.isprintable():  # of bytes that are no UTF-8
            raise CheckpointError(
                f"{self.name!r}: tensorstore takes no such path; rename the folder"
            )
        self.tuning: Tuning = "instruction" if folders.looks_instruction_tuned(folder) else "base"
        self._folder = folder.resolve()
        structure = folders.read_json(folder, _STRUCTURE) if is_listed(folder) else {}
        self._keys = _parameter_keys(structure, self.name)
        self._arrays = self._open(structure)
        shapes = {path: self._shape(path) for path in self._keys}
        stored = _custom_metadata(folder).get("config")
        if config is None and stored is not None:
            config = infer.from_json(stored, self.name)
        if config is None:
            shaped = ((path, _Shaped(shape)) for path, shape in shapes.items())
            config = infer.config_of(layout.nest(shaped), name=self.name)
        infer.check(shapes, config, self.name)
        self.config = config

    def params(self, dtype: Any) -> Iterator[tuple[layout.Path, np.ndarray]]:
        """Parameters one by one, as (official path, array of `dtype`), embedding first.

        Raises:
          CheckpointError: an array cannot be read.
        """
        for leaf in layout.leaves(self.config):
            yield leaf.path, self._read(leaf.path, dtype)

    def _open(self, structure: Mapping[str, Any]) -> dict[layout.Path, Any]:
        """Opens every array, which reads its shape and dtype."""
        import tensorstore as ts

        together = (self._folder / "manifest.ocdbt").exists()
        base = {"driver": "file", "path": f"{self._folder}/"}
        # Where everything was written, what is not there is lost; otherwise it is the fill value.
        complete = structure.get("store_array_data_equal_to_fill_value") is True

        def spec(name: str) -> dict[str, Any]:
            if together:
                place = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            else:
                place = {"driver": "file", "path": f"{self._folder}/{name}/"}
            return {"driver": driver, "kvstore": place, "fill_missing_data_reads": not complete}

        driver = "zarr3" if structure.get("use_zarr3") is True else "zarr"
        self._check_descriptions("zarr.json" if driver == "zarr3" else ".zarray", together)
        specs = {path: spec(".".join(keys)) for path, keys in self._keys.items()}
        context = ts.Context()
        opening = {
            path: ts.open(spec, open=True, read=True, context=context)
            for path, spec in specs.items()
        }
        opened = {}
        for path, future in opening.items():
            with self._errors(path):
                opened[path] = future.result()
        return opened

    def _check_descriptions(self, file_name: str, together: bool) -> None:
        """Refuses what the library's own parser would run out of its stack or memory over.

        It is read twice: here as bytes, and by the library when it opens the array.
        """
        names = {path: f"{'.'.join(keys)}/{file_name}" for path, keys in self._keys.items()}
        if together:
            self._check_size(self._folder / "manifest.ocdbt", _MAX_ABOUT, "the parameters")
            for path, raw in self._in_database(names):
                _check_description(raw, f"{self.name}: parameter {'/'.join(path)}: its {file_name}")
            return
        for path, name in names.items():
            file = self._folder / name
            self._check_size(file, _MAX_DESCRIPTION, f"parameter {'/'.join(path)}")
            if file.exists():
                raw = folders.content(file, _MAX_DESCRIPTION)
                _check_description(raw, f"{file}: parameter {'/'.join(path)}")

    def _in_database(self, names: Mapping[layout.Path, str]) -> Iterator[tuple[layout.Path, bytes]]:
        """What a database keeps under some names, of those that are there."""
        import tensorstore as ts

        context = ts.Context({"cache_pool": {"total_bytes_limit": _MAX_ABOUT}})
        spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self._folder}/"}}
        with self._errors(next(iter(names), ())):
            store = ts.KvStore.open(spec, context=context).result()
        # What is shorter has no such range, which is an error, and is read whole.
        long = {path: store.read(name, byte_range=_TOO_LONG) for path, name in names.items()}
        whole = {}
        for path, future in long.items():
            if future.exception() is None and future.result().state == "value":
                raise CheckpointError(
                    f"{self.name}: more than {_MAX_DESCRIPTION:,} bytes about parameter "
                    f"{'/'.join(path)}; {_REMEDY}"
                )
            whole[path] = store.read(names[path])
        for path, future in whole.items():
            with self._errors(path):
                found = future.result()
            if found.state == "value":
                yield path, found.value

    @staticmethod
    def _check_size(file: Path, most: int, what: str) -> None:
        """Refuses what tensorstore would read whole, whatever its size."""
        if file.exists() and (size := file.stat().st_size) > most:
            raise CheckpointError(
                f"{file}: {size:,} bytes about {what}, expected at most {most:,}; {_REMEDY}"
            )

    def _shape(self, path: layout.Path) -> tuple[int, ...]:
        array, what = self._arrays[path], f"{self.name}: parameter {'/'.join(path)}"
        shape, dtype = tuple(array.shape), array.dtype.name
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"{what}: expected float32, bfloat16 or float16, got {dtype}; use a checkpoint "
                "that is not quantised"
            )
        chunk = tuple(array.chunk_layout.read_chunk.shape or shape)
        if any(c > s for c, s in zip(chunk, shape, strict=True)):
            raise CheckpointError(f"{what}: chunks of {chunk} in an array of {shape}; {_REMEDY}")
        count = math.prod(-(-s // c) for c, s in zip(chunk, shape, strict=True))
        if count > _MAX_CHUNKS:
            raise CheckpointError(
                f"{what}: {count:,} chunks, expected at most {_MAX_CHUNKS:,}; {_REMEDY}"
            )
        chunk_bytes = math.prod(chunk) * array.dtype.numpy_dtype.itemsize
        own = self._folder / ".".join(self._keys[path])
        for file in own.rglob("*") if own.is_dir() else ():
            self._check_size(file, 2 * chunk_bytes + _MAX_ABOUT, f"parameter {'/'.join(path)}")
        return shape

    def _read(self, path: layout.Path, dtype: Any) -> np.ndarray:
        """A parameter in `dtype`, converted piece by piece where it is stored in pieces."""
        array = self._arrays[path]
        with self._errors(path):
            rows = _rows_at_once(array)
            if rows >= array.shape[0]:
                return arrays.settled(array.read().result(), dtype)
            out = arrays.empty(array.shape, dtype)
            for start in range(0, array.shape[0], rows):
                stop = min(start + rows, array.shape[0])
                out[start:stop] = array[start:stop].read().result()
            return out

    @contextlib.contextmanager
    def _errors(self, path: layout.Path) -> Iterator[None]:
        """What the library raises over damage becomes a CheckpointError that names the array."""
        try:
            yield
        except (ValueError, OSError, RuntimeError, OverflowError) as error:
            if found := kinds.in_folder(self._folder):
                raise CheckpointError(found) from error
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{self.name}: parameter {'/'.join(path)} cannot be read ({reason}); {_REMEDY}"
            ) from error


def _check_description(raw: bytes, what: str) -> None:
    """Refuses a description of an array that no Gemma's has.

    A type with fields has a shape of its own, and the library makes a value of it at once.
    """
    about = folders.parse_json(raw, what)
    dtype = about.get("dtype", about.get("data_type"))
    if not isinstance(dtype, str) or re.search(r"\d{4}", dtype):
        raise CheckpointError(
            f"{what}: expected a number type such as '<f4' or 'bfloat16', got {dtype!r:.60}; "
            f"{_REMEDY}"
        )


def _rows_at_once(array: Any) -> int:
    """Whole chunks of rows, some 64 MiB of them: a chunk cannot be decoded in part."""
    row = array.dtype.numpy_dtype.itemsize * math.prod(array.shape[1:])
    chunk_rows = (array.chunk_layout.read_chunk.shape or array.shape)[0]
    return int(chunk_rows * max(1, _PIECE // max(1, row * chunk_rows)))


class _Shaped:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def save_params(
    params: Mapping[str, Any], config: TransformerConfig, path: str | os.PathLike[str]
) -> Path:
    """Writes an Orbax checkpoint in the layout of the released ones.

    google-deepmind/gemma reads it; `OrbaxFolder` finds the configuration in it as well.

    Args:
      params: official tree, nested or flat.
      config: the model's numbers.
      path: a folder that does not exist yet; it appears whole or not at all.

    Raises:
      CheckpointError: `path` exists or cannot be written, or `params` do not belong to `config`,
        or are shapes without weights.
    """
    import jax
    import orbax.checkpoint as ocp

    path = Path(path).expanduser().absolute()
    if path.exists():
        raise CheckpointError(f"{path} exists already; choose another path, or remove it")
    infer.check(infer.shapes_of(params), config)
    flat = layout.official(params)
    for name, leaf in flat.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"parameter {'/'.join(name)} has a shape but no weights; load them, or initialise "
                "the model with a key, before it is saved"
            )
    tree = layout.released(layout.nest(flat))
    about = {_OURS: {"config": infer.to_json(config)}}
    try:
        # Orbax would find out in a thread, whose traceback comes minutes later.
        path.parent.mkdir(parents=True, exist_ok=True)
        with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.StandardSave(tree), custom_metadata=about)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; make room there, or choose another "
            "path"
        ) from error
    return path


# --- what is read without the library -------------------------------------------------------------


def _custom_metadata(folder: Path) -> dict[str, Any]:
    """What `save_params` stored beside the arrays; empty for a checkpoint of others."""
    if not (folder / _ABOUT).exists():
        return {}
    custom = folders.read_json(folder, _ABOUT).get("custom_metadata")
    ours = custom.get(_OURS) if isinstance(custom, dict) else None
    return ours if isinstance(ours, dict) else {}


def _parameter_keys(structure: Mapping[str, Any], name: str) -> dict[layout.Path, tuple[str, ...]]:
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
                f"and {'/'.join(keys)}; {_REMEDY}"
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
    """Whether a parameter's name can be a file's."""
    return part.isprintable() and len(part) < 256 and "\\" not in part


def _stored_keys(structure: Mapping[str, Any], name: str) -> Iterator[tuple[str, ...]]:
    if not structure:
        raise CheckpointError(f"{name}: its file {_STRUCTURE} is missing; {_REMEDY}")
    tree = structure.get("tree_metadata")
    entries: list[Any] = list(tree.values()) if isinstance(tree, dict) else [None]
    if len(entries) > _MAX_ARRAYS:
        raise CheckpointError(
            f"{name}: {_STRUCTURE} lists {len(entries):,} parameters, expected at most "
            f"{_MAX_ARRAYS:,}; {_REMEDY}"
        )
    for entry in entries:
        try:
            keys = tuple(part["key"] for part in entry["key_metadata"])
        except (TypeError, KeyError):
            keys = ()
        if not keys or not all(isinstance(key, str) for key in keys):
            raise CheckpointError(f"{name}: {_STRUCTURE} does not list parameters; {_REMEDY}")
        yield keys


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's reports of what it does, which it logs as warnings."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
