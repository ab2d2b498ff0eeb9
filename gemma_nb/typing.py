"""The axis legend of the whole package, and the shapes of what is passed around.

Every einsum, docstring and shape annotation uses these letters:

    B  batch              N  query heads           D  embedding (residual stream)
    T  query tokens       K  key-value heads       F  feed-forward
    S  key positions      G  query heads per K     V  vocabulary
    L  layers             H  head dimension
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax

# The official Gemma parameter tree: nested dicts with arrays at the leaves.
Params: TypeAlias = Mapping[str, Any]

# One layer's cache: k and v (B, S, K, H), positions (B, S) int32 (-1: empty), end_index (B,) int32.
LayerCache: TypeAlias = dict[str, jax.Array]

# `layer_0`, `layer_1`, ... -> LayerCache.
KVCache: TypeAlias = dict[str, LayerCache]

# The position stored in a cache slot that holds no token, and given to padding tokens.
EMPTY = -1
