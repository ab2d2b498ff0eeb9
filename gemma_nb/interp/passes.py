"""A forward pass taken apart: the residual stream is kept, everything else recomputed on demand.

Between two layers there is nothing but the residual stream, (T, D) numbers.  A `Pass` keeps it for
every layer (200 MB for 4,000 tokens of the default model) and recomputes a layer from it when one
of its sites is asked for: attention of all layers at once would take 4.6 GB, of one head 64 MB.

Layers of one kind share one compiled program, whose parameters and layer number are arguments: a
model of 18 layers compiles two blocks instead of one program of 18.  Long texts go through a layer
in pieces that fill the layer's own key-value cache, so that no (N, T, T) array is ever whole.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb import placement
from gemma_nb.interp import programs
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn import Transformer, Wrapped
from gemma_nb.nn.block import Block
from gemma_nb.sites import Site
from gemma_nb.typing import EMPTY, LayerCache, Params, empty_cache

# Texts are padded to one of these lengths, so that a growing conversation seldom recompiles.
LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
PIECE = 512  # tokens of a longer text that go through a layer at a time
# The residual stream is kept at fewer layers where all of them would take more.
_KEPT_BYTES = 2**30
_VOCABULARY_ROWS = 64  # positions whose logits are computed at a time


def padded_length(length: int) -> int:
    """The length that a text of `length` tokens is computed with."""
    return next((n for n in LENGTHS if n >= length), -(-length // 1024) * 1024)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What of a site is wanted; None means all.

    Attributes:
      positions: absolute positions (of queries, on maps).
      heads: indices of query heads.
      dtype: of the result.
    """

    positions: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    dtype: str = "float32"


ALL = Selection()


class Pass:
    """One text's way through a model.

    Attributes:
      model: what computes, with its interventions.
      ids: (T,) int32 token ids.
    """

    def __init__(self, model: GemmaTransformer, ids: np.ndarray) -> None:
        self.model, self.ids = model, ids
        size = padded_length(len(ids))
        self._tokens = np.zeros((1, size), np.int32)
        self._positions = np.full_like(self._tokens, EMPTY)
        self._tokens[0, : len(ids)] = ids
        self._positions[0, : len(ids)] = np.arange(len(ids))
        self._kept: dict[int, jax.Array] = {}
        layers, width = model.config.num_layers, model.config.embed_dim
        self._stride = max(1, -(-4 * (layers + 1) * size * width // _KEPT_BYTES))

    @classmethod
    def of(cls, model: GemmaTransformer, ids: np.ndarray) -> Pass:
        """A pass of `ids`: the one that some trace still holds, or a new one.

        So a panel that asks for one layer after the other computes the residual stream once.
        """
        key = (model.transformer, id(model.params), id(model.interventions), ids.tobytes())
        found = _alive.get(key)
        if found is None:
            found = _alive[key] = cls(model, ids)
        return found

    def capture(
        self, sites: Sequence[Site], layers: Sequence[int], select: Selection = ALL
    ) -> dict[str, np.ndarray]:
        """Site name -> (layers, T, ...) or, where the model has it once, (T, ...).

        Maps are (layers, N, T, S).  Padding is cut off, `select` applied.

        Args:
          sites: which sites, all of them of this model.
          layers: ascending layer indices.
          select: positions, heads and dtype.
        """
        if isinstance(self.model.transformer, Wrapped):
            return self._capture_wrapped(sites, layers, select)
        per_layer = tuple(s for s in sites if s.per_layer)
        found: dict[str, np.ndarray] = {}
        for row, layer in enumerate(layers if per_layer else ()):
            for name, value in self._layer(layer, per_layer, select).items():
                if len(layers) == 1 and value.flags.writeable:
                    found[name] = value[None]  # our own already; a long text's map is large
                    continue
                if name not in found:
                    found[name] = np.empty((len(layers), *value.shape), value.dtype)
                found[name][row] = value
        for s in sites:
            if not s.per_layer:
                found[s.name] = self._whole(s, select)
        return found

    def residual(self, layer: int) -> jax.Array:
        """(1, padded T, D): the stream before `layer`; of index L after the last one."""
        start = max((i for i in self._kept if i <= layer), default=None)
        if start is None:
            start, given = 0, (self._ours, self._params, self._tokens, *self._edits)
            self._kept[0] = programs.embed(*given)
        x = self._kept[start]
        for i in range(start, layer):
            x, _ = cast(tuple[jax.Array, Any], self._through(i, x, (), ALL))
            if (i + 1) % self._stride == 0 or i + 1 == self.model.config.num_layers:
                self._kept[i + 1] = x
        return x

    # --- inside ---------------------------------------------------------------------------------

    @property
    def _ours(self) -> Transformer:
        assert isinstance(self.model.transformer, Transformer)
        return self.model.transformer

    @property
    def _params(self) -> Params:
        return self.model.params

    @property
    def _edits(self) -> tuple[jax.Array, Any]:
        return jnp.asarray(self._positions), self.model.interventions

    def _layer(self, layer: int, sites: tuple[Site, ...], select: Selection) -> dict[str, Any]:
        """Sites of one layer; keeps the stream after it where that is news."""
        after = [s for s in sites if s.name == "residual"]
        within = tuple(s for s in sites if s.name != "residual")
        values: dict[str, Any] = {}
        if within:
            x, values = self._through(layer, self.residual(layer), within, select)
            if layer + 1 not in self._kept and x is not None and (layer + 1) % self._stride == 0:
                self._kept[layer + 1] = x
        for s in after:
            values[s.name] = self._rows(s, self.residual(layer + 1)[0], select)
        return values

    def _rows(self, s: Site, value: jax.Array, select: Selection) -> np.ndarray:
        rows = slice(len(self.ids)) if select.positions is None else np.array(select.positions)
        return np.asarray(placement.fetch(value[rows].astype(select.dtype)))

    def _through(
        self, layer: int, x: jax.Array, sites: tuple[Site, ...], select: Selection
    ) -> tuple[jax.Array | None, dict[str, np.ndarray]]:
        """The stream after a layer (None where it is known already), and some of its sites."""
        advance = layer + 1 not in self._kept
        call = partial(
            programs.run_block,
            Block(self.model.config, self.model.config.layers[layer]),
            sites,
            select.dtype,
            advance,
            self.model.mesh is None,
            self._params[f"layer_{layer}"],
            self.model.interventions,
            np.int32(layer),
            None if select.heads is None else np.array(select.heads, np.int32),
        )
        size = self._tokens.shape[1]
        if size <= LENGTHS[-1]:
            x, _, found = call(x, self._positions, None, self._wanted(0, size, select))
            return x, {s.name: self._cut(s, found[s.name], select) for s in sites}
        c = self.model.config
        shape = (1, size, c.num_kv_heads, c.head_dim)
        cache: LayerCache | None = empty_cache(1, shape, x.dtype)["layer_0"]
        streams: list[jax.Array] = []
        whole: dict[str, np.ndarray] = {}
        done = 0
        for start in range(0, size, PIECE):
            stop = start + PIECE
            if start >= len(self.ids) and not advance:
                break
            part, cache, found = call(
                x[:, start:stop],
                self._positions[:, start:stop],
                cache,
                self._wanted(start, stop, select),
            )
            streams += [part]
            count = self._count(start, stop, select)
            for s in sites:
                # On the host at once: the device holds one piece, whatever is asked for.
                self._add(whole, s, found[s.name], slice(done, done + count), select)
            done += count
        after = jnp.concatenate(streams, axis=1) if advance else None
        return after, whole

    def _wanted(self, start: int, stop: int, select: Selection) -> np.ndarray | None:
        """Rows of a piece to return, as many for every piece; None for all."""
        if select.positions is None:
            return None
        inside = [p - start for p in select.positions if start <= p < stop]
        rows = np.full(len(select.positions), inside[0] if inside else 0, np.int32)
        rows[: len(inside)] = inside
        return rows

    def _count(self, start: int, stop: int, select: Selection) -> int:
        """How many of the selected positions lie from `start` up to `stop`."""
        if select.positions is None:
            return max(0, min(stop, len(self.ids)) - start)
        return sum(start <= p < stop for p in select.positions)

    def _add(
        self, whole: dict[str, np.ndarray], s: Site, piece: Any, at: slice, select: Selection
    ) -> None:
        """Puts a piece's rows in their place, which is made at the first piece."""
        cut = self._cut(s, piece, select, at.stop - at.start)
        axis = 1 if s.is_map else 0
        if s.name not in whole:
            shape = list(cut.shape)
            shape[axis] = self._count(0, len(self.ids), select)
            whole[s.name] = np.empty(shape, cut.dtype)
        whole[s.name][(slice(None),) * axis + (at,)] = cut

    def _cut(self, s: Site, piece: Any, select: Selection, count: int | None = None) -> np.ndarray:
        """A piece's first `count` rows (None: all of the text's); queries behind heads on a map."""
        count = self._count(0, len(self.ids), select) if count is None else count
        rows = np.asarray(placement.fetch(piece))[:count]
        # The model keeps queries in front; a map is read head by head.  XLA would take two copies
        # to turn it; here it is a view, and one copy to where it is kept.
        return rows[..., : len(self.ids)].transpose(1, 0, 2) if s.is_map else rows

    def _whole(self, s: Site, select: Selection) -> np.ndarray:
        """A site that the model has once."""
        if s.name == "embed":
            return self._rows(s, self.residual(0)[0], select)
        last = self.residual(self.model.config.num_layers)
        final, rms = programs.finish(self._ours, self._params, last, *self._edits)
        if s.name == "final_rms":
            return self._rows(s, rms[0], select)
        if s.name == "final":
            return self._rows(s, final[0], select)
        wanted = self._rows(s, final[0], dataclasses.replace(select, dtype=str(final.dtype)))
        return _logits(self.model, wanted, select.dtype)

    def _capture_wrapped(
        self, sites: Sequence[Site], layers: Sequence[int], select: Selection
    ) -> dict[str, np.ndarray]:
        values = programs.capture_wrapped(
            self.model.transformer,
            tuple(sites),
            tuple(layers),
            select.dtype,
            self._params,
            self._tokens,
            self._positions,
        )
        found, length = {}, len(self.ids)
        rows = np.arange(length) if select.positions is None else np.array(select.positions)
        heads = slice(None) if select.heads is None else np.array(select.heads)
        for s in sites:
            value = np.asarray(placement.fetch(values[s.name]))
            if s.is_map:
                value = value[:, heads][:, :, rows, :length]
            else:
                value = np.take(value, rows, axis=1 if s.per_layer else 0)
            found[s.name] = value
        return found


# A pass keeps its model alive, so the numbers in a key stand for what they stood for.
_alive: weakref.WeakValueDictionary[tuple[Any, ...], Pass] = weakref.WeakValueDictionary()


def _logits(model: GemmaTransformer, final: np.ndarray, dtype: str) -> np.ndarray:
    """(T, V) of (T, D) final-normed states, some rows at a time."""
    result = np.empty((len(final), model.config.num_embed), dtype)
    for start in range(0, len(final), _VOCABULARY_ROWS):
        rows = final[start : start + _VOCABULARY_ROWS]
        padded = np.zeros((_VOCABULARY_ROWS, final.shape[1]), final.dtype)
        padded[: len(rows)] = rows
        logits = programs.unembed(model.transformer, model.params, padded, dtype)
        result[start : start + len(rows)] = placement.fetch(logits)[: len(rows)]
    return result
