"""One stream's key-value cache in the form that is fast between compiled steps."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_nb import placement
from gemma_nb.config import TransformerConfig
from gemma_nb.typing import EMPTY, KVCache

# A cache starts small and grows, since a step reads all slots, used or not.  Each size is one
# compilation.
SIZES = (1024, 4096, 16_384, 32_768, 131_072)


@flax.struct.dataclass
class StreamCache:
    """The cache of a single stream.

    Keys and values are matrices at the boundary of the jitted step: XLA's CPU backend updates a
    donated (S, K*H) argument in place, and copies a (1, S, K, H) one several times a step.  All
    layers hold the same positions, so these are kept once.

    Attributes:
      k: per layer (S, K*H).
      v: per layer (S, K*H).
      positions: (S,) int32; -1 where the slot is empty.
      end_index: () int32, slots in use.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    positions: jax.Array
    end_index: jax.Array

    @classmethod
    def empty(cls, config: TransformerConfig, size: int, mesh: Mesh | None = None) -> StreamCache:
        """A float32 cache of `size` slots (float32: converting bfloat16 keys costs more than
        reading twice the bytes), split over the devices of `mesh` as the parameters are."""
        shape = (size, config.num_kv_heads * config.head_dim)
        split, whole = placement.stream_sharding(config, mesh), placement.everywhere(mesh)

        def zeros() -> tuple[jax.Array, ...]:
            # One array each: a donated buffer must not be passed twice.
            return tuple(jnp.zeros(shape, jnp.float32, device=split) for _ in config.layers)

        positions = jnp.full(size, EMPTY, jnp.int32, device=whole)
        return cls(zeros(), zeros(), positions, jnp.zeros((), jnp.int32, device=whole))

    @property
    def size(self) -> int:
        """S, slots allocated."""
        return self.positions.shape[0]

    def to_model(self, config: TransformerConfig) -> KVCache:
        """The same as the model's own cache, with a batch of one."""
        heads = (1, -1, config.num_kv_heads, config.head_dim)
        positions, end = self.positions[None], self.end_index[None]
        return {
            f"layer_{i}": {
                "k": k.reshape(heads),
                "v": v.reshape(heads),
                "positions": positions,
                "end_index": end,
            }
            for i, (k, v) in enumerate(zip(self.k, self.v, strict=True))
        }

    @classmethod
    def from_model(cls, cache: KVCache) -> StreamCache:
        """The inverse of `to_model`."""
        layers = [cache[f"layer_{i}"] for i in range(len(cache))]

        def matrix(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[1], -1)

        return cls(
            k=tuple(matrix(layer["k"]) for layer in layers),
            v=tuple(matrix(layer["v"]) for layer in layers),
            positions=layers[0]["positions"][0],
            end_index=layers[0]["end_index"][0],
        )


@jax.jit(donate_argnums=0)
def rewind(cache: StreamCache, length: jax.Array) -> StreamCache:
    """`cache` with only its first `length` slots in use."""
    used = jnp.arange(cache.size) < length
    return cache.replace(  # type: ignore[attr-defined]
        positions=jnp.where(used, cache.positions, EMPTY),
        end_index=jnp.minimum(cache.end_index, length),
    )


# Static: the new size.  Not donated: the arrays change shape.
@jax.jit(static_argnums=1)
def grow(cache: StreamCache, size: int) -> StreamCache:
    """`cache` with room for `size` slots."""
    more = size - cache.size

    def widen(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, more), (0, 0)))

    return StreamCache(
        k=tuple(map(widen, cache.k)),
        v=tuple(map(widen, cache.v)),
        positions=jnp.pad(cache.positions, (0, more), constant_values=EMPTY),
        end_index=cache.end_index,
    )


def size_for(length: int, limit: int) -> int:
    """Slots to allocate for `length` positions when there will be at most `limit`."""
    return min(next((size for size in SIZES if size >= length), limit), limit)
