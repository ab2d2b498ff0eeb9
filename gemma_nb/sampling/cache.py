"""One stream's key-value cache in the form that is fast between compiled steps."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_nb import placement
from gemma_nb.config import Sliding, TransformerConfig
from gemma_nb.executables import CachedJit
from gemma_nb.nn.kv_cache import before
from gemma_nb.typing import EMPTY, KVCache, LayerCache

# A cache starts small and grows, since a step reads all slots, used or not.  Each size is one
# compilation.
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)


@flax.struct.dataclass
class StreamCache:
    """The cache of a single stream.

    Keys and values are matrices at the boundary of the jitted step: XLA's CPU backend updates a
    donated (S, K*H) argument in place, and copies a (1, S, K, H) one several times a step.

    A sliding layer's cache may be a ring of one window, so that its cost does not grow with the
    context.  All other layers hold the same positions, as all rings do, so these are kept once.

    Attributes:
      k: per layer (S, K*H), or (W, K*H) where it is a ring.
      v: as k, or per layer (K*H, S), see `columns`.
      positions: (S,) int32; -1 where the slot is empty.
      ring_positions: (W,) int32, of the rings; None where there are none.
      end_index: () int32, tokens held.
      rings: per layer, whether it is a ring.
      columns: whether the values are transposed, see `gemma_nb.nn.kv_cache.GrowingCache`.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    positions: jax.Array
    ring_positions: jax.Array | None
    end_index: jax.Array
    rings: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    columns: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(
        cls,
        config: TransformerConfig,
        size: int,
        mesh: Mesh | None = None,
        *,
        own: bool = False,
    ) -> StreamCache:
        """A float32 cache of `size` slots (float32: converting bfloat16 keys costs more than
        reading twice the bytes), split over the devices of `mesh` as the parameters are.

        Args:
          config: the model's numbers.
          size: S.
          mesh: None for one device.
          own: in the form that our own module reads fastest, with rings and transposed values;
            else in one that any model knows.
        """
        make, rings = _empty(config, size, own)
        made = make()
        if mesh is not None:
            k, v, *counts = jax.device_get(made)
            # Copies, since a donated buffer must not be passed twice.
            rows = placement.stream_shardings(config, mesh)
            k, v = jax.device_put((k, v), (rows, rows), may_alias=False)
            counts = jax.device_put(counts, placement.everywhere(mesh), may_alias=False)
            made = (k, v, *counts)
        k, v, positions, rolled, end = made
        return cls(k, v, positions, rolled, end, rings, own)

    @classmethod
    def shapes(cls, config: TransformerConfig, size: int, *, own: bool = False) -> StreamCache:
        """What `empty` makes of the same arguments for one device, as shapes: allocates nothing."""
        make, rings = _empty(config, size, own)
        k, v, positions, rolled, end = jax.eval_shape(make.jitted)
        return cls(k, v, positions, rolled, end, rings, own)

    @property
    def size(self) -> int:
        """S, slots allocated."""
        return self.positions.shape[0]

    @property
    def ring_size(self) -> int:
        """W, slots of a ring; 0 where there are none."""
        return 0 if self.ring_positions is None else self.ring_positions.shape[0]

    def ring_rows(self, count: int) -> tuple[int, int, int, int]:
        """Shape (ring layers, 2, n, K*H) of the keys and values of n slots of all rings."""
        width = next(k.shape[1] for k, ring in zip(self.k, self.rings, strict=True) if ring)
        return sum(self.rings), 2, count, width

    def to_model(self, config: TransformerConfig) -> KVCache:
        """The same as the model's own cache, with a batch of one."""
        sizes = map(config.axis_sizes, config.layers)
        return {f"layer_{i}": self.layer(i, each) for i, each in enumerate(sizes)}

    def layer(self, i: int, sizes: Mapping[str, int]) -> LayerCache:
        """One layer's part of `to_model`; `sizes` are of its axes."""
        positions = self.ring_positions if self.rings[i] else self.positions
        assert positions is not None
        heads = sizes["K"], sizes["H"]
        columns, rows = (1, *heads, -1), (1, -1, *heads)
        return {
            "k": self.k[i].reshape(rows),
            "vt" if self.columns else "v": self.v[i].reshape(columns if self.columns else rows),
            "positions": positions[None],
            "end_index": self.end_index[None],
        }

    def updated(self, cache: KVCache) -> StreamCache:
        """The inverse of `to_model`, for what a step made of this cache."""
        layers = [cache[f"layer_{i}"] for i in range(len(cache))]

        def values(layer: LayerCache) -> jax.Array:
            if self.columns:
                return layer["vt"].reshape(-1, layer["vt"].shape[-1])
            return layer["v"].reshape(layer["v"].shape[1], -1)

        def positions(of_rings: bool) -> jax.Array | None:
            held = zip(layers, self.rings, strict=True)
            return next((c["positions"][0] for c, ring in held if ring == of_rings), None)

        plain = positions(False)
        return StreamCache(
            k=tuple(layer["k"].reshape(layer["k"].shape[1], -1) for layer in layers),
            v=tuple(values(layer) for layer in layers),
            positions=self.positions if plain is None else plain,
            ring_positions=positions(True),
            end_index=layers[0]["end_index"][0],
            rings=self.rings,
            columns=self.columns,
        )

    def with_rings(self, archive: Archive, length: int) -> StreamCache:
        """The cache with only its first `length` tokens in use, its rings made anew.

        Args:
          archive: holds the keys and values of these tokens.
          length: at most the tokens held.
        """
        wanted, cache = newest(self.ring_size, length), self
        lost = (wanted != EMPTY) & (wanted != np.asarray(self.ring_positions))
        # One block when little was overwritten, since copying 16 MB of rings takes half a step.
        for block in _blocks(self.ring_size):
            if lost[block].any():
                rows = archive.rows(wanted[block])
                cache = _refilled(cache, rows, np.int32(block.start))
        return rewind(cache, np.int32(length), wanted)

    def with_ring_rows(self, rows: Iterable[Iterable[jax.Array]]) -> StreamCache:
        """The cache with other keys and values in its rings, one pair of (W, K*H) per ring."""
        k, v = list(self.k), list(self.v)
        rings = (i for i, ring in enumerate(self.rings) if ring)
        for i, (keys, values) in zip(rings, rows, strict=True):
            k[i], v[i] = keys, values.T if self.columns else values
        return self.replace(k=tuple(k), v=tuple(v))  # type: ignore[attr-defined]


def _empty(config: TransformerConfig, size: int, own: bool) -> tuple[CachedJit, tuple[bool, ...]]:
    """What makes the arrays of an empty cache, and which layers have rings."""
    rings = ring_layers(config) if own else (False,) * config.num_layers
    ring = min(size, smallest_window(config))
    slots = tuple(ring if is_ring else size for is_ring in rings)
    sizes = map(config.axis_sizes, config.layers)
    shapes = tuple((n, s["K"] * s["H"]) for n, s in zip(slots, sizes, strict=True))
    return _compiled_empty(shapes, size, ring if any(rings) else None, own), rings


# Compiled, since arrays that come from the host take longer.
@functools.cache
def _compiled_empty(
    shapes: tuple[tuple[int, int], ...], size: int, ring: int | None, columns: bool
) -> CachedJit:
    """What makes k, v, positions, ring_positions and end_index of an empty cache."""

    def empty() -> tuple[Any, ...]:
        k = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
        v = tuple(jnp.zeros(shape[::-1] if columns else shape, jnp.float32) for shape in shapes)
        rolled = None if ring is None else jnp.full(ring, EMPTY, jnp.int32)
        return k, v, jnp.full(size, EMPTY, jnp.int32), rolled, jnp.int32(0)

    return CachedJit(empty, shapes, size, ring, columns)


# Slots of the rings that are filled anew at once.
_REFILLED = 128


def _blocks(ring: int) -> list[slice]:
    """All slots of a ring in blocks of one size; the last may overlap the one before."""
    size = min(_REFILLED, ring)
    return [slice(min(i, ring - size), min(i + size, ring)) for i in range(0, ring, size)]


@jax.jit(donate_argnums=0)
def rewind(
    cache: StreamCache, length: jax.Array, ring_positions: jax.Array | None = None
) -> StreamCache:
    """`cache` with only its first `length` tokens in use.

    Args:
      cache: what is held.
      length: () int32.
      ring_positions: (W,) int32, what its rings hold now; None: what they held, as far as it stays.
    """
    if ring_positions is None and cache.ring_positions is not None:
        ring_positions = before(cache.ring_positions, length)
    return cache.replace(  # type: ignore[attr-defined]
        positions=before(cache.positions, length),
        ring_positions=ring_positions,
        end_index=jnp.minimum(cache.end_index, length),
    )


# One program, as each of its thirty small ones would take a third of a millisecond to start.
@jax.jit(donate_argnums=0)
def _refilled(cache: StreamCache, rows: jax.Array, slot: jax.Array) -> StreamCache:
    """`cache` with other keys and values (ring layers, 2, n, K*H) from a slot of its rings on."""
    k, v = list(cache.k), list(cache.v)
    rings = (i for i, ring in enumerate(cache.rings) if ring)
    for i, (keys, values) in zip(rings, rows, strict=True):
        k[i] = jax.lax.dynamic_update_slice_in_dim(k[i], keys, slot, 0)
        values, axis = (values.T, 1) if cache.columns else (values, 0)
        v[i] = jax.lax.dynamic_update_slice_in_dim(v[i], values, slot, axis)
    return cache.replace(k=tuple(k), v=tuple(v))  # type: ignore[attr-defined]


def compile_rewinding(cache: StreamCache) -> None:
    """Compiles what takes tokens back, from a cache's shapes."""
    rewind.lower(cache, jnp.int32(0)).compile()
    ring = cache.ring_size
    if ring:
        rows = np.zeros(cache.ring_rows(min(_REFILLED, ring)), np.float32)
        _refilled.lower(cache, rows, np.int32(0)).compile()
        rewind.lower(cache, np.int32(0), np.zeros(ring, np.int32)).compile()


# Static: the sizes.  Not donated: the arrays change shape.
@jax.jit(static_argnums=(1, 2))
def _widen(cache: StreamCache, size: int, ring: int) -> StreamCache:
    def pad(x: jax.Array, slots: int, value: int = 0, axis: int = 0) -> jax.Array:
        more = [(0, 0)] * x.ndim
        more[axis] = (0, slots - x.shape[axis])
        return jnp.pad(x, more, constant_values=value)

    def wide(arrays: Sequence[jax.Array], axis: int) -> tuple[jax.Array, ...]:
        held = zip(arrays, cache.rings, strict=True)
        return tuple(pad(x, ring if is_ring else size, axis=axis) for x, is_ring in held)

    rolled = cache.ring_positions
    return StreamCache(
        k=wide(cache.k, 0),
        v=wide(cache.v, 1 if cache.columns else 0),
        positions=pad(cache.positions, size, EMPTY),
        ring_positions=None if rolled is None else pad(rolled, ring, EMPTY),
        end_index=cache.end_index,
        rings=cache.rings,
        columns=cache.columns,
    )


def grow(cache: StreamCache, size: int, config: TransformerConfig) -> StreamCache:
    """`cache` with room for `size` slots; rings grow up to one window."""
    return _widen(cache, size, min(size, smallest_window(config)))


def size_for(length: int, limit: int) -> int:
    """Slots to allocate for `length` positions when there will be at most `limit`."""
    return min(next((size for size in SIZES if size >= length), limit), limit)


def next_size(size: int, limit: int) -> int | None:
    """The size after `size`, or None where there is none."""
    return None if size >= limit else size_for(size + 1, limit)


def ring_layers(config: TransformerConfig) -> tuple[bool, ...]:
    """Per layer, whether its cache may be a ring.

    Those are the sliding layers with the smallest window, of one width of keys, so that what is new
    in all rings is one array.
    """
    window = Sliding(smallest_window(config))
    sizes = [config.axis_sizes(spec) for spec in config.layers]
    widths = [s["K"] * s["H"] for s in sizes]
    near = [spec.kind == window for spec in config.layers]
    width = next((width for width, is_near in zip(widths, near, strict=True) if is_near), None)
    return tuple(is_near and w == width for w, is_near in zip(widths, near, strict=True))


def smallest_window(config: TransformerConfig) -> int:
    """The smallest window of the sliding layers."""
    windows = [spec.kind.window for spec in config.layers if isinstance(spec.kind, Sliding)]
    return min(windows, default=config.max_context)


class Archive:
    """Keys and values of the sliding layers for every token, on the host.

    What a ring has overwritten is needed again when a conversation is taken back, and it cannot be
    recomputed from one window: each layer's keys depend on the window below.  So each step's
    keys and values are kept; taking back copies one window.
    """

    # Tokens in one block: a conversation that grows is never copied.
    _BLOCK = 256

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []

    def write(self, start: int, rows: np.ndarray) -> None:
        """Keeps rows (ring layers, 2, n, K*H) of the tokens from position `start` on."""
        done = 0
        while done < rows.shape[2]:
            index, offset = divmod(start + done, self._BLOCK)
            if index == len(self._blocks):
                shape = (*rows.shape[:2], self._BLOCK, rows.shape[3])
                self._blocks.append(np.empty(shape, rows.dtype))
            piece = rows[:, :, done : done + self._BLOCK - offset]
            self._blocks[index][:, :, offset : offset + piece.shape[2]] = piece
            done += piece.shape[2]

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Keys and values (ring layers, 2, n, K*H) of n positions; zeros where one is EMPTY."""
        layers, pair, _, width = self._blocks[0].shape
        rows = np.zeros((layers, pair, len(positions), width), self._blocks[0].dtype)
        # What follows one another in a block is copied in one go.
        follows = (np.diff(positions, prepend=EMPTY) == 1) & (positions % self._BLOCK != 0)
        starts = np.flatnonzero(~follows)
        for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
            if positions[start] != EMPTY:
                index, offset = divmod(int(positions[start]), self._BLOCK)
                rows[:, :, start:stop] = self._blocks[index][:, :, offset : offset + stop - start]
        return rows


def newest(size: int, stop: int) -> np.ndarray:
    """The positions by slot (size,), int32, of a ring when the token before `stop` had been fed.

    EMPTY where there is none: position p is in slot p mod `size`, and the latest one stays.
    """
    slots = np.arange(size, dtype=np.int32)
    positions = slots + (stop - 1 - slots) // size * size
    return np.where(positions < 0, EMPTY, positions).astype(np.int32)
