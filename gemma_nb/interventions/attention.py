"""Interventions on what attention sees and how it weighs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.config import Sliding
from gemma_nb.indices import Indices
from gemma_nb.interventions.base import Intervention
from gemma_nb.interventions.checks import check_places
from gemma_nb.interventions.numbers import array, padded, plain, short
from gemma_nb.interventions.positions import Positions, Where, from_zero, ints, single, taken
from gemma_nb.interventions.pytrees import fill, node

if TYPE_CHECKING:
    from gemma_nb.config import TransformerConfig


@node
class KnockOut(Intervention):
    """Cuts edges of attention, before the softmax: `KnockOut(5, queries=[9], keys=[0, 1])`.

    "Attention knockout" (Geva et al. 2023, arXiv:2304.14767).  What remains of a row still sums to
    one; a query left without any key gathers nothing.

    Attributes:
      layer: () int32.
      heads: (n,) int32, padded, or None for all.
      queries: positions of the queries.
      keys: positions of the keys.
    """

    layer: jax.Array
    heads: jax.Array | None
    queries: Where
    keys: Where

    edits_attention: ClassVar[bool] = True

    def __init__(
        self,
        layer: int,
        heads: Indices = None,
        *,
        queries: Positions = None,
        keys: Positions = None,
    ) -> None:
        some, mask = (None, None) if heads is None else taken(heads, "heads")
        fill(self, layer=single(layer, "layer"), heads=None if some is None else ints(some))
        fill(self, masks=() if mask is None else (("heads", mask),))
        fill(self, queries=Where.of(queries), keys=Where.of(keys))

    @property
    def sites(self) -> tuple[str, ...]:
        """None: it changes which keys are seen."""
        return ()

    def cut(self, mask: jax.Array, layer: Any, positions: jax.Array, keys: jax.Array) -> jax.Array:
        """The mask without the edges."""
        edge = self.queries(positions)[:, :, None, None] & self.keys(keys)[:, None, None, :]
        mine = jnp.ones(mask.shape[2], bool)
        if self.heads is not None:
            mine = (jnp.arange(mask.shape[2])[:, None] == self.heads).any(axis=-1)
        return mask & ~(edge & mine[:, None] & (self.layer == layer))

    @property
    def last(self) -> int:
        """The last query; keys may stand anywhere before."""
        return self.queries.last

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError for an unknown layer or head."""
        check_places(config, self.layer, self.heads)

    def __str__(self) -> str:
        heads = "all heads" if self.heads is None else f"heads {short(plain(self.heads))}"
        return (
            f"knock out attention of layer {int(self.layer)}, {heads}, from {self.queries} "
            f"to {self.keys}"
        )


@node
class ReplaceAttention(Intervention):
    """Puts given weights in the place of a head's: `ReplaceAttention(5, 2, rows, queries=[9])`.

    Where tokens are decoded with a cache (chats, samplers), weights on keys after their query, or
    outside a sliding layer's window, are refused with a ValueError: they are not there then.

    Attributes:
      layer: () int32.
      head: () int32.
      queries: (P,) int32 positions of the queries, padded.
      weights: (P, S) from each of them to key positions 0 to S - 1, padded; later keys get none.
    """

    layer: jax.Array
    head: jax.Array
    queries: jax.Array
    weights: jax.Array

    edits_attention: ClassVar[bool] = True

    def __init__(self, layer: int, head: int, weights: Any, *, queries: Indices = None) -> None:
        rows = array(weights, np.float32, "weights")
        at = list(range(len(rows))) if queries is None else taken(queries, "queries")[0]
        if rows.ndim != 2 or len(at) != len(rows):
            raise ValueError(
                f"weights must be (queries, keys), one row for each of {len(at)} queries, got "
                f"{rows.shape}"
            )
        if len(set(at)) < len(at):
            raise ValueError(f"a query's weights can be replaced once, got {short(at)}")
        fill(self, layer=single(layer, "layer"), head=single(head, "head"))
        fill(self, weights=padded(rows, np.float32, 0, axes=2))
        fill(self, queries=from_zero(at, queries, "queries"))

    @property
    def last(self) -> int:
        """The last query."""
        return max(plain(self.queries))

    def beyond(self, length: int) -> list[int]:
        """The queries that a text of `length` tokens does not have."""
        return [p for p in plain(self.queries) if p >= length]

    @property
    def sites(self) -> tuple[str, ...]:
        """attention."""
        return ("attention",)

    def apply(self, value: jax.Array, layer: Any, positions: jax.Array, keys: Any) -> jax.Array:
        """The weights (B, T, N, S) with the head's rows replaced."""
        match = positions[..., None] == self.queries
        rows = self.weights[match.argmax(axis=-1)]  # (B, T, given)
        size = rows.shape[-1]
        given = (keys >= 0) & (keys < size)
        at = jnp.clip(keys, 0, size - 1)[:, None, :]
        new = jnp.take_along_axis(rows, jnp.broadcast_to(at, (*rows.shape[:2], at.shape[-1])), -1)
        new = jnp.where(given[:, None], new, 0.0)[:, :, None].astype(value.dtype)
        mine = (jnp.arange(value.shape[2]) == self.head) & (self.layer == layer)
        return jnp.where(match.any(axis=-1)[:, :, None, None] & mine[:, None], new, value)

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError for an unknown layer or head."""
        check_places(config, self.layer, self.head)

    def uncached(self, config: TransformerConfig, start: int) -> str:
        """Weights on keys that come after a query, or that its layer no longer keeps."""
        queries, weights = np.asarray(self.queries)[:, None], np.asarray(self.weights)
        keys = np.arange(weights.shape[1])
        kind = config.layers[int(self.layer)].kind
        gone = keys <= queries - kind.window if isinstance(kind, Sliding) else keys < 0
        for lost, why in ((keys > queries, "comes later"), (gone, "has left the layer's window")):
            found = np.argwhere((weights != 0) & (queries >= max(start, 0)) & lost)
            if len(found):
                query, key = int(queries[found[0, 0], 0]), int(found[0, 1])
                return f"it has a weight from query {query} on key {key}, which {why}"
        return ""

    def __str__(self) -> str:
        return (
            f"replace attention of layer {int(self.layer)}, head {int(self.head)} at queries "
            f"{short(plain(self.queries))}"
        )
