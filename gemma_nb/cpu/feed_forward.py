"""The feed-forward layer of few tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_nb.cpu.fusion import materialize


def geglu_of_few(
    x: Float[Array, "B T D"], gating: jax.Array, linear: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gate, up, hidden (B, T, F) and output (B, T, D) of few tokens.

    The tokens stand in columns in between, so that what is large is not turned round twice.

    Args:
      x: the layer's input.
      gating: (2*F, D) float32, see `gemma_nb.nn.linear.Einsum.wide`.
      linear: (D, F) float32.
    """

    def tokens_first(y: jax.Array) -> jax.Array:
        return y.T.reshape(*x.shape[:-1], -1).astype(x.dtype)

    columns = x.reshape(-1, x.shape[-1]).astype(jnp.float32).T
    gate, up = jnp.split((gating @ columns).astype(x.dtype), 2)
    hidden = jax.nn.gelu(gate) * up
    # Else XLA:CPU would turn round the product instead of what it makes.
    raw = materialize(linear @ hidden.astype(jnp.float32))
    return tokens_first(gate), tokens_first(up), tokens_first(hidden), tokens_first(raw)
