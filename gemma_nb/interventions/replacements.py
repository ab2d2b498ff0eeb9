"""Values that ablated heads and feed-forward layers are replaced with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.interventions.numbers import padded


def replacements(method: str, values: Callable[[int], Any] | None, count: int) -> jax.Array:
    """Values in the place of `count` ablated parts: (M, P, width) float32, M padded.

    P is 1 for "zero" and "mean", and the length of the reference text for "resample", padded with
    NaN, which replaces nothing.

    Args:
      method: "zero", "mean" or "resample".
      values: from the index of a part to its (P, width) values in a reference trace; None where
        there is none.
      count: how many parts.

    Raises:
      ValueError: another method, or no reference where one is needed.
    """
    if method == "zero":
        return padded(np.zeros((count, 1, 1)), np.float32, 0)
    if method not in ("mean", "resample"):
        raise ValueError(f'method must be "zero", "mean" or "resample", got {method!r}')
    needs_reference(values, method)
    assert values is not None
    taken = [np.asarray(values(i), np.float32) for i in range(count)]
    taken = taken or [np.zeros((1, 1), np.float32)]
    if method == "mean":
        return padded(np.stack([x.mean(axis=0, keepdims=True) for x in taken]), np.float32, 0)
    return padded(np.stack(taken), np.float32, np.nan, axes=2)


def last_of(matches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each of the n columns of (M, n) bool: True where a row matches, and the last such row."""
    last = matches.shape[0] - 1 - jnp.argmax(matches[::-1], axis=0)
    return matches.any(axis=0), last


def replaced(
    values: jax.Array, which: jax.Array, positions: jax.Array, method: str
) -> tuple[jax.Array, jax.Array]:
    """Replacements of parts (n,) at positions (B, T): (B, T, n, width), and where they hold.

    Where: (B, T, n, width) bool, or () where it is everywhere; False behind a reference text.
    """
    row = jnp.clip(positions, 0, values.shape[1] - 1)
    new = values[which, row[..., None]]
    if method != "resample":
        return new, jnp.ones((), bool)
    return new, (positions < values.shape[1])[..., None, None] & ~jnp.isnan(new)


def needs_reference(reference: Any, method: str) -> None:
    """Raises ValueError where there is no trace to take values from."""
    if reference is None:
        raise ValueError(f'method="{method}" needs reference=gnb.trace(...) to take values from')
