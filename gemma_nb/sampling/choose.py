"""One choice: the next token, and what is known about it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gemma_nb.sampling.evidence import Evidence
from gemma_nb.sampling.head import Scores
from gemma_nb.sampling.methods import Controls, Distribution, distribution, draw, uniform_at


def choose(
    scores: Scores,
    controls: Controls,
    seen: Bool[Array, " V"],
    position: Int[Array, ""],
    k: int,
    forced_logit: Float[Array, ""] | None = None,
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
    """
    totals = _totals(scores)
    forced, token = controls.forced >= 0, controls.forced
    allowed = ~controls.banned[scores.ids]
    number = allowed.sum()

    def among_shortlist() -> Evidence:
        chosen, probabilities = _draw_from(scores.values, allowed, controls, position)
        value = scores.values[chosen]
        rank = jnp.sum(scores.values > value)
        p = probabilities[chosen], probabilities
        return _evidence(scores, totals, (scores.ids[chosen], value, rank), p, k)

    def beside_shortlist() -> Evidence:
        """A forced token, where all that may be drawn is on the shortlist."""
        _, probabilities = _draw_from(scores.values, allowed, controls, position)
        known = scores if forced_logit is None else _with(scores, token, forced_logit)
        value = known.logits[token]
        rank = jnp.sum(known.logits > value)
        p = jnp.sum(jnp.where(scores.ids == token, probabilities, 0.0)), probabilities
        return _evidence(scores, _totals(known), (token, value, rank), p, k)

    def among_all() -> Evidence:
        known = scores if forced_logit is None else _with(scores, token, forced_logit)
        dist = distribution(known.logits, controls, seen)
        chosen = jnp.where(forced, token, draw(dist, controls, position))
        return observe(known, dist, chosen, k)

    enough = jnp.where(
        controls.temperature == 0, number > 0, (controls.top_k > 0) & (controls.top_k <= number)
    )
    short = enough & (controls.repetition_penalty == 1)
    # A conditional, not a select: only the branch that is needed is computed.
    which = jnp.where(short, forced.astype(jnp.int32), 2)
    return lax.switch(which, (among_shortlist, beside_shortlist, among_all))


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
    return _evidence(scores, _totals(scores), (token, logit, rank), p, k)


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


def _with(scores: Scores, token: Int[Array, ""], logit: Float[Array, ""]) -> Scores:
    """`scores` with the exact logit of one token (-1: none); those of the shortlist are exact."""
    known = (token < 0) | (scores.ids == token).any()
    logit = jnp.where(known, scores.logits[token], logit)
    return dataclasses.replace(scores, logits=scores.logits.at[token].set(logit))


def _totals(scores: Scores) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Log-sum-exp of the logits, and the entropy of their softmax."""
    top = scores.values[0]
    weights = jnp.exp(scores.logits - top)
    total = weights.sum()
    log_total = top + jnp.log(total)
    # H = -sum p log p = log Z - sum p x.
    return log_total, log_total - jnp.sum(weights * scores.logits) / total


def _evidence(
    scores: Scores,
    totals: tuple[jax.Array, jax.Array],
    chosen: tuple[jax.Array, jax.Array, jax.Array],
    probabilities: tuple[jax.Array, jax.Array],
    k: int,
) -> Evidence:
    """Evidence of a token with its logit and rank; probabilities of it and of the shortlist."""
    log_total, entropy = totals
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
    position: Int[Array, ""],
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
    running = jnp.cumsum(weights)
    target = uniform_at(controls, position) * running[-1]
    last = jnp.max(jnp.where(weights > 0, jnp.arange(len(values)), 0))
    drawn = jnp.minimum(jnp.sum(running <= target), last)
    return jnp.where(greedy, first, drawn), weights / running[-1]
