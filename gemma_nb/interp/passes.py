"""A forward pass taken apart: what crosses between layers is kept, all else recomputed on demand.

Between two layers there is little but the residual stream, (T, D) numbers.  A `Pass` keeps it for
every layer (200 MB for 4,000 tokens of the default model) and recomputes a layer from it when one
of its sites is asked for: attention of all layers at once would take 4.6 GB, of one head 64 MB.

What is known of the stream already is not computed again: of a text that grew, only the new
positions go through the layers, each with the keys and values of all that came before.

Layers of one kind share one compiled program, whose parameters and layer number are arguments: a
model of 18 layers compiles two blocks instead of one program of 18.  Long texts go through a layer
in pieces that fill the layer's own key-value cache, so that no (N, T, T) array is ever whole.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb import placement
from gemma_nb.interp import programs
from gemma_nb.interp.pieces import Pieces, Selection
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn import Transformer, Wrapped
from gemma_nb.nn.layer import Block
from gemma_nb.nn.layer_input import Carry
from gemma_nb.sites import Site
from gemma_nb.text.prefix import shared_prefix
from gemma_nb.typing import EMPTY, LayerCache, Params, empty_cache

# Texts are padded to one of these lengths, so that a growing conversation seldom recompiles.
LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
PIECE = 512  # tokens of a longer text that go through a layer at a time
# New positions of a text that go through a layer at a time: one compilation for each.
_STEPS = (64, PIECE)
# The beginning of a text must be so long for its known stream to be used: a pass over less is quick
# and needs no other program.
WORTH = PIECE
# The residual stream is kept at fewer layers where all of them would take more.
_KEPT_BYTES = 2**30
_VOCABULARY_ROWS = 64  # positions whose logits are computed at a time


def padded_length(length: int) -> int:
    """The length that a text of `length` tokens is computed with."""
    return next((n for n in LENGTHS if n >= length), -(-length // 1024) * 1024)


ALL = Selection()


class Known(Protocol):
    """The residual stream of a text's beginning, from where it was computed before.

    Attributes:
      length: tokens of the text that it covers.
    """

    length: int

    def before(self, layer: int) -> np.ndarray | None:
        """(length, D) before `layer`, of index L after the last; None where it is not known."""


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
        self._kept: dict[int, Carry] = {}
        self._known: dict[type[Known], Known] = {}
        layers, width = model.config.num_layers, model.config.embed_dim
        self._stride = max(1, -(-4 * (layers + 1) * size * width // _KEPT_BYTES))

    @classmethod
    def of(cls, model: GemmaTransformer, ids: np.ndarray) -> Pass:
        """A pass of `ids`: the one that some trace still holds, or a new one.

        So a panel that asks for one layer after the other computes the residual stream once, and a
        new pass takes over what one that is held found of the same beginning.
        """
        of_model = (model.transformer, id(model.params), id(model.interventions))
        key = (*of_model, ids.tobytes())
        found = _alive.get(key)
        if found is None:
            others = [other for whose, other in list(_alive.items()) if whose[:3] == of_model]
            found = _alive[key] = cls(model, ids)
            for other in others:
                found.learn(Beginning.of(other, ids))
        return found

    def learn(self, known: Known) -> None:
        """Uses what is known of the beginning of the text, under the same interventions.

        Of each kind of source the one that covers most is kept.
        """
        held = self._known.get(type(known))
        if known.length >= WORTH and (held is None or held.length < known.length):
            self._known[type(known)] = known

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
        within = tuple(s for s in sites if s.per_layer and s.name != "residual")
        after = [s for s in sites if s.name == "residual"]
        size, pieces = self._tokens.shape[1], Pieces(len(layers), len(self.ids), select)
        for row, layer in enumerate(layers):
            if within:
                onward = bool(after) or row + 1 < len(layers)
                self._sites(layer, within, row, pieces, onward=onward)
            for s in after:
                stream = self.residual(layer + 1)
                pieces.catch_up()
                pieces.add(s, row, partial(self._rows, stream, select), 0, size)
        pieces.catch_up()
        whole = {s.name: self._whole(s, select) for s in sites if not s.per_layer}
        return pieces.found | whole

    def residual(self, layer: int) -> jax.Array:
        """(1, padded T, D): the stream before `layer`; of index L after the last one."""
        return self._carry(layer).x

    # --- inside ---------------------------------------------------------------------------------

    def _carry(self, layer: int) -> Carry:
        """All that crosses into `layer`, padded; of index L out of the last one."""
        start = max((i for i in self._kept if i <= layer), default=None)
        if start is None:
            start, given = 0, (self._ours, self._params, self._tokens, *self._edits)
            self._kept[0] = programs.embed(*given)
        carry = self._kept[start]
        for i in range(start, layer):
            carry = self._after(i, carry)
            self._keep(i + 1, carry)
        return carry

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

    def _keep(self, layer: int, carry: Carry) -> None:
        if layer % self._stride == 0 or layer == self.model.config.num_layers:
            self._kept[layer] = carry

    def _held(self, layer: int) -> np.ndarray | None:
        """(n, D): the known beginning of the stream before `layer`."""
        found = [rows for k in self._known.values() if (rows := k.before(layer)) is not None]
        return max(found, key=len, default=None)

    def _call(self, program: Any, layer: int, *static: Any) -> Any:
        """A program of `programs`, given a layer."""
        block = Block(self.model.config, self.model.config.layers[layer])
        alone = self.model.mesh is None
        given = (self._params[f"layer_{layer}"], self.model.interventions, np.int32(layer))
        return partial(program, block, *static, alone, *given)

    def _after(self, layer: int, carry: Carry) -> Carry:
        """All that crosses out of a layer: its known beginning, and the rest computed."""
        held = self._held(layer + 1)
        if held is None:
            nothing = Pieces(0, len(self.ids), ALL)
            computed = self._through(layer, carry, (), 0, nothing, onward=True)
            assert computed is not None
            return computed
        size, length = self._tokens.shape[1], len(self.ids)
        stream: Any = np.zeros(carry.x.shape, carry.x.dtype)
        stream[0, : len(held)] = held
        after = Carry(stream)
        step = min(size, next((n for n in _STEPS if n >= length - len(held)), PIECE))
        extend = self._call(programs.extend, layer, step)
        for start in range(len(held), length, step):
            # The last piece may begin among what is known, which then comes out once more.
            after = extend(carry, after, self._positions, np.int32(min(start, size - step)))
        return jax.tree.map(jnp.asarray, after)

    def _sites(
        self, layer: int, sites: tuple[Site, ...], row: int, pieces: Pieces, *, onward: bool
    ) -> None:
        """Adds sites of one layer to `pieces`; computes the stream after it where it is wanted."""
        carry = self._carry(layer)
        onward = onward and layer + 1 not in self._kept and self._held(layer + 1) is None
        after = self._through(layer, carry, sites, row, pieces, onward=onward)
        if after is not None:
            self._keep(layer + 1, after)

    def _through(
        self,
        layer: int,
        carry: Carry,
        sites: tuple[Site, ...],
        row: int,
        pieces: Pieces,
        *,
        onward: bool,
    ) -> Carry | None:
        """All that crosses out of a layer (None unless `onward`); adds sites of it to `pieces`."""
        size, call = self._tokens.shape[1], self._call
        run = partial(
            call(programs.run_block, layer, sites, pieces.select.dtype, onward), pieces.heads()
        )

        def add(found: dict[str, jax.Array], start: int, stop: int) -> None:
            pieces.catch_up()
            for s in sites:
                pieces.add(s, row, partial(placement.fetch, found[s.name]), start, stop)

        if size <= LENGTHS[-1]:
            after, _, found = run(carry, self._positions, None, pieces.rows(0, size))
            add(found, 0, size)
            return cast(Carry | None, after)
        sizes = self.model.config.axis_sizes(layer)
        shape = (1, size, sizes["K"], sizes["H"])
        cache: LayerCache | None = empty_cache([shape], carry.x.dtype)["layer_0"]
        parts: list[Carry] = []
        for start in range(0, size, PIECE):
            part, stop = programs.piece(carry, np.int32(start), PIECE), start + PIECE
            # Of what is padding only, anything will do.
            if start < len(self.ids):
                positions = self._positions[:, start:stop]
                part, cache, found = run(part, positions, cache, pieces.rows(start, stop))
                add(found, start, stop)
            parts += [part]
        if not onward:
            return None
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), *parts)

    def _rows(self, stream: jax.Array, select: Selection) -> np.ndarray:
        """What is wanted of (1, padded T, ...)."""
        rows = slice(len(self.ids)) if select.positions is None else np.array(select.positions)
        found: np.ndarray = np.asarray(placement.fetch(stream))[0][rows]
        return found.astype(select.dtype, copy=False)

    def _whole(self, s: Site, select: Selection) -> np.ndarray:
        """A site that the model has once."""
        if s.name == "embed":
            return self._rows(self.residual(0), select)
        last = self._carry(self.model.config.num_layers)
        final, rms = programs.finish(self._ours, self._params, last, *self._edits)
        if s.name == "final_rms":
            return self._rows(rms, select)
        if s.name == "final":
            return self._rows(final, select)
        wanted = self._rows(final, dataclasses.replace(select, dtype=str(final.dtype)))
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


class Beginning:
    """What another pass keeps, or will keep, of the beginning that its text shares with one."""

    def __init__(self, kept: dict[int, Carry], length: int) -> None:
        """`length` tokens of a pass that keeps what crosses as `kept`."""
        self.length, self._kept = length, kept

    @classmethod
    def of(cls, other: Pass, ids: np.ndarray) -> Beginning:
        """What `other` is for a text of `ids`."""
        return cls(other._kept, shared_prefix(ids.tolist(), other.ids.tolist()))

    def before(self, layer: int) -> np.ndarray | None:
        """(length, D), see `Known`."""
        carry = self._kept.get(layer)
        return None if carry is None else np.asarray(placement.fetch(carry.x))[0, : self.length]


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
