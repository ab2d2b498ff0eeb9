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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_nb.checkpoints import arrays, folders, infer, kinds, layout
from gemma_nb.checkpoints.orbax_tree import (
    OURS,
    REMEDY,
    STRUCTURE,
    custom_metadata,
    is_listed,
    parameter_keys,
)
from gemma_nb.config import TransformerConfig
from gemma_nb.errors import CheckpointError
from gemma_nb.presets import Tuning

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_MAX_CHUNKS = 1 << 16  # of one array: one for each device that it was spread over, or a few
_MAX_ABOUT = 1 << 24  # bytes of a file that describes arrays
_MAX_DESCRIPTION = 1 << 16  # bytes of a file that describes one array: some 400
_TOO_LONG = slice(_MAX_DESCRIPTION, _MAX_DESCRIPTION + 1)
_PIECE = 1 << 26  # bytes read together, or one chunk where that is more


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
        structure = folders.read_json(folder, STRUCTURE) if is_listed(folder) else {}
        self._keys = parameter_keys(structure, self.name)
        self._arrays = self._open(structure)
        shapes = {path: self._shape(path) for path in self._keys}
        stored = custom_metadata(folder).get("config")
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
        """Open every array, which reads its shape and dtype."""
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
        """Refuse what the library's own parser would run out of its stack or memory over.

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
        """Contents of a database under some names, of those that are there."""
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
                    f"{'/'.join(path)}; {REMEDY}"
                )
            whole[path] = store.read(names[path])
        for path, future in whole.items():
            with self._errors(path):
                found = future.result()
            if found.state == "value":
                yield path, found.value

    @staticmethod
    def _check_size(file: Path, most: int, what: str) -> None:
        """Refuse what tensorstore would read whole, whatever its size."""
        if file.exists() and (size := file.stat().st_size) > most:
            raise CheckpointError(
                f"{file}: {size:,} bytes about {what}, expected at most {most:,}; {REMEDY}"
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
            raise CheckpointError(f"{what}: chunks of {chunk} in an array of {shape}; {REMEDY}")
        count = math.prod(-(-s // c) for c, s in zip(chunk, shape, strict=True))
        if count > _MAX_CHUNKS:
            raise CheckpointError(
                f"{what}: {count:,} chunks, expected at most {_MAX_CHUNKS:,}; {REMEDY}"
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
        """A block in which what the library raises over damage becomes a CheckpointError."""
        try:
            yield
        except (ValueError, OSError, RuntimeError, OverflowError) as error:
            if found := kinds.in_folder(self._folder):
                raise CheckpointError(found) from error
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{self.name}: parameter {'/'.join(path)} cannot be read ({reason}); {REMEDY}"
            ) from error


def _check_description(raw: bytes, what: str) -> None:
    """Refuse a description of an array that no Gemma's has.

    A type with fields has a shape of its own, and the library makes a value of it at once.
    """
    about = folders.parse_json(raw, what)
    dtype = about.get("dtype", about.get("data_type"))
    if not isinstance(dtype, str) or re.search(r"\d{4}", dtype):
        raise CheckpointError(
            f"{what}: expected a number type such as '<f4' or 'bfloat16', got {dtype!r:.60}; "
            f"{REMEDY}"
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
    """Write an Orbax checkpoint in the layout of the released ones.

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
    about = {OURS: {"config": infer.to_json(config)}}
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A block without Orbax's reports of what it does, which it logs as warnings."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
