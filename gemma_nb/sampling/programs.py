"""The compiled programs of one stream, and which of them are compiled before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import jax
import numpy as np

from gemma_nb.executables import Kept
from gemma_nb.interventions import Interventions
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn import Transformer
from gemma_nb.sampling import ahead
from gemma_nb.sampling.cache import StreamCache, compile_rewinding
from gemma_nb.sampling.feed import Captured
from gemma_nb.sampling.filters import Controls
from gemma_nb.sampling.look import can_look, compile_look, compiled_look
from gemma_nb.sampling.prefill import BUCKETS
from gemma_nb.sampling.step import Program
from gemma_nb.sampling.weights import Part, decoding_weights

# What compiles something, for `ahead.begin`.
Jobs = Iterator[Callable[[], object]]


class Programs:
    """What a stream runs.

    What is compiled ahead is compiled from shapes, since the arrays themselves are given away by
    the next step; once in a process, whoever asks for it.

    Attributes:
      one: feeds a single token.
      many: feeds several tokens behind others.
      first: feeds several tokens that have nothing before them to attend to; `many` where that is
        all the same.
      looks: whether `look` may be run: with our own module, on one device.
      looking: whether somebody looks, or may soon; until then no look is compiled ahead.
    """

    def __init__(
        self, model: GemmaTransformer, *, top_k: int, attention_layers: tuple[int, ...] = ()
    ) -> None:
        """The programs of a model; nothing is compiled yet.

        Args:
          model: what computes.
          top_k: number of alternatives.
          attention_layers: whose attention weights come with a choice, ascending.
        """
        self._transformer = model.transformer
        self._mesh = model.mesh
        self.looks = can_look(model)
        self.looking = False
        # A pass is computed in the parameters' own precision.
        exact = self.looks and model.storage == "exact"
        captured = Captured(attention_layers, residuals=exact)
        # Held, since other streams of the model take them from here.
        self._weights = decoding_weights(model)
        of = (top_k, captured)
        if self.looks and jax.default_backend() == "cpu":
            own = cast(Transformer, model.transformer)
            ends, layers = self._weights.for_several()
            parts = Part.of(ends), tuple(map(Part.of, layers))
            self.many = Program.layerwise(own, parts, *of)
            self.first = Program.layerwise(own, parts, *of, first=True)
        else:
            self.first = self.many = Program.several(model.transformer, self._weights, *of)
        # One token is given less.
        self.one = Program.single(model.transformer, self._weights.for_one_token(), *of)

    def use_huge_pages(self) -> None:
        """See `DecodingWeights`; a second time it does nothing."""
        self._weights.use_huge_pages()

    def feeding(self, length: int, *, first: bool) -> Program:
        """What feeds so many tokens at once.  `first`: nothing is cached."""
        if length == 1:
            return self.one
        return self.first if first else self.many

    @property
    def look(self) -> Kept:
        """The jitted pass of `gemma_nb.sampling.look.look`, for the leaves of `one`."""
        return compiled_look(self._transformer, self.one.ends.structure)

    def steps_at(
        self, size: int | None, controls: Controls, interventions: Interventions | None
    ) -> Jobs:
        """What compiles the steps that come first at a cache size, unless that was begun."""
        if size is None or not self._is_new(self.one.feed, size, interventions):
            return
        yield partial(self.one.compile, *self._given(size), 1, controls, interventions)
        yield partial(compile_rewinding, self._given(size)[0])
        yield from self.pieces_at(size, controls, interventions)

    def pieces_at(self, size: int, controls: Controls, interventions: Interventions | None) -> Jobs:
        """What compiles the short pieces behind others at a cache size, unless that was begun."""
        # `many` may be the program of single tokens, too, but for other shapes.
        if not self._is_new(self.many.feed, size, interventions, several=True):
            return
        for length in BUCKETS[:2]:
            yield partial(self.many.compile, *self._given(size), length, controls, interventions)

    def choice(self, controls: Controls) -> Jobs:
        """What compiles the choice after a prompt for all settings, unless that was begun.

        Most need the short one, which is compiled in half the time.
        """
        begun = ahead.begun(self.many.choose)
        if not self.looks or begun:
            return
        begun.add(True)
        config, dtype = self._transformer.config, cast(Transformer, self._transformer).dtype
        hidden = jax.ShapeDtypeStruct((config.embed_dim,), dtype)
        state = hidden, jax.ShapeDtypeStruct((), np.dtype(np.int32))
        seen = jax.ShapeDtypeStruct((config.num_embed,), np.dtype(bool))
        yield partial(self.many.compile_choice, seen, state, controls)

    def looks_at(self, size: int | None, interventions: Interventions | None) -> Jobs:
        """What compiles the looks at a cache size, where they may be wanted."""
        if size is None or not (self.looking and self.looks):
            return
        if self._is_new(self.look, size, interventions):
            cache, _ = self._given(size)
            yield partial(compile_look, self.look, self.one.ends.leaves, cache, interventions)

    def _given(self, size: int) -> tuple[StreamCache, jax.ShapeDtypeStruct]:
        """Shapes of the cache and of the tokens seen."""
        config = self._transformer.config
        seen = jax.ShapeDtypeStruct((config.num_embed,), np.dtype(bool))
        return StreamCache.shapes(config, size, own=self.looks), seen

    def _is_new(
        self, program: Any, size: int, interventions: Interventions | None, *, several: bool = False
    ) -> bool:
        """Whether nobody has begun to compile a program for a cache size; notes that it is."""
        what = (size, several, jax.tree.structure(interventions))
        begun = ahead.begun(program)
        # Several hosts must run the same programs in the same order.
        if what in begun or self._mesh is not None:
            return False
        begun.add(what)
        return True
