"""One choice: the next token, and what is known about it."""

from __future__ import annotations

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gemma_nb.cpu.head import SHORTLIST, Scores
from gemma_nb.sampling.evidence import Evidence
from gemma_nb.sampling.methods import (
    Controls,
    Distribution,
    Sampling,
    distribution,
    draw,
    invert,
    uniform_at,
)

# In so many parts a vocabulary is added up.
_ROWS = 64


def choose(
    scores: Scores,
    controls: Controls,
    seen: Bool[Array, " V"],
    position: Int[Array, ""],
    k: int,
    forced_logit: Float[Array, ""] | None = None,
    *,
    short: bool = False,
) -> Evidence:
    """Chooses the token that follows, with its evidence.

    The choice depends on the key in `controls`, the position and the distribution only, unless
    `controls.forced` names the token: then the evidence is that of choosing this one.

    Args:
      scores: the model's logits.
      controls: the sampler's settings.
      seen: tokens of the context so far, for the repetition penalty.
      position: of the token that the logits were computed at.
      k: number of alternatives; at most as many as there are tokens on the shortlist.
      forced_logit: exact logit of `controls.forced`, where `scores` knows those of the shortlist
        only; None where all are exact.
      short: take it that the shortlist holds all that may be drawn, see `suffices`: half as much
        is compiled.
    """
    forced, uniform = controls.forced, uniform_at(controls, position)
    exact = None if forced_logit is None else _Exact.of(scores, forced, forced_logit)
    allowed = ~controls.banned[scores.ids]

    def among_shortlist() -> tuple[jax.Array, jax.Array, jax.Array]:
        chosen, p = _draw_from(scores.values, allowed, controls, uniform)
        token = jnp.where(forced >= 0, forced, scores.ids[chosen])
        return token, jnp.sum(jnp.where(scores.ids == token, p, 0.0)), p

    def among_all() -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = scores.logits if exact is None else exact.within(scores.logits)
        dist = distribution(logits, controls, seen)
        token = jnp.where(forced >= 0, forced, draw(dist, controls, uniform))
        return token, dist.probability(token), dist.probability(scores.ids)

    # Conditionals, not selects: only the branch that is needed is computed.
    found = (
        among_shortlist()
        if short
        else lax.cond(suffices(scores, controls), among_shortlist, among_all)
    )
    token, probabilities = found[0], found[1:]
    value = scores.logits[token]
    if exact is not None:
        value = jnp.where(exact.token >= 0, exact.logit, value)
    rank = lax.cond(
        (scores.ids == token).any(),
        lambda: jnp.sum(scores.values > value),
        # Not the token itself, whose own logit may have been inexact.
        lambda: jnp.sum((scores.logits > value) & (jnp.arange(len(scores.logits)) != token)),
    )
    return _evidence(scores, exact, (token, value, rank), tuple(probabilities), k)


def suffices(scores: Scores, controls: Controls) -> Bool[Array, ""]:
    """Whether the shortlist holds all that may be drawn."""
    number = (~controls.banned[scores.ids]).sum()
    enough = jnp.where(
        controls.temperature == 0, number > 0, (controls.top_k > 0) & (controls.top_k <= number)
    )
    return enough & (controls.repetition_penalty == 1)


def may_suffice(sampling: Sampling) -> bool:
    """Whether a shortlist may hold all that may be drawn: as far as the settings tell."""
    kept = 1 if sampling.temperature == 0 else int(sampling.top_k or 0)
    return sampling.repetition_penalty in (None, 1) and 0 < kept <= SHORTLIST


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
    return _evidence(scores, None, (token, logit, rank), p, k)


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
class _Exact:
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
    def of(cls, scores: Scores, forced: jax.Array, logit: jax.Array) -> _Exact:
        token = jnp.where((scores.ids == forced).any(), -1, forced)
        return cls(token, logit, scores.logits[token])

    def within(self, logits: jax.Array) -> jax.Array:
        """`logits` with this one."""
        return jnp.where(jnp.arange(len(logits)) == self.token, self.logit, logits)


def _totals(scores: Scores, exact: _Exact | None) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Log-sum-exp of the logits, and the entropy of their softmax; with the `exact` one, if any."""
    top = scores.values[0]
    # Both sums in one loop, which takes each exponential once; and row by row, since the rounding
    # errors of a sum grow with how much is added to one number.
    rows = scores.logits.reshape(math.gcd(len(scores.logits), _ROWS), -1)
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


def _evidence(
    scores: Scores,
    exact: _Exact | None,
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


def _draw_from(
    values: Float[Array, " n"],
    allowed: Bool[Array, " n"],
    controls: Controls,
    uniform: Float[Array, ""],
) -> tuple[Int[Array, ""], Float[Array, " n"]]:
    """The index drawn from a sorted shortlist that holds all that is kept; all probabilities.

    The methods are those of `distribution`, in its order.
    """
    greedy = controls.temperature == 0
    scores = values / jnp.where(greedy, 1.0, controls.temperature)
    scores = jnp.where(allowed, scores, -jnp.inf)
    kept = jnp.where(greedy, 1, controls.top_k)
    within = allowed & (jnp.cumsum(allowed) <= kept)
    first = jnp.argmax(allowed)
    weights = jnp.where(within, jnp.exp(scores - scores[first]), 0.0)
    p = weights / weights.sum()
    before = jnp.cumsum(p) - p
    nucleus = (before < controls.top_p) | (controls.top_p >= 1)
    nucleus = (within & nucleus) | (jnp.arange(len(values)) == first)
    threshold = jnp.min(jnp.where(nucleus, scores, jnp.inf))
    threshold = jnp.maximum(threshold, scores[first] + jnp.log(controls.min_p))
    # Tokens as likely as the last one kept are kept as well.
    weights = jnp.where(allowed & (scores >= threshold), jnp.exp(scores - scores[first]), 0.0)
    total = weights.sum()
    drawn, _ = invert(weights, uniform * total)
    return jnp.where(greedy, first, drawn), weights / total
