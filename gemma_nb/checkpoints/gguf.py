"""Reads GGUF files: numbers of the model, and its parameters under their official names.

The header is parsed in `gguf_header`; quantised blocks go through the `gguf` library.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gemma_nb.checkpoints import adapters, layout
from gemma_nb.checkpoints.gguf_header import REDOWNLOAD, Header, Span, TensorInfo
from gemma_nb.config import Global, LayerSpec, TransformerConfig, interleave
from gemma_nb.errors import CheckpointError

_ROWS_AT_ONCE = 8_192  # dequantised together: bounds the temporaries of a large embedding

# So many values at most are given to the `gguf` library's loop at once: fewer take longer, and more
# leave a core's own cache (a conversion of Gemma 3 270M: 5.2 s with sixteen rows, 4.3 with these).
_VALUES_AT_ONCE = 1 << 17

_NOT_TEXT = ("v.", "mm.")  # what images go through, where a file has that as well

_MAX_LAYERS = 256  # the largest Gemma has 62

# llama.cpp does not store it: these sizes scale queries by D / N instead of H.  (D, L) of Gemma 2
# 27B and of Gemma 3 27B.  Sources: the Gemma 2 and 3 reports and google-deepmind/gemma.
_SCALED_BY_WIDTH = {(4608, 46), (5376, 62)}
# Gemma 2 2B: as in the official tree; only how the gating matrices are kept.
_NOT_TRANSPOSED = (2304, 26)

ARCHITECTURES = ("gemma", "gemma2", "gemma3")


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
        """Unmaps the file; arrays that were read stay valid, they are copies."""
        self._bytes.close()

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        """A tensor, dequantised to float32 and rounded once, to nearest even, to `dtype`.

        Raises:
          CheckpointError: there is no such tensor, or its storage type has no dequantisation.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.name}: tensor {name!r} is missing; {REDOWNLOAD}")
        out = np.empty(info.shape, dtype)
        rows = out.reshape(-1, info.shape[-1])
        stride = info.nbytes // len(rows)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, len(rows))
            first, last = info.offset + start * stride, info.offset + stop * stride
            raw = self._bytes.view(first, last).reshape(stop - start, stride)
            rows[start:stop] = self._dequantize(info, raw)
            self._bytes.release(first, last)
        return out

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
      CheckpointError: the architecture is none of `ARCHITECTURES`, or a field is missing or cannot
        be right.
    """
    adapters.refuse_gguf(metadata, name)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{name}: expected architecture 'gemma', 'gemma2' or 'gemma3', got "
            f"{architecture!r:.80}; pass a GGUF file of Gemma 1, 2 or 3 (text, or the text part of "
            "others); Gemma 3n and Gemma 4 are not supported yet"
        )
    fields = _Fields(metadata, f"{architecture}.", name)
    fields.expect("attention.layer_norm_rms_epsilon", 1e-6, tolerance=1e-8)
    head_dim = fields.count("attention.key_length")
    fields.expect("attention.value_length", head_dim)
    embed_dim = fields.count("embedding_length")
    num_layers = fields.count("block_count", most=_MAX_LAYERS)
    heads = fields.count("attention.head_count")
    by_width = (embed_dim, num_layers) in _SCALED_BY_WIDTH
    first, third = architecture == "gemma", architecture == "gemma3"
    # What llama.cpp takes where a file of Gemma 2 says nothing.
    caps = {"attn": 50.0, "final": 30.0} if architecture == "gemma2" else {"attn": 0, "final": 0}
    try:
        return TransformerConfig(
            num_embed=vocabulary_size(metadata, name),
            embed_dim=embed_dim,
            hidden_dim=fields.count("feed_forward_length"),
            num_heads=heads,
            num_kv_heads=fields.count("attention.head_count_kv"),
            head_dim=head_dim,
            layers=_layers(fields, architecture, num_layers),
            query_pre_attn_scalar=embed_dim / heads if by_width else float(head_dim),
            use_qk_norm=third,
            use_post_attn_norm=not first,
            use_post_ffw_norm=not first,
            attn_logits_soft_cap=fields.cap("attn_logit_softcapping", caps["attn"]),
            final_logit_soft_cap=fields.cap("final_logit_softcapping", caps["final"]),
            transpose_gating_einsum=not (first or (embed_dim, num_layers) == _NOT_TRANSPOSED),
            max_context=fields.count("context_length"),
        )
    except ValueError as error:
        raise CheckpointError(
            f"{name}: metadata describe no possible model: {error}; {REDOWNLOAD}"
        ) from error


def _layers(fields: _Fields, architecture: str, count: int) -> tuple[LayerSpec, ...]:
    if architecture == "gemma":
        base = fields.positive("rope.freq_base", 10_000.0)
        return (LayerSpec(Global(), base, fields.rope_scale()),) * count
    if architecture == "gemma2":  # every other layer is global, and all rotate alike
        base = fields.positive("rope.freq_base", 10_000.0)
        return interleave(
            count,
            window=fields.count("attention.sliding_window", default=4096),
            pattern=fields.pattern("attention.sliding_window_pattern", 2),
            local_base=base,
            global_base=base,
        )
    return interleave(
        count,
        window=fields.count("attention.sliding_window"),
        pattern=fields.pattern("attention.sliding_window_pattern", 6),
        local_base=fields.positive("rope.freq_base_swa", 10_000.0),
        global_base=fields.positive("rope.freq_base", 1_000_000.0),
        global_scale=fields.rope_scale(),
    )


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

    def _fail(self, key: str, problem: str) -> NoReturn:
        raise CheckpointError(
            f"{self._name}: metadata field {self._prefix + key!r}: {problem}; {REDOWNLOAD}"
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
        value = self.number(key, default)
        if not isinstance(value, int) or not 1 <= value <= most:
            self._fail(key, f"expected a whole number from 1 to {most:,}, got {value!r}")
        return value

    def expect(self, key: str, wanted: float, tolerance: float = 0.0) -> None:
        if abs(self.number(key) - wanted) > tolerance:
            self._fail(key, f"expected {wanted:g}, got {self.number(key):g}")

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            self._fail(key, f"expected a positive number, got {value:g}")
        return value

    def cap(self, key: str, default: float) -> float | None:
        """A soft-cap; 0 stands for none."""
        return self.positive(key, default) if self.number(key, default) else None

    def pattern(self, key: str, default: int) -> tuple[bool, ...]:
        """Which layers are global: every nth, or listed one by one."""
        value = self._metadata.get(self._prefix + key, default)
        if isinstance(value, np.ndarray) and value.size:  # true: the layer slides
            return tuple(not sliding for sliding in value.tolist())
        if not isinstance(value, int) or not 1 <= value <= _MAX_LAYERS:
            self._fail(key, f"expected a number from 1 to {_MAX_LAYERS}, got {value!r}")
        return (False,) * (value - 1) + (True,)

    def rope_scale(self) -> float:
        kind = self._metadata.get(self._prefix + "rope.scaling.type", "none")
        if not isinstance(kind, str) or kind not in ("none", "linear"):
            self._fail("rope.scaling.type", f"expected 'linear', got {kind!r}")
        return 1.0 if kind == "none" else self.positive("rope.scaling.factor")


def official_params(
    file: GGUFFile, config: TransformerConfig, dtype: Any = np.float32
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Parameters with official names and shapes, one leaf at a time: (path, array of `dtype`).

    Every name and shape is checked before the first leaf is read.

    Raises:
      CheckpointError: a tensor is missing, or its shape is not the one `config` asks for.
    """
    leaves = list(layout.leaves(config))
    if "output.weight" in file.tensors:
        raise CheckpointError(
            f"{file.name}: tensor 'output.weight': a head of its own; Gemma's is the embedding: "
            "use a file of the model as released"
        )
    for leaf in leaves:
        for name, shape in zip(leaf.gguf, leaf.shapes, strict=True):
            info = file.tensors.get(name)
            if info is None:
                raise CheckpointError(f"{file.name}: tensor {name!r} is missing; {REDOWNLOAD}")
            if info.shape != shape:
                raise CheckpointError(
                    f"{file.name}: tensor {name!r}: expected shape {shape} from the metadata, got "
                    f"{info.shape}; {REDOWNLOAD}"
                )
    known = {name for leaf in leaves for name in leaf.gguf}
    for name in file.tensors:
        if name not in known and not name.startswith(_NOT_TEXT):
            raise CheckpointError(
                f"{file.name}: tensor {name!r} belongs to no Gemma 1, 2 or 3 text model of "
                f"{config.num_layers} layers; use a file of the model as released (adapters have "
                "to be merged first)"
            )
    for leaf in leaves:
        if leaf.is_norm:  # llama.cpp stores 1 + scale; subtract before rounding to `dtype`
            yield leaf.path, (file.read(leaf.gguf[0]) - np.float32(1)).astype(dtype)
        else:
            yield leaf.path, leaf.join([file.read(name, dtype) for name in leaf.gguf])
