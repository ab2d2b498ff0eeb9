"""Parses the header of a GGUF file: metadata and the table of tensors.

The `gguf` library's own reader takes over 20 s in a vocabulary of 262,144 strings; this one takes
about 0.1 s.  It trusts nothing in the file: a count or a length is compared with the bytes that are
left before anything of that size is made.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gemma_nb.checkpoints import folders, kinds
from gemma_nb.errors import CheckpointError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
_MAX_DIMS = 4  # GGML_MAX_DIMS
_WINDOW = 1 << 23  # bytes copied at a time
_MAX_NAME = 65_535  # the format's limit for metadata keys; tensor names are shorter still
# What no Gemma comes near, and a sparse file of no size can announce: the largest has 1,247
# tensors, some 40 fields and 262,144 tokens.
_MAX_TENSORS, _MAX_FIELDS, _MAX_ENTRIES, _MAX_TEXT = 1 << 16, 1 << 12, 1 << 23, 1 << 24

REDOWNLOAD = "the file is incomplete or not what it says: download it again"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Place of a tensor.

    Attributes:
      name: its name in the file, for example "blk.0.attn_q.weight".
      shape: row-major, that is the file's dimensions reversed.
      type_name: storage, for example "F32" or "Q4_K".
      offset: of its first byte in the file.
      nbytes: bytes it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    nbytes: int


class Span:
    """Bytes of one or more memory-mapped files, addressed as if they were one."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._maps: list[mmap.mmap] = []
        self._starts: list[int] = []
        self.size = 0
        for part in parts:
            try:
                if not folders.regular(part):  # a pipe would be waited for
                    raise CheckpointError(
                        f"{part} is {folders.kind_of(part)}, expected a file; pass the path of a "
                        ".gguf file"
                    )
                with open(part, "rb") as file:
                    length = os.fstat(file.fileno()).st_size
                    if not length:
                        raise CheckpointError(f"{part} is empty; {REDOWNLOAD}")
                    self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except OSError as error:
                self.close()
                raise folders.unreadable(part, error) from error
            self._starts.append(self.size)
            self.size += length

    def view(self, start: int, stop: int) -> np.ndarray:
        """Bytes start..stop as uint8: a view inside one file, a copy across two."""
        pieces = []
        for first, mapped in zip(self._starts, self._maps, strict=True):
            low, high = max(start - first, 0), min(stop - first, len(mapped))
            if low < high:
                pieces.append(np.frombuffer(mapped, np.uint8, high - low, low))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def release(self, start: int, stop: int) -> None:
        """Let go of the memory behind bytes start..stop; a later view reads them anew.

        Pages that a mapping has touched count as this process's memory until then.
        """
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows: they stay until `close`
            return
        for first, mapped in zip(self._starts, self._maps, strict=True):
            low, high = max(start - first, 0), min(stop - first, len(mapped))
            if low < high:
                low -= low % mmap.PAGESIZE
                mapped.madvise(mmap.MADV_DONTNEED, low, high - low)

    def close(self) -> None:
        """Unmap what no array views any more; the rest goes with its last view."""
        for mapped in self._maps:
            try:
                mapped.close()
            except BufferError:
                continue
        self._maps.clear()
        self._starts.clear()


class Header:
    """Reads the header front to back; `_field` says where, for messages."""

    def __init__(self, span: Span, name: str) -> None:
        self._span = span
        self._name = name
        self._field = "the first bytes"
        self._pos = 0
        self._window = b""  # a copy of the bytes around _pos: slicing bytes is the fast way
        self._window_start = 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        """Metadata and tensor table."""
        tensor_count, field_count = self._preamble()
        metadata = self._metadata(field_count)
        tensors = self._tensor_table(tensor_count, metadata)
        return metadata, tensors

    def _fail(self, problem: str, remedy: str = REDOWNLOAD) -> NoReturn:
        raise CheckpointError(f"{self._name}: {self._field}: {problem}; {remedy}")

    @property
    def _left(self) -> int:
        return self._span.size - self._pos

    def _take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self._left:
            self._fail(
                f"{count:,} more bytes announced at byte {self._pos:,}, the file has "
                f"{self._left:,} left"
            )
        start = self._pos - self._window_start
        if start + count > len(self._window):
            stop = min(self._pos + max(count, _WINDOW), self._span.size)
            self._window = self._span.view(self._pos, stop).tobytes()
            self._window_start, start = self._pos, 0
        self._pos += count
        return self._window[start : start + count]

    def _int(self, code: str) -> int:
        return struct.unpack("<" + code, self._take(struct.calcsize(code)))[0]

    def _text(self, limit: int = _MAX_TEXT) -> str:
        length = self._int("Q")
        if length > limit:
            self._fail(f"a text of {length:,} bytes, expected at most {limit:,}")
        raw = self._take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{raw[:40]!r} is not UTF-8 text")

    def _preamble(self) -> tuple[int, int]:
        magic = self._take(4)
        if magic != _MAGIC:
            start = self._span.view(0, min(_WINDOW, self._span.size)).tobytes()
            kinds.refuse_bytes(start, self._name)
            self._fail(
                f"expected {_MAGIC!r}, got {magic!r}: this is not a GGUF file",
                "pass the path of a .gguf file",
            )
        self._field = "version"
        version = self._int("I")
        if version not in (2, 3):
            hint = " (a big-endian file)" if version >= 1 << 16 else ""
            self._fail(
                f"expected 2 or 3, got {version}{hint}",
                "convert the model again with a current llama.cpp, little-endian",
            )
        self._field = "tensor count"
        tensors = self._count(24, _MAX_TENSORS)  # name length, rank, type, offset
        self._field = "field count"
        return tensors, self._count(13, _MAX_FIELDS)  # key length, type, one byte of value

    def _count(self, smallest: int, most: int = _MAX_ENTRIES) -> int:
        """A number of things that take at least `smallest` bytes each."""
        count = self._int("Q")
        if count * smallest > self._left:
            self._fail(f"{count:,} entries announced, the file has {self._left:,} bytes left")
        if count > most:
            self._fail(f"{count:,} entries announced, expected at most {most:,}")
        return count

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            self._field = f"metadata field {index}"
            key = self._text(_MAX_NAME)
            self._field = f"metadata field {key!r}"
            if key in metadata:
                self._fail("occurs twice")
            metadata[key] = self._value(self._int("I"))
        return metadata

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array()
        return self._numbers(kind, 1)[0].item()

    def _array(self) -> list[str] | np.ndarray:
        kind = self._int("I")
        if kind == _STRING:
            return self._texts(self._count(8))
        if kind == _ARRAY:
            self._fail("an array of arrays, which no Gemma file has")
        smallest = _SCALARS[kind].itemsize if kind in _SCALARS else 1
        return self._numbers(kind, self._count(smallest))

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            self._fail(f"unknown value type {kind}")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _texts(self, count: int) -> list[str]:
        """Many strings, without a method call for each: this is where the time goes."""
        texts: list[str] = []
        unpack = struct.Struct("<Q").unpack_from
        window = self._take(min(self._left, max(_WINDOW, 32 * count)))
        base = self._pos - len(window)
        pos = 0
        for _ in range(count):
            end = pos + 8 + unpack(window, pos)[0] if pos + 8 <= len(window) else len(window) + 1
            if end > len(window):  # not in the window: the careful way, and a new window after it
                self._pos = base + pos
                texts.append(self._text())
                base, pos = self._pos, 0
                window = self._take(min(self._left, max(_WINDOW, 32 * (count - len(texts)))))
                continue
            try:
                texts.append(window[pos + 8 : end].decode("utf-8"))
            except UnicodeDecodeError:
                self._fail(f"entry {len(texts)} is not UTF-8 text")
            pos = end
        self._pos = base + pos
        return texts

    def _tensor_table(self, count: int, metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
        self._field = "metadata field 'general.alignment'"
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self._fail(f"expected a power of two, got {alignment!r}")
        tensors: dict[str, TensorInfo] = {}
        for index in range(count):
            self._field = f"tensor {index}"
            info = self._tensor()
            if info.name in tensors:
                self._fail("occurs twice")
            if info.offset % alignment:
                self._fail(f"offset {info.offset:,} is not a multiple of {alignment}")
            tensors[info.name] = info
        start = -(-self._pos // alignment) * alignment  # data begins at the next aligned byte
        placed = {n: dataclasses.replace(t, offset=start + t.offset) for n, t in tensors.items()}
        self._check_placement(placed, start)
        return placed

    def _tensor(self) -> TensorInfo:
        """One entry of the table; its offset is still relative to the data section."""
        name = self._text(_MAX_NAME)
        self._field = f"tensor {name!r}"
        rank = self._int("I")
        if not 1 <= rank <= _MAX_DIMS:
            self._fail(f"expected 1 to {_MAX_DIMS} dimensions, got {rank}")
        shape = struct.unpack(f"<{rank}Q", self._take(8 * rank))[::-1]
        if min(shape) < 1:
            self._fail(f"expected positive dimensions, got {shape}")
        type_name, block, block_bytes = _storage(self._int("I"), self._fail)
        if shape[-1] % block:
            self._fail(f"rows of {shape[-1]} values are not whole {type_name} blocks of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        return TensorInfo(name, shape, type_name, self._int("Q"), nbytes)

    def _check_placement(self, tensors: Mapping[str, TensorInfo], start: int) -> None:
        end, previous = start, ""
        for info in sorted(tensors.values(), key=lambda t: t.offset):
            self._field = f"tensor {info.name!r}"
            if info.offset < end:
                self._fail(f"overlaps tensor {previous!r}")
            end, previous = info.offset + info.nbytes, info.name
            if end > self._span.size:
                self._fail(f"ends at byte {end:,}, the file has {self._span.size:,}")


def _storage(number: int, fail: Callable[[str, str], NoReturn]) -> tuple[str, int, int]:
    """Name, values in a block, bytes of a block."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        fail(f"unknown storage type {number}", "update the gguf library: pip install -U gguf")
    return kind.name, block, nbytes
