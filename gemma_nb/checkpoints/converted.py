"""The cache of converted weights: one safetensors file per source, converter version and dtype.

A file holds the official parameters, the SentencePiece model and the scalar metadata of its source,
so a second load reads nothing else.  It is memory-mapped; its tensors are handed to JAX without a
copy.  Every block of 16 MiB has a CRC-32 that is checked before any of it is used (0.2 s for the
default model), the first time and when the file has been written to since: one that was cut off or
changed is noticed and written again.  The check reads the file and leaves the mapping alone, so a
load touches no parameter: each becomes part of this process's memory when it is first computed
with, and is the only copy there.

Format: https://huggingface.co/docs/safetensors (readable by the library; written here as a stream,
which the library cannot do, so that a conversion never holds the whole model in memory).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from gemma_nb.cache import (
    cache_dir,
    drop_oldest,
    limit_bytes,
    lock_shared,
    make,
    remove_leftovers,
    temporary,
)
from gemma_nb.checkpoints import folders
from gemma_nb.errors import CheckpointError

# Part of a file's name: raise it whenever conversion or the file's layout changes.
CONVERTER_VERSION = 2

DTYPES: Mapping[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
_CODES = {"BF16": DTYPES["bfloat16"], "F32": DTYPES["float32"], "U8": np.dtype(np.uint8)}
_NAMES = {dtype: code for code, dtype in _CODES.items()}

_TOKENIZER = "tokenizer_model"  # the one entry that is no parameter
_BLOCK = 1 << 24  # bytes under one checksum
_PIECE = 1 << 17  # bytes read together: stays in the processor's cache
_MAX_NOTES = 4096  # files of which a checksum is remembered
_HEADER_SIZE = 1 << 20  # written last, so room is kept; a file's data start here


class DamagedError(CheckpointError):
    """A converted file is not what was written."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted checkpoint.

    Attributes:
      params: (path in the official tree, read-only array) pairs, memory-mapped.
      tokenizer: a SentencePiece model.
      metadata: scalar metadata of the source, and its lists of numbers.
    """

    params: dict[tuple[str, ...], np.ndarray]
    tokenizer: bytes
    metadata: dict[str, Any]


def path_for(sha256: str, dtype: str) -> Path:
    """The file of a source with this SHA-256, converted to "bfloat16" or "float32"."""
    return cache_dir() / "weights" / f"{sha256}-v{CONVERTER_VERSION}-{dtype}.safetensors"


# --- reading --------------------------------------------------------------------------------------


def read(path: Path) -> Converted | None:
    """The converted checkpoint at `path`; None if there is none.

    Raises:
      DamagedError: it is cut off, or its bytes are not those that were written.
    """
    try:
        with open(path, "rb") as file:
            lock_shared(file)  # until no parameter of it is mapped any more
            data = np.memmap(file, np.uint8, "r")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise DamagedError(str(error)) from error
    header = _verified_header(path, data)
    with contextlib.suppress(OSError):
        os.utime(_note(path)[0])  # what is not used any more goes first
    extra = header.pop("__metadata__")
    tensors = {name: _tensor(data, entry) for name, entry in header.items()}
    return Converted(
        tokenizer=tensors.pop(_TOKENIZER).tobytes(),
        params={tuple(name.split("/")): array for name, array in tensors.items()},
        metadata=json.loads(extra["source"]),
    )


def _verified_header(path: Path, data: np.ndarray) -> dict[str, Any]:
    if len(data) < _HEADER_SIZE:
        raise DamagedError(f"{len(data):,} bytes, too short for its header")
    raw = data[8:_HEADER_SIZE].tobytes()
    try:
        header = json.loads(raw)
        sums = header["__metadata__"]["crc32"]
        expected = [int(sums[i : i + 8], 16) for i in range(0, len(sums), 8)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError("its header cannot be read") from error
    blank = raw.replace(sums.encode(), b"0" * len(sums), 1)
    if data[:8].tobytes() != struct.pack("<Q", _HEADER_SIZE - 8):
        raise DamagedError("its first bytes have changed")
    try:
        # A file that was whole, and has not been written to since, is not read through every time.
        before, checked = _note(path), _known(path, "crc32") == sums
        actual = [zlib.crc32(blank), *(expected[1:] if checked else _checksums(path))]
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror or error}") from error
    if len(actual) != len(expected):
        raise DamagedError(f"{len(data):,} bytes are not as many as were written")
    if actual != expected:
        block = next(i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b)
        raise DamagedError(f"checksum {block} of {len(expected)} does not match")
    if not checked:
        _remember(before, "crc32", sums)
    return header


def _tensor(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    start, stop = (_HEADER_SIZE + offset for offset in entry["data_offsets"])
    return data[start:stop].view(_CODES[entry["dtype"]]).reshape(entry["shape"])


def _checksums(path: str | Path) -> list[int]:
    """CRC-32 of every block behind the header; zlib lets go of the GIL, so threads share the work.

    Read, not mapped: mapped pages would count as this process's memory.
    """

    def checksum(start: int) -> int:
        crc, left, piece = 0, _BLOCK, memoryview(bytearray(_PIECE))
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while left and (count := file.readinto(piece[:left])):
                crc, left = zlib.crc32(piece[:count], crc), left - count
        return crc

    starts = range(_HEADER_SIZE, os.path.getsize(path), _BLOCK)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(checksum, starts))


# --- writing --------------------------------------------------------------------------------------


def write(
    path: Path,
    params: Iterable[tuple[tuple[str, ...], np.ndarray]],
    tokenizer: bytes,
    metadata: Mapping[str, Any],
) -> None:
    """Write a converted checkpoint so that `path` is at any time absent or whole.

    Several processes may do so at once: each writes its own temporary file, the last one stays.

    Args:
      path: from `path_for`.
      params: (path in the official tree, array) pairs, float32 or bfloat16; consumed one by one.
      tokenizer: a SentencePiece model.
      metadata: of the source; its scalars and lists of numbers are kept, its arrays and texts
        are not.

    Raises:
      CheckpointError: the file cannot be written, for example for lack of space.
    """
    try:
        make(path.parent)
        remove_leftovers(path.parent)
        with temporary(path) as file:
            _write_file(file, params, tokenizer, metadata)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the converted weights to {path.parent}: {error.strerror or error}; make "
            "room there, or set the environment variable GEMMA_NB_CACHE to another folder"
        ) from error
    drop_oldest(path.parent, "*.safetensors", limit_bytes("weights"), last_used=_last_used)


def _last_used(path: Path) -> float:
    """The time when a converted file was last read: when its note was touched."""
    try:
        return _note(path)[0].stat().st_mtime
    except OSError:
        return 0.0


def _write_file(
    file: BinaryIO,
    params: Iterable[tuple[tuple[str, ...], np.ndarray]],
    tokenizer: bytes,
    metadata: Mapping[str, Any],
) -> None:
    header: dict[str, Any] = {}
    file.seek(_HEADER_SIZE)

    def append(name: str, array: np.ndarray) -> None:
        start = file.tell() - _HEADER_SIZE
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, file.tell() - _HEADER_SIZE],
        }

    for path, array in params:
        append("/".join(path), array)
    append(_TOKENIZER, np.frombuffer(tokenizer, np.uint8))
    file.flush()
    sums = _checksums(file.name)
    kept = {k: v for k, v in metadata.items() if isinstance(v, str) or _is_numeric(v)}
    blank = "0" * 8 * (1 + len(sums))
    # The checksums stand before anything that a source can choose, so the first match is theirs.
    extra = {"format": "np", "crc32": blank, "source": json.dumps(kept)}
    raw = json.dumps({"__metadata__": extra, **header}).encode().ljust(_HEADER_SIZE - 8)
    if len(raw) > _HEADER_SIZE - 8:
        raise CheckpointError(
            f"the names and metadata of this checkpoint take {len(raw):,} bytes, the converted "
            f"file has room for {_HEADER_SIZE - 8:,}; please report it"
        )
    digits = "".join(f"{crc:08x}" for crc in (zlib.crc32(raw), *sums))
    file.seek(0)
    file.write(struct.pack("<Q", len(raw)) + raw.replace(blank.encode(), digits.encode(), 1))


def _is_numeric(value: Any) -> bool:
    """True where it is a number or a list of numbers."""
    return all(isinstance(v, int | float) for v in (value if isinstance(value, list) else [value]))


# --- content hashes -------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered by path, size and times, so that it is read once.

    Raises:
      CheckpointError: the file cannot be read.
    """
    if (known := remembered_sha256(path)) is not None:
        return known
    try:
        before = _note(path)
        digest = sha256_of([path])
    except OSError as error:
        raise folders.unreadable(path, error) from error
    _remember(before, "sha256", digest)
    return digest


def remembered_sha256(path: Path) -> str | None:
    """The result of `file_sha256` the last time, where the file has not changed since."""
    return _known(path, "sha256")


def _known(path: Path, what: str) -> str | None:
    """The note of what was found out of a file, where it has not changed since."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        note, state = _note(path)
        known = json.loads(note.read_text())
        if isinstance(known, dict) and known.get("state") == state and what in known:
            return str(known[what])
    return None


def _remember(before: tuple[Path, list[int]], what: str, found: str) -> None:
    """Remember what was found out of the file of which `before` is the `_note`."""
    note, state = before
    with contextlib.suppress(OSError):  # only a saving: an unwritable cache is reported elsewhere
        make(note.parent)
        if not note.exists():
            drop_oldest(note.parent, "*.json", math.inf, count=_MAX_NOTES)
        with temporary(note) as file:
            file.write(json.dumps({"state": state, what: found}).encode())


def _note(path: Path) -> tuple[Path, list[int]]:
    """The place of a file's remembered checksum, and what tells whether the file has changed."""
    path = path.resolve(strict=True)
    stat = path.stat()
    name = hashlib.sha256(os.fsencode(path)).hexdigest()
    return cache_dir() / "hashes" / f"{name}.json", [
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
    ]


def sha256_of(paths: Iterable[Path]) -> str:
    """SHA-256 of files joined end to end, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
