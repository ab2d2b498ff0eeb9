"""Compiled programs of a stream: tokens in, the next one out, with the evidence of the choice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import flax
import jax
import numpy as np

from gemma_nb.cpu.scores import Scores
from gemma_nb.interventions import Interventions
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn import Transformer
from gemma_nb.sampling.cache import StreamCache
from gemma_nb.sampling.draw import choose, suffices
from gemma_nb.sampling.evidence import exact_logit
from gemma_nb.sampling.feed import Captured, StepJit, feed
from gemma_nb.sampling.filters import Controls
from gemma_nb.sampling.inspect_position import compiled_inspection
from gemma_nb.sampling.layerwise import Layerwise, compiled_layerwise
from gemma_nb.sampling.traits import EngineTraits
from gemma_nb.sampling.weights import DecodingWeights, Part, decoding_weights


@flax.struct.dataclass
class StepOutput:
    """The output of a step, beside the cache.

    Attributes:
      token: (1, 1) int32, the chosen id, as the next step takes it; None where none was wanted.
      words: the packed evidence, or None.
      kv_rows: the new tokens' keys and values on the layers whose cache is a ring,
        (layers, 2, T, K*H) float32; None where there are none.
      attention: see `feed.sown_attention`, in float16; None where no layers were asked for.
      residuals: see `residuals.sown_residuals`; None where they are not captured.
    """

    token: jax.Array | None
    words: jax.Array | None
    kv_rows: jax.Array | None
    attention: tuple[jax.Array | None, jax.Array | None] | None
    residuals: jax.Array | tuple[jax.Array, ...] | None


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A compiled step, and the weights that it is given.

    A prefill is in two parts, so that the choice is compiled once for all numbers of
    tokens and sizes of the cache; a decode step is not, since handing the state over takes 4 %
    of a step.

    Attributes:
      feed: takes `weights`, a `StreamCache` and the tokens seen (V,), both given away, tokens and
        positions (1, T), the index of the last token, and `Interventions`; returns the cache, the
        tokens seen, the last token's final-normed state with its position, and `kv_rows`,
        `attention` and `residuals` of `StepOutput`.  Where there is no `choose` it takes
        `Controls`, too, and returns what that does in place of the state.
      choose: takes the leaves of `ends`, the tokens seen, that state and position, and `Controls`;
        returns `token` and `words` of `StepOutput`.
      choose_short: `choose` from the shortlist alone, and whether that was right.
      ends: the weights; where layers are apart, those that are in none.
      layers: of each layer, where they are apart.
    """

    feed: StepJit | Layerwise
    choose: StepJit | None
    choose_short: StepJit | None
    ends: Part
    layers: tuple[Part, ...] = ()

    @classmethod
    def decode_step(
        cls, transformer: Any, weights: DecodingWeights, top_k: int, captured: Captured
    ) -> StepProgram:
        """The step of single tokens.

        Args:
          transformer: the module.
          weights: those of the module.
          top_k: number of alternatives.
          captured: what comes with the tokens.
        """
        part = Part.of(weights)
        return cls(_compiled_step(transformer, part.structure, top_k, captured), None, None, part)

    @classmethod
    def prefill(
        cls, transformer: Any, weights: DecodingWeights, top_k: int, captured: Captured
    ) -> StepProgram:
        """The step of several tokens, of any module anywhere; arguments as of `decode_step`."""
        part = Part.of(weights)
        feed = _compiled_feed(transformer, part.structure, captured)
        return cls(feed, *_choices(transformer, part.structure, top_k), part)

    @classmethod
    def layerwise_prefill(
        cls,
        transformer: Transformer,
        weights: tuple[Part, tuple[Part, ...]],
        top_k: int,
        captured: Captured,
        *,
        first: bool = False,
    ) -> StepProgram:
        """The step of several tokens, layer by layer, for our own module on a CPU.

        Args:
          transformer: the module.
          weights: those of the ends, and of each layer.
          top_k: number of alternatives.
          captured: what comes with the tokens.
          first: the cache is empty, so the tokens attend to each other alone (with Gemma 3 270M,
            16, 64 and 256 tokens take 0.90, 0.97 and 0.83 of the time).
        """
        ends, layers = weights
        structures = tuple(part.structure for part in layers)
        feed = compiled_layerwise(transformer, ends.structure, structures, captured, first)
        return cls(feed, *_choices(transformer, ends.structure, top_k), ends, layers)

    def run(
        self,
        cache: StreamCache,
        seen: jax.Array,
        tokens: Any,
        positions: np.ndarray,
        last: int,
        controls: Controls,
        interventions: Interventions | None,
        *,
        wanted: bool = True,
        short: bool = False,
    ) -> tuple[StreamCache, jax.Array, StepOutput]:
        """Feed tokens (1, T), and choose the one after index `last` where it is `wanted`.

        `short`: the settings may need no more than the shortlist, see `draw.may_suffice`.

        Returns:
          The cache and the tokens seen, in place of those that were given away, and the output.
        """
        inputs = (cache, seen, tokens, positions, np.int32(last), interventions)
        args = (self._weights, *inputs)
        if self.choose is None:
            cache, seen, (token, words), *captured = self.feed(*args, controls)
        else:
            cache, seen, state, *captured = self.feed(*args)
            token, words = None, None
            if wanted:
                token, words = self._choice((self.ends.leaves, seen, state, controls), short)
        return cache, seen, StepOutput(token, words, *captured)

    def compile(
        self,
        cache: StreamCache,
        seen: jax.ShapeDtypeStruct,
        length: int,
        controls: Controls,
        interventions: Interventions | None,
    ) -> None:
        """Compile it for so many tokens at once, from shapes; nothing is allocated or run."""
        tokens = positions = np.zeros((1, length), np.int32)
        inputs = (cache, seen, tokens, positions, np.int32(0), interventions)
        more = (controls,) if self.choose is None else ()
        self.feed.compile(self._weights, *inputs, *more)

    def _choice(self, inputs: tuple[Any, ...], short: bool) -> tuple[jax.Array, jax.Array]:
        assert self.choose is not None
        assert self.choose_short is not None
        if short:
            token, words, enough = self.choose_short(*inputs)
            # Whoever feeds several tokens waits for the choice anyway.
            if enough:
                return token, words
        return cast(tuple[jax.Array, jax.Array], self.choose(*inputs))

    def compile_choice(
        self,
        seen: jax.ShapeDtypeStruct,
        state: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
        controls: Controls,
    ) -> None:
        """Compile `choose`, from shapes."""
        assert self.choose is not None
        self.choose.compile(self.ends.leaves, seen, state, controls)

    @property
    def _weights(self) -> Any:
        """The weights as `feed` takes them."""
        return (self.ends, self.layers) if self.layers else self.ends.leaves


# Static is the module (its configuration), the tree structure of the weights and what is captured.
# All else is traced, so no setting adds a compilation but the first that the shortlist does not
# suffice for, see `StepProgram.choose_short`.


@functools.cache
def _compiled_feed(transformer: Transformer, weights: Any, captured: Captured) -> StepJit:
    """`StepProgram.feed` of several tokens; compiled per number of tokens and cache size."""

    def feed_several(leaves: Sequence[jax.Array], *args: Any) -> Any:
        return feed(transformer, jax.tree.unflatten(weights, leaves), *args, captured=captured)

    return StepJit(feed_several, transformer, weights, captured, donate_argnums=(1, 2))


@functools.cache
def _choices(transformer: Transformer, weights: Any, top_k: int) -> tuple[StepJit, StepJit]:
    """`StepProgram.choose` and `.choose_short`; each is compiled once."""

    def compiled(short: bool) -> StepJit:
        def choice(leaves: Sequence[jax.Array], *args: Any) -> Any:
            own = jax.tree.unflatten(weights, leaves)
            return _choose(transformer, own, *args, top_k=top_k, short=short)

        return StepJit(choice, transformer, weights, top_k, short)

    return compiled(False), compiled(True)


@functools.cache
def _compiled_step(
    transformer: Transformer, weights: Any, top_k: int, captured: Captured
) -> StepJit:
    """`StepProgram.feed` of a single token, with the choice; compiled per cache size."""

    def step(leaves: Sequence[jax.Array], *args: Any) -> Any:
        own = jax.tree.unflatten(weights, leaves)
        *inputs, controls = args
        cache, seen, state, *shown = feed(transformer, own, *inputs, captured=captured)
        chosen = _choose(transformer, own, seen, state, controls, top_k=top_k)
        return cache, seen, chosen, *shown

    return StepJit(step, transformer, weights, top_k, captured, donate_argnums=(1, 2))


def _choose(
    transformer: Transformer,
    weights: DecodingWeights,
    seen: jax.Array,
    state: tuple[jax.Array, jax.Array],
    controls: Controls,
    *,
    top_k: int,
    short: bool = False,
) -> tuple[jax.Array, ...]:
    """Choose the token after a final-normed state (D,) at a position; see `StepProgram.choose`."""
    hidden, position = state
    forced_logit = None
    if weights.head is not None:
        cap = transformer.config.final_logit_soft_cap
        scores = weights.head.scores(hidden, weights.table, cap)
        forced_logit = exact_logit(controls.forced, hidden, weights.table, cap)
    else:
        logits = transformer.apply(weights.variables, hidden, method="unembed")
        scores = Scores.of(cast(jax.Array, logits))
    evidence = choose(scores, controls, seen, position, top_k, forced_logit, short=short)
    chosen = evidence.token.reshape(1, 1), evidence.pack()
    return (*chosen, suffices(scores, controls)) if short else chosen


class Programs:
    """The programs that a stream of one model runs.

    Attributes:
      decode_step: feeds a single token.
      prefill: feeds several tokens behind others.
      first_prefill: feeds several tokens that have nothing before them to attend to; `prefill`
        where that is all the same.
    """

    def __init__(
        self,
        model: GemmaTransformer,
        traits: EngineTraits,
        *,
        top_k: int,
        attention_layers: tuple[int, ...] = (),
    ) -> None:
        """The programs of a model; nothing is compiled yet.

        Args:
          model: what computes.
          traits: of its engine.
          top_k: number of alternatives.
          attention_layers: whose attention weights come with a choice, ascending.
        """
        self.transformer = model.transformer
        # Held, since other streams of the model take them from here.
        self._weights = decoding_weights(model)
        of = top_k, Captured(attention_layers, residuals=traits.can_capture_residuals)
        if traits.layerwise_prefill:
            own = cast(Transformer, model.transformer)
            ends, layers = self._weights.for_several()
            weights = Part.of(ends), tuple(map(Part.of, layers))
            self.prefill = StepProgram.layerwise_prefill(own, weights, *of)
            self.first_prefill = StepProgram.layerwise_prefill(own, weights, *of, first=True)
        else:
            self.prefill = StepProgram.prefill(model.transformer, self._weights, *of)
            self.first_prefill = self.prefill
        # One token is given less.
        bare = self._weights.for_one_token()
        self.decode_step = StepProgram.decode_step(model.transformer, bare, *of)

    def use_huge_pages(self) -> None:
        """Move weights to huge pages, see `DecodingWeights`; a second time it does nothing."""
        self._weights.use_huge_pages()

    def feeding(self, length: int, *, first: bool) -> StepProgram:
        """The program that feeds so many tokens at once.  `first`: nothing is cached."""
        if length == 1:
            return self.decode_step
        return self.first_prefill if first else self.prefill

    @property
    def inspection(self) -> StepJit:
        """The pass of `gemma_nb.sampling.inspect_position`, for the leaves of `decode_step`."""
        return compiled_inspection(self.transformer, self.decode_step.ends.structure)
