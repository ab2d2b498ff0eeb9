"""Reads GGUF files: numbers of the model, and its parameters under their official names.

The header is parsed in `gguf_header`; quantised blocks go through the `gguf` library.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gemma_nb.checkpoints import adapters, gguf_fields, layout
from gemma_nb.checkpoints.gguf_header import REDOWNLOAD, Header, Span, TensorInfo
from gemma_nb.config import Global, LayerSpec, Sliding, TransformerConfig
from gemma_nb.errors import CheckpointError

_ROWS_AT_ONCE = 8_192  # dequantised together: bounds the temporaries of a large embedding

# So many values at most are given to the `gguf` library's loop at once: fewer take longer, and more
# leave a core's own cache (a conversion of Gemma 3 270M: 5.2 s with sixteen rows, 4.3 with these).
_VALUES_AT_ONCE = 1 << 17

_HEAD = "output.weight"
_NOT_TEXT = ("v.", "mm.")  # what images go through, where a file has that as well

_MAX_LAYERS = 256  # the largest Gemma has 62

# llama.cpp does not store it: these sizes scale queries by D / N instead of H.  (D, L) of Gemma 2
# 27B and of Gemma 3 27B.  Sources: the Gemma 2 and 3 reports and google-deepmind/gemma.
_SCALED_BY_WIDTH = {(4608, 46), (5376, 62)}
# Gemma 2 2B: as in the official tree; only how the gating matrices are kept.
_NOT_TRANSPOSED = (2304, 26)

# What is as wide as a head in every Gemma, whatever other architectures use these fields for.
_HEAD_DIMS = (
    *("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"),
    *("rope.dimension_count", "rope.dimension_count_swa"),
)
_MAX_PADDING_ROWS = 256  # of an embedding, as in `safetensors`


class GGUFFile:
    """A memory-mapped GGUF file, or several files that joined end to end are one.

    Attributes:
      name: for messages.
      metadata: key -> value; arrays of strings are lists, arrays of numbers are numpy arrays.
      tensors: name -> `TensorInfo`.

    Raises:
      CheckpointError: the file is missing, truncated, of an unknown version or contradicts itself.
    """

    def __init__(self, source: str | os.PathLike[str] | Sequence[Path], *, name: str = "") -> None:
        parts = [Path(source)] if isinstance(source, str | os.PathLike) else list(source)
        self.name = name or str(parts[0])
        self._bytes = Span(parts)
        try:
            header = Header(self._bytes, self.name)
            self.metadata, self.tensors = header.read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {self.name}: {len(self.metadata)} fields, {len(self.tensors)} tensors>"

    def close(self) -> None:
        """Unmap the file; arrays that were read stay valid, they are copies."""
        self._bytes.close()

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        """A tensor, dequantised to float32 and rounded once, to nearest even, to `dtype`.

        Raises:
          CheckpointError: there is no such tensor, or its storage type has no dequantisation.
        """
        info = self._info(name)
        out = np.empty(info.shape, dtype)
        rows, start = out.reshape(-1, info.shape[-1]), 0
        for piece in self.pieces(name):
            rows[start : start + len(piece)] = piece
            start += len(piece)
            del piece  # before the next one is made
        return out

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """A tensor as float32 (rows, columns), some rows at a time; raises like `read`."""
        info = self._info(name)
        count = math.prod(info.shape[:-1])
        stride = info.nbytes // count
        for start in range(0, count, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, count)
            first, last = info.offset + start * stride, info.offset + stop * stride
            raw = self._bytes.view(first, last).reshape(stop - start, stride)
            yield self._dequantize(info, raw)
            del raw  # a view of the mapping
            self._bytes.release(first, last)

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.name}: tensor {name!r} is missing; {REDOWNLOAD}")
        return info

    def _dequantize(self, info: TensorInfo, raw: np.ndarray) -> np.ndarray:
        """Rows of bytes (rows, stride) -> float32 (rows, columns)."""
        import gguf

        kind = gguf.GGMLQuantizationType[info.type_name]
        if kind == gguf.GGMLQuantizationType.F32:
            # A copy, since the file's offset may not be aligned to 4 bytes.
            return np.frombuffer(raw.tobytes(), "<f4").reshape(len(raw), -1)
        if kind == gguf.GGMLQuantizationType.F16:
            return np.frombuffer(raw.tobytes(), "<f2").astype(np.float32).reshape(len(raw), -1)
        # The library takes sixteen rows at a time, of a narrow matrix too few.  Blocks do not know
        # where a row ends, so several rows may pass for one; a power of two, as most heights are.
        joined = max(1, _VALUES_AT_ONCE // (16 * info.shape[-1]))
        joined = math.gcd(len(raw), 1 << (joined.bit_length() - 1))
        try:
            values = gguf.quants.dequantize(raw.reshape(len(raw) // joined, -1), kind)
            return values.reshape(len(raw), -1)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.name}: tensor {info.name!r} is stored as {info.type_name}, which the gguf "
                "library cannot dequantise; use a file quantised to Q8_0, Q4_K_M or similar"
            ) from None


def config_from_gguf(metadata: Mapping[str, Any], name: str = "GGUF file") -> TransformerConfig:
    """The model's numbers from the metadata (and its vocabulary size from the token list).

    Raises:
      CheckpointError: the architecture is none of Gemma 1, 2 and 3, or a field is missing or cannot
        be right.
    """
    adapters.refuse_gguf(metadata, name)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in gguf_fields.ARCHITECTURES:
        images = " (the part of a model for images)" if repr(architecture) == "'clip'" else ""
        raise CheckpointError(
            f"{name}: expected architecture 'gemma', 'gemma2' or 'gemma3', got "
            f"{architecture!r:.80}{images}; pass a GGUF file of Gemma 1, 2 or 3 (text, or the text "
            "part of others); Gemma 3n and Gemma 4 are not supported yet"
            f"{gguf_fields.origin(metadata)}"
        )
    fields = _Fields(metadata, f"{architecture}.", name)
    embed_dim = fields.count("embedding_length")
    num_layers = fields.count("block_count", most=_MAX_LAYERS)
    heads = fields.count("attention.head_count")
    head_dim = fields.count("attention.key_length", default=embed_dim // heads)
    fields.expect("attention.layer_norm_rms_epsilon", 1e-6, tolerance=1e-8)
    for key in _HEAD_DIMS:
        fields.expect(key, head_dim)
    by_width = (embed_dim, num_layers) in _SCALED_BY_WIDTH
    first, third = architecture == "gemma", architecture == "gemma3"
    # What llama.cpp takes where a file of Gemma 2 says nothing.
    caps = {"attn": 50.0, "final": 30.0} if architecture == "gemma2" else {"attn": 0, "final": 0}
    layers = _layers(fields, architecture, num_layers)
    # Gemma 3: 32k, and 128k where global positions are rescaled (arXiv:2503.19786, section 2).
    rescaled = any(spec.rope_scale > 1 for spec in layers)
    trained_for = 8192 if not third else 131_072 if rescaled else 32_768
    try:
        return TransformerConfig(
            num_embed=vocabulary_size(metadata, name),
            embed_dim=embed_dim,
            hidden_dim=fields.count("feed_forward_length"),
            num_heads=heads,
            num_kv_heads=fields.count("attention.head_count_kv", default=heads),
            head_dim=head_dim,
            layers=layers,
            query_pre_attn_scalar=embed_dim / heads if by_width else float(head_dim),
            use_qk_norm=third,
            use_post_attn_norm=not first,
            use_post_ffw_norm=not first,
            attn_logits_soft_cap=fields.cap("attn_logit_softcapping", caps["attn"]),
            final_logit_soft_cap=fields.cap("final_logit_softcapping", caps["final"]),
            transpose_gating_einsum=not (first or (embed_dim, num_layers) == _NOT_TRANSPOSED),
            max_context=fields.count("context_length", default=trained_for),
        )
    except ValueError as error:
        raise CheckpointError(
            f"{name}: metadata describe no possible model: {error}; {REDOWNLOAD}"
        ) from error


def _layers(fields: _Fields, architecture: str, count: int) -> tuple[LayerSpec, ...]:
    """The layers, as llama.cpp's loaders of the three architectures have them.

    It takes 10,000 for the base of Gemma 3's global layers where a file says nothing.  Its own
    converter always says it, and files that do not are meant to be read with the model's 1,000,000.
    """
    first, third = architecture == "gemma", architecture == "gemma3"
    base = fields.positive("rope.freq_base", 1_000_000.0 if third else 10_000.0)
    scale = fields.rope_scale()
    full = LayerSpec(Global(), base, scale)
    key = "attention.sliding_window"
    if first or (third and not fields.number(key, 0)):  # no window: every layer sees all
        return (full,) * count
    sliding = LayerSpec(
        Sliding(fields.count(key, default=4096)),
        fields.positive("rope.freq_base_swa", 10_000.0 if third else base),
        1.0 if third else scale,
    )
    pattern = fields.pattern("attention.sliding_window_pattern", 6 if third else 2)
    return tuple(full if pattern[i % len(pattern)] else sliding for i in range(count))


def vocabulary_size(metadata: Mapping[str, Any], name: str = "GGUF file") -> int:
    """V: the length of the token list, or the number that stands in for a list not kept."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list | int) or not tokens:
        raise CheckpointError(
            f"{name}: metadata field 'tokenizer.ggml.tokens' is missing or empty; {REDOWNLOAD}"
        )
    return tokens if isinstance(tokens, int) else len(tokens)


class _Fields:
    """Metadata of one architecture, checked as they are read."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, name: str) -> None:
        self._metadata, self._prefix, self._name = metadata, prefix, name

    def _fail(self, key: str, problem: str, remedy: str = REDOWNLOAD) -> NoReturn:
        raise CheckpointError(
            f"{self._name}: metadata field {self._prefix + key!r}: {problem}; {remedy}"
            f"{gguf_fields.origin(self._metadata)}"
        )

    def number(self, key: str, default: float | None = None) -> float:
        value = self._metadata.get(self._prefix + key, default)
        if value is None:
            self._fail(key, "is missing")
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            self._fail(key, f"expected a number, got {value!r}")
        return value

    def count(self, key: str, most: int = (1 << 31) - 1, default: int | None = None) -> int:
        """A whole number; one for each layer will do where all are the same."""
        each = self._metadata.get(self._prefix + key)
        each = each.tolist() if isinstance(each, np.ndarray) else each
        if isinstance(each, list) and each and all(one == each[0] for one in each):
            alike = _Fields({self._prefix + key: each[0]}, self._prefix, self._name)
            return alike.count(key, most)
        value = self.number(key, default)
        if not isinstance(value, int) or not 1 <= value <= most:
            self._fail(key, f"expected a whole number from 1 to {most:,}, got {value!r}")
        return value

    def expect(self, key: str, wanted: float, tolerance: float = 0.0) -> None:
        value = self.number(key, wanted)
        if abs(value - wanted) > tolerance:
            self._fail(key, f"expected {wanted:g}, got {value:g}")

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            self._fail(key, f"expected a positive number, got {value:g}")
        return value

    def cap(self, key: str, default: float) -> float | None:
        """A soft-cap; 0 stands for none."""
        return self.positive(key, default) if self.number(key, default) else None

    def pattern(self, key: str, default: int) -> tuple[bool, ...]:
        """The global layers: every nth, or listed one by one."""
        value = self._metadata.get(self._prefix + key, default)
        if isinstance(value, list | np.ndarray) and len(value):  # true: the layer slides
            return tuple(not sliding for sliding in value)
        if not isinstance(value, int) or not 1 <= value <= _MAX_LAYERS:
            self._fail(key, f"expected a number from 1 to {_MAX_LAYERS}, got {value!r}")
        return (False,) * (value - 1) + (True,)

    def rope_scale(self) -> float:
        """The divisor of positions; a factor of no type is linear, and 0 is none."""
        kind = self._metadata.get(self._prefix + "rope.scaling.type", "linear")
        if not isinstance(kind, str) or kind not in ("none", "linear"):
            remedy = "use a file of the model as released, whose positions are not stretched so"
            self._fail("rope.scaling.type", f"expected 'linear', got {kind!r}", remedy)
        factor = self.number("rope.scaling.factor", 1.0)
        return 1.0 if kind == "none" or not factor else self.positive("rope.scaling.factor", 1.0)


def official_params(
    file: GGUFFile, config: TransformerConfig, dtype: Any = np.float32
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Parameters with official names and shapes, one leaf at a time: (path, array of `dtype`).

    Every name and shape is checked before the first leaf is read.

    Raises:
      CheckpointError: a tensor is missing, or its shape is not the one `config` asks for.
    """
    leaves = list(layout.leaves(config))
    places = _places(leaves, file.tensors)
    embedding = leaves[0].gguf[0]
    origin = gguf_fields.origin(file.metadata)
    known = {_HEAD} | {place.tensor for place in places.values()}
    foreign = [
        name for name in file.tensors if name not in known and not name.startswith(_NOT_TEXT)
    ]
    for name, place in places.items():
        info = file.tensors.get(place.tensor)
        if info is None:
            there = f", {foreign[0]!r} is there" if foreign else ""
            raise CheckpointError(
                f"{file.name}: tensor {name!r} is missing{there}; {REDOWNLOAD}{origin}"
            )
        if info.shape != place.shape and not (name == embedding and _padded(info, place.shape)):
            raise CheckpointError(
                f"{file.name}: tensor {info.name!r}: expected shape {place.shape} from the "
                f"metadata, got {info.shape}; {REDOWNLOAD}{origin}"
            )
    if foreign:
        raise CheckpointError(
            f"{file.name}: tensor {foreign[0]!r} belongs to no Gemma 1, 2 or 3 text model of "
            f"{config.num_layers} layers; use a file of the model as released (adapters have "
            f"to be merged first){origin}"
        )
    _check_head(file, embedding)
    for leaf in leaves:
        if leaf.is_norm:  # llama.cpp stores 1 + scale; subtract before rounding to `dtype`
            yield leaf.path, (file.read(leaf.gguf[0]) - np.float32(1)).astype(dtype)
        else:
            matrices = [file.read(places[n].tensor, dtype)[places[n].rows] for n in leaf.gguf]
            yield leaf.path, leaf.join(matrices)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Place of a matrix: the tensor, the shape that it is to have, and the matrix's rows of it."""

    tensor: str
    shape: tuple[int, ...]
    rows: slice


def _places(leaves: Sequence[layout.Leaf], tensors: Mapping[str, Any]) -> dict[str, _Place]:
    """Every matrix by its own name; llama.cpp also reads queries, keys and values as one tensor."""
    shapes = {n: s for leaf in leaves for n, s in zip(leaf.gguf, leaf.shapes, strict=True)}
    places = {name: _Place(name, shape, slice(0, shape[0])) for name, shape in shapes.items()}
    for name in shapes:
        fused = name.replace(".attn_q.", ".attn_qkv.")
        if fused == name or fused not in tensors or name in tensors:
            continue
        parts = [name.replace(".attn_q.", f".attn_{part}.") for part in "qkv"]
        height, start = sum(shapes[part][0] for part in parts), 0
        for part in parts:
            stop = start + shapes[part][0]
            places[part] = _Place(fused, (height, *shapes[part][1:]), slice(start, stop))
            start = stop
    return places


def _padded(info: TensorInfo, shape: tuple[int, ...]) -> bool:
    """True where an embedding has rows behind those of the vocabulary, to round their number up."""
    surplus = info.shape[0] - shape[0]
    return info.shape[1:] == shape[1:] and 0 < surplus <= _MAX_PADDING_ROWS


def _check_head(file: GGUFFile, embedding: str) -> None:
    """A stored vocabulary head has to be the embedding, which is the head of every Gemma."""
    head, own = file.tensors.get(_HEAD), file.tensors[embedding]
    if head is None:
        return
    differs = "its shape is another"
    if head.shape == own.shape:
        both = zip(file.pieces(_HEAD), file.pieces(embedding), strict=True)
        if all(np.array_equal(one, other) for one, other in both):
            return
        differs = f"stored as {head.type_name}, the embedding as {own.type_name}"
    raise CheckpointError(
        f"{file.name}: tensor {_HEAD!r}: a head of its own ({differs}); Gemma's is the embedding: "
        "use a file without it, or with the same values in both"
        f"{gguf_fields.origin(file.metadata)}"
    )
