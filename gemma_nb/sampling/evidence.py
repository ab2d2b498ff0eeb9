"""Evidence of a choice, computed in the step that makes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from gemma_nb.cpu.scores import Scores
from gemma_nb.sampling.filters import Distribution

if TYPE_CHECKING:
    from gemma_nb.sampling.rows import AttentionRow

# In so many parts a vocabulary is added up.
_PARTS = 64


@flax.struct.dataclass
class Evidence:
    """The evidence of one choice.

    Log-probabilities and entropy are in nats and of the model's own distribution, before the
    sampler; probabilities are what the sampler drew from.

    Attributes:
      token: int32, the chosen id.
      logprob: float32, log-probability of the chosen token before the sampler.
      probability: float32, its probability after the sampler.
      entropy: float32, of the model's distribution.
      rank: int32, how many tokens the model found more likely (0: its first choice).
      ids: (k,) int32, the model's most likely tokens, in order.
      logprobs: (k,) float32, theirs before the sampler.
      probabilities: (k,) float32, theirs after it.
      finite: bool, whether all logits were finite.
      attention: on the host, the attention row of the choice; None where none was captured.
    """

    token: jax.Array
    logprob: jax.Array
    probability: jax.Array
    entropy: jax.Array
    rank: jax.Array
    ids: jax.Array
    logprobs: jax.Array
    probabilities: jax.Array
    finite: jax.Array
    attention: AttentionRow | None = flax.struct.field(pytree_node=False, default=None)

    def pack(self) -> jax.Array:
        """All of it as one array of 32-bit words: each array that a step makes costs time."""
        fields = [getattr(self, name) for name in (*_ONES, *_LISTS)]
        words = [
            jnp.ravel(x) if x.dtype != bool else jnp.ravel(x).astype(jnp.int32) for x in fields
        ]
        return jnp.concatenate([lax.bitcast_convert_type(x, jnp.uint32) for x in words])

    @classmethod
    def unpack(cls, words: np.ndarray) -> Evidence:
        """The inverse of `pack`, on the host."""
        # Once as each kind, and then parts: a view of every part would take longer.
        kinds: tuple[type[np.number], ...] = (np.int32, np.float32)
        views = {kind: words.view(kind) for kind in kinds}
        ones = enumerate(_ONES.items())
        values: dict[str, Any] = {name: views[kind][i] for i, (name, kind) in ones}
        start, length = len(_ONES), (len(words) - len(_ONES)) // len(_LISTS)
        for name, kind in _LISTS.items():
            values[name] = views[kind][start : start + length]
            start += length
        return cls(**{**values, "finite": values["finite"] != 0})


# What 32-bit words stand for, in order.
_ONES: dict[str, type[np.number]] = {
    "token": np.int32,
    "rank": np.int32,
    "finite": np.int32,
    "logprob": np.float32,
    "probability": np.float32,
    "entropy": np.float32,
}
_LISTS: dict[str, type[np.number]] = {
    "ids": np.int32,
    "logprobs": np.float32,
    "probabilities": np.float32,
}


def exact_logit(
    token: Int[Array, ""],
    hidden: Float[Array, " D"],
    table: Float[Array, "V D"],
    soft_cap: float | None,
) -> Float[Array, ""]:
    """The logit of one token, from one row of the embedding table.

    Args:
      token: its id; for a negative one the result means nothing.
      hidden: the final-normed state.
      table: the embedding table.
      soft_cap: bound on the logit, `soft_cap * tanh(logit / soft_cap)`.
    """
    row = table[jnp.maximum(token, 0)]
    logit = jnp.dot(row.astype(jnp.float32), hidden.astype(jnp.float32))
    return logit if soft_cap is None else soft_cap * jnp.tanh(logit / soft_cap)


@flax.struct.dataclass
class ExactLogit:
    """The exact logit of a forced token, where the others know only a rough one.

    Attributes:
      token: () int32; -1 where nothing is forced, or what is stands on the shortlist.
      logit: () float32.
      rough: () float32, what it is among all logits.
    """

    token: jax.Array
    logit: jax.Array
    rough: jax.Array

    @classmethod
    def of(cls, scores: Scores, forced: jax.Array, logit: jax.Array) -> ExactLogit:
        """The exact `logit` of the token `forced`, beside what `scores` says of it."""
        token = jnp.where((scores.ids == forced).any(), -1, forced)
        return cls(token, logit, scores.logits[token])

    def within(self, logits: jax.Array) -> jax.Array:
        """`logits` with this one."""
        return jnp.where(jnp.arange(len(logits)) == self.token, self.logit, logits)


def observe(scores: Scores, dist: Distribution, token: Int[Array, ""], k: int) -> Evidence:
    """Evidence of choosing `token` through `dist`, however it was chosen.

    Args:
      scores: the model's logits.
      dist: what the sampler made of them.
      token: the chosen id.
      k: number of alternatives; at most as many as there are tokens on the shortlist.
    """
    logit = scores.logits[token]
    rank = jnp.sum(scores.logits > logit)
    p = dist.probability(token), dist.probability(scores.ids)
    return evidence_of(scores, None, (token, logit, rank), p, k)


def evidence_of(
    scores: Scores,
    exact: ExactLogit | None,
    chosen: tuple[jax.Array, jax.Array, jax.Array],
    probabilities: tuple[jax.Array, jax.Array],
    k: int,
) -> Evidence:
    """Evidence of a token with its logit and rank; probabilities of it and of the shortlist."""
    log_total, entropy = _totals(scores, exact)
    token, logit, rank = chosen
    return Evidence(
        token=token.astype(jnp.int32),
        logprob=logit - log_total,
        probability=probabilities[0],
        entropy=entropy,
        rank=rank.astype(jnp.int32),
        ids=scores.ids[:k],
        logprobs=scores.values[:k] - log_total,
        probabilities=probabilities[1][:k],
        finite=jnp.isfinite(entropy),
    )


def _totals(scores: Scores, exact: ExactLogit | None) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Log-sum-exp of the logits, and the entropy of their softmax; with the `exact` one, if any."""
    top = scores.values[0]
    # Both sums in one loop, which takes each exponential once; and row by row, since the rounding
    # errors of a sum grow with how much is added to one number.
    rows = scores.logits.reshape(math.gcd(len(scores.logits), _PARTS), -1)
    weights = jnp.exp(rows - top)
    zero = np.float32(0)
    sums = lax.reduce(
        (weights, weights * rows), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (1,)
    )
    total, weighted = (x.sum() for x in sums)
    if exact is not None:
        # One term in place of another: the logits with this one would have to be written first.
        new, old = jnp.exp(exact.logit - top), jnp.exp(exact.rough - top)
        known = exact.token < 0
        total += jnp.where(known, 0.0, new - old)
        weighted += jnp.where(known, 0.0, new * exact.logit - old * exact.rough)
    log_total = top + jnp.log(total)
    # H = -sum p log p = log Z - sum p x.
    return log_total, log_total - weighted / total
