"""Arrays on their way from a file to a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from gemma_nb.errors import CheckpointError

_ALIGNMENT = 64  # bytes; JAX takes over an array that is aligned to them, and copies any other
_AT_ONCE = 1 << 22  # values checked together: bounds the temporaries


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialised array that `jax.device_put` takes over on CPU without a copy."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def settled(array: np.ndarray, dtype: Any) -> np.ndarray:
    """`array` in row-major order, in `dtype`, aligned: itself if it is so already."""
    fits = array.dtype == dtype and array.flags.c_contiguous
    if fits and array.ctypes.data % _ALIGNMENT == 0:
        return array
    out = empty(array.shape, dtype)
    out[...] = array
    return out


def check_finite(array: np.ndarray, path: Sequence[str], name: str) -> None:
    """Refuse weights that are no numbers.

    Raises:
      CheckpointError: NaN or infinity in `array`, the parameter at `path` of the checkpoint `name`.
    """
    flat = array.reshape(-1)
    for start in range(0, flat.size, _AT_ONCE):
        if not _all_finite(flat[start : start + _AT_ONCE]):
            raise _not_finite(path, name)


def check_numbers(leaf: Any, path: Sequence[str], name: str) -> None:
    """Refuse what cannot be a parameter: values of another kind, or that are no numbers.

    Args:
      leaf: of numpy or JAX; of a shape alone, or of one that is being traced, only the kind is
        looked at.
      path: of the parameter in the official tree.
      name: of the checkpoint, for messages.

    Raises:
      CheckpointError: integers, objects, text; or NaN or infinity.
    """
    import jax

    if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
        raise CheckpointError(
            f"{name}: parameter {'/'.join(path)}: expected floating-point numbers, got "
            f"{leaf.dtype}; pass a checkpoint that is not quantised"
        )
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
        return
    here = isinstance(leaf, np.ndarray) or all(d.platform == "cpu" for d in leaf.devices())
    if here and getattr(leaf, "is_fully_addressable", True):
        check_finite(np.asarray(leaf), path, name)
    elif not bool(jax.numpy.isfinite(leaf).all()):
        raise _not_finite(path, name)


def _not_finite(path: Sequence[str], name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: parameter {'/'.join(path)} holds NaN or infinity; the file is damaged or its "
        "training diverged: download it again, or use an earlier checkpoint"
    )


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:  # by its bits: five times as fast as np.isfinite
        exponent = np.uint16(0x7F80)
        return not bool(((values.view(np.uint16) & exponent) == exponent).any())
    if values.dtype == np.float64:  # becomes float32, which ends at 3e38
        with np.errstate(over="ignore", invalid="ignore"):
            values = values.astype(np.float32)
    return bool(np.isfinite(values).all())
