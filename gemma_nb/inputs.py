"""What a model is given to score: tokens, and where needed their positions and mask."""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from gemma_nb.executables import pinned
from gemma_nb.expected import token_array
from gemma_nb.summaries import summary
from gemma_nb.typing import EMPTY


@flax.struct.dataclass
class GemmaInputs:
    """What a model is given to score.

    Attributes:
      tokens: (T,) or (B, T) int32 token ids.
      positions: like tokens; counted from 0 where absent.
      attention_mask: (T, T) or (B, T, T) bool, query before key; replaces the causal rule where
        given, not the sliding window.
    """

    tokens: Int[Array, "*B T"]
    positions: Int[Array, "*B T"] | None = None
    attention_mask: Bool[Array, "*B T T"] | None = None

    __repr__ = summary

    @classmethod
    @pinned
    def from_basic_segments(cls, tokens: Any) -> GemmaInputs:
        """Inputs in which each row of `tokens` is one text, from its first position on."""
        return cls(tokens=_ids(tokens, "tokens"))

    @classmethod
    @pinned
    def from_packed_segments(cls, tokens: Any, segments: Any) -> GemmaInputs:
        """Inputs in which rows hold several texts, one behind the other, that do not see another.

        Args:
          tokens: (T,) or (B, T) token ids.
          segments: like tokens; equal numbers side by side are one text, 0 is padding.
        """
        tokens, segments = _ids(tokens, "tokens"), _ids(segments, "segments")
        if tokens.shape != segments.shape:
            raise ValueError(
                f"segments must have one number per token: expected {tokens.shape}, "
                f"got {segments.shape}"
            )
        at = jnp.arange(tokens.shape[-1])
        new = segments[..., 1:] != segments[..., :-1]
        new = jnp.concatenate([jnp.ones_like(segments[..., :1], bool), new], axis=-1)
        starts = jax.lax.cummax(jnp.where(new, at, 0), axis=segments.ndim - 1)
        positions = jnp.where(segments == 0, EMPTY, at - starts)
        same = starts[..., :, None] == starts[..., None, :]
        mask = same & (at[None, :] <= at[:, None]) & (segments != 0)[..., None, :]
        return cls(tokens=tokens, positions=positions, attention_mask=mask)

    def check(self, tokens: np.ndarray, num_embed: int) -> None:
        """Refuses what a model with `num_embed` tokens cannot score.

        Raises:
          ValueError: tokens of other axes, or outside the vocabulary; positions or a mask of
            another shape.
        """
        if tokens.ndim not in (1, 2) or tokens.size == 0:
            raise ValueError(f"tokens must be (T,) or (B, T) and not empty, got {tokens.shape}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= num_embed:
            raise ValueError(f"token ids must lie in 0 to {num_embed - 1}, got {low} to {high}")
        expected = {"positions": tokens.shape, "attention_mask": (*tokens.shape, tokens.shape[-1])}
        for name, shape in expected.items():
            given = getattr(self, name)
            if given is not None and jnp.shape(given) != shape:
                raise ValueError(
                    f"{name} must be {shape} for tokens {tokens.shape}, got {jnp.shape(given)}"
                )


def _ids(given: Any, argument: str) -> jax.Array:
    if isinstance(given, jax.core.Tracer):
        return jnp.asarray(given, jnp.int32)
    found = token_array(given, argument, "tokenizer.encode(text, bos=True) gives the ids of a text")
    return jax.device_put(found.astype(np.int32))
