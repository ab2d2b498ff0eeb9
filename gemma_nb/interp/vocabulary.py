"""Predictions of states of the residual stream, without their logits in memory.

One state's logits are V numbers (1 MB for Gemma 3), and a lens looks at thousands of states.  The
vocabulary is therefore read once, a stretch at a time, and of each stretch only running sums (the
online softmax of Milakov and Gimelshein, arXiv:1805.02867) and the largest logits of small groups
are kept.  The best entries are then looked up in the groups that can hold them.

Where the processor multiplies bfloat16 matrices in hardware, the running sums are made of products
of bfloat16 terms (`split`).  What these leave out is put right for the best entries, which have the
largest parts; of all others it has either sign and is lost in the sums.  The best and the watched
entries themselves are float32 products.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gemma_nb import placement
from gemma_nb.cpu import split
from gemma_nb.executables import pinned
from gemma_nb.interventions.numbers import room
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn.norms import RMSNorm
from gemma_nb.typing import Params

_STRETCH = 512  # vocabulary entries at a time
_GROUP = 16  # of them, of which the largest logit is kept
_PART = 128
_MENDED = 32  # best entries whose part of the sums is put right
_AT_ONCE = 8  # states whose best entries are looked at together
_POSITIONS = (1, 8, 16, 32, 64)  # how many positions are read at a time
_RANKS = (1, 10, 32)  # how many best entries are looked up, and multiples of 64
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


@pinned
def normalise(model: GemmaTransformer, residual: np.ndarray) -> np.ndarray:
    """`residual` (..., D) through the model's final norm."""
    flat = np.asarray(residual).reshape(-1, residual.shape[-1])
    # Few counts of vectors are compiled.
    padded = np.pad(flat, ((0, room(len(flat)) - len(flat)), (0, 0)))
    normal = placement.fetch(_normalise(model.params["final_norm"], padded))
    return normal[: len(flat)].reshape(residual.shape)


@jax.jit
def _normalise(params: Params, residual: jax.Array) -> jax.Array:
    return cast(jax.Array, RMSNorm().apply({"params": params}, residual))


@pinned
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
    # Few numbers of each are compiled.
    columns = watched.shape[1]
    more = (1 << (columns - 1).bit_length()) - columns if columns else 0
    watched = np.pad(watched, ((0, 0), (0, more)), mode="edge") if more else watched
    ranks = next((n for n in _RANKS if n >= k), -(-k // 64) * 64)
    ranks = min(ranks, model.config.num_embed)
    parts = []
    for start in range(0, count, _POSITIONS[-1]):
        stop = min(start + _POSITIONS[-1], count)
        size = next(n for n in _POSITIONS if n >= stop - start)
        more = size - (stop - start)
        some = np.pad(states[:, start:stop], ((0, 0), (0, more), (0, 0)))
        ids = np.pad(watched[start:stop], ((0, more), (0, 0)))
        part = _read_some(model, some, ids, ranks)
        part |= {name: part[name][..., :k] for name in ("top_logits", "top_ids")}
        part |= {n: part[n][..., :columns] for n in ("watched_logits", "watched_ranks")}
        parts.append(jax.tree.map(lambda x, real=stop - start: x[:, :real], part))
    return Reading(**{n: np.concatenate([p[n] for p in parts], axis=1) for n in parts[0]})


def _read_some(
    model: GemmaTransformer, states: np.ndarray, watched: np.ndarray, k: int
) -> dict[str, np.ndarray]:
    table = model.params["embedder"]["input_embedding"]
    cap = model.config.final_logit_soft_cap
    size = min(_STRETCH, table.shape[0])
    x, ids = jax.device_put((np.asarray(states, np.float32), watched))
    watched_logits = _watched(table, cap, x, ids)
    # A rank counts all that is larger, however little: watched entries need the plain product.
    terms = split.pays() and not ids.shape[1] and table.dtype in (jnp.float32, jnp.bfloat16)
    group = math.gcd(size, _GROUP)
    sums, groups = _through(size, group, cap, terms, table, x, ids, watched_logits)
    mend = terms and not split.is_exact(table.dtype)
    (top_logits, top_ids), sums = _best(k, group, size, cap, mend, table, x, groups, sums)
    found = {"top_logits": top_logits, "top_ids": top_ids, "watched_logits": watched_logits}
    return cast(dict[str, np.ndarray], placement.fetch({**_finish(sums), **found}))


def _capped(logits: jax.Array, cap: float | None) -> jax.Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


# Static: the soft-cap.
@jax.jit(static_argnums=1)
def _watched(table: jax.Array, cap: float | None, x: jax.Array, watched: jax.Array) -> jax.Array:
    rows = table[watched].astype(jnp.float32)
    return _capped(jnp.einsum("nPD,PWD->nPW", x, rows), cap)


def _held(table: jax.Array, turn: jax.Array) -> jax.Array:
    """The table as one turn of a loop sees it.

    XLA's CPU backend would else widen all of a bfloat16 table before the loop begins.
    """
    return lax.optimization_barrier((table, turn))[0]


def _starts(vocabulary: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First entry of each stretch of the vocabulary, and the first that no other has.

    The last one reaches back, so that all are of one size.
    """
    fresh = np.arange(0, vocabulary, size, dtype=np.int32)
    return np.minimum(fresh, vocabulary - size), fresh


def _times(flat: jax.Array, rows: jax.Array) -> jax.Array:
    """(entries, states), the plain product."""
    return lax.dot_general(rows.astype(jnp.float32), flat, (((1,), (1,)), ((), ())))


# Static: sizes, the soft-cap and whether to split.  Logits lie (entries, states), so that sums over
# entries run through whole vectors of states, and a stretch of them stays in the processor's cache.
@jax.jit(static_argnums=(0, 1, 2, 3))
def _through(
    size: int,
    group: int,
    cap: float | None,
    terms: bool,
    table: jax.Array,
    x: jax.Array,
    watched: jax.Array,
    watched_logits: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Sums over the vocabulary (n, P), and the largest logit of each group (groups, n * P)."""
    n, count, width = x.shape
    flat = x.reshape(-1, width)
    times = split.product(flat, table.dtype) if terms else partial(_times, flat)
    begins, fresh = _starts(table.shape[0], size)
    overlap = bool((begins != fresh).any())
    columns = [(watched_logits[..., w].reshape(-1), watched[:, w]) for w in range(watched.shape[1])]

    def stretch(
        sums: dict[str, jax.Array], place: tuple[jax.Array, jax.Array]
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        at, first = place
        rows = lax.dynamic_slice_in_dim(_held(table, at), at, size)
        logits = _capped(times(rows), cap)
        ids = at + jnp.arange(size, dtype=jnp.int32)[:, None]
        if overlap:
            logits = jnp.where(ids >= first, logits, _ABSENT)
        groups = logits.reshape(-1, group, logits.shape[-1]).max(axis=1)
        largest = jnp.maximum(sums["largest"], groups.max(axis=0))
        shrink = jnp.exp(sums["largest"] - largest)
        weights = jnp.exp(logits - largest)
        # Of the output's distribution, for the cross-entropy of every state at the same position.
        output = jnp.tile(weights[:, -count:], (1, n))
        above = [
            ((logits > least) & (ids != jnp.tile(token, n))).sum(axis=0, dtype=jnp.int32)
            for least, token in columns
        ]
        ranks = sums["watched_ranks"]
        return {
            "largest": largest,
            "sum": shrink * sums["sum"] + weights.sum(axis=0),
            "weighted": shrink * sums["weighted"] + (weights * logits).sum(axis=0),
            "crossed": jnp.tile(shrink[-count:], n) * sums["crossed"]
            + (output * logits).sum(axis=0),
            "watched_ranks": ranks + jnp.stack(above, axis=-1) if above else ranks,
        }, groups

    zero = jnp.zeros(len(flat), jnp.float32)
    sums = dict.fromkeys(("sum", "weighted", "crossed"), zero)
    sums["largest"] = jnp.full(len(flat), _ABSENT, jnp.float32)
    sums["watched_ranks"] = jnp.zeros((len(flat), len(columns)), jnp.int32)
    sums, groups = lax.scan(stretch, sums, (jnp.asarray(begins), jnp.asarray(fresh)))
    sums = {name: value.reshape(n, count, *value.shape[1:]) for name, value in sums.items()}
    return sums, groups.reshape(-1, len(flat))


# Static: sizes, the soft-cap and whether to put the sums right.
@jax.jit(static_argnums=(0, 1, 2, 3, 4))
def _best(
    k: int,
    group: int,
    size: int,
    cap: float | None,
    mend: bool,
    table: jax.Array,
    x: jax.Array,
    groups: jax.Array,
    sums: dict[str, jax.Array],
) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
    """The k largest logits and their ids, which only the k groups with the largest ones can hold.

    And `sums`, where `mend` says so with what `split.product` left out of the best logits.
    """
    n, count, width = x.shape
    begins, fresh = _starts(table.shape[0], size)
    starts = (begins[:, None] + np.arange(0, size, group, dtype=np.int32)).reshape(-1)
    firsts = np.repeat(fresh, size // group)
    _, which = _top(groups.T, min(k, len(starts)))
    which = jnp.sort(which, axis=-1)

    def row(ids: jax.Array) -> jax.Array:
        return _held(table, ids)[ids].astype(jnp.float32)

    def among(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        vector, chosen = state
        ids = jnp.asarray(starts)[chosen][:, None] + jnp.arange(group, dtype=jnp.int32)
        logits = jnp.where(
            ids >= jnp.asarray(firsts)[chosen][:, None], _capped(row(ids) @ vector, cap), _ABSENT
        )
        values, at = lax.top_k(logits.reshape(-1), min(max(k, _MENDED), ids.size))
        return values, ids.reshape(-1)[at]

    def both(vectors: jax.Array, ids: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits (ids, vectors) as they are, and as they were summed."""
        rows = row(ids)
        logits = rows @ vectors.T
        pair = logits, logits - split.lost(rows, vectors.T)
        whole, summed = (jnp.where(counted[:, None], _capped(x, cap), _ABSENT) for x in pair)
        return whole, summed

    def changes(place: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        vector, ids, values, largest = place
        whole, summed = both(vector[None], ids, values > _ABSENT)
        new, old = jnp.exp(whole - largest), jnp.exp(summed - largest)
        return {"sum": (new - old).sum(), "weighted": (new * whole - old * summed).sum()}

    def crossed(place: tuple[jax.Array, ...]) -> jax.Array:
        vectors, ids, values, largest = place  # ids, values and largest of the output
        whole, summed = both(vectors, ids, values > _ABSENT)
        new, old = (jnp.exp(x[:, -1:] - largest) for x in (whole, summed))
        return (new * whole - old * summed).sum(axis=0)

    flat, largest = x.reshape(-1, width), sums["largest"]
    values, ids = lax.map(among, (flat, which), batch_size=_AT_ONCE)
    if mend:
        given = (flat, ids, values, largest.reshape(-1))
        changed = lax.map(changes, given, batch_size=_AT_ONCE)
        changed = {name: change.reshape(n, count) for name, change in changed.items()}
        output = (part.reshape(n, count, -1)[-1] for part in given[1:3])
        across = (x.swapaxes(0, 1), *output, largest[-1])
        changed["crossed"] = lax.map(crossed, across, batch_size=_AT_ONCE).T
        sums = sums | {name: sums[name] + change for name, change in changed.items()}
    values, ids = (part[:, :k].reshape(n, count, k) for part in (values, ids))
    return (values, ids), sums


def _top(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of the last axis: only the k best parts of it can hold them."""
    size = x.shape[-1]
    if size % _PART or size <= k * _PART:
        values, indices = lax.top_k(x, k)
        return values, indices
    parts = x.reshape(*x.shape[:-1], -1, _PART)
    _, best = lax.top_k(parts.max(axis=-1), k)
    best = jnp.sort(best, axis=-1)
    candidates = jnp.take_along_axis(parts, best[..., None], axis=-2)
    values, which = lax.top_k(candidates.reshape(*x.shape[:-1], -1), k)
    part = jnp.take_along_axis(best, which // _PART, axis=-1)
    return values, part * _PART + which % _PART


@jax.jit
def _finish(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    logsumexp = sums["largest"] + jnp.log(sums["sum"])
    mean = sums["weighted"] / sums["sum"]
    # KL(p || q) = sum of p (log p - log q), with p the output's.
    under_output = sums["crossed"] / sums["sum"][-1]
    kl = (mean[-1] - logsumexp[-1]) - (under_output - logsumexp)
    return {
        "logsumexp": logsumexp,
        "entropy": logsumexp - mean,
        "kl": jnp.maximum(kl, 0.0),
        "watched_ranks": sums["watched_ranks"],
    }
