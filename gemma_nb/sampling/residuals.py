"""The residual stream of a decoder's tokens, kept for whoever looks into the conversation.

Of 2,000 tokens a pass takes seconds, in which it computes what decoding has computed already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.config import TransformerConfig
from gemma_nb.sites import SITES

# What is kept takes at most so much: 4,369 tokens of Gemma 3 270M, 1,680 of 1B.
_LIMIT_BYTES = 192 * 2**20
_BLOCK = 64  # tokens that were fed one by one in one array: what grows is never copied


def sown_residuals(sown: Any, layers: int) -> jax.Array | tuple[jax.Array, ...]:
    """The stream (T, D) after each layer, float32, of a step's `intermediates`."""
    found = tuple(SITES["residual"].value(sown, i)[0].astype(jnp.float32) for i in range(layers))
    # Each array that a step returns takes some microseconds, and several tokens' are large.
    return jnp.stack(found) if found[0].shape[0] == 1 else found


@dataclasses.dataclass
class _Part:
    """Successive tokens.

    Attributes:
      rows: (T, D) of each layer, and more tokens where a block is not full.
      length: T.
      room: tokens that it may come to.
    """

    rows: Sequence[np.ndarray] | np.ndarray
    length: int
    room: int


class Residuals:
    """The stream after each layer, of the first tokens of a decoder.

    Nothing is written twice, so what was given away stays as it was.
    """

    def __init__(self, config: TransformerConfig) -> None:
        """Nothing yet."""
        self._most = _LIMIT_BYTES // (4 * config.num_layers * config.embed_dim)
        self._parts: list[_Part] = []
        self._count = 0

    def write(self, start: int, layers: Sequence[np.ndarray] | np.ndarray, count: int) -> None:
        """Keeps the tokens from position `start` on, while there is room.

        What was held from there on is forgotten, and everything in a text of twice as many tokens
        as there is room for.

        Args:
          start: position of the first of them.
          layers: of each layer (T, D), as `sown_residuals` has it; several tokens are not copied.
          count: of these T that are real.
        """
        self._cut(start)
        if start > 2 * self._most:
            # Of so long a text it is a small part, and its caches take the memory.
            self._parts, self._count = [], 0
        if self._count < start or start + count > self._most:
            return
        if isinstance(layers, np.ndarray):
            if not self._parts or self._parts[-1].length == self._parts[-1].room:
                block = np.empty((len(layers), _BLOCK, layers.shape[2]), np.float32)
                self._parts.append(_Part(block, 0, _BLOCK))
            part = self._parts[-1]
            cast(np.ndarray, part.rows)[:, part.length] = layers[:, 0]
            part.length += 1
        else:
            self._parts.append(_Part(layers, count, count))
        self._count += count

    def first(self, count: int) -> KeptResiduals:
        """Those of at most `count` tokens."""
        count = min(count, self._count)
        return KeptResiduals([(part.rows, part.length) for part in self._parts], count)

    def _cut(self, length: int) -> None:
        """Forgets what is held from position `length` on."""
        while self._count > length:
            part = self._parts.pop()
            self._count -= part.length
            if (left := length - self._count) > 0:
                # What was behind it is not written over.
                self._parts.append(_Part(part.rows, left, left))
                self._count = length


class KeptResiduals:
    """What was kept at some moment, as `gemma_nb.interp.passes.Known` has it.

    Attributes:
      length: tokens that it covers.
    """

    def __init__(self, parts: Sequence[tuple[Any, int]], length: int) -> None:
        """The first `length` tokens of parts: (T, D) or more of each layer, and T."""
        self.length, self._parts = length, parts

    def before(self, layer: int) -> np.ndarray | None:
        """(length, D) float32 before `layer`; None before the first, where it is the embedding."""
        if layer == 0 or not self._parts:
            return None
        rows = [layers[layer - 1][:count] for layers, count in self._parts]
        return np.concatenate(rows)[: self.length]
