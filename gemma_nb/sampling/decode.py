"""The compiled step, and the stream of tokens that it makes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb import placement
from gemma_nb.interventions import Interventions
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn import Output, Transformer
from gemma_nb.sampling.cache import StreamCache, grow, rewind, size_for
from gemma_nb.sampling.evidence import Evidence, observe
from gemma_nb.sampling.methods import Controls, Sampling, distribution, draw
from gemma_nb.sampling.prefill import BUCKETS, chunks
from gemma_nb.typing import Params

# Prepared weights of the models that are alive: sessions of one model share them.
_prepared: dict[int, Params] = {}


def decoding_weights(model: GemmaTransformer) -> Params:
    """The linen variables that decoding runs on: matrices as rows, the rest as it is."""
    key = id(model.params)  # the same in a model's copies with interventions
    if key not in _prepared:
        _prepared[key] = _prepare(model)
        weakref.finalize(model, _prepared.pop, key, None)
    return _prepared[key]


def _prepare(model: GemmaTransformer) -> Params:
    if model.mesh is not None:
        # Rows join axes that a mesh splits, which would put all of them on every device.
        return {"params": model.params}
    prepared = model.transformer.prepare(model.params)
    replaced = flax.traverse_util.flatten_dict(prepared)
    flat = flax.traverse_util.flatten_dict(dict(model.params))
    kept = {path: leaf for path, leaf in flat.items() if path not in replaced}
    return {"params": flax.traverse_util.unflatten_dict(kept), "prepared": prepared}


# Static: the module (its configuration) and the number of alternatives.  Traced: everything else,
# so a compilation is made per (number of tokens, cache size) and no setting adds one.
@partial(
    jax.jit,
    static_argnames=("transformer", "top_k"),
    donate_argnames=("cache", "seen"),
)
def _step(
    transformer: Transformer,
    weights: Params,
    cache: StreamCache,
    seen: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    last: jax.Array,
    controls: Controls,
    interventions: Interventions | None,
    *,
    top_k: int,
) -> tuple[StreamCache, jax.Array, Evidence]:
    """Feeds tokens (1, T), and chooses the one after index `last`."""
    output = cast(
        Output,
        transformer.apply(
            weights,
            tokens,
            cache=cache.to_model(transformer.config),
            positions=positions,
            return_hidden_states=True,
            interventions=interventions,
        ),
    )
    assert output.hidden_states is not None
    assert output.cache is not None
    # Only the last token's logits: the vocabulary is most of a small model's work.
    logits = cast(
        jax.Array, transformer.apply(weights, output.hidden_states[0, last], method="unembed")
    )
    padded = jnp.where(positions[0] >= 0, tokens[0], seen.shape[0])
    seen = seen.at[padded].set(True, mode="drop")
    dist = distribution(logits, controls, seen)
    token = draw(dist, controls, positions[0, last])
    return StreamCache.from_model(output.cache), seen, observe(logits, dist, token, top_k)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items a and b share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


class Decoder:
    """One stream of tokens: what is in the cache, and the next choice.

    Not thread-safe: the session that owns it holds a lock.

    Attributes:
      ids: the token ids in the cache, in order.
      limit: most positions that the cache may hold.
    """

    def __init__(self, model: GemmaTransformer, *, limit: int, top_k: int) -> None:
        self.limit = limit
        self.ids: list[int] = []
        self._transformer = model.transformer
        self._mesh = model.mesh
        self._weights = decoding_weights(model)
        self._interventions = model.interventions
        self._top_k = top_k
        self._cache: StreamCache | None = None
        self._seen: Any = None
        self._controls: Controls | None = None
        self._next: int | None = None  # the token chosen last, not yet fed

    @property
    def full(self) -> bool:
        """Whether no further token can be fed."""
        return len(self.ids) >= self.limit

    def reset(self) -> None:
        """Forgets everything; the next prompt is computed from its first token."""
        self.ids, self._cache, self._next = [], None, None

    def keep(self, ids: Sequence[int]) -> None:
        """Takes back what is in the cache beyond the prefix that it shares with `ids`."""
        shared = _common_prefix(self.ids, ids)
        if self._cache is not None and shared < len(self.ids):
            self._cache = rewind(self._cache, jnp.int32(shared))
        self.ids, self._next = self.ids[:shared], None

    def intervene(self, interventions: Interventions | None) -> None:
        """Computes under other interventions from now on; None takes them away.

        What is cached stays up to where the old or the new ones start to act.
        """
        if interventions is not self._interventions:
            both = (self._interventions, interventions)
            self.keep(self.ids[: min(int(x.start) for x in both if x is not None)])
        self._interventions = interventions

    def begin(self, ids: Sequence[int], sampling: Sampling) -> list[int]:
        """Readies the stream to continue `ids`, reusing what the cache already holds of it.

        Args:
          ids: the whole context, at least one token.
          sampling: settings of the reply; its seed is set.

        Returns:
          What of `ids` is still to be fed; at least the last token, whose logits are needed.

        Raises:
          ValueError: the context is empty or exceeds `limit`.
        """
        if not 0 < len(ids) <= self.limit:
            raise ValueError(f"a context must hold 1 to {self.limit} tokens, got {len(ids)}")
        self.keep(ids[:-1])
        config = self._transformer.config
        size = size_for(len(ids) + 1, self.limit)
        if self._cache is None:
            self._cache = StreamCache.empty(config, size, self._mesh)
        elif self._cache.size < size:
            self._cache = grow(self._cache, size)
        self._controls = Controls.of(sampling, config.num_embed)
        seen = np.zeros(config.num_embed, bool)
        seen[self.ids] = True
        where = placement.vocabulary_sharding(config, self._mesh)
        self._seen = placement.put(jnp.asarray(seen), where)
        return list(ids[len(self.ids) :])

    def prefill(
        self, ids: Sequence[int], between: Callable[[int], bool] | None = None
    ) -> Evidence | None:
        """Feeds a prompt and chooses the token after it.

        Args:
          ids: what `begin` returned.
          between: called between pieces with the number of tokens fed; False ends the prefill.

        Returns:
          The evidence on the host, or None where `between` ended it.
        """
        result = None
        for fed, (tokens, positions, last) in enumerate(chunks(ids, len(self.ids))):
            if fed and between is not None and not between(len(self.ids)):
                return None
            result = self._feed(tokens, positions, last)
        return result

    def step(self) -> Evidence:
        """Feeds the token chosen last, and chooses the next; evidence on the host.

        Raises:
          RuntimeError: nothing was chosen yet, or the cache is full.
        """
        if self._next is None or self.full:
            raise RuntimeError("step() needs a prefilled stream with room for one more token")
        token, position = [[self._next]], [[len(self.ids)]]
        return self._feed(np.array(token, np.int32), np.array(position, np.int32), 0)

    def compile(self, progress: Callable[[float], None] | None = None) -> None:
        """Compiles every step that a short conversation needs, and leaves the stream empty."""
        self.reset()
        sizes = (*BUCKETS[:2], 1)
        for i, size in enumerate(sizes):
            rest = self.begin([0] * min(size, self.limit - 1), Sampling(seed=0))
            self.prefill(rest)
            self.reset()
            if progress is not None:
                progress((i + 1) / len(sizes))

    def _feed(self, tokens: np.ndarray, positions: np.ndarray, last: int) -> Evidence:
        assert self._cache is not None
        assert self._controls is not None
        fed = [int(token) for token in tokens[0, : last + 1]]
        size = size_for(len(self.ids) + len(fed), self.limit)
        if self._cache.size < size:
            self._cache = grow(self._cache, size)
        try:
            self._cache, self._seen, evidence = _step(
                self._transformer,
                self._weights,
                self._cache,
                self._seen,
                tokens,
                positions,
                np.int32(last),
                self._controls,
                self._interventions,
                top_k=self._top_k,
            )
            evidence = jax.device_get(evidence)
        except BaseException:
            # The cache was donated, so what is left of it cannot be trusted.
            self.reset()
            raise
        self.ids.extend(fed)
        self._next = int(evidence.token)
        return evidence
