"""Hugging Face folders: config.json and safetensors files, whole or in shards.

Files are mapped into memory by the `safetensors` library and read in pieces.  Each piece maps its
file anew: pages that a mapping has touched count as this process's memory until it is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_nb.checkpoints import (
    arrays,
    chat_templates,
    folders,
    kinds,
    layout,
    names,
    quantised,
)
from gemma_nb.checkpoints.safetensors_header import odd_tensor
from gemma_nb.config import TransformerConfig
from gemma_nb.errors import CheckpointError
from gemma_nb.presets import Tuning

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
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

# Hugging Face rounds the vocabulary of the multimodal models up, from 262,144 to 262,208 rows.
_MAX_PADDING_ROWS = 256
_PADDED_TO = 8  # the least multiple that trainers round up to


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is: its file, its name there, and what the file says about it."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def what(self) -> str:
        """File and tensor, for messages."""
        return f"{self.file}: tensor {self.stored_name!r}"


def is_folder(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face checkpoint, also one without its weights."""
    if any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
        return True
    return (folder / CONFIG).exists() and not any(folder.glob("*.gguf"))


class HuggingFaceFolder:
    """A folder as `save_pretrained` and the Hugging Face hub lay it out.

    Nothing but names and shapes is read before `params` is called.

    Attributes:
      name: of the folder, for messages.
      config: the model's numbers, from config.json.
      tuning: "instruction" where the folder has a chat template, else "base".

    Raises:
      CheckpointError: the folder is damaged, or is no Gemma 1, 2 or 3 model.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int | None = None,
        config: TransformerConfig | None = None,
    ) -> None:
        """Reads names and shapes.

        Args:
          folder: that holds config.json.
          vocab_size: pieces of the tokenizer, as of `keep_rows`; None to keep all rows.
          config: read from config.json where it is not given.
        """
        self.name = str(folder)
        self._untied = False
        if config is None:
            config, self._untied = _config(folder)
        self._stored = _listed(folder)
        self._tensors = _text_tensors(self._stored, config)
        self.config = self._with_all_rows(config)
        if vocab_size is not None:
            self.keep_rows(vocab_size)
        self._check()
        templates = chat_templates.of_folder(folder)
        self.tuning: Tuning = "base" if templates is None else "instruction"

    def params(self, dtype: Any) -> Iterator[tuple[layout.Path, np.ndarray]]:
        """Parameters one by one, as (official path, array of `dtype`).

        Raises:
          CheckpointError: a tensor cannot be read.
        """
        self._check_head()
        for leaf in layout.leaves(self.config):
            pieces = [
                _read(self._tensors[name], shape[0], dtype)
                for name, shape in zip(leaf.hf, leaf.shapes, strict=True)
            ]
            yield leaf.path, arrays.settled(leaf.join(pieces), dtype)

    def keep_rows(self, vocab_size: int) -> None:
        """Drops the rows of the embedding that only pad it, beyond the tokenizer's pieces.

        Rows that are no padding are kept, with a warning: they may have been trained.

        Raises:
          CheckpointError: there are fewer rows than pieces, or too many more.
        """
        rows = self.config.num_embed
        surplus = rows - vocab_size
        if not 0 <= surplus <= _MAX_PADDING_ROWS:
            raise CheckpointError(
                f"{self.name}: the tokenizer has {vocab_size:,} pieces, {CONFIG} says {rows:,}; "
                "put the tokenizer's files of this checkpoint into the folder"
            )
        if surplus and rows % _PADDED_TO and surplus % _PADDED_TO:
            warnings.warn(
                f"{self.name}: the embedding has {rows:,} rows, the tokenizer {vocab_size:,} "
                "pieces; the rows that no token is known for are kept: if tokens were added, put "
                "the files that name them (tokenizer.json, added_tokens.json, "
                "tokenizer_config.json) into the folder",
                stacklevel=5,  # whoever called gnb.load
            )
        else:
            self.config = dataclasses.replace(self.config, num_embed=vocab_size)

    def _with_all_rows(self, config: TransformerConfig) -> TransformerConfig:
        """The embedding may have been resized without a word in config.json."""
        tensor = self._tensors.get(next(layout.leaves(config)).hf[0])
        rows = tensor.shape[0] if tensor is not None and len(tensor.shape) == 2 else 0
        if 0 < rows - config.num_embed <= _MAX_PADDING_ROWS:
            return dataclasses.replace(config, num_embed=rows)
        return config

    def _check(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for leaf in layout.leaves(self.config):
            expected.update(zip(leaf.hf, leaf.shapes, strict=True))
        known = {*expected, names.HEAD}
        foreign = [tensor for name, tensor in self._tensors.items() if name not in known]
        if foreign or not all(t.dtype in _FLOATS for t in self._tensors.values()):
            self._refuse_quantised()
        missing = [name for name in expected if name not in self._tensors]
        if foreign:
            lacks = f", and {missing[0]!r} is missing" if missing else ""
            raise CheckpointError(
                f"{foreign[0].what} belongs to no Gemma 1, 2 or 3 text model of "
                f"{self.config.num_layers} layers{lacks}; adapters have to be merged and quantised "
                "weights dequantised first"
            )
        if missing:
            raise CheckpointError(
                f"{self.name}: tensor {missing[0]!r} is missing; the checkpoint is incomplete: "
                "download it again"
            )
        for name, shape in expected.items():
            self._check_tensor(self._tensors[name], shape, padded=name == next(iter(expected)))
        if self._untied and names.HEAD not in self._tensors:
            raise CheckpointError(
                f"{self.name}: {CONFIG} promises a head of its own (tie_word_embeddings is false) "
                f"and tensor {names.HEAD!r} is missing; download the whole checkpoint again, or "
                "put true there if the head is the embedding, as in every Gemma"
            )

    def _check_tensor(self, tensor: Tensor, shape: tuple[int, ...], *, padded: bool) -> None:
        """One tensor against what the configuration asks for; padding rows are allowed for."""
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{tensor.what}: expected one of {', '.join(sorted(_FLOATS))}, got {tensor.dtype}; "
                "a library has packed it, so use a checkpoint that is not quantised"
            )
        fits = tensor.shape == shape
        if padded and len(tensor.shape) == 2:
            surplus = tensor.shape[0] - shape[0]
            fits = tensor.shape[1:] == shape[1:] and 0 <= surplus <= _MAX_PADDING_ROWS
        if not fits:
            raise CheckpointError(
                f"{tensor.what}: expected shape {shape} from {CONFIG}, got {tensor.shape}; "
                "the two are of different models: download both from one place"
            )

    def _refuse_quantised(self) -> None:
        """Names the library that has packed the weights, where they show it."""
        if (found := quantised.by_tensors(self._stored)) is not None:
            library, name = found
            raise CheckpointError(
                f"{self._stored[name].what}: quantised weights, which are not read (by {library}); "
                f"{quantised.REMEDY}"
            )

    def _check_head(self) -> None:
        """A stored vocabulary head has to be the embedding, which is the head of every Gemma.

        What counts are the values of the rows that are read, whatever they are stored as.
        """
        head = self._tensors.get(names.HEAD)
        if head is None:
            return
        embedding = self._tensors[next(layout.leaves(self.config)).hf[0]]
        rows = self.config.num_embed
        same = head.shape[1:] == embedding.shape[1:] and rows <= head.shape[0]
        same = same and head.dtype in _FLOATS
        for piece in _pieces(head, rows) if same else ():
            same = same and np.array_equal(_slice(head, piece), _slice(embedding, piece))
        if not same:
            raise CheckpointError(
                f"{head.what} differs from the embedding: a head of its own, which no Gemma has; "
                "use a checkpoint with tied embeddings"
            )


def _config(folder: Path) -> tuple[TransformerConfig, bool]:
    """The model's numbers, and whether the file says that its head is not the embedding."""
    fields = folders.read_json(folder, CONFIG)
    if (how := quantised.by_config(fields)) is not None:
        raise CheckpointError(
            f"{folder / CONFIG}: quantised weights, which are not read{how}; {quantised.REMEDY}"
        )
    # Whether it is the embedding all the same is seen in the weights.
    tied = {"tie_word_embeddings": None}
    untied = fields.get("tie_word_embeddings") is False
    fields |= tied
    if isinstance(text := fields.get("text_config"), dict):
        untied |= text.get("tie_word_embeddings") is False
        fields["text_config"] = text | tied
    try:
        return TransformerConfig.from_hf(fields), untied
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        problem = str(error).removeprefix(f"{CONFIG}: ")
        raise CheckpointError(
            f"{folder / CONFIG}: {problem}; this has to be the configuration of "
            "a Gemma 1, 2 or 3 model (Gemma 3n and 4 are not supported yet): pass the folder of "
            "one, or download the file again"
        ) from error


def _listed(folder: Path) -> dict[str, Tensor]:
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
    """Which weights a folder has that are not read, for a message."""
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


def _text_tensors(stored: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """By the names of a text-only checkpoint, without what belongs to images."""
    text: dict[str, Tensor] = {}
    for name, plain in names.text_names(stored, config):
        if plain in text:
            raise CheckpointError(
                f"{stored[name].what} and {text[plain].stored_name!r} are the same parameter; pass "
                "a folder with one model"
            )
        text[plain] = stored[name]
    return text


def _read(tensor: Tensor, rows: int, dtype: Any) -> np.ndarray:
    """The first `rows` rows of a tensor in `dtype`, converted piece by piece."""
    out = arrays.empty((rows, *tensor.shape[1:]), dtype)
    for piece in _pieces(tensor, rows):
        out[piece] = _slice(tensor, piece)
    return out


def _pieces(tensor: Tensor, rows: int) -> Iterator[slice]:
    row_bytes = 8 * int(np.prod(tensor.shape[1:], dtype=np.int64))
    step = max(1, _PIECE // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _slice(tensor: Tensor, rows: slice) -> np.ndarray:
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
