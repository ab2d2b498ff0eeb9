"""What is known about each choice, computed in the step that makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gemma_nb import settings
from gemma_nb.indices import is_mask, listed
from gemma_nb.sites import check_layers

if TYPE_CHECKING:
    from gemma_nb.sampling.rows import AttentionRow


@dataclasses.dataclass(frozen=True)
class Capture:
    """What every reply token keeps.

    Attributes:
      top_k: how many alternatives.
      attention_layers: layers whose attention weights are kept: "all", indices (negative ones count
        from the last layer), a slice or mask of the layers, or None.  They come out of the step
        that chooses the token, in float16; see `TokenRecord.attention`.  By default none are, since
        they take memory: for Gemma 3 270M up to 61 kB a token in the local layers, and another 24
        bytes for each token of the context in the global ones; what nobody looks at may as well be
        computed when it is looked at (`chat.look`).
      attention_bytes: most bytes that the attention rows of a session may take.  When they are
        used up, the oldest rows are evicted; `chat.attention_kept` says how many.
    """

    top_k: int = 10
    attention_layers: Literal["all"] | Sequence[int] | None = None
    attention_bytes: int = 256_000_000

    def __post_init__(self) -> None:
        top_k = Capture.top_k if self.top_k is None else self.top_k
        top_k = settings.whole("Capture.top_k", top_k, "a whole number from 1 to 256")
        if not 1 <= top_k <= 256:
            settings.refuse("Capture.top_k", "a whole number from 1 to 256", self.top_k)
        most = Capture.attention_bytes if self.attention_bytes is None else self.attention_bytes
        most = settings.whole("Capture.attention_bytes", most, "a number of bytes")
        if most < 0:
            settings.refuse("Capture.attention_bytes", "at least 0", self.attention_bytes)
        layers = self.attention_layers
        if isinstance(layers, str) and layers != "all":
            settings.refuse(
                "Capture.attention_layers", '"all", a list of layer indices, or None', layers
            )
        if layers is not None and not isinstance(layers, str | slice):
            layers = tuple(listed(layers, "Capture.attention_layers"))
        fields = {"top_k": top_k, "attention_bytes": most, "attention_layers": layers}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def resolved(self, num_layers: int) -> Capture:
        """The same for a model of so many layers, a mask or a slice of them as indices.

        Raises:
          ValueError: a mask of another length.
        """
        layers: Any = self.attention_layers
        if isinstance(layers, slice) or (isinstance(layers, tuple) and is_mask(layers)):
            return dataclasses.replace(self, attention_layers=check_layers(layers, num_layers))
        return self

    def fitting(self, num_layers: int) -> Capture:
        """The same for a model of so many layers, without those that it does not have."""
        if self.attention_layers is None or self.attention_layers == "all":
            return self
        layers = tuple(i for i in self.attention_layers if -num_layers <= i < num_layers)
        return dataclasses.replace(self, attention_layers=layers or None)


@flax.struct.dataclass
class Evidence:
    """The evidence of one choice.

    Log-probabilities and entropy are in nats and of the model's own distribution, before the
    sampler; probabilities are what the sampler drew from.

    Attributes:
      token: int32, the chosen id.
      logprob: float32, log-probability of the chosen token before the sampler.
      probability: float32, its probability after the sampler.
      entropy: float32, of the model's distribution.
      rank: int32, how many tokens the model found more likely (0: its first choice).
      ids: (k,) int32, the model's most likely tokens, in order.
      logprobs: (k,) float32, theirs before the sampler.
      probabilities: (k,) float32, theirs after it.
      finite: bool, whether all logits were finite.
      attention: on the host, the attention row of the choice; None where none was captured.
    """

    token: jax.Array
    logprob: jax.Array
    probability: jax.Array
    entropy: jax.Array
    rank: jax.Array
    ids: jax.Array
    logprobs: jax.Array
    probabilities: jax.Array
    finite: jax.Array
    attention: AttentionRow | None = flax.struct.field(pytree_node=False, default=None)

    def pack(self) -> jax.Array:
        """All of it as one array of 32-bit words: each array that a step makes costs time."""
        fields = [getattr(self, name) for name in (*_ONES, *_LISTS)]
        words = [
            jnp.ravel(x) if x.dtype != bool else jnp.ravel(x).astype(jnp.int32) for x in fields
        ]
        return jnp.concatenate([lax.bitcast_convert_type(x, jnp.uint32) for x in words])

    @classmethod
    def unpack(cls, words: np.ndarray) -> Evidence:
        """The inverse of `pack`, on the host."""
        # Once as each kind, and then parts: a view of every part would take longer.
        kinds: tuple[type[np.number], ...] = (np.int32, np.float32)
        views = {kind: words.view(kind) for kind in kinds}
        ones = enumerate(_ONES.items())
        values: dict[str, Any] = {name: views[kind][i] for i, (name, kind) in ones}
        start, length = len(_ONES), (len(words) - len(_ONES)) // len(_LISTS)
        for name, kind in _LISTS.items():
            values[name] = views[kind][start : start + length]
            start += length
        return cls(**{**values, "finite": values["finite"] != 0})


# What 32-bit words stand for, in order.
_ONES: dict[str, type[np.number]] = {
    "token": np.int32,
    "rank": np.int32,
    "finite": np.int32,
    "logprob": np.float32,
    "probability": np.float32,
    "entropy": np.float32,
}
_LISTS: dict[str, type[np.number]] = {
    "ids": np.int32,
    "logprobs": np.float32,
    "probabilities": np.float32,
}
