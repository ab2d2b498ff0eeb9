"""What is measured of a run, and how little of the vocabulary it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LogitDifference:
    """The logit of one token minus that of another, after the last position.

    Only two rows of the vocabulary are read.

    Attributes:
      token: () int32 id.
      against: () int32 id.
    """

    token: int | jax.Array
    against: int | jax.Array

    def rows(self) -> jax.Array:
        """Ids of the logits that are needed."""
        return jnp.asarray([self.token, self.against], jnp.int32)

    def of(self, logits: jax.Array) -> jax.Array:
        """From the logits of `rows` (..., 2)."""
        return logits[..., 0] - logits[..., 1]

    def __str__(self) -> str:
        return f"logit of {int(self.token)} minus logit of {int(self.against)}"


@flax.struct.dataclass
class Logit:
    """The logit of a token after the last position; one row of the vocabulary is read.

    Attributes:
      token: () int32 id.
    """

    token: int | jax.Array

    def rows(self) -> jax.Array:
        """Ids of the logits that are needed."""
        return jnp.asarray([self.token], jnp.int32)

    def of(self, logits: jax.Array) -> jax.Array:
        """From the logits of `rows` (..., 1)."""
        return logits[..., 0]

    def __str__(self) -> str:
        return f"logit of {int(self.token)}"


@dataclasses.dataclass(frozen=True)
class OfLogits:
    """Any function of the whole logits after the last position, (V,) -> ().

    Attributes:
      function: traced by JAX.
    """

    function: Callable[[jax.Array], Any]

    def rows(self) -> None:
        """All of them."""
        return

    def of(self, logits: jax.Array) -> jax.Array:
        """From logits (..., V)."""
        flat = logits.reshape(-1, logits.shape[-1])
        return jax.vmap(self.function)(flat).reshape(logits.shape[:-1])

    def __str__(self) -> str:
        return getattr(self.function, "__name__", "metric")


Metric = LogitDifference | Logit | OfLogits | Callable[[jax.Array], Any]


def resolve(metric: Metric) -> LogitDifference | Logit | OfLogits:
    """A plain function of the logits becomes an `OfLogits`."""
    return metric if isinstance(metric, LogitDifference | Logit | OfLogits) else OfLogits(metric)
