"""One line for what holds arrays: their types and shapes, never their numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

_LONGEST = 40  # characters of a value that is no array
_FEW = 6  # of a list's items


def summary(item: Any) -> str:
    """`SparseAutoencoder(w_enc=float32 (640, 16384), ..., layer=9)`, of a dataclass.

    To be a class's `__repr__`.  What has no fields is told by its leaves as a pytree.
    """
    if dataclasses.is_dataclass(item):
        fields = {f.name: getattr(item, f.name, None) for f in dataclasses.fields(item) if f.repr}
    else:
        leaves, _ = jax.tree_util.tree_flatten_with_path(item)
        fields = {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}
        fields = {name or "value": leaf for name, leaf in fields.items() if leaf is not item}
    told = ", ".join(f"{name}={value_summary(value)}" for name, value in fields.items())
    return f"{type(item).__name__}({told})"


def value_summary(value: Any) -> str:
    """One line for a value: an array's type and shape; the number, where it is a single one."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        if isinstance(value, jax.core.Tracer):
            return f"traced {dtype} {tuple(shape)}"
        if not shape and isinstance(value, jax.Array | np.ndarray | np.generic):
            return str(dtype) if _is_key(dtype) else one_line(repr(value.item()), _LONGEST)
        return f"{dtype} {tuple(shape)}"
    if isinstance(value, dict | list | tuple | set | frozenset):
        if any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value)):
            return f"{type(value).__name__} of {len(value)}"
        if len(value) > _FEW and isinstance(value, list | tuple):
            first = ", ".join(map(repr, value[:_FEW]))
            return one_line(f"({first}, ... {len(value)} in all)", 4 * _LONGEST)
    return one_line(repr(value), 2 * _LONGEST)


def one_line(text: str, most: int) -> str:
    """A text without line breaks, cut to `most` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else f"{flat[: most - 3]}..."


def _is_key(dtype: Any) -> bool:
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
