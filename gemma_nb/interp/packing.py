"""Cells of a patching sweep, packed into rows that go through a layer together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.nn.layer import Block
from gemma_nb.nn.layer_input import Carry, LayerInput
from gemma_nb.typing import EMPTY, Params


@dataclasses.dataclass(frozen=True)
class Cell:
    """One patch: of the whole text where position is None, of all heads where head is."""

    position: int | None
    head: int | None
    place: tuple[int, ...]  # its indices in the result, behind the layer's

    @property
    def start(self) -> int:
        """The first position that differs from the unpatched run."""
        return self.position or 0


@dataclasses.dataclass(frozen=True)
class SlotPatch:
    """A patch by slot: acts (R, T) bool, heads (R, T, N) bool, values (R, T, ...)."""

    acts: np.ndarray
    heads: np.ndarray
    values: np.ndarray

    def off(self) -> SlotPatch:
        """The same arrays, acting nowhere."""
        return dataclasses.replace(self, acts=np.zeros_like(self.acts))


jax.tree_util.register_dataclass(SlotPatch, data_fields=["acts", "heads", "values"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows of cells.

    Attributes:
      positions: (R, T) absolute position of each slot, -1 where it is empty.
      source: the same with 0 for -1, to gather by.
      mask: (R, T, 2 T) which of the unpatched run's keys and of the row's own each slot sees.
      spans: (row, first slot, slot behind the last, cell).
    """

    positions: np.ndarray
    source: np.ndarray
    mask: np.ndarray
    spans: tuple[tuple[int, int, int, Cell], ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Cell]], count: int, length: int) -> Batch:
        """`rows` of cells side by side in texts of `length`, filled up to `count` rows."""
        positions = np.full((count, length), EMPTY, np.int32)
        mask = np.zeros((count, length, 2 * length), bool)
        spans = []
        for r, row in enumerate(rows):
            start = 0
            for cell in row:
                size = length - cell.start
                end = start + size
                positions[r, start:end] = np.arange(cell.start, length)
                mask[r, start:end, : cell.start] = True
                own = slice(length + start, length + end)
                mask[r, start:end, own] = np.tri(size, dtype=bool)
                spans.append((r, start, end, cell))
                start = end
        return cls(positions, np.maximum(positions, 0), mask, tuple(spans))


class _PatchedEdit:
    """The model's own interventions, then a patch by slot."""

    def __init__(self, own: Any, site: str, patch: SlotPatch) -> None:
        self.own, self.site, self.patch = own, site, patch
        self.edits_attention = own is not None and own.edits_attention

    def __call__(self, name: str, value: jax.Array, keys: Any = None) -> jax.Array:
        if self.own is not None:
            value = self.own(name, value, keys)
        if name != self.site:
            return value
        acts = self.patch.acts.reshape(*self.patch.acts.shape, *(1,) * (value.ndim - 2))
        if name == "z":
            acts = acts & self.patch.heads[..., None]
        return jnp.where(acts, self.patch.values.astype(value.dtype), value)

    def edges(self, mask: jax.Array, keys: jax.Array) -> jax.Array:
        return mask if self.own is None else self.own.edges(mask, keys)


# Static: the block and the site.  Traced: parameters and layer, so one compilation for each kind
# of layer serves the whole sweep.
@partial(jax.jit, static_argnums=(0, 1))
def run_layer(
    block: Block,
    site: str,
    params: Params,
    interventions: Any,
    layer: jax.Array,
    carry: Carry,
    positions: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    patch: SlotPatch,
) -> Carry:
    """The carry of R rows of T slots behind a layer."""
    rows, length = positions.shape
    own = None if interventions is None else interventions.at(layer, positions)

    def cached(shared: jax.Array) -> jax.Array:
        both = jnp.concatenate([shared, jnp.zeros_like(shared)])[None]
        return jnp.broadcast_to(both, (rows, *both.shape[1:])).astype(carry.x.dtype)

    at = jnp.arange(length, dtype=jnp.int32)
    cache = {
        "k": cached(keys),
        "v": cached(values),
        "positions": jnp.broadcast_to(jnp.concatenate([at, at * 0 + EMPTY]), (rows, 2 * length)),
        "end_index": jnp.full(rows, length, jnp.int32),
    }
    # Every slot is stored, the empty ones too, so that slots and mask agree.
    counted = jnp.maximum(positions, 0)
    given = LayerInput(counted, mask, edit=_PatchedEdit(own, site, patch))
    after, _ = cast(Any, block.apply({"params": params}, carry, given, cache))
    return cast(Carry, after)
