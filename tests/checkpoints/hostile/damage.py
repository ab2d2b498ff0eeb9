"""How checkpoints are damaged."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file, save_file

from tests.checkpoints import written

# Writes a damaged checkpoint into a folder that is not there yet; what is said about it.
Case = tuple[Callable[[Path], Path], str]


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self):
        return os.mkdir, (str(self.where),)


def hf(folder: Path, **options) -> Path:
    return written.hugging_face(folder, written.params(), shards=1, **options)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


def raw_safetensors(path: Path, header: dict | bytes, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def truncate(path: Path, part: float) -> None:
    os.truncate(path, int(path.stat().st_size * part))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
