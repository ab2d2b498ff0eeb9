"""Hugging Face folders: config.json and safetensors files, whole or in shards.

Files are mapped into memory by the `safetensors` library and read in pieces.  Each piece maps its
file anew: pages that a mapping has touched count as this process's memory until it is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_nb.checkpoints import arrays, chat_templates, folders, layout
from gemma_nb.checkpoints.safetensors_header import odd_tensor
from gemma_nb.config import TransformerConfig
from gemma_nb.errors import CheckpointError
from gemma_nb.presets import Tuning

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_TENSORS = 1 << 14  # the largest Gemma with its vision encoder has some 1,300
_PIECE = 1 << 26  # bytes read under one mapping
_REMEDY = "the file is incomplete or damaged: download it again"

# The text model inside a Gemma3ForConditionalGeneration, by old and new names, and what stands
# beside it.
_INSIDE = re.compile(r"^(?:language_model\.|model\.language_model\.(?!model\.))")
_NOT_TEXT = re.compile(r"^(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
_BUFFERS = re.compile(r"\.(?:inv_freq|position_ids|masked_bias)$")  # computed, not learned
_HEAD = "lm_head.weight"

# Hugging Face rounds the vocabulary of the multimodal models up, from 262,144 to 262,208 rows.
_MAX_PADDING_ROWS = 256


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
    """Whether a folder looks like a Hugging Face checkpoint."""
    return (folder / CONFIG).exists() or any(folder.glob("*.safetensors"))


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
          vocab_size: pieces of the tokenizer; rows of the embedding beyond them are dropped.
          config: read from config.json where it is not given.
        """
        self.name = str(folder)
        if config is None:
            config = _config(folder)
        self._tensors = _text_tensors(_listed(folder))
        self.config = self._without_padding(config, vocab_size)
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

    def _without_padding(
        self, config: TransformerConfig, vocab_size: int | None
    ) -> TransformerConfig:
        if vocab_size is None or config.num_embed == vocab_size:
            return config
        if 0 < config.num_embed - vocab_size <= _MAX_PADDING_ROWS:
            return dataclasses.replace(config, num_embed=vocab_size)
        raise CheckpointError(
            f"{self.name}: the tokenizer has {vocab_size:,} pieces, {CONFIG} says "
            f"{config.num_embed:,}; put the tokenizer.model of this checkpoint into the folder"
        )

    def _check(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for leaf in layout.leaves(self.config):
            expected.update(zip(leaf.hf, leaf.shapes, strict=True))
        embedding = next(iter(expected))
        for name, shape in expected.items():
            tensor = self._tensors.get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{self.name}: tensor {name!r} is missing; the checkpoint is incomplete: "
                    "download it again"
                )
            fits = tensor.shape == shape
            if name == embedding and len(tensor.shape) == 2:  # padding rows were allowed for
                surplus = tensor.shape[0] - shape[0]
                fits = tensor.shape[1:] == shape[1:] and 0 <= surplus <= _MAX_PADDING_ROWS
            if not fits:
                raise CheckpointError(
                    f"{tensor.what}: expected shape {shape} from {CONFIG}, got {tensor.shape}; "
                    "the two are of different models: download both from one place"
                )
            if tensor.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{tensor.what}: expected one of {', '.join(sorted(_FLOATS))}, got "
                    f"{tensor.dtype}; use a checkpoint that is not quantised"
                )
        for name, tensor in self._tensors.items():
            if name not in expected and name != _HEAD:
                raise CheckpointError(
                    f"{tensor.what} belongs to no Gemma 1, 2 or 3 text model; adapters have to be "
                    "merged and quantised weights dequantised first"
                )

    def _check_head(self) -> None:
        """A stored vocabulary head has to be the embedding, which is the head of every Gemma."""
        head = self._tensors.get(_HEAD)
        if head is None:
            return
        embedding = self._tensors[next(layout.leaves(self.config)).hf[0]]
        same = head.shape == embedding.shape and head.dtype == embedding.dtype
        if same:
            for rows in _pieces(head, head.shape[0]):
                one, other = _slice(head, rows), _slice(embedding, rows)
                same = same and one.tobytes() == other.tobytes()
        if not same:
            raise CheckpointError(
                f"{head.what} differs from the embedding: a head of its own, which no Gemma has; "
                "use a checkpoint with tied embeddings"
            )


def _config(folder: Path) -> TransformerConfig:
    fields = folders.read_json(folder, CONFIG)
    if "quantization_config" in fields:
        raise CheckpointError(
            f"{folder / CONFIG}: quantised weights, which are not read; use the checkpoint that "
            "they were made from, or a GGUF file"
        )
    try:
        return TransformerConfig.from_hf(fields)
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
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        folders.refuse_pickles(folder)
        raise CheckpointError(
            f"{folder} has no *.safetensors file; download the weights beside its {CONFIG}"
        )
    if SINGLE in names:
        names = [SINGLE]
    elif len(names) > 1:
        raise CheckpointError(
            f"{folder} has {len(names)} *.safetensors files and no {INDEX}; download the index"
        )
    return _header(folder, names[0])


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
    headers = {file: _header(folder, file) for file in sorted(set(where.values()))}
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
        raise CheckpointError(f"{folder / name}: {folders.NO_PICKLES}")
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


def _text_tensors(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of a text-only checkpoint, without what belongs to images."""
    text: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if _NOT_TEXT.match(name) or _BUFFERS.search(name):
            continue
        plain = name
        if match := _INSIDE.match(name):
            rest = name[match.end() :]
            plain = rest if rest.startswith("model.") or rest == _HEAD else f"model.{rest}"
        if plain in text:
            raise CheckpointError(
                f"{tensor.what} and {text[plain].stored_name!r} are the same parameter; {_REMEDY}"
            )
        text[plain] = tensor
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
        folders.refuse_pickle(path)
        odd = odd_tensor(path)
        reason = f"{odd}; {error}" if odd else str(error)
        raise CheckpointError(
            f"{what}: no valid safetensors file ({reason:.600}); {_REMEDY}"
        ) from error
