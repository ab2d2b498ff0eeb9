"""Gemma 1, 2 and 3 text models, by configuration."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from gemma_nb import presets
from gemma_nb.config import RotationKind, TransformerConfig
from gemma_nb.nn.embedder import Embedder
from gemma_nb.nn.layer import Block
from gemma_nb.nn.layer_input import Carry, LayerInput
from gemma_nb.nn.norms import RMSNorm
from gemma_nb.nn.observe import observe
from gemma_nb.nn.prepare import prepare
from gemma_nb.nn.rope import Rotation
from gemma_nb.processor import ONE_PLACE, Streams
from gemma_nb.sites import EVERYWHERE
from gemma_nb.summaries import summary
from gemma_nb.typing import KVCache, Params

# Layers of one kind differ in their names only, and are traced once: tracing all of them takes
# longer than loading their compiled program.
_SharedBlock = nn.jit(Block)

_PADDING_ID = 0  # <pad> of every Gemma vocabulary


@dataclasses.dataclass(frozen=True)
class Info:
    """What google-deepmind/gemma's samplers look up: the tokenizer that goes with a model.

    Attributes:
      tokenizer_version: 2 or 3; None where the sampler must be given a tokenizer.
      default_ckpt: where the official checkpoint of this size is, None where there is none.
    """

    tokenizer_version: int | None = None
    default_ckpt: str | None = None


@flax.struct.dataclass
class Output:
    """What a forward pass returns.

    Attributes:
      logits: (B, T, V) float32, or (B, V) with `return_last_only`.
      cache: the extended cache, where one was given.
      hidden_states: (B, T, D) after the final norm, or (B, D); only on request.
    """

    logits: jax.Array
    cache: KVCache | None
    hidden_states: jax.Array | None

    __repr__ = summary


class Transformer(nn.Module):
    """A Gemma text model whose parameter tree is that of the official Flax checkpoints.

    It satisfies `gm.nn.TransformerLike`: google-deepmind/gemma's samplers run on it.

    Scoring, prefill, decoding and tracing all run this module.  What makes decoding fast is a
    different storage of the same parameters, the collection `prepared` (see `prepare`), which its
    linear maps use in place of a parameter where it is there.

    Attributes:
      config: the model's numbers.
      dtype: of the activations.  float32 by default, also over bfloat16 parameters.
    """

    config: TransformerConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares embedder, layers and final norm under their official names."""
        c = self.config
        self.embedder = Embedder(c.num_embed, c.embed_dim, self.dtype)
        self.blocks = [_SharedBlock(c, spec, name=f"layer_{i}") for i, spec in enumerate(c.layers)]
        self.final_norm = RMSNorm()

    @property
    def INFO(self) -> Info:
        """Tokenizer and checkpoint of the released size that this is."""
        size = presets.name_of(self.config)
        if size is None:
            return Info()
        # gm publishes Gemma 2 and later.
        folder = None if size.startswith("gemma1") else f"gs://gemma-data/checkpoints/{size}-it"
        return Info(presets.tokenizer_version(self.config), folder)

    def __call__(
        self,
        tokens: Int[Array, "*B T"],
        *,
        images: Any = None,
        cache: KVCache | None = None,
        positions: Int[Array, "*B T"] | None = None,
        attention_mask: Bool[Array, "*B T S"] | None = None,
        return_last_only: bool | None = None,
        return_hidden_states: bool | None = None,
        interventions: Any = None,
    ) -> Output:
        """One forward pass, over any number of batch axes.

        Args:
          tokens: token ids.
          images: must be None, this is a text model.
          cache: keys and values of earlier tokens; None for a pass over the whole text.
          positions: of the tokens; by default they continue the cache, or count from 0.  -1 marks
            padding, which is neither seen nor stored.
          attention_mask: replaces the causal rule; over cache slots where a cache is given.
          return_last_only: logits and hidden states of the last token only that is not padding
            (position -1, or token id 0 as google-deepmind/gemma pads).
          return_hidden_states: return the states that the logits were computed from.
          interventions: a `gemma_nb.interventions.Interventions`, which change what is computed at
            capture sites; None compiles to the program without them.

        Raises:
          ValueError: images are given.
        """
        if images is not None:
            raise ValueError("images were given, but this is a text model: it takes tokens only")
        batch = tokens.shape[:-1]
        if len(batch) != 1:
            inputs = (tokens, cache, positions, attention_mask)
            tokens, cache, positions, attention_mask = jax.tree.map(
                lambda x: x.reshape(math.prod(batch), *x.shape[len(batch) :]), inputs
            )
        # A setting of JAX's for the code around it.
        with jax.numpy_rank_promotion("allow"):
            output = self._forward(
                tokens, cache, positions, attention_mask, bool(return_last_only), interventions
            )
        if not return_hidden_states:
            output = output.replace(hidden_states=None)  # type: ignore[attr-defined]
        if len(batch) != 1:
            output = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), output)
        return output

    def _forward(
        self,
        tokens: Int[Array, "B T"],
        cache: KVCache | None,
        positions: Int[Array, "B T"] | None,
        attention_mask: Bool[Array, "B T S"] | None,
        last_only: bool,
        interventions: Any = None,
    ) -> Output:
        count = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        if positions is None:
            start = 0 if cache is None else cache["layer_0"]["end_index"][:, None]
            positions = jnp.broadcast_to(start + count, tokens.shape)
        carry, rotations = self.enter(tokens, positions, interventions)
        new_cache: KVCache = {}
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache[f"layer_{i}"]
            rotation = rotations[self.config.rotation_of(block.spec)]
            given = LayerInput.of(
                i, positions, interventions, mask=attention_mask, rotation=rotation
            )
            carry, layer_cache = block(carry, given, layer_cache)
            if layer_cache is not None:
                new_cache[f"layer_{i}"] = layer_cache
        x = self.leave(carry, positions, interventions)
        if last_only:
            real = (tokens != _PADDING_ID) & (positions >= 0)
            index = jnp.max(jnp.where(real, count, 0), axis=-1)
            x = x[jnp.arange(len(x)), index]
        # A caller under jit that ignores the logits does not pay for them.
        return Output(
            logits=self.unembed(x), cache=None if cache is None else new_cache, hidden_states=x
        )

    def enter(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], interventions: Any = None
    ) -> tuple[Carry, dict[RotationKind, Rotation]]:
        """The carry of the first layer, and the rotation of each kind of layer.

        With `leave`, for whoever runs the layers one by one.
        """
        edit = None if interventions is None else interventions.at(EVERYWHERE, positions)
        x = self.embedder.encode(tokens if edit is None else edit("tokens", tokens))
        x = observe(self, "embed", x, edit)
        # Once for all layers of a kind: sines take long.
        rotations: dict[RotationKind, Rotation] = {}
        for spec in self.config.layers:
            kind = self.config.rotation_of(spec)
            if kind not in rotations:
                rotations[kind] = Rotation.of(positions, kind[-1], spec).materialize()
        return Carry(x), rotations

    def leave(
        self, carry: Carry, positions: Int[Array, "B T"], interventions: Any = None
    ) -> Float[Array, "B T D"]:
        """Final-normed states of the last layer's carry."""
        edit = None if interventions is None else interventions.at(EVERYWHERE, positions)
        return observe(self, "final", self.final_norm(carry.x), edit)

    def unembed(self, hidden: Float[Array, "*lead D"]) -> Float[Array, "*lead V"]:
        """Logits of final-normed hidden states, soft-capped where the model says so."""
        logits = self.embedder.decode(hidden)
        cap = self.config.final_logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def init_cache(
        self, *, batch_size: int, dtype: Any, cache_length: int, sharding: Any = None
    ) -> KVCache:
        """An empty cache for `cache_length` positions.

        Args:
          batch_size: B.
          dtype: of keys and values.
          cache_length: S.
          sharding: where the arrays are placed; None leaves it to JAX.
        """
        return self.config.init_cache(
            batch_size=batch_size, dtype=dtype, cache_length=cache_length, sharding=sharding
        )

    def prepare(
        self,
        params: Params,
        *,
        int8: bool = False,
        columns: Any = None,
        streams: Streams = ONE_PLACE,
    ) -> Params:
        """The collection `prepared` for `params`, see `gemma_nb.cpu.storage`.

        A pure function of the official tree: `apply({"params": params, "prepared": prepared}, ...)`
        computes what `apply({"params": params}, ...)` does, up to rounding and `int8`.

        Args:
          params: the official tree.
          int8: store the rows, which single tokens use, in int8 with a scale per row, and round
            what is multiplied with bfloat16 columns to bfloat16.  The layers are run on a sample of
            text for it, see `gemma_nb.cpu.calibration`.
          columns: dtype of a second copy for several tokens at once, see `pack`; None computes
            these from the rows.
          streams: from how many places rows are read at once, see `gemma_nb.cpu.storage.FloatRows`.
        """
        return prepare(self, params, int8=int8, columns=columns, streams=streams)
