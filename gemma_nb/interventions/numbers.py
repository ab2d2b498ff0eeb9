"""The numbers of interventions as arrays, also while a program is being traced.

A number that is known where an intervention is made stays known inside of `jax.jit`, `jax.grad` and
`jax.vmap`, so that it can be checked and told there, too; one that is traced (a steering vector
that is optimised, say) is used as it is.

How many entries an array has is part of a compiled program.  Arrays are therefore padded, with what
acts nowhere: a sweep over numbers of heads or positions compiles few programs, not one for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.expected import a

# A layer, head and position that nobody names: what stands in the padding.

NOWHERE = -(2**30)

_FEWEST, _STEP = 8, 64


def room(count: int) -> int:
    """The length that arrays of `count` entries are padded to.

    8, 16, 32 or a multiple of 64, so that counts up to a thousand make twenty lengths.
    """
    small = max(_FEWEST, 1 << max(count - 1, 0).bit_length())
    return small if small <= _STEP else -(-count // _STEP) * _STEP


def is_traced(values: Any) -> bool:
    """True where an array, or one of some numbers, is not known while a program is traced."""
    if isinstance(values, slice):
        values = (values.start, values.stop, values.step)
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def array(values: Any, dtype: Any = None, name: str = "value") -> jax.Array:
    """An array that is known wherever the values are.

    Args:
      values: numbers, or an array of numpy, JAX or another library.
      dtype: of the result; None is the values' own, if that is a floating one of at most 32 bits,
        and otherwise float32.
      name: of the argument.

    Raises:
      TypeError: something else than numbers.
    """
    if is_traced(values):
        found = jnp.asarray(values)
        return found.astype(_dtype(found.dtype) if dtype is None else dtype)
    host = _host(values, name)
    host = host.astype(_dtype(host.dtype) if dtype is None else dtype)  # a copy
    # Otherwise a constant would be traced with the program that is made.  Not `jnp.asarray`, which
    # is a program for each shape.
    with jax.ensure_compile_time_eval():
        return jax.device_put(host)


def _host(values: Any, name: str) -> np.ndarray:
    found = np.asarray(values)
    # bfloat16 is no kind of numpy's own.
    if found.dtype.kind not in "biuf" and not jnp.issubdtype(found.dtype, jnp.floating):
        raise TypeError(f"{name} must be numbers, got {a(values)}")
    return found


def _dtype(own: Any) -> Any:
    fits = jnp.issubdtype(own, jnp.floating) and np.dtype(own).itemsize <= 4
    return own if fits else np.float32


def padded(
    values: Any, dtype: Any, fill: float = NOWHERE, axes: int = 1, name: str = "value"
) -> jax.Array:
    """`array` with its first `axes` axes filled up to the lengths of `room`.

    Args:
      values: see `array`.
      dtype: see `array`.
      fill: what the padding is made of.
      axes: how many.
      name: see `array`.
    """
    found = jnp.asarray(values) if is_traced(values) else _host(values, name)
    more = [(0, room(size) - size if axis < axes else 0) for axis, size in enumerate(found.shape)]
    pad = jnp.pad if is_traced(values) else np.pad
    return array(pad(found.astype(dtype), more, constant_values=fill), dtype)


def known(name: str, value: Any) -> Any:
    """`value`, of an argument that decides where an intervention acts.

    Raises:
      ValueError: it is being traced.
    """
    if is_traced(value):
        raise ValueError(
            f"{name} is traced by jax.jit, jax.grad or jax.vmap, and has to be a number that is "
            f"known when the intervention is made: vectors, values and scales may be traced.  Let "
            f"{name} be static (jax.jit's static_argnames), or make one intervention for each"
        )
    return value


def real(places: Any) -> np.ndarray:
    """Bool mask of the entries of padded places that are no padding."""
    found: np.ndarray = np.asarray(places) != NOWHERE
    return found


def plain(values: Any) -> list[Any]:
    """Layers, heads or positions as Python numbers, without the padding."""
    found = np.asarray(values)
    numbers: list[Any] = found[real(found)].tolist()
    return numbers


def short(values: Sequence[Any], most: int = 6) -> str:
    """A list of numbers or names, cut where it is longer than `most`."""
    shown = ", ".join(map(str, values[:most]))
    return shown if len(values) <= most else f"{shown}, ... ({len(values)} of them)"
