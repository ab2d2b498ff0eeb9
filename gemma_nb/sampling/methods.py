"""How the next token is chosen: the settings, and the distribution that they leave."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gemma_nb import settings
from gemma_nb.cpu.top_k import top_k
from gemma_nb.summaries import summary

if TYPE_CHECKING:
    from gemma_nb.model import GemmaTransformer

# Top-k up to this, and any nucleus that fits into it, needs no sort of the whole vocabulary.
_SHORTLIST = 256
_NONE = -1  # no token is forced
# What settings are held to, so that no product or quotient of them and a logit leaves float32
# (1.2e-38 to 3.4e38): beyond it every score is infinite or NaN, and nothing is left to draw.
_SMALLEST, _LARGEST, _PENALTY = 1e-24, 1e24, 1e6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How replies are sampled.  `None` switches a method off, and is the default of what is needed.

    The methods apply in this order, as in Hugging Face transformers: repetition penalty,
    forbidden tokens, temperature, top-k, top-p, min-p.

    Attributes:
      temperature: logits are divided by it; 0 always takes the most likely token (greedy).
      top_k: keep the k most likely tokens.
      top_p: keep the fewest tokens whose probability adds up to at least this
        (nucleus sampling, arXiv:1904.09751).
      min_p: keep tokens at least this many times as likely as the most likely one
        (arXiv:2407.01082).
      repetition_penalty: logits of tokens already in the context are divided by it where positive,
        multiplied where negative (CTRL, arXiv:1909.05858, section 4.1).  1 changes nothing.
      seed: the same seed in the same conversation gives the same reply; None draws one, which the
        turn then records.
      max_new_tokens: longest reply.
      stop: the reply ends before the first of these strings.
      forbidden: token ids that are never chosen.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    forbidden: tuple[int, ...] = ()

    __repr__ = summary

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)

    def _checked(self) -> dict[str, Any]:
        """The fields as plain Python values.

        Raises:
          ValueError: a value that its field cannot have, by the name of the field.
        """
        return {
            "temperature": _within(
                *("temperature", self.temperature, 0),
                expected=f"0 (greedy) or a number from {_SMALLEST:g} to {_LARGEST:g}",
                default=Sampling.temperature,
            ),
            "top_k": _counted("top_k", self.top_k, "at least 1, or None for no limit"),
            "top_p": _within("top_p", self.top_p, most=1),
            "min_p": _within("min_p", self.min_p, 0, most=1),
            "repetition_penalty": _within(
                *("repetition_penalty", self.repetition_penalty),
                least=1 / _PENALTY,
                most=_PENALTY,
            ),
            "seed": _counted("seed", self.seed, "in 0 to 2**32 - 1, or None", 0, 2**32 - 1),
            "max_new_tokens": _counted(
                "max_new_tokens",
                Sampling.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
                "at least 1",
            ),
            "stop": settings.texts("stop", self.stop, "a non-empty string, or a list of such"),
            "forbidden": settings.wholes("forbidden", self.forbidden, "a list of token ids"),
        }

    @classmethod
    def given(cls, sampling: Sampling | Mapping[str, Any] | None) -> Sampling | None:
        """Settings as an argument gives them: whole, as a mapping of the fields, or None.

        Raises:
          ValueError: it is none of these, or a field is unknown or has another value.
        """
        return None if sampling is None else settings.record(cls, "sampling", sampling)

    @classmethod
    def recommended(cls, model: GemmaTransformer, **changes: object) -> Sampling:
        """What the authors of `model`'s checkpoint recommend, with `changes` on top."""
        fields = dict(model.info.sampling) if model.info else {}
        return cls(**{**fields, **changes})  # type: ignore[arg-type]


def _within(
    name: str,
    value: Any,
    *also: float,
    least: float = _SMALLEST,
    most: float = _LARGEST,
    expected: str = "",
    default: float | None = None,
) -> float | None:
    """A number from `least` to `most`, or one of `also`; None for None, or the `default`."""
    if value is None:
        return default
    alone = "".join(f"{number:g}, " for number in also)
    expected = expected or f"{alone}a number from {least:g} to {most:g}, or None"
    number = settings.real(name, value, expected)
    if number not in also and not least <= number <= most:
        settings.refuse(name, expected, value)
    return number


def _counted(
    name: str, value: Any, expected: str, least: int = 1, most: float = math.inf
) -> int | None:
    """A whole number from `least` to `most`; None for None."""
    if value is None:
        return None
    number = settings.whole(name, value, f"a whole number {expected}")
    if not least <= number <= most:
        settings.refuse(name, f"a whole number {expected}", value)
    return number


@flax.struct.dataclass
class Controls:
    """`Sampling` as scalars on the device: a changed setting compiles no step anew.

    Attributes:
      temperature: float32, 0 for greedy.
      top_k: int32, 0 for off.
      top_p: float32, 1 for off.
      min_p: float32, 0 for off.
      repetition_penalty: float32, 1 for off.
      banned: (V,) bool, tokens never chosen.
      key: the reply's random key.
      forced: int32, the token that is chosen whatever is drawn; -1 for none.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    banned: jax.Array
    key: jax.Array
    forced: jax.Array

    __repr__ = summary

    @classmethod
    def of(cls, sampling: Sampling, num_embed: int) -> Controls:
        """Controls for `sampling`, whose seed must be set.

        Raises:
          ValueError: a forbidden id outside the vocabulary, or no seed.
        """
        if sampling.seed is None:
            raise ValueError("the seed must be drawn before sampling starts")
        scalars = _on_device(
            num_embed,
            sampling.forbidden,
            temperature=float(sampling.temperature),
            top_k=min(int(sampling.top_k or 0), num_embed),
            top_p=1.0 if sampling.top_p is None else float(sampling.top_p),
            min_p=float(sampling.min_p or 0),
            repetition_penalty=float(sampling.repetition_penalty or 1),
        )
        return cls(**scalars, key=seeded(sampling.seed))

    def forcing(self, token: int) -> Controls:
        """The same settings, under which `token` is chosen whatever is drawn.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        if not 0 <= token < len(self.banned):
            raise ValueError(f"token ids must lie in 0 to {len(self.banned) - 1}, got {token}")
        return cast(Controls, self.replace(forced=np.int32(token)))  # type: ignore[attr-defined]


def seeded(seed: int) -> jax.Array:
    """The key () that `jax.random.key` makes of a seed, without a program that makes it.

    Args:
      seed: 0 to 2**32 - 1.
    """
    # Of threefry it is the seed itself, in two words.
    words = jax.device_put(np.array([0, seed], np.uint32))
    return jax.random.wrap_key_data(words, impl="threefry2x32")


# Kept, since most replies of a chat have the settings of the one before, and differ in their seed.
@functools.lru_cache(maxsize=8)
def _on_device(
    num_embed: int, forbidden: tuple[int, ...], *, top_k: int, **numbers: float
) -> dict[str, jax.Array]:
    """All of `Controls` but the key."""
    banned = np.zeros(num_embed, bool)
    outside = [i for i in forbidden if not 0 <= i < num_embed]
    if outside:
        raise ValueError(f"forbidden ids must lie in 0 to {num_embed - 1}, got {outside[:5]}")
    banned[list(forbidden)] = True
    if banned.all():
        raise ValueError("every token of the vocabulary is forbidden: none is left to choose")
    scalars = {name: np.float32(value) for name, value in numbers.items()}
    whole = {"top_k": np.int32(top_k), "forced": np.int32(_NONE)}
    return jax.device_put({**scalars, **whole, "banned": banned})


@flax.struct.dataclass
class Distribution:
    """What the sampler draws from: softmax of `scores` over scores >= threshold.

    Attributes:
      scores: (V,) float32 logits after penalty, bans and temperature.
      threshold: scalar; what lies below has probability 0.
      log_total: scalar, log-sum-exp of the kept scores.
    """

    scores: jax.Array
    threshold: jax.Array
    log_total: jax.Array

    __repr__ = summary

    def probability(self, ids: Int[Array, "*n"]) -> Float[Array, "*n"]:
        """Probability of drawing each id."""
        scores = self.scores[ids]
        return jnp.where(scores >= self.threshold, jnp.exp(scores - self.log_total), 0.0)


def distribution(
    logits: Float[Array, " V"], controls: Controls, seen: Bool[Array, " V"]
) -> Distribution:
    """The distribution that `controls` make of the model's logits.

    Args:
      logits: as the model computed them, float32.
      controls: the settings.
      seen: tokens of the context so far, for the repetition penalty.
    """
    penalty = controls.repetition_penalty
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    scores = jnp.where(seen, penalised, logits)
    scores = jnp.where(controls.banned, -jnp.inf, scores)
    greedy = controls.temperature == 0
    scores = scores / jnp.where(greedy, 1.0, controls.temperature)

    kept = jnp.where(greedy, 1, controls.top_k)
    threshold = _rank_threshold(scores, kept, controls.top_p)
    threshold = jnp.maximum(threshold, scores.max() + jnp.log(controls.min_p))
    log_total = jax.nn.logsumexp(jnp.where(scores >= threshold, scores, -jnp.inf))
    return Distribution(scores, threshold, log_total)


def _rank_threshold(scores: jax.Array, k: jax.Array, p: jax.Array) -> jax.Array:
    """The smallest score that top-k (0: off) and then top-p (1: off) keep."""
    size = scores.shape[0]

    def among(shortlist: jax.Array, log_total: jax.Array) -> jax.Array:
        index = jnp.arange(shortlist.shape[0])
        within = (k == 0) | (index < k)
        # Top-p looks at the distribution that top-k has left.
        left = jax.nn.logsumexp(jnp.where(within, shortlist, -jnp.inf))
        weights = jnp.exp(shortlist - jnp.where(k == 0, log_total, left))
        probabilities = jnp.where(within, weights, 0.0)
        before = jnp.cumsum(probabilities) - probabilities
        nucleus = within & ((before < p) | (p >= 1) | (index == 0))
        return jnp.min(jnp.where(nucleus, shortlist, jnp.inf))

    def by_shortlist() -> jax.Array:
        shortlist, _ = top_k(scores, min(_SHORTLIST, size))
        log_total = jax.nn.logsumexp(scores)
        covered = jnp.exp(shortlist - log_total).sum()
        enough = ((k > 0) & (k <= _SHORTLIST)) | ((k == 0) & (covered >= p))
        return lax.cond(
            enough, lambda: among(shortlist, log_total), lambda: _bisected(scores, k, p)
        )

    # Conditionals, not selects: only the branch that is needed is computed.
    return lax.cond((k == 0) & (p >= 1), lambda: jnp.float32(-jnp.inf), by_shortlist)


def _bisected(scores: jax.Array, k: jax.Array, p: jax.Array) -> jax.Array:
    """`_rank_threshold` without a shortlist.

    By bisection of the bits of a score, 32 times at most.  With `top_p` 0.95 alone, a choice among
    the 262,144 tokens of Gemma 3 270M takes 4 ms so, and 73 where all are sorted (on a Zen 3).
    """
    top = scores.max()
    weights = jnp.exp(scores - top)

    def smallest(keeps: Callable[[jax.Array], jax.Array], after: jax.Array) -> jax.Array:
        """The smallest score from `after` on that is kept; all larger ones are, too."""

        def halve(ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = ends
            middle = (low & high) + ((low ^ high) >> 1)  # the sum of both may overflow
            kept = keeps(_in_order(middle, jnp.float32))
            return jnp.where(kept, low, middle + 1), jnp.where(kept, middle, high)

        ends = _in_order(after, jnp.int32), _in_order(top, jnp.int32)
        _, found = lax.while_loop(lambda ends: ends[0] < ends[1], halve, ends)
        return _in_order(found, jnp.float32)

    def above(value: jax.Array) -> jax.Array:
        return jnp.where(scores > value, weights, 0.0).sum()

    bottom = scores.min()
    least = lax.cond(
        k == 0, lambda: bottom, lambda: smallest(lambda v: jnp.sum(scores > v) < k, bottom)
    )
    # Of scores that equal the last one kept, top-p sees only as many as top-k has left.
    equal = jnp.exp(least - top) * (k - jnp.sum(scores > least)).astype(jnp.float32)
    total = jnp.where(k == 0, weights.sum(), above(least) + equal)
    return smallest(lambda v: (p >= 1) | (above(v) < p * total), least)


def _in_order(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 as int32 in the same order, or the inverse."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type(bits ^ ((bits >> 31) & 0x7FFFFFFF), dtype)


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
    """The token id drawn by a number of `uniform_at`: the same one always draws the same.

    By inversion of the cumulative distribution, in two levels (blocks of the vocabulary, then
    inside one), since a cumulative sum over all of it is slow.
    """
    block = 512

    def drawn() -> jax.Array:
        kept = dist.scores >= dist.threshold
        weights = jnp.where(kept, jnp.exp(dist.scores - dist.log_total), 0.0)
        padded = jnp.pad(weights, (0, -weights.shape[0] % block)).reshape(-1, block)
        sums = padded.sum(axis=1)
        row, rest = invert(sums, uniform * sums.sum())
        column, _ = invert(padded[row], jnp.maximum(rest, 0.0))
        return (row * block + column).astype(jnp.int32)

    def greedy() -> jax.Array:
        return jnp.argmax(dist.scores).astype(jnp.int32)

    # A conditional, not a select: XLA:CPU finds the largest of a vocabulary on one thread, which
    # takes 4 % of a step of Gemma 3 270M.
    return lax.cond(controls.temperature == 0, greedy, drawn)
