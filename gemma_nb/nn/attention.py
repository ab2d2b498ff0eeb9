"""Attention with a key-value cache: multi-head, grouped-query and multi-query."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gemma_nb.config import LayerSpec, TransformerConfig
from gemma_nb.nn.layers import Einsum, RMSNorm
from gemma_nb.nn.masks import visible
from gemma_nb.nn.observe import observe
from gemma_nb.nn.rope import apply_rope
from gemma_nb.typing import LayerCache

# Stands for -infinity in masked scores: finite, so that a row with no visible key stays finite.
MASKED = -2.3819763e38


def extend_cache(cache: LayerCache, new: LayerCache) -> LayerCache:
    """`cache` with the `new` keys, values and positions written behind what it holds.

    Tokens at position -1 are padding (on the right) and are not stored, so a padded prompt leaves
    the cache as the bare prompt does.  What does not fit is dropped: the caller counts.

    Args:
      cache: k and v (B, S, K, H), positions (B, S), end_index (B,).
      new: k and v (B, T, K, H), positions (B, T).
    """
    end = cache["end_index"]
    batch, length = new["positions"].shape
    new = {name: value.astype(cache[name].dtype) for name, value in new.items()}
    if batch == length == 1:
        # One token of one stream: written in place, where a scatter would copy the cache.

        def write(name: str) -> jax.Array:
            at = (0, end[0]) + (0,) * (cache[name].ndim - 2)
            return lax.dynamic_update_slice(cache[name], new[name], at)

        return {**{name: write(name) for name in new}, "end_index": end + 1}

    size = cache["positions"].shape[1]
    real = new["positions"] >= 0
    slots = jnp.where(real, end[:, None] + jnp.arange(length), size)  # `size`: dropped
    rows = jnp.arange(batch)[:, None]
    written = {n: cache[n].at[rows, slots].set(v, mode="drop") for n, v in new.items()}
    return {**written, "end_index": end + real.sum(axis=1, dtype=end.dtype)}


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
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]

    def weigh(scores: jax.Array, allowed: jax.Array) -> jax.Array:
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(allowed, scores.astype(jnp.float32), MASKED)
        return jax.nn.softmax(scores, axis=-1).astype(q.dtype)

    k, v = k.astype(q.dtype), v.astype(q.dtype)
    if batch == length == kv_heads == 1:
        # The decode step of the small models: plain matrices are what XLA:CPU multiplies fast.
        weights = weigh((k[0, :, 0] @ q[0, 0].T).T, mask[0])
        return weights[None, None], (weights @ v[0, :, 0])[None, None]

    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BTKGS", grouped, k)
    weights = weigh(scores, mask[:, :, None, None])
    gathered = jnp.einsum("BTKGS,BSKH->BTKGH", weights, v)
    return weights.reshape(batch, length, heads, -1), gathered.reshape(q.shape)


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
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BTKGS", grouped, k.astype(q.dtype))
    scores = scores.reshape(batch, length, heads, -1).astype(jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    allowed = edit.edges(jnp.broadcast_to(mask[:, :, None], scores.shape), keys)
    weights = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1)
    weights = jnp.where(allowed.any(axis=-1, keepdims=True), weights, 0.0).astype(q.dtype)
    weights = edit("attention", weights, keys)
    gathered = jnp.einsum(
        "BTKGS,BSKH->BTKGH",
        weights.reshape(batch, length, kv_heads, heads // kv_heads, -1),
        v.astype(q.dtype),
    )
    return weights, gathered.reshape(q.shape)


class Attention(nn.Module):
    """One layer's attention.

    Attributes:
      config: the model's numbers.
      spec: this layer's kind and rotary base.
    """

    config: TransformerConfig
    spec: LayerSpec

    def setup(self) -> None:
        """Declares the projections under their official names."""
        c = self.config
        if c.num_heads == c.num_kv_heads:
            # Official multi-head checkpoints store the three projections as one.
            self.qkv_einsum = Einsum("...D,CNDH->...CNH", (3, c.num_heads, c.embed_dim, c.head_dim))
        else:
            self.q_einsum = Einsum("...D,NDH->...NH", (c.num_heads, c.embed_dim, c.head_dim))
            self.kv_einsum = Einsum(
                "...D,CKDH->...CKH", (2, c.num_kv_heads, c.embed_dim, c.head_dim)
            )
        self.attn_vec_einsum = Einsum("...NH,NHD->...D", (c.num_heads, c.head_dim, c.embed_dim))
        if c.use_qk_norm:
            self._query_norm = RMSNorm()
            self._key_norm = RMSNorm()

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        if self.config.num_heads == self.config.num_kv_heads:
            qkv = self.qkv_einsum(x)
            return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        kv = self.kv_einsum(x)
        return self.q_einsum(x), kv[..., 0, :, :], kv[..., 1, :, :]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None,
        attention_mask: Bool[Array, "B T S"] | None,
        edit: Any = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attention's output before any post-norm, and the extended cache."""
        c, spec = self.config, self.spec
        q, k, v = self._project(x)
        if c.use_qk_norm:
            q, k = self._query_norm(q), self._key_norm(k)
        q, k = observe(self, "q_pre", q, edit), observe(self, "k_pre", k, edit)
        q = apply_rope(q, positions, base=spec.rope_base, scale=spec.rope_scale)
        q = q * jnp.asarray(c.query_scale, q.dtype)
        k = apply_rope(k, positions, base=spec.rope_base, scale=spec.rope_scale)
        q, k, v = (observe(self, s, x, edit) for s, x in (("q", q), ("k", k), ("v", v)))

        seen: LayerCache = {"k": k, "v": v, "positions": positions}
        new_cache = None
        if cache is not None:
            seen = new_cache = extend_cache(cache, seen)
        mask = visible(positions, seen["positions"], spec.kind, attention_mask)
        cap = c.attn_logits_soft_cap
        if edit is not None and edit.edits_attention:
            weights, z = attend_edited(
                q, seen["k"], seen["v"], mask, edit, seen["positions"], soft_cap=cap
            )
        else:
            weights, z = attend(q, seen["k"], seen["v"], mask, soft_cap=cap)

        self.sow("intermediates", "attention", weights)
        z = observe(self, "z", z, edit)
        return observe(self, "attn_raw", self.attn_vec_einsum(z), edit), new_cache
