"""A Gemma model as one value: configuration, module and parameters together."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from gemma_nb.config import TransformerConfig
from gemma_nb.nn import Output, Transformer
from gemma_nb.presets import ModelInfo
from gemma_nb.typing import Params

if TYPE_CHECKING:
    import xarray


@flax.struct.dataclass
class GemmaInputs:
    """What a model is given to score.

    Attributes:
      tokens: (T,) or (B, T) int32 token ids.
      positions: like tokens; counted from 0 where absent.
      attention_mask: (B, T, T) bool, replaces the causal rule where given.
    """

    tokens: Int[Array, "*B T"]
    positions: Int[Array, "*B T"] | None = None
    attention_mask: Bool[Array, "*B T T"] | None = None

    @classmethod
    def from_basic_segments(cls, tokens: Any) -> GemmaInputs:
        """Inputs in which each row of `tokens` is one text, from its first position on."""
        return cls(tokens=jnp.asarray(tokens, jnp.int32))


@flax.struct.dataclass
class GemmaTransformer:
    """A loaded model.  A pytree, never mutated.

    Attributes:
      params: the official parameter tree.
      config: the model's numbers.
      transformer: the linen module that computes with `params`.
      info: what is known about the checkpoint; None for a model made by hand.
    """

    params: Params
    config: TransformerConfig = flax.struct.field(pytree_node=False)
    transformer: Transformer = flax.struct.field(pytree_node=False)
    info: ModelInfo | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def from_config(cls, config: TransformerConfig, *, key: Any = None) -> GemmaTransformer:
        """A model with random float32 weights, or without a key with shapes in their place.

        Args:
          config: the model's numbers.
          key: a `jax.random.key`; None leaves `jax.ShapeDtypeStruct`s as parameters.
        """
        transformer = Transformer(config)

        def init(key: Any) -> Params:
            return transformer.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

        params = jax.eval_shape(init, jax.random.key(0)) if key is None else jax.jit(init)(key)
        return cls(params=params, config=config, transformer=transformer)

    def __call__(self, inputs: GemmaInputs) -> xarray.DataArray:
        """float32 logits ("seq", "vocabulary"), led by "batch" where the tokens are.

        The logits at position t are for the token at position t + 1.

        Raises:
          ValueError: tokens outside the vocabulary, or not of one or two axes.
        """
        import xarray

        tokens = jnp.asarray(inputs.tokens, jnp.int32)
        if tokens.ndim not in (1, 2) or tokens.size == 0:
            raise ValueError(f"tokens must be (T,) or (B, T) and not empty, got {tokens.shape}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.num_embed:
            raise ValueError(
                f"token ids must lie in 0 to {self.config.num_embed - 1}, got {low} to {high}"
            )

        def with_batch(x: jax.Array | None) -> jax.Array | None:
            return x if x is None or tokens.ndim == 2 else jnp.asarray(x)[None]

        logits = _score(
            self.transformer,
            self.params,
            tokens.reshape(-1, tokens.shape[-1]),
            with_batch(inputs.positions),
            with_batch(inputs.attention_mask),
        )
        dims = ("batch", "seq", "vocabulary")
        array = xarray.DataArray(jax.device_get(logits), dims=dims, name="logits")
        return array if tokens.ndim == 2 else array[0]

    def __repr__(self) -> str:
        c = self.config
        title = self.info.title if self.info else "Gemma"
        dtypes = {str(x.dtype) for x in jax.tree.leaves(self.params)}
        return (
            f"<GemmaTransformer {title}: {c.num_params():,} parameters, {c.num_layers} layers, "
            f"{c.num_heads} heads on {c.num_kv_heads} key-value heads, {'/'.join(sorted(dtypes))}>"
        )

    def replace(self, **changes: Any) -> GemmaTransformer:
        """A copy with some fields changed; everything else is shared."""
        return dataclasses.replace(self, **changes)


# Static: the module (a frozen dataclass of numbers).  A new text length recompiles.
@jax.jit(static_argnums=0)
def _score(
    transformer: Transformer,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None,
    attention_mask: jax.Array | None,
) -> jax.Array:
    output = transformer.apply(
        {"params": params}, tokens, positions=positions, attention_mask=attention_mask
    )
    return cast(Output, output).logits
