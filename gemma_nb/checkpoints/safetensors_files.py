"""Tensors of safetensors files: where each lies, in one file or in shards, and its rows.

Files are mapped into memory by the `safetensors` library and read in pieces.  Each piece maps its
file anew: pages that a mapping has touched count as this process's memory until it is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma_nb.checkpoints import arrays, folders, kinds
from gemma_nb.checkpoints.safetensors_header import odd_tensor
from gemma_nb.errors import CheckpointError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"

_MAX_TENSORS = 1 << 14  # the largest Gemma with its vision encoder has some 1,300
_PIECE = 1 << 26  # bytes read under one mapping
_REMEDY = "the file is incomplete or damaged: download it again"

# Weights of other programs, by the end of their file's name.
_OTHER_WEIGHTS = {
    ".msgpack": "for Flax",
    ".h5": "for Keras or TensorFlow",
    ".npz": "of numpy arrays",
    ".onnx": "for ONNX",
    ".tflite": "for TensorFlow Lite",
    ".task": "for MediaPipe",
    ".litertlm": "for LiteRT-LM",
    ".incomplete": "a download that did not end",
    ".part": "a download that did not end",
    ".crdownload": "a download that did not end",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Place of a tensor: its file, its name there, and what the file says about it."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def what(self) -> str:
        """File and tensor, for messages."""
        return f"{self.file}: tensor {self.stored_name!r}"


def listed(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder, by its stored name."""
    if (folder / INDEX).exists():
        return _indexed(folder)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        folders.refuse_pickles(folder)
        raise CheckpointError(
            f"{folder} has no *.safetensors file{_instead(folder)}; download the weights beside "
            f"its {CONFIG}"
        )
    if SINGLE in files:
        files = [SINGLE]
    elif len(files) > 1:
        raise CheckpointError(
            f"{folder} has {len(files)} *.safetensors files and no {INDEX}; download the index"
        )
    return _header(folder, files[0])


def _instead(folder: Path) -> str:
    """The weights of a folder that are not read, for a message."""
    for suffix, what in _OTHER_WEIGHTS.items():
        for path in sorted(folder.glob(f"*{suffix}")):
            return f", only {path.name} ({what}, which gemma_nb does not read)"
    return ""


def _indexed(folder: Path) -> dict[str, Tensor]:
    where = folders.read_json(folder, INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
        raise CheckpointError(
            f"{folder / INDEX}: expected a weight_map from tensor names to files; {_REMEDY}"
        )
    if len(where) > _MAX_TENSORS:
        raise CheckpointError(
            f"{folder / INDEX}: {len(where):,} tensors, expected at most {_MAX_TENSORS:,}; pass a "
            "folder of Gemma 1, 2 or 3"
        )
    for file in where.values():
        if Path(file).name != file:
            raise CheckpointError(
                f"{folder / INDEX}: {file!r} is no file of this folder; the index has been "
                "tampered with or damaged: download it again"
            )
    files = sorted(set(where.values()))
    absent = [f for f in files if "\0" not in f and not os.path.lexists(folder / f)]
    if absent:
        why = kinds.unfinished(folder)
        raise CheckpointError(
            f"{folder / absent[0]} is missing; {len(absent)} of the {len(files)} files that "
            f"{INDEX} names are not in the folder: {why or 'download them'}"
        )
    headers = {file: _header(folder, file) for file in files}
    for file, tensors in headers.items():
        for name in tensors:
            if where.get(name) != file:
                problem = f"{INDEX} says is in {where[name]}" if name in where else "no index lists"
                raise CheckpointError(
                    f"{folder / file}: tensor {name!r} is in this file, which {problem}; the files "
                    "are of different models: download all of them again"
                )
    for name, file in where.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{folder / file}: tensor {name!r} is missing, which {INDEX} says is in it; "
                f"{_REMEDY}"
            )
    return {name: headers[file][name] for name, file in where.items()}


def _header(folder: Path, name: str) -> dict[str, Tensor]:
    """Names, shapes and dtypes of one file; the library checks that its tensors fill it."""
    if not name.endswith(".safetensors"):
        raise CheckpointError(f"{folder / name}: {kinds.NO_PICKLES}")
    path = folders.member(folder, name)
    tensors = {}
    with _opened(path) as file:
        if (count := len(keys := file.keys())) > _MAX_TENSORS:
            raise CheckpointError(
                f"{path}: {count:,} tensors, expected at most {_MAX_TENSORS:,}; pass a folder of "
                "Gemma 1, 2 or 3"
            )
        for key in keys:
            piece = file.get_slice(key)
            tensors[key] = Tensor(path, key, tuple(piece.get_shape()), piece.get_dtype())
    return tensors


def read(tensor: Tensor, rows: int, dtype: Any) -> np.ndarray:
    """The first `rows` rows of a tensor in `dtype`, converted piece by piece."""
    out = arrays.empty((rows, *tensor.shape[1:]), dtype)
    for piece in pieces(tensor, rows):
        out[piece] = read_rows(tensor, piece)
    return out


def pieces(tensor: Tensor, rows: int) -> Iterator[slice]:
    """Slices of the first `rows` rows, each of which is read under one mapping."""
    row_bytes = 8 * int(np.prod(tensor.shape[1:], dtype=np.int64))
    step = max(1, _PIECE // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def read_rows(tensor: Tensor, rows: slice) -> np.ndarray:
    """Rows of a tensor, as they are stored."""
    with _opened(tensor.file, tensor.stored_name) as file:
        piece = file.get_slice(tensor.stored_name)
        if tuple(piece.get_shape()) != tensor.shape:
            raise CheckpointError(f"{tensor.what} changed while it was read; load it again")
        return np.asarray(piece[rows])


@contextlib.contextmanager
def _opened(path: Path, tensor: str = "") -> Iterator[Any]:
    """The library's handle of a file; what it raises becomes a CheckpointError."""
    from safetensors import SafetensorError, safe_open

    what = f"{path}: tensor {tensor!r}" if tensor else str(path)
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except OSError as error:
        raise folders.unreadable(what, error) from error
    except (SafetensorError, ValueError, TypeError) as error:
        kinds.refuse(path)
        odd = odd_tensor(path)
        reason = f"{odd}; {error}" if odd else str(error)
        raise CheckpointError(
            f"{what}: no valid safetensors file ({reason:.600}); {_REMEDY}"
        ) from error
