"""Libraries that quantised the weights of a folder, by its configuration or by what they left.

Nothing of it is read: every library packs in its own way.  What is wanted is its name, since that
is what a user looks for the original by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

REMEDY = "use the checkpoint that they were made from, or a GGUF file"

# What each library adds to the name of a layer (`...mlp.down_proj`), the most telling first.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("bitsandbytes", ("weight.absmax", "weight.quant_map", "SCB", "weight_format")),
    ("bitsandbytes", ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")),
    ("compressed-tensors", ("weight_packed", "weight_shape")),
    ("ExLlamaV3", ("trellis", "suh", "svh")),
    ("ExLlamaV2", ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "q_perm")),
    ("GPTQ", ("g_idx",)),
    ("GPTQ or AWQ", ("qweight", "qzeros")),
    ("HQQ", ("W_q",)),
    ("AQLM", ("codebooks", "codes")),
    ("VPTQ", ("centroids.weight", "indices")),
    ("quanto", ("weight._data", "weight._scale")),
    ("torchao", ("_weight_qdata", "weight_qdata", "_weight_scale", "weight:qdata", "weight:scale")),
    ("ModelOpt", ("weight_scale_2",)),
    ("a float8 library", ("weight_scale_inv", "weight_scale", "input_scale", "scale_weight")),
    ("EETQ", ("weight_scales",)),
    ("MLX", ("biases", "scales")),
)


class _Stored(Protocol):
    """Facts of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


def by_config(config: Mapping[str, Any]) -> str | None:
    """The way in which a config.json says that its weights are quantised; None: it says nothing.

    Args:
      config: the parsed file.

    Returns:
      " (by bitsandbytes, in 4 bits)"; "" where it says that they are, and no more.
    """
    text = config.get("text_config")
    places = [config, text if isinstance(text, Mapping) else {}]
    for name in ("quantization_config", "quantization"):
        for place in places:
            if (given := place.get(name)) not in (None, {}):
                return _said(given if isinstance(given, Mapping) else {})
    return None


def _said(given: Mapping[str, Any]) -> str:
    library = given.get("quant_method") or given.get("quant_algo")
    if library is None and given.get("load_in_4bit", given.get("load_in_8bit")) is not None:
        library = "bitsandbytes"
    elif library is None and {"group_size", "bits"} <= given.keys():
        library = "MLX"  # the one that names no method
    bits = given.get("bits", given.get("w_bit"))
    if bits is None:
        bits = next((n for n in (4, 8) if given.get(f"load_in_{n}bit") is True), None)
    said = [] if library is None else [f"by {library!s:.40}"]
    said += [] if bits is None else [f"in {bits!s:.10} bits"]
    return f" ({', '.join(said)})" if said else ""


def by_tensors(tensors: Mapping[str, _Stored]) -> tuple[str, str] | None:
    """A library and the first tensor that shows it; None where none does.

    Args:
      tensors: by the names they are stored under.
    """
    for library, marks in _MARKS:
        for name in tensors:
            if any(name.endswith(f".{mark}") for mark in marks):
                return _told_apart(library, tensors), name
    return None


def _told_apart(library: str, tensors: Mapping[str, _Stored]) -> str:
    """The library where names do not tell: GPTQ packs eight rows into one, AWQ eight columns."""
    if library == "a float8 library" and not any(
        t.dtype.startswith("F8") for t in tensors.values()
    ):
        return "compressed-tensors"  # whose int8 has scales of these names
    if library != "GPTQ or AWQ":
        return library
    for name, packed in tensors.items():
        scales = tensors.get(name.removesuffix("qweight") + "scales")
        if name.endswith(".qweight") and scales is not None:
            return "GPTQ" if packed.shape[-1:] == scales.shape[-1:] else "AWQ"
    return library
