"""GGUF models in several files, as llama.cpp's `gguf-split` writes them.

Each file is a GGUF file of its own, with a header and some of the tensors; the first has the
metadata of the model.  (A file that was merely cut into pieces is read by `GGUFFile` itself.)

Format: https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_nb.checkpoints import folders
from gemma_nb.checkpoints.gguf import GGUFFile
from gemma_nb.errors import CheckpointError

_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_MAX_FILES = 1000


def siblings(path: Path) -> list[Path]:
    """The files of the model that `path` is a file of, in order; `path` alone if it is whole.

    Raises:
      CheckpointError: one of them is missing.
    """
    match = _NAME.match(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= _MAX_FILES:
        raise CheckpointError(
            f"{path}: expected a number from 00001 to {count:05} in the name; give the file the "
            "name that it was published under"
        )
    files = [
        path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]
    for file in files:
        if not file.exists():
            raise CheckpointError(
                f"{file} is missing; the model comes in {count} files, which have to be in one "
                "folder: download all of them"
            )
        if file != path:
            folders.member(path.parent, file.name)
    return files


class SplitGGUF:
    """Several GGUF files that are one model; stands in for a `GGUFFile`.

    Attributes:
      name: of the first file, for messages.
      metadata: of the first file.
      tensors: of all files, by name.

    Raises:
      CheckpointError: a file is damaged, or they do not belong together.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.name = str(files[0])
        self._files: list[GGUFFile] = []
        try:
            for number, path in enumerate(files):
                file = GGUFFile(path)
                self._files.append(file)
                _expect(file, "split.no", number)
                _expect(file, "split.count", len(files))
            self.metadata = self._files[0].metadata
            self._home = {name: file for file in self._files for name in file.tensors}
            self.tensors = {name: file.tensors[name] for name, file in self._home.items()}
            count = sum(len(file.tensors) for file in self._files)
            if len(self.tensors) != count:
                twice = next(n for f in self._files for n in f.tensors if self._home[n] is not f)
                raise CheckpointError(
                    f"{self._home[twice].name}: tensor {twice!r} is in another file as well; the "
                    "files belong to different models: download all of them again"
                )
            _expect(self._files[0], "split.tensors.count", count)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SplitGGUF:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files."""
        for file in self._files:
            file.close()

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        """A tensor; like `GGUFFile.read`."""
        return self._home.get(name, self._files[0]).read(name, dtype)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """A tensor, some rows at a time; like `GGUFFile.pieces`."""
        return self._home.get(name, self._files[0]).pieces(name)


def open_files(files: Sequence[Path], name: str) -> GGUFFile | SplitGGUF:
    """The model in `files`: one file, one file in pieces, or `gguf-split`'s files.

    Args:
      files: in order.
      name: for messages.

    Raises:
      CheckpointError: a file is damaged, missing or of another model.
    """
    if len(files) > 1 and all(_NAME.match(file.name) for file in files):
        return SplitGGUF(files)
    file = GGUFFile(files, name=name)
    count = file.metadata.get("split.count", 1)
    if not isinstance(count, int) or count > 1:
        file.close()
        raise CheckpointError(
            f"{name}: this is one of {count!r} files of a model, and its name does not say which; "
            "rename them as they were published, for example model-00001-of-00002.gguf"
        )
    return file


def _expect(file: GGUFFile, key: str, wanted: int) -> None:
    value = file.metadata.get(key)
    if value != wanted or isinstance(value, bool):
        raise CheckpointError(
            f"{file.name}: metadata field {key!r}: expected {wanted}, got {value!r}; the files "
            "belong to different models or have been renamed: download all of them again"
        )
