"""Interventions on the tokens that are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.interventions.base import Intervention
from gemma_nb.interventions.numbers import array, is_traced
from gemma_nb.interventions.positions import from_zero, single
from gemma_nb.interventions.pytrees import fill, node

if TYPE_CHECKING:
    from gemma_nb.config import TransformerConfig


@node
class ForceToken(Intervention):
    """Has the model read another token at a position than the one that stands there.

    Attributes:
      position: () int32.
      token: () int32 id.
    """

    position: jax.Array
    token: jax.Array

    def __init__(self, position: int, token: int) -> None:
        at = single(position, "position")
        from_zero([int(at)], position, "position")
        # A token may be traced.
        read = array(token, np.int32) if is_traced(token) else single(token, "token")
        fill(self, position=at, token=read)

    @property
    def last(self) -> int:
        """The position."""
        return int(self.position)

    def beyond(self, length: int) -> list[int]:
        """The position, where a text of `length` tokens does not reach it."""
        return [p for p in [int(self.position)] if p >= length]

    @property
    def sites(self) -> tuple[str, ...]:
        """The token ids, before they are embedded."""
        return ("tokens",)

    def apply(self, value: jax.Array, layer: Any, positions: jax.Array, keys: Any) -> jax.Array:
        """(B, T) token ids with the one replaced."""
        del layer, keys
        return jnp.where(positions == self.position, self.token, value)

    def check(self, config: TransformerConfig) -> None:
        """Raises ValueError for an id outside the vocabulary."""
        if not is_traced(self.token) and not 0 <= int(self.token) < config.num_embed:
            raise ValueError(
                f"token ids must lie in 0 to {config.num_embed - 1}, got {int(self.token)}"
            )

    def __str__(self) -> str:
        return f"read token {int(self.token)} at position {int(self.position)}"
