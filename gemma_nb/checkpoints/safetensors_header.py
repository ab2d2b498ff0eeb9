"""Says which tensor of a damaged safetensors file is the odd one, which the library seldom does.

Format: https://huggingface.co/docs/safetensors: eight bytes with the header's length, a JSON object
from names to dtype, shape and place, and the data, which the tensors fill without overlap or hole.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

_MAX_HEADER = 1 << 24  # bytes looked at; that of the largest Gemma has 0.2 MB
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


def odd_tensor(path: Path) -> str:
    """The fault of the first tensor that cannot be as announced; "" if none is to blame."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _MAX_HEADER else None
        data = path.stat().st_size - 8 - length
    except (OSError, ValueError, RecursionError, struct.error):
        return ""
    if not isinstance(header, dict) or data < 0:
        return ""
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        try:
            places[name] = _place(entry)
        except (TypeError, KeyError, ValueError) as error:
            return f"tensor {name!r:.200}: {error}"
    end = 0
    for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
        if start != end:
            return f"tensor {name!r:.200} starts at byte {start:,}, the one before ends at {end:,}"
        if stop > data:
            return f"tensor {name!r:.200} ends at byte {stop:,}, the file has {max(data, 0):,}"
        end = stop
    return ""


def _place(entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor.

    Raises:
      TypeError, KeyError, ValueError: an entry that is none, or contradicts itself.
    """
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("expected a dtype, a shape and data_offsets")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"unknown dtype {dtype!r:.60}")
    for numbers, what in ((shape, "shape"), (place, "data_offsets")):
        whole = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not whole:
            raise ValueError(f"expected whole numbers as {what}, got {numbers!r:.60}")
    start, stop = place
    nbytes = math.prod(shape) * _ITEM_BYTES[dtype] if len(shape) < 32 else -1
    if stop - start != nbytes:
        raise ValueError(f"{dtype} of shape {shape!r:.60} in {stop - start:,} bytes")
    return start, stop
