"""What states of the residual stream say about the next token, without their logits.

One state's logits are V numbers (1 MB for Gemma 3), and a lens looks at thousands of states.  The
vocabulary is therefore read once, a stretch at a time, and of each stretch only running sums and
the best entries are kept (the online softmax of Milakov and Gimelshein, arXiv:1805.02867).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gemma_nb import placement
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn.layers import RMSNorm
from gemma_nb.typing import Params

_STRETCH = 16_384  # vocabulary entries at a time
_GROUP = 128
_POSITIONS = (1, 8, 16, 32, 64)  # how many positions are read at a time
_ABSENT = -1e30  # the logit of an entry that was counted before


@dataclasses.dataclass(frozen=True)
class Reading:
    """Of n states at each of P positions, of which the last is the model's output.

    Attributes:
      logsumexp: (n, P) of the logits.
      entropy: (n, P) nats.
      kl: (n, P) nats, of the output's distribution from the state's: KL(output || state).
      top_logits: (n, P, k), descending.
      top_ids: (n, P, k) int32.
      watched_logits: (n, P, W).
      watched_ranks: (n, P, W) int32, how many tokens have a larger logit.
    """

    logsumexp: np.ndarray
    entropy: np.ndarray
    kl: np.ndarray
    top_logits: np.ndarray
    top_ids: np.ndarray
    watched_logits: np.ndarray
    watched_ranks: np.ndarray


def normalise(model: GemmaTransformer, residual: Any) -> jax.Array:
    """`residual` (..., D) through the model's final norm."""
    return _normalise(model.params["final_norm"], jnp.asarray(residual))


@jax.jit
def _normalise(params: Params, residual: jax.Array) -> jax.Array:
    return cast(jax.Array, RMSNorm().apply({"params": params}, residual))


def read(
    model: GemmaTransformer, states: np.ndarray, k: int, watched: np.ndarray | None = None
) -> Reading:
    """Reads the vocabulary for final-normed states.

    Args:
      model: whose embedding is the vocabulary head.
      states: (n, P, D); states[-1] are the output's.
      k: how many of the best entries to keep.
      watched: (P, W) token ids to know the logits and ranks of.
    """
    count = states.shape[1]
    if watched is None:
        watched = np.zeros((count, 0), np.int32)
    parts = []
    for start in range(0, count, _POSITIONS[-1]):
        stop = min(start + _POSITIONS[-1], count)
        size = next(n for n in _POSITIONS if n >= stop - start)
        more = size - (stop - start)
        some = np.pad(states[:, start:stop], ((0, 0), (0, more), (0, 0)))
        ids = np.pad(watched[start:stop], ((0, more), (0, 0)))
        part = _read_some(model, some, ids, k)
        parts.append(jax.tree.map(lambda x, real=stop - start: x[:, :real], part))
    return Reading(**{n: np.concatenate([p[n] for p in parts], axis=1) for n in parts[0]})


def _read_some(
    model: GemmaTransformer, states: np.ndarray, watched: np.ndarray, k: int
) -> dict[str, np.ndarray]:
    table = model.params["embedder"]["input_embedding"]
    cap = model.config.final_logit_soft_cap
    vocabulary = table.shape[0]
    stretch = min(_STRETCH, vocabulary)
    x = jnp.asarray(states, jnp.float32)
    shape = states.shape[:2]
    carry = {
        "largest": jnp.full(shape, _ABSENT, jnp.float32),
        "sum": jnp.zeros(shape, jnp.float32),
        "weighted": jnp.zeros(shape, jnp.float32),
        "crossed": jnp.zeros(shape, jnp.float32),
        "top_logits": jnp.full((*shape, k), _ABSENT, jnp.float32),
        "top_ids": jnp.zeros((*shape, k), jnp.int32),
        "watched_ranks": jnp.zeros((*shape, watched.shape[1]), jnp.int32),
    }
    watched_logits = _watched(table, cap, x, jnp.asarray(watched))
    for start in range(0, vocabulary, stretch):
        # The last stretch reaches back, so that all are of one size.
        at = min(start, vocabulary - stretch)
        carry = _stretch(stretch, cap, table, x, watched, watched_logits, carry, at, start)
    found = placement.fetch(_finish(carry))
    return {**found, "watched_logits": placement.fetch(watched_logits)}


def _capped(logits: jax.Array, cap: float | None) -> jax.Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


# Static: the soft-cap.
@jax.jit(static_argnums=1)
def _watched(table: jax.Array, cap: float | None, x: jax.Array, watched: jax.Array) -> jax.Array:
    rows = table[watched].astype(jnp.float32)
    return _capped(jnp.einsum("nPD,PWD->nPW", x, rows), cap)


# Static: sizes and the soft-cap; where the stretch begins is traced.
@partial(jax.jit, static_argnums=(0, 1), donate_argnames=("carry",))
def _stretch(
    size: int,
    cap: float | None,
    table: jax.Array,
    x: jax.Array,
    watched: jax.Array,
    watched_logits: jax.Array,
    carry: dict[str, jax.Array],
    at: jax.Array,
    fresh: jax.Array,
) -> dict[str, jax.Array]:
    rows = lax.dynamic_slice_in_dim(table, at, size).astype(jnp.float32)
    ids = at + jnp.arange(size, dtype=jnp.int32)
    flat = x.reshape(-1, x.shape[-1])
    logits = _capped((flat @ rows.T).reshape(*x.shape[:2], size), cap)
    logits = jnp.where(ids >= fresh, logits, _ABSENT)

    largest = jnp.maximum(carry["largest"], logits.max(axis=-1))
    shrink = jnp.exp(carry["largest"] - largest)
    weights = jnp.exp(logits - largest[..., None])
    # Of the output's distribution, for the cross-entropy of every state at the same position.
    output = (weights[-1][None] * logits).sum(axis=-1)

    k = carry["top_logits"].shape[-1]
    values, indices = _top(logits, min(k, size))
    both = jnp.concatenate([carry["top_logits"], values], axis=-1)
    both_ids = jnp.concatenate([carry["top_ids"], ids[indices]], axis=-1)
    values, which = lax.top_k(both, k)
    above = [
        ((logits > watched_logits[..., w, None]) & (ids != watched[:, w, None])).sum(axis=-1)
        for w in range(watched.shape[1])
    ]
    ranks = carry["watched_ranks"]
    return {
        "largest": largest,
        "sum": shrink * carry["sum"] + weights.sum(axis=-1),
        "weighted": shrink * carry["weighted"] + (weights * logits).sum(axis=-1),
        "crossed": shrink[-1] * carry["crossed"] + output,
        "top_logits": values,
        "top_ids": jnp.take_along_axis(both_ids, which, axis=-1),
        "watched_ranks": ranks + jnp.stack(above, axis=-1).astype(jnp.int32) if above else ranks,
    }


def _top(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of the last axis: only the k best groups can hold them."""
    size = x.shape[-1]
    if size % _GROUP or size <= k * _GROUP:
        values, indices = lax.top_k(x, k)
        return values, indices
    groups = x.reshape(*x.shape[:-1], -1, _GROUP)
    _, best = lax.top_k(groups.max(axis=-1), k)
    best = jnp.sort(best, axis=-1)
    candidates = jnp.take_along_axis(groups, best[..., None], axis=-2)
    values, which = lax.top_k(candidates.reshape(*x.shape[:-1], -1), k)
    group = jnp.take_along_axis(best, which // _GROUP, axis=-1)
    return values, group * _GROUP + which % _GROUP


@jax.jit
def _finish(carry: dict[str, jax.Array]) -> dict[str, jax.Array]:
    logsumexp = carry["largest"] + jnp.log(carry["sum"])
    mean = carry["weighted"] / carry["sum"]
    # KL(p || q) = sum of p (log p - log q), with p the output's.
    under_output = carry["crossed"] / carry["sum"][-1]
    kl = (mean[-1] - logsumexp[-1]) - (under_output - logsumexp)
    return {
        "logsumexp": logsumexp,
        "entropy": logsumexp - mean,
        "kl": jnp.maximum(kl, 0.0),
        "top_logits": carry["top_logits"],
        "top_ids": carry["top_ids"],
        "watched_ranks": carry["watched_ranks"],
    }
