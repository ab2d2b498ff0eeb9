"""Attention with a key-value cache: multi-head, grouped-query and multi-query."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from gemma_nb.config import LayerSpec, TransformerConfig
from gemma_nb.cpu import attention as cpu
from gemma_nb.cpu.fusion import materialize
from gemma_nb.cpu.storage import concatenate, preparing
from gemma_nb.nn.kv_cache import GrowingCache, cache_of, in_rows
from gemma_nb.nn.layer_input import LayerInput
from gemma_nb.nn.linear import Einsum
from gemma_nb.nn.masks import visible
from gemma_nb.nn.norms import RMSNorm
from gemma_nb.nn.observe import observe
from gemma_nb.nn.rope import Rotation, apply_rope
from gemma_nb.typing import LayerCache

# Stands for -infinity in masked scores: finite, so that a row with no visible key stays finite.
MASKED = -2.3819763e38


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "B T N S"], Float[Array, "B T N H"]]:
    """Attention weights softmax(q k^T) and the values they gather.

    Grouped queries: head n reads key-value head n // (N / K) (arXiv:2305.13245).  Scores are
    optionally capped to soft_cap * tanh(score / soft_cap) (Gemma 2, arXiv:2408.00118, section 2).

    Args:
      q: queries, already scaled.
      k: keys.
      v: values.
      mask: which keys each query may see.
      soft_cap: bound on the scores.
    """
    scores = _scores(q, k.astype(q.dtype))
    weights = _weigh(scores, mask[:, :, None], soft_cap)
    return weights, _gather(weights, v.astype(q.dtype))


def _scores(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> Float[Array, "B T N S"]:
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    if batch == 1:
        return cpu.scores(grouped, k)
    return jnp.einsum("BTKGH,BSKH->BTKGS", grouped, k).reshape(batch, length, heads, -1)


def _gather(
    weights: Float[Array, "B T N S"], v: Float[Array, "B S K H"]
) -> Float[Array, "B T N H"]:
    batch, length, heads, size = weights.shape
    kv_heads, head_dim = v.shape[2:]
    grouped = weights.reshape(batch, length, kv_heads, heads // kv_heads, size)
    if batch == 1:
        return cpu.gather(grouped, v)
    return jnp.einsum("BTKGS,BSKH->BTKGH", grouped, v).reshape(batch, length, heads, head_dim)


def _weigh(
    scores: Float[Array, "*lead S"], allowed: Bool[Array, "*#lead S"], soft_cap: float | None
) -> Float[Array, "*lead S"]:
    """Softmax of the capped scores over the keys that are allowed, in the scores' dtype."""
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    masked = jnp.where(allowed, scores.astype(jnp.float32), MASKED)
    return jax.nn.softmax(masked, axis=-1).astype(scores.dtype)


def attend_edited(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    edit: Any,
    keys: Int[Array, "B S"],
    *,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "B T N S"], Float[Array, "B T N H"]]:
    """`attend` with interventions on its edges and weights.

    A query that is left without any key gathers nothing, rather than an average of everything.

    Args:
      q: queries, already scaled.
      k: keys.
      v: values.
      mask: which keys each query may see.
      edit: `Interventions.at(...)` of this layer.
      keys: positions stored in the key slots.
      soft_cap: bound on the scores.
    """
    scores = _scores(q, k.astype(q.dtype)).astype(jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    allowed = edit.edges(jnp.broadcast_to(mask[:, :, None], scores.shape), keys)
    weights = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1)
    weights = jnp.where(allowed.any(axis=-1, keepdims=True), weights, 0.0).astype(q.dtype)
    weights = edit("attention", weights, keys)
    return weights, _gather(weights, v.astype(q.dtype))


class Attention(nn.Module):
    """One layer's attention.

    Attributes:
      config: the model's numbers.
      spec: this layer's kind and shape.
    """

    config: TransformerConfig
    spec: LayerSpec

    def setup(self) -> None:
        """Declares the projections under their official names."""
        n, k, h, d = self._sizes
        if n == k:
            # Official multi-head checkpoints store the three projections as one.
            self.qkv_einsum = Einsum("...D,CNDH->...CNH", (3, n, d, h))
        else:
            self.q_einsum = Einsum("...D,NDH->...NH", (n, d, h), joined=True)
            self.kv_einsum = Einsum("...D,CKDH->...CKH", (2, k, d, h), joined=True)
        self.attn_vec_einsum = Einsum("...NH,NHD->...D", (n, h, d))
        if self.config.use_qk_norm:
            self._query_norm = RMSNorm()
            self._key_norm = RMSNorm()

    @property
    def _sizes(self) -> tuple[int, ...]:
        """N, K, H and D of this layer."""
        sizes = self.config.axis_sizes(self.spec)
        return tuple(sizes[axis] for axis in "NKHD")

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads, kv_heads, head_dim, _ = self._sizes
        if heads == kv_heads:
            qkv = self.qkv_einsum(x)
            return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        if self.has_variable("prepared", "qkv"):
            # One product instead of two small ones.
            y: jax.Array = self.get_variable("prepared", "qkv")(x)
            y = y.reshape(*x.shape[:-1], heads + 2 * kv_heads, head_dim)
            q, k, v = jnp.split(y, (heads, heads + kv_heads), axis=-2)
            return q, k, v
        q, kv = self.q_einsum(x), self.kv_einsum(x)
        if preparing(self):
            parts = [self.q_einsum.stored(x), self.kv_einsum.stored(x)]
            self.put_variable("prepared", "qkv", concatenate(parts))
        return q, kv[..., 0, :, :], kv[..., 1, :, :]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        given: LayerInput,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attention's output before any post-norm, and the extended cache."""
        c, spec = self.config, self.spec
        positions, rotation, edit = given.positions, given.rotation, given.edit
        if rotation is None:
            rotation = Rotation.of(positions, c.axis_sizes(spec)["H"], spec)
        q, k, v = self._project(x)
        if c.use_qk_norm:
            q, k = self._query_norm(q), self._key_norm(k)
        q, k = observe(self, "q_pre", q, edit), observe(self, "k_pre", k, edit)
        q = apply_rope(q, rotation)
        q = q * jnp.asarray(c.query_scale, q.dtype)
        # Computed once, so that what is cached and what is shown are the same to the last bit.
        k = materialize(apply_rope(k, rotation))
        q, k, v = (observe(self, s, x, edit) for s, x in (("q", q), ("k", k), ("v", v)))

        seen: LayerCache = {"k": k, "v": v, "positions": positions}
        new_cache = None
        if cache is not None:
            # A caller with a mask speaks of slots, which then must not mean another token later.
            held = GrowingCache(cache) if given.mask is not None else cache_of(cache, spec.kind)
            seen, extended = held.append(seen)
            new_cache = extended.arrays
        mask = visible(positions, seen["positions"], spec.kind, given.mask)
        cap = c.attn_logits_soft_cap
        if edit is not None and edit.edits_attention:
            weights, z = attend_edited(
                q, seen["k"], in_rows(seen)["v"], mask, edit, seen["positions"], soft_cap=cap
            )
        elif "vt" in seen and seen["k"].shape[1] <= cpu.SHORT:
            weigh = functools.partial(_weigh, allowed=mask[0], soft_cap=cap)
            weights, z = cpu.attend_by_one(q, seen["k"], seen["vt"], mask, weigh)
        else:
            weights, z = attend(q, seen["k"], in_rows(seen)["v"], mask, soft_cap=cap)

        self.sow("intermediates", "attention", weights)
        z = observe(self, "z", z, edit)
        return observe(self, "attn_raw", self.attn_vec_einsum(z), edit), new_cache
