"""Metrics of a run, and the rows of the vocabulary that each takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp

from gemma_nb.summaries import summary

if TYPE_CHECKING:
    from gemma_nb.interp.labels import Labels


@flax.struct.dataclass
class LogitDifference:
    """The logit of one token minus that of another, after the last position.

    Only two rows of the vocabulary are read.

    Attributes:
      token: () int32 id; or a text that is one token, such as " Rome".
      against: () int32 id, or a text.
    """

    token: int | str | jax.Array
    against: int | str | jax.Array

    __repr__ = summary

    def rows(self) -> jax.Array:
        """Ids of the logits that are needed."""
        return jnp.asarray([self.token, self.against], jnp.int32)

    def of(self, logits: jax.Array) -> jax.Array:
        """From the logits of `rows` (..., 2)."""
        return logits[..., 0] - logits[..., 1]

    def title(self, labels: Labels) -> str:
        """Name of the metric, with its tokens."""
        token, against = (labels.piece(int(i)) for i in (self.token, self.against))
        return f"logit of {token!r} minus logit of {against!r}"


@flax.struct.dataclass
class Logit:
    """The logit of a token after the last position; one row of the vocabulary is read.

    Attributes:
      token: () int32 id; or a text that is one token, such as " Rome".
    """

    token: int | str | jax.Array

    __repr__ = summary

    def rows(self) -> jax.Array:
        """Ids of the logits that are needed."""
        return jnp.asarray([self.token], jnp.int32)

    def of(self, logits: jax.Array) -> jax.Array:
        """From the logits of `rows` (..., 1)."""
        return logits[..., 0]

    def title(self, labels: Labels) -> str:
        """Name of the metric, with its token."""
        return f"logit of {labels.piece(int(self.token))!r}"


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
        values = jax.vmap(self.function)(flat)
        if values.shape != flat.shape[:1]:
            raise ValueError(
                "a metric makes one number of the (V,) logits, this one an array of "
                f"{values.shape[1:]}"
            )
        return values.reshape(logits.shape[:-1])

    def title(self, labels: Labels) -> str:
        """Its name, where it has one."""
        del labels
        name = getattr(self.function, "__name__", "metric")
        return "metric" if name == "<lambda>" else name.replace("_", " ")


Metric = LogitDifference | Logit | OfLogits | Callable[[jax.Array], Any]


def resolve(metric: Metric, labels: Labels) -> LogitDifference | Logit | OfLogits:
    """Texts become token ids; a plain function of the logits becomes an `OfLogits`.

    Raises:
      ValueError: a token that the vocabulary does not have, or no metric.
    """
    if isinstance(metric, LogitDifference):
        return LogitDifference(labels.id_of(metric.token), labels.id_of(metric.against))
    if isinstance(metric, Logit):
        return Logit(labels.id_of(metric.token))
    if not callable(metric) and not isinstance(metric, OfLogits):
        raise ValueError(
            "a metric is gnb.LogitDifference(a, b), gnb.Logit(a) or a function of the (V,) logits, "
            f"got {metric!r:.60}"
        )
    return metric if isinstance(metric, OfLogits) else OfLogits(metric)
