"""The journal: records, only ever appended, of changes since a conversation's file was written.

    header   b"gemma_nb journal 1\\n", then the generation of the file that it continues and b"\\n"
    record   <u64 length of the payload> <u32 CRC-32 of the payload> payload
    payload  <u32 length of the JSON> JSON, then the blobs it counts in "evidence", one by one

A record that was cut off by the end of the process, or of the machine, is left out when reading.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from gemma_nb.chat.saving import archive
from gemma_nb.errors import ConversationError

_MAGIC = b"gemma_nb journal 1\n"
_GENERATION_SIZE = 32  # hexadecimal digits
_HEADER_SIZE = len(_MAGIC) + _GENERATION_SIZE + 1
_FRAME = struct.Struct("<QI")
_LENGTH = struct.Struct("<I")

Record = tuple[dict[str, Any], dict[str, bytes]]


def path_of(path: Path) -> Path:
    """Path of the journal of the file at `path`: beside the file itself, not a link to it."""
    real = archive.real(path)
    return real.with_name(f"{real.name}.journal")


def remove(path: Path) -> None:
    """Removes the journal of the file at `path`, whose content the file has."""
    path_of(path).unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Keeps the journal of the file at `path` under another name: not all of it was read."""
    beside, number = path_of(path), 1
    kept = beside.with_name(f"{beside.name}.left-out")
    while os.path.lexists(kept):
        number += 1
        kept = beside.with_name(f"{beside.name}.left-out-{number}")
    with contextlib.suppress(FileNotFoundError):
        os.replace(beside, kept)


def generation_of(path: Path) -> str | None:
    """The generation that the journal at `path` continues; None where there is none."""
    with contextlib.suppress(OSError), archive.opened(path) as file:
        header = file.read(_HEADER_SIZE)
        if len(header) == _HEADER_SIZE and header.startswith(_MAGIC):
            return header[len(_MAGIC) : -1].decode("ascii", "replace")
    return None


@dataclasses.dataclass(frozen=True)
class Journal:
    """A journal as far as it can be read.

    Attributes:
      generation: of the file that it continues.
      records: (JSON, blobs by their names) pairs, in order.
      damaged: bytes at its end that are more than a record that was cut off; 0 if it is sound.
    """

    generation: str
    records: list[Record]
    damaged: int = 0


class Writer:
    """Appends to a journal.

    Attributes:
      size: bytes written so far.
    """

    def __init__(self, path: Path, generation: str) -> None:
        """Replaces the journal at `path` by an empty one.

        Raises:
          ConversationError: it cannot be written.
        """
        self._path = path
        with archive.replacing(path) as file:
            file.write(_MAGIC + generation.encode("ascii") + b"\n")
        self.size = _HEADER_SIZE
        self._file: BinaryIO = open(path, "r+b", buffering=0)  # noqa: SIM115
        self._file.seek(0, os.SEEK_END)

    def append(self, changes: dict[str, Any], blobs: dict[str, bytes]) -> dict[str, int]:
        """Writes one record, to the disk.

        Returns:
          Where each blob begins in the file.

        Raises:
          OSError: it could not be written whole; this journal cannot be continued.
        """
        sizes = {name: len(blob) for name, blob in blobs.items()}
        text = json.dumps({**changes, "evidence": sizes}, allow_nan=False, separators=(",", ":"))
        raw = text.encode("ascii")
        payload = b"".join([_LENGTH.pack(len(raw)), raw, *blobs.values()])
        frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        if self._file.write(frame) != len(frame):
            raise OSError(f"the disk took only a part of {len(frame):,} bytes")
        os.fsync(self._file.fileno())
        places, at = {}, self.size + _FRAME.size + _LENGTH.size + len(raw)
        for name, size in sizes.items():
            places[name] = at
            at += size
        self.size += len(frame)
        return places

    def read(self, place: int, size: int) -> bytes:
        """Bytes written before."""
        self._file.seek(place)
        data = self._file.read(size)
        self._file.seek(0, os.SEEK_END)
        return data

    def is_where_it_was(self) -> bool:
        """Whether the path still leads to this journal, rather than to somebody else's."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def still_there(self) -> bool:
        """Whether it is where it was, and as long as it was left."""
        return self.is_where_it_was() and os.fstat(self._file.fileno()).st_size == self.size

    def remove(self) -> None:
        """Removes the file, whose content is elsewhere, and lets go of it."""
        if self.is_where_it_was():
            self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


def read(path: Path) -> Journal | None:
    """The journal at `path`; None if there is none, or nothing in it.

    Raises:
      ConversationError: it cannot be read, or is no journal.
    """
    try:
        with archive.opened(path) as file:
            data = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise archive.unreadable(path, error) from error
    if len(data) < _HEADER_SIZE:
        return None
    header = data[:_HEADER_SIZE]
    if not header.startswith(_MAGIC):
        raise ConversationError(
            f"{path} is not the journal of a conversation: expected it to begin with {_MAGIC!r}.  "
            "Move it away to load the conversation without it"
        )
    generation = header[len(_MAGIC) : -1].decode("ascii", "replace")
    records: list[Record] = []
    at = _HEADER_SIZE
    while (payload := _payload(data, at)) is not None:
        try:
            records.append(_parse(payload))
        except archive.DAMAGE:
            break
        at += _FRAME.size + len(payload)
    return Journal(generation, records, 0 if _cut_off(data, at) else len(data) - at)


def _payload(data: bytes, at: int) -> bytes | None:
    """The payload of the record at `at`, if it is whole."""
    start = at + _FRAME.size
    if start > len(data):
        return None
    size, crc = _FRAME.unpack_from(data, at)
    if size > len(data) - start:
        return None
    payload = data[start : start + size]
    return payload if zlib.crc32(payload) == crc else None


def _cut_off(data: bytes, at: int) -> bool:
    """Whether what is left at `at` is nothing, or the beginning of one record."""
    start = at + _FRAME.size
    if start > len(data):
        return True
    size, _ = _FRAME.unpack_from(data, at)
    return size > len(data) - start


def _parse(payload: bytes) -> Record:
    (length,) = _LENGTH.unpack_from(payload)
    at = _LENGTH.size + length
    changes = json.loads(payload[_LENGTH.size : at])
    blobs = {}
    for name, size in changes.pop("evidence").items():
        blobs[name] = payload[at : at + size]
        at += size
    if at != len(payload):
        raise ValueError(f"expected {at:,} bytes, got {len(payload):,}")
    return changes, blobs
