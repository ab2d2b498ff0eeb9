"""Hugging Face folders: config.json and safetensors files."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_nb.checkpoints import (
    arrays,
    chat_templates,
    folders,
    layout,
    names,
    quantised,
    safetensors_files,
)
from gemma_nb.checkpoints.safetensors_files import CONFIG, INDEX, Tensor
from gemma_nb.config import TransformerConfig
from gemma_nb.errors import CheckpointError
from gemma_nb.presets import Tuning

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# Hugging Face rounds the vocabulary of the multimodal models up, from 262,144 to 262,208 rows.
_MAX_PADDING_ROWS = 256
_PADDED_TO = 8  # the least multiple that trainers round up to


def is_folder(folder: Path) -> bool:
    """True where a folder looks like a Hugging Face checkpoint, also one without its weights."""
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
        """Read names and shapes.

        Args:
          folder: that holds config.json.
          vocab_size: pieces of the tokenizer, as of `keep_rows`; None to keep all rows.
          config: read from config.json where it is not given.
        """
        self.name = str(folder)
        self._untied = False
        if config is None:
            config, self._untied = _config(folder)
        self._stored = safetensors_files.listed(folder)
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
                safetensors_files.read(self._tensors[name], shape[0], dtype)
                for name, shape in zip(leaf.hf, leaf.shapes, strict=True)
            ]
            yield leaf.path, arrays.settled(leaf.join(pieces), dtype)

    def keep_rows(self, vocab_size: int) -> None:
        """Drop the rows of the embedding that only pad it, beyond the tokenizer's pieces.

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
        for piece in safetensors_files.pieces(head, rows) if same else ():
            a, b = (safetensors_files.read_rows(tensor, piece) for tensor in (head, embedding))
            same = same and np.array_equal(a, b)
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


def _text_tensors(stored: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Tensors by the names of a text-only checkpoint, without what belongs to images."""
    text: dict[str, Tensor] = {}
    for name, plain in names.text_names(stored, config):
        if plain in text:
            raise CheckpointError(
                f"{stored[name].what} and {text[plain].stored_name!r} are the same parameter; pass "
                "a folder with one model"
            )
        text[plain] = stored[name]
    return text
