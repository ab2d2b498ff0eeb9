"""Attention rows: how much each head looked at each token where a token was chosen."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_nb.interventions import Interventions
from gemma_nb.model import GemmaTransformer
from gemma_nb.sampling.cache import ring_layers, smallest_window
from gemma_nb.sampling.settings import Capture
from gemma_nb.sites import check_layers
from gemma_nb.text.tokenizer import Tokenizer


def in_order(ring: np.ndarray, window: int, start: int, position: int) -> np.ndarray:
    """Weights of one query over what a ring's layer sees, sorted by position.

    Args:
      ring: (..., W) where a single token was fed, which stands in the ring already; fewer while the
        cache is smaller than a window, and no ring yet.  (..., W + T) where T tokens were fed at
        once: the ring as it was before, and then these tokens.
      window: W.
      start: position of the first token fed.
      position: p, of the query.

    Returns:
      (..., n) over the last n = min(p + 1, W) positions up to p; a copy.
    """
    seen = np.arange(max(0, position + 1 - window), position + 1)
    slots = seen % window
    if ring.shape[-1] > window:
        slots = np.where(seen < start, slots, window + seen - start)
    # Stretch by stretch: `np.take` picks weight by weight, which takes 58 us instead of 22.
    edges = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1), len(slots)]
    stretches = [slice(slots[a], slots[b - 1] + 1) for a, b in itertools.pairwise(edges)]
    return np.concatenate([ring[..., stretch] for stretch in stretches], axis=-1)


def together(
    near: np.ndarray | None, far: np.ndarray | None, are_near: Sequence[bool], position: int
) -> np.ndarray:
    """Weights of all layers over all positions.

    Args:
      near: (layers, N, n), what `in_order` gives of the layers whose cache is a ring.
      far: (layers, N, p + 1 or more), of the others.
      are_near: per layer, which of both has it.
      position: p, of the query.

    Returns:
      (L, N, p + 1) float32; 0 before a ring's n positions.
    """
    some = near if near is not None else far
    assert some is not None
    weights = np.zeros((len(are_near), some.shape[1], position + 1), np.float32)
    where = np.array(are_near)
    if near is not None:
        weights[where, :, position + 1 - near.shape[-1] :] = near
    if far is not None:
        weights[~where] = far[:, :, : position + 1]
    return weights


class AttentionRow:
    """The attention weights with which one token was chosen, for as long as there is room.

    The query is the token before the chosen one: its row says why the model chose as it did.  It is
    the same whichever token was chosen there.

    Attributes:
      position: p, of the query.
      ids: token ids of the context; the first p + 1 of them are the keys.
      interventions: what the model computed under.
      home: where it is kept.
    """

    __slots__ = ("__weakref__", "_weights", "home", "ids", "interventions", "position")

    def __init__(
        self,
        home: AttentionRows,
        weights: tuple[np.ndarray | None, np.ndarray | None],
        position: int,
        ids: Sequence[int],
        interventions: Interventions | None,
    ) -> None:
        self.home = home
        self.position = position
        self.ids = ids
        self.interventions = interventions
        self._weights: tuple[np.ndarray | None, np.ndarray | None] | None = weights

    def __deepcopy__(self, memo: object) -> AttentionRow:
        """Itself: a copied record has the same row."""
        return self

    def __reduce__(self) -> Any:
        """As in files, None stands for it in what is pickled."""
        return type(None), ()

    @property
    def nbytes(self) -> int:
        """What the weights take; 0 once they were evicted."""
        return sum(part.nbytes for part in self._weights or () if part is not None)

    def weights(self) -> np.ndarray | None:
        """(L, N, p + 1) float32 of the layers captured; None once they were evicted."""
        held = self._weights  # another thread may evict them meanwhile
        return None if held is None else together(*held, self.home.are_near, self.position)

    def evict(self) -> None:
        """Gives the memory back."""
        self._weights, self.ids = None, ()


@dataclasses.dataclass(frozen=True)
class AttentionKept:
    """How many attention rows are kept, and what became of the others.

    Attributes:
      layers: which layers are captured; none where the session's `Capture` asks for none, and where
        another library's module, or one on a mesh, computes.
      tokens: how many tokens have their rows.
      evicted: how many had them before they were the oldest and there was no more room.
      bytes: what the rows take.
      limit: most bytes that they may take, `Capture.attention_bytes`.
    """

    layers: tuple[int, ...]
    tokens: int
    evicted: int
    bytes: int
    limit: int

    @property
    def warning(self) -> str:
        """What to tell the user; empty while nothing was evicted."""
        if not self.evicted:
            return ""
        return (
            f"Attention rows are kept in at most {self.limit / 1e6:g} MB: those of the oldest "
            f"{self.evicted} tokens are gone, {self.tokens} tokens have theirs.  "
            "Capture(attention_bytes=...) sets the limit; chat.look(token) computes them anew."
        )


class AttentionRows:
    """Attention rows within a number of bytes; the oldest captured go first.

    A row that no token refers to any longer takes no room.

    Attributes:
      layers: which layers are captured, ascending.
      are_near: for each of them, whether its row ends at the window (its cache is a ring).
      config: of the model.
      tokenizer: names tokens.
      title: of the model.
    """

    def __init__(
        self, capture: Capture, model: GemmaTransformer, tokenizer: Tokenizer, *, shown: bool
    ) -> None:
        """No rows yet.

        Args:
          capture: which layers, and how many bytes.
          model: what computes.
          tokenizer: of the model.
          shown: whether it shows its attention; otherwise none is captured.

        Raises:
          ValueError: a layer that the model does not have.
        """
        self.config, self.tokenizer, self.title = model.config, tokenizer, model.title
        wanted = capture.attention_layers
        layers: tuple[int, ...] = ()
        if wanted is not None:
            layers = check_layers(None if wanted == "all" else wanted, self.config.num_layers)
        self.layers = layers if shown else ()
        self._window, rings = smallest_window(self.config), ring_layers(self.config)
        self.are_near = tuple(rings[i] for i in self.layers)
        self._limit = capture.attention_bytes
        # Reentrant: a row may be collected while the lock is held.
        self._lock = threading.RLock()
        self._sizes: dict[weakref.ref[AttentionRow], int] = {}  # the oldest first
        self._bytes = self._evicted = 0

    @property
    def kept(self) -> AttentionKept:
        """How many there are."""
        with self._lock:
            return AttentionKept(
                self.layers, len(self._sizes), self._evicted, self._bytes, self._limit
            )

    def keep(
        self,
        found: tuple[np.ndarray | None, np.ndarray | None],
        ids: Sequence[int],
        start: int,
        interventions: Interventions | None,
    ) -> AttentionRow:
        """Keeps a copy of what a step has made, and evicts the oldest if there is no room.

        Args:
          found: see `feed.sown_attention`.
          ids: all tokens up to the query, which is the last one.  More may be appended later.
          start: position of the first token that the step was given.
          interventions: what the model computed under.
        """
        ring, whole = found
        position = len(ids) - 1
        near = None if ring is None else in_order(ring, self._window, start, position)
        far = None if whole is None else whole[:, :, : position + 1].copy()
        row = AttentionRow(self, (near, far), position, ids, interventions)
        with self._lock:
            self._sizes[weakref.ref(row, self._forget)] = row.nbytes
            self._bytes += row.nbytes
            while self._bytes > self._limit:
                oldest = next(iter(self._sizes))
                gone = oldest()
                self._forget(oldest)
                if gone is not None:
                    gone.evict()
                    self._evicted += 1
        return row

    def _forget(self, row: weakref.ref[AttentionRow]) -> None:
        with self._lock:
            self._bytes -= self._sizes.pop(row, 0)
