"""The axis legend of the whole package, and the shapes of what is passed around.

Every einsum, docstring and shape annotation uses these letters:

    B  batch              N  query heads           D  embedding (residual stream)
    T  query tokens       K  key-value heads       F  feed-forward
    S  key positions      G  query heads per K     V  vocabulary
    L  layers             H  head dimension
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

# The official Gemma parameter tree: nested dicts with arrays at the leaves.
Params: TypeAlias = Mapping[str, Any]

# One layer's cache: k and v (B, S, K, H), positions (B, S) int32 (-1: empty), end_index (B,) int32.
LayerCache: TypeAlias = dict[str, jax.Array]

# `layer_0`, `layer_1`, ... -> LayerCache.
KVCache: TypeAlias = dict[str, LayerCache]

# The position stored in a cache slot that holds no token, and given to padding tokens.
EMPTY = -1


def empty_cache(
    shapes: Sequence[tuple[int, int, int, int]], dtype: Any, sharding: Any = None
) -> KVCache:
    """A cache that holds nothing yet.

    Args:
      shapes: of each layer, (B, S, K, H) of its keys and of its values.
      dtype: of keys and values.
      sharding: where the arrays are placed; None leaves it to JAX.
    """

    def layer(shape: tuple[int, int, int, int]) -> LayerCache:
        return {
            "k": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
            "positions": jnp.full(shape[:2], EMPTY, jnp.int32),
            "end_index": jnp.zeros(shape[0], jnp.int32),
        }

    cache = {f"layer_{i}": layer(shape) for i, shape in enumerate(shapes)}
    return cache if sharding is None else jax.device_put(cache, sharding)
