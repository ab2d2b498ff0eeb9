"""Other people's transformers behind our interface.

google-deepmind/gemma's modules take the same parameters and tokens, but their cache is written
without regard to padding, they know no padding by position, and they sow no capture sites.  The
adapter here settles that around an unchanged module, so that sampling, chat and trace need not
know whose module computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from gemma_nb.config import Global, TransformerConfig
from gemma_nb.cpu.products import product
from gemma_nb.nn.masks import visible
from gemma_nb.nn.transformer import Info, Output, Transformer
from gemma_nb.typing import EMPTY, KVCache, Params


def adapt(transformer: Any, config: TransformerConfig | None = None) -> Any:
    """`transformer` with the interface of our `Transformer`; ours is returned as it is.

    Args:
      transformer: a `gm.nn.TransformerLike` with the official parameter tree.
      config: its numbers; None reads them from its own `config`.

    Raises:
      ValueError: its configuration is not one of Gemma 1, 2 or 3.
    """
    if isinstance(transformer, Transformer | Wrapped):
        return transformer
    return Wrapped(transformer, config or TransformerConfig.from_gm(transformer.config))


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A `gm.nn.TransformerLike` with the interface of our `Transformer`.

    Attributes:
      inner: the module; hashable, as linen modules are.
      config: its numbers in our words.
    """

    inner: Any
    config: TransformerConfig

    @property
    def shown_sites(self) -> tuple[str, ...]:
        """The capture sites that can be read from outside of the module."""
        return _SHOWN

    @property
    def INFO(self) -> Info:
        """The module's own."""
        info = self.inner.INFO
        return Info(info.tokenizer_version, info.default_ckpt)

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        return self.inner.init(*args, **kwargs)

    def init_cache(
        self, *, batch_size: int, dtype: Any, cache_length: int, sharding: Any = None
    ) -> KVCache:
        """An empty cache in our form; see `Transformer.init_cache`."""
        return self.config.init_cache(
            batch_size=batch_size, dtype=dtype, cache_length=cache_length, sharding=sharding
        )

    def prepare(self, params: Params, **how: Any) -> Params:
        """No other storage: the module knows the official tree only."""
        del params, how
        return {}

    def apply(
        self,
        variables: Mapping[str, Any],
        tokens: jax.Array,
        *,
        method: str | None = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """What `Transformer.apply` does with the same arguments, but for interventions.

        Args:
          variables: the official tree under "params"; `prepared` is not used.
          tokens: (B, T) token ids, or hidden states for `method="unembed"`.
          method: None or "unembed".
          mutable: ["intermediates"] returns (output, {"intermediates": sites}).
          **kwargs: as of `Transformer.__call__`.

        Raises:
          ValueError: several rows with a cache, another method, or interventions.
        """
        if kwargs.pop("interventions", None) is not None:
            raise ValueError(
                "a wrapped transformer takes no interventions: they happen inside our modules.  "
                "Compute with gnb.nn.Transformer on the same parameters"
            )
        params = variables["params"]
        if method == "unembed":
            return self._unembed(params, tokens)
        if method is not None:
            raise ValueError(f"expected method None or 'unembed', got {method!r}")
        if not mutable:
            return self._forward(params, tokens, **kwargs)[0]
        output, sown = self._forward(params, tokens, capture=True, **kwargs)
        return output, {"intermediates": sown}

    def _unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """As `Transformer.unembed`: every Gemma's head is its embedding."""
        table = params["embedder"]["input_embedding"]
        logits = product(hidden.astype(jnp.float32), table)
        cap = self.config.final_logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _forward(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        images: Any = None,
        cache: KVCache | None = None,
        positions: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        return_last_only: bool | None = None,
        return_hidden_states: bool | None = None,
        capture: bool = False,
    ) -> tuple[Output, Any]:
        if cache is not None and len(tokens) != 1:
            # gm's modules write all rows behind the first one's end.
            raise ValueError(f"a wrapped transformer caches one row at a time, got {len(tokens)}")
        if positions is None:
            start = 0 if cache is None else cache["layer_0"]["end_index"][:, None]
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        dtype = params["embedder"]["input_embedding"].dtype
        room = None if cache is None else _with_room(cache, tokens.shape[1], dtype)
        keys = positions if room is None else _positions_after(room, positions)
        if attention_mask is not None:  # over the slots there are; those of `room` hold nothing
            wider = keys.shape[-1] - attention_mask.shape[-1]
            attention_mask = jnp.pad(attention_mask, ((0, 0), (0, 0), (0, wider)))
        mask = visible(positions, keys, Global(), attention_mask)
        call = {"images": images, "cache": room, "positions": positions, "attention_mask": mask}
        call |= {"return_last_only": return_last_only, "return_hidden_states": return_hidden_states}
        if capture:
            output, state = self.inner.apply(
                {"params": params},
                tokens,
                **call,
                capture_intermediates=_is_site,
                mutable=["intermediates"],
            )
            sown = _sites(state["intermediates"], self.config)
        else:
            output, sown = self.inner.apply({"params": params}, tokens, **call), None
        new_cache = None if cache is None else _settle(cache, output.cache, positions)
        return Output(output.logits, new_cache, output.hidden_states), sown


def _with_room(cache: KVCache, length: int, dtype: Any) -> KVCache:
    """`cache` with `length` more slots, in the dtype that the module computes in.

    The module writes padding too, and would shift what does not fit at the end over older tokens.
    A single token is never padding, and always fits where the caller counts.
    """
    more = length if length > 1 else 0

    def widen(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        wide = ((0, 0), (0, more), (0, 0), (0, 0))
        return {
            "k": jnp.pad(layer["k"].astype(dtype), wide),
            "v": jnp.pad(layer["v"].astype(dtype), wide),
            "positions": jnp.pad(layer["positions"], wide[:2], constant_values=EMPTY),
            "end_index": layer["end_index"],
        }

    return {name: widen(layer) for name, layer in cache.items()}


def _positions_after(cache: KVCache, positions: jax.Array) -> jax.Array:
    """Positions of all slots once `positions` are written behind what the cache holds."""
    layer = cache["layer_0"]
    return lax.dynamic_update_slice(layer["positions"], positions, (0, layer["end_index"][0]))


def _settle(old: KVCache, new: KVCache, positions: jax.Array) -> KVCache:
    """What the module wrote, in the size, dtype and order of keys of `old`.

    Padding was written behind the real tokens, at position -1: it is seen by nobody, and the next
    tokens are written over it.
    """
    real = (positions >= 0).sum(axis=1, dtype=jnp.int32)

    def settle(before: dict[str, jax.Array], after: dict[str, jax.Array]) -> dict[str, jax.Array]:
        size = before["positions"].shape[1]
        kept = {n: after[n][:, :size].astype(before[n].dtype) for n in ("k", "v", "positions")}
        return {**kept, "end_index": before["end_index"] + real}

    return {name: settle(layer, new[name]) for name, layer in old.items()}


# --- capture --------------------------------------------------------------------------------------

_CAPTURED = {"embedder", "final_norm", "attention_weights", "attn", "mlp"}
_CAPTURED |= {f"{side}_{norm}_norm" for side in ("pre", "post") for norm in ("attention", "ffw")}
# What gm's modules return to each other; the rest happens inside their methods.
_SHOWN = (
    *("embed", "residual_pre", "attn_in", "attention", "attn_raw", "attn_out", "residual_mid"),
    *("mlp_in", "mlp_raw", "mlp_out", "residual", "final", "logits"),
)


def _is_site(module: nn.Module, method: str) -> bool:
    """Whether the result of this call is one of our sites, or a part of one."""
    called = "encode" if module.name == "embedder" else "__call__"
    is_layer = (module.name or "").startswith("layer_")
    return method == called and (is_layer or module.name in _CAPTURED)


def _sites(raw: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """The intermediates of gm's modules under the names that our modules sow."""

    def result(home: Mapping[str, Any], *path: str, method: str = "__call__") -> Any:
        for name in path:
            home = home[name]
        return home[method][0]

    embed = result(raw, "embedder", method="encode")
    sites: dict[str, Any] = {"embed": (embed,), "final": (result(raw, "final_norm"),)}
    residual = embed
    for i in range(config.num_layers):
        home = raw[f"layer_{i}"]
        before, residual = residual, result(home)[1]
        attn_raw, mlp_raw = result(home, "attn")[1], result(home, "mlp")
        post_attn, post_ffw = config.use_post_attn_norm, config.use_post_ffw_norm
        attn_out = result(home, "post_attention_norm") if post_attn else attn_raw
        block = {
            "residual_pre": before,
            "attn_in": result(home, "pre_attention_norm"),
            "attn_out": attn_out,
            "residual_mid": before + attn_out,
            "mlp_in": result(home, "pre_ffw_norm"),
            "mlp_out": result(home, "post_ffw_norm") if post_ffw else mlp_raw,
            "residual": residual,
        }
        attention = result(home, "attn", "attention_weights")
        sites[f"layer_{i}"] = {
            **{name: (value,) for name, value in block.items()},
            "attn": {"attention": (attention,), "attn_raw": (attn_raw,)},
            "mlp": {"mlp_raw": (mlp_raw,)},
        }
    return sites
