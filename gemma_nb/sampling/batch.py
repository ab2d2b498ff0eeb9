"""Several streams at once, which share what stands before them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.executables import pinned
from gemma_nb.model import GemmaTransformer
from gemma_nb.sampling.batch_programs import (
    EVERYBODYS,
    NOBODYS,
    compiled_choose,
    compiled_feed,
    gather,
)
from gemma_nb.sampling.cache import StreamCache
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.evidence import Evidence
from gemma_nb.sampling.filters import Controls, seeded
from gemma_nb.sampling.prefill import Between
from gemma_nb.sampling.settings import Sampling
from gemma_nb.sampling.weights import decoding_weights
from gemma_nb.text.prefix import shared_prefix
from gemma_nb.typing import EMPTY

# Numbers of streams that are compiled.
WIDTHS = (1, 2, 4, 8, 16)
MOST = WIDTHS[-1]

# Tokens that are fed at once where the streams begin with different ones.
_PIECES = (16, 64, 256)

# The cache starts with so many slots, and is made four times as large when it is full: each size is
# a compilation.
_SLOTS, _MORE = 1024, 4


class Batch:
    """Streams that continue one context, one token of each per step.

    All streams stand in one cache, as if they were one text: what they share is there once, and a
    mask lets each token see that and its own stream.  So a step feeds its tokens as a prompt is
    fed, in products of matrices, and takes little longer than a single stream's.  What it pays for
    that is that a token's scores are computed over the others' tokens, too, and masked.

    A loop of its own beside the decoder's, which feeds a token that never left the device, one
    step ahead: here any stream may end after each token, and the tokens come from the host.

    The same seed draws in each stream what it draws in a `Decoder`, whose logits differ in the
    last bits of float32.

    Attributes:
      ids: per stream, the token ids that were fed, in order.
      fed: how many tokens were computed for all streams together.
    """

    def __init__(self, model: GemmaTransformer, decoder: Decoder, *, top_k: int) -> None:
        """A batch of no streams yet.

        Args:
          model: what computes; our own module, on one device (see `EngineTraits.can_batch`).
          decoder: computes what the streams share, and keeps it cached.
          top_k: number of alternatives.
        """
        self.ids: list[list[int]] = []
        self.fed = 0
        self._decoder = decoder
        self._transformer = model.transformer
        # Held, so that the decoder's and these stay the same arrays.
        self._weights = decoding_weights(model)
        self._leaves, structure = jax.tree.flatten(self._weights)
        self._feed_step = compiled_feed(model.transformer, structure)
        self._choose_step = compiled_choose(model.transformer, structure, top_k)
        self._cache: StreamCache | None = None
        # Of each slot; the device has the positions, too, but these are ahead of it.
        self._owners = np.zeros(0, np.int32)
        self._positions = np.zeros(0, np.int32)
        self._end = 0
        self._seen: Any = None
        self._controls: Any = None
        self._keys: Any = None

    @pinned
    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        between: Between | None = None,
    ) -> list[Evidence] | None:
        """Feed the prompts, and choose the token after each.

        Args:
          prompts: each stream's whole context, at least one token and at most the decoder's limit.
          samplings: theirs, which differ in their seeds only; these are set.
          between: see `gemma_nb.sampling.prefill.Between`.

        Returns:
          Each stream's evidence on the host, or None where `between` ended it.

        Raises:
          ValueError: no or too many streams, or a context of a wrong length.
        """
        if not 0 < len(prompts) <= MOST:
            raise ValueError(f"a batch holds 1 to {MOST} streams, got {len(prompts)}")
        limit = self._decoder.limit
        if not all(0 < len(ids) <= limit for ids in prompts):
            raise ValueError(f"a context must hold 1 to {limit} tokens")
        # Of each at least the last token is left, whose logits are needed.
        common = functools.reduce(_prefix, [list(ids[:-1]) for ids in prompts])
        own = sum(len(ids) - len(common) for ids in prompts)
        if not self._share(common, samplings[0], own, between):
            return None
        self.ids = [list(ids) for ids in prompts]
        width = next(size for size in WIDTHS if size >= len(prompts))
        vocabulary = self._transformer.config.num_embed
        self._controls = Controls.of(samplings[0], vocabulary)
        padded = [*samplings, *[samplings[0]] * (width - len(samplings))]
        self._keys = jnp.stack([seeded(cast(int, s.seed)) for s in padded])
        seen = np.zeros((width, vocabulary), bool)
        for row, ids in enumerate(prompts):
            seen[row, list(ids)] = True
        self._seen = jnp.asarray(seen)
        hidden = self._feed_rest(len(common), width, between)
        return None if hidden is None else self._choose(hidden, range(len(prompts)))

    @pinned
    def step(self, tokens: dict[int, int]) -> dict[int, Evidence]:
        """Feed the next token of some streams, and choose the one after each.

        A stream that is left out has ended.

        Args:
          tokens: stream to token id.

        Returns:
          Stream to evidence, on the host.
        """
        self._decoder.settle()
        width = self._seen.shape[0]
        fed = [(token, len(self.ids[i]), i) for i, token in tokens.items()]
        rows = self._feed(fed, width, live=list(tokens))
        hidden = np.zeros((width, rows.shape[1]), np.float32)
        for row, i in enumerate(tokens):
            hidden[i] = rows[row]
            self.ids[i].append(tokens[i])
        chosen = self._choose(hidden, list(tokens))
        return dict(zip(tokens, chosen, strict=True))

    def _share(
        self, common: list[int], sampling: Sampling, own: int, between: Between | None
    ) -> bool:
        """Compute what all streams begin with, and make the cache; False where that was ended.

        `own` is the number of tokens that are to be fed afterwards.
        """
        config, count = self._transformer.config, len(common)
        held = None
        if common:
            rest = self._decoder.begin(common, sampling)
            self.fed += len(rest)
            total = len(rest) + own

            def goes_on(done: int, _: int) -> bool:
                return between is None or between(done, total)

            if self._decoder.prefill(rest, goes_on) is None:
                return False
            held = self._decoder.cache
        size = _slots_for(count + 2 * MOST)
        self._owners = np.full(size, NOBODYS, np.int32)
        self._positions = np.full(size, EMPTY, np.int32)
        self._owners[:count], self._positions[:count] = EVERYBODYS, np.arange(count)
        self._end = count
        if held is None:
            self._cache = StreamCache.empty(config, size)
        else:
            self._cache = gather(held, np.arange(size), self._positions, np.int32(count))
        return True

    def _feed_rest(self, done: int, width: int, between: Between | None) -> np.ndarray | None:
        """Feed what the streams do not share; (width, D) states behind their next tokens."""
        rest = [
            (token, done + offset, i)
            for i, ids in enumerate(self.ids)
            for offset, token in enumerate(ids[done:])
        ]
        last = {(i, len(ids) - 1) for i, ids in enumerate(self.ids)}
        hidden = np.zeros((width, self._transformer.config.embed_dim), np.float32)
        everyone = range(len(self.ids))
        while rest:
            sizes = (width, *_PIECES)
            size = next((n for n in sizes if n >= len(rest)), sizes[-1])
            piece, rest = rest[:size], rest[size:]
            rows = self._feed(piece, size, live=everyone)
            for row, (_, position, i) in zip(rows, piece, strict=False):
                if (i, position) in last:
                    hidden[i] = row
            self.fed += len(piece)
            if between is not None and not between(self.fed, self.fed + len(rest)) and rest:
                return None
        return hidden

    def _feed(
        self, triples: Sequence[tuple[int, int, int]], size: int, live: Sequence[int]
    ) -> np.ndarray:
        """Feed (token, position, stream) triples as `size` tokens; (size, D) final states."""
        self._make_room(len(triples), live)
        tokens = np.zeros((1, size), np.int32)
        positions = np.full((1, size), EMPTY, np.int32)
        owners = np.full(size, NOBODYS, np.int32)
        count = len(triples)
        tokens[0, :count], positions[0, :count], owners[:count] = zip(*triples, strict=True)
        slots = slice(self._end, self._end + count)
        self._positions[slots], self._owners[slots] = positions[0, :count], owners[:count]
        self._end += count
        self._cache, hidden = self._feed_step(
            self._leaves,
            self._cache,
            *(tokens, positions, owners),
            # Copies: the device may read them later than they change.
            *(self._positions.copy(), self._owners.copy()),
            self._decoder.interventions,
        )
        return np.asarray(hidden)

    def _choose(self, hidden: np.ndarray, live: Sequence[int]) -> list[Evidence]:
        width = len(hidden)
        alive = np.zeros(width, bool)
        alive[list(live)] = True
        positions = np.zeros(width, np.int32)
        positions[: len(self.ids)] = [len(ids) - 1 for ids in self.ids]
        self._seen, evidence = self._choose_step(
            self._leaves, self._seen, hidden, alive, positions, self._keys, self._controls
        )
        on_host = jax.device_get(evidence)
        return [jax.tree.map(lambda x, i=i: x[i], on_host) for i in live]

    def _make_room(self, count: int, live: Sequence[int]) -> None:
        """Room for `count` tokens more; first, the tokens of streams that have ended go."""
        if self._end + count <= len(self._owners):
            return
        assert self._cache is not None
        stays = np.flatnonzero(np.isin(self._owners[: self._end], [EVERYBODYS, *live]))
        # Half of it free, or room would soon be wanted again.
        size = _slots_for(2 * (len(stays) + count))
        slots = np.zeros(size, np.int32)
        slots[: len(stays)] = stays
        positions, owners = np.full((2, size), EMPTY, np.int32)
        owners[:] = NOBODYS
        positions[: len(stays)] = self._positions[stays]
        owners[: len(stays)] = self._owners[stays]
        self._cache = gather(self._cache, slots, positions, np.int32(len(stays)))
        self._positions, self._owners, self._end = positions, owners, len(stays)


def _prefix(a: list[int], b: list[int]) -> list[int]:
    return a[: shared_prefix(a, b)]


def _slots_for(count: int) -> int:
    size = _SLOTS
    while size < count:
        size *= _MORE
    return size
