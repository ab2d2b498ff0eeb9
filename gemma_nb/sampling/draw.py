"""The draw of the next token, with its evidence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gemma_nb.cpu.scores import SHORTLIST, Scores
from gemma_nb.sampling.evidence import Evidence, ExactLogit, evidence_of
from gemma_nb.sampling.filters import (
    Controls,
    Distribution,
    distribution,
    shortlist_distribution,
)
from gemma_nb.sampling.settings import Sampling

# A cumulative sum over a whole vocabulary is slow: it is taken over blocks, and inside one.
_BLOCK = 512


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
    """Choose the token that follows, with its evidence.

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
    exact = None if forced_logit is None else ExactLogit.of(scores, forced, forced_logit)
    allowed = ~controls.banned[scores.ids]

    def among_shortlist() -> tuple[jax.Array, jax.Array, jax.Array]:
        dist = shortlist_distribution(scores.values, allowed, controls)
        chosen, p = draw(dist, controls, uniform), dist.probabilities()
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
    return evidence_of(scores, exact, (token, value, rank), tuple(probabilities), k)


def suffices(scores: Scores, controls: Controls) -> Bool[Array, ""]:
    """True where the shortlist holds all that may be drawn."""
    number = (~controls.banned[scores.ids]).sum()
    enough = jnp.where(
        controls.temperature == 0, number > 0, (controls.top_k > 0) & (controls.top_k <= number)
    )
    return enough & (controls.repetition_penalty == 1)


def may_suffice(sampling: Sampling) -> bool:
    """True where a shortlist may hold all that may be drawn: as far as the settings tell."""
    most = 1 if sampling.temperature == 0 else int(sampling.top_k or 0)
    return sampling.repetition_penalty in (None, 1) and 0 < most <= SHORTLIST


def invert(w: Float[Array, " n"], target: Float[Array, ""]) -> tuple[jax.Array, jax.Array]:
    """First index whose running sum exceeds `target`, and what is left of that there.

    Only an entry above 0 is found, whatever is rounded.
    """
    running, index = jnp.cumsum(w), jnp.arange(w.shape[0])
    # Rounding may leave target at or beyond the sum: the last entry that has weight.
    last = jnp.max(jnp.where(w > 0, index, 0))
    found = jnp.min(jnp.where((running > target) & (w > 0), index, last))
    return found, target - (running[found] - w[found])


def uniform_at(controls: Controls, position: Int[Array, ""]) -> Float[Array, ""]:
    """The random number in [0, 1) that decides at `position`; the reply's key makes it."""
    return jax.random.uniform(jax.random.fold_in(controls.key, position))


def draw(dist: Distribution, controls: Controls, uniform: Float[Array, ""]) -> Int[Array, ""]:
    """The index drawn by a number of `uniform_at`: the same one always draws the same.

    By inversion of the cumulative distribution.
    """
    greedy = controls.temperature == 0
    if dist.shortlist_weights is not None:
        assert dist.likeliest is not None
        found, _ = invert(dist.shortlist_weights, uniform * dist.total)
        return jnp.where(greedy, dist.likeliest, found)

    def drawn() -> jax.Array:
        weights = dist.weights()
        blocks = jnp.pad(weights, (0, -len(weights) % _BLOCK)).reshape(-1, _BLOCK)
        sums = blocks.sum(axis=1)
        row, rest = invert(sums, uniform * sums.sum())
        column, _ = invert(blocks[row], jnp.maximum(rest, 0.0))
        return (row * _BLOCK + column).astype(jnp.int32)

    # A conditional, not a select: XLA:CPU finds the largest of a vocabulary on one thread, which
    # takes 4 % of a step of Gemma 3 270M.
    return lax.cond(greedy, lambda: jnp.argmax(dist.scores).astype(jnp.int32), drawn)
