"""The compiled step: tokens in, the next one out, with what is known about the choice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import flax
import jax
import numpy as np

from gemma_nb.cpu.head import Scores
from gemma_nb.executables import Kept
from gemma_nb.interventions import Interventions
from gemma_nb.nn import Transformer
from gemma_nb.sampling.cache import StreamCache
from gemma_nb.sampling.choose import choose, exact_logit, suffices
from gemma_nb.sampling.feed import Captured, feed, kept
from gemma_nb.sampling.layerwise import Layerwise, compiled_layerwise
from gemma_nb.sampling.methods import Controls
from gemma_nb.sampling.weights import DecodingWeights, Part


@flax.struct.dataclass
class Made:
    """What a step makes beside the cache.

    Attributes:
      token: (1, 1) int32, the chosen id, as the next step takes it; None where none was wanted.
      words: the evidence, packed, or None.
      rows: the new tokens' keys and values on the layers whose cache is a ring, (layers, 2, T, K*H)
        float32; None where there are none.
      attention: see `feed.sown_attention`, in float16; None where no layers were asked for.
      residuals: see `residuals.sown_residuals`; None where they are not kept.
    """

    token: jax.Array | None
    words: jax.Array | None
    rows: jax.Array | None
    attention: tuple[jax.Array | None, jax.Array | None] | None
    residuals: jax.Array | tuple[jax.Array, ...] | None


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted step, and the weights that it is given.

    Of several tokens it is in two parts, so that the choice is compiled once for all numbers of
    tokens and sizes of the cache; of a single one it is not, since handing the state over takes 4 %
    of a step.

    Attributes:
      feed: takes `weights`, a `StreamCache` and the tokens seen (V,), both given away, tokens and
        positions (1, T), the index of the last token, and `Interventions`; returns the cache, the
        tokens seen, the last token's final-normed state with its position, and `rows`, `attention`
        and `residuals` of `Made`.  Where there is no `choose` it takes `Controls`, too, and returns
        what that does in place of the state.
      choose: takes the leaves of `ends`, the tokens seen, that state and position, and `Controls`;
        returns `token` and `words` of `Made`.
      short: `choose` from the shortlist alone, and whether that was right.
      ends: the weights; where layers are apart, those that are in none.
      layers: of each layer, where they are apart.
    """

    feed: Kept | Layerwise
    choose: Kept | None
    short: Kept | None
    ends: Part
    layers: tuple[Part, ...] = ()

    @classmethod
    def single(
        cls, transformer: Any, weights: DecodingWeights, top_k: int, captured: Captured
    ) -> Program:
        """The step of single tokens.

        Args:
          transformer: the module.
          weights: what it is given.
          top_k: number of alternatives.
          captured: what comes with the tokens.
        """
        part = Part.of(weights)
        return cls(_compiled_step(transformer, part.structure, top_k, captured), None, None, part)

    @classmethod
    def several(
        cls, transformer: Any, weights: DecodingWeights, top_k: int, captured: Captured
    ) -> Program:
        """The step of several tokens, of any module anywhere; arguments as of `single`."""
        part = Part.of(weights)
        feed = _compiled_feed(transformer, part.structure, captured)
        return cls(feed, *_choices(transformer, part.structure, top_k), part)

    @classmethod
    def layerwise(
        cls,
        transformer: Transformer,
        parts: tuple[Part, tuple[Part, ...]],
        top_k: int,
        captured: Captured,
        *,
        first: bool = False,
    ) -> Program:
        """The step of several tokens, layer by layer, for our own module on a CPU.

        Args:
          transformer: the module.
          parts: the weights of the ends, and of each layer.
          top_k: number of alternatives.
          captured: what comes with the tokens.
          first: the cache that it is given is empty, so the tokens attend to each other alone (with
            Gemma 3 270M 16, 64 and 256 tokens take 0.90, 0.97 and 0.83 of the time).
        """
        ends, layers = parts
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
    ) -> tuple[StreamCache, jax.Array, Made]:
        """Feeds tokens (1, T), and chooses the one after index `last` where it is `wanted`.

        `short`: the settings may need no more than the shortlist, see `choose.may_suffice`.

        Returns:
          The cache and the tokens seen, in place of those that were given away, and what is made.
        """
        given = (cache, seen, tokens, positions, np.int32(last), interventions)
        shapes = self._shapes(cache, tokens.shape[1], interventions)
        if self.choose is None:
            cache, seen, (token, words), *kept = self.feed(shapes, self._weights, *given, controls)
        else:
            cache, seen, state, *kept = self.feed(shapes, self._weights, *given)
            token, words = None, None
            if wanted:
                token, words = self._choice((self.ends.leaves, seen, state, controls), short)
        return cache, seen, Made(token, words, *kept)

    def compile(
        self,
        cache: StreamCache,
        seen: jax.ShapeDtypeStruct,
        length: int,
        controls: Controls,
        interventions: Interventions | None,
    ) -> None:
        """Compiles it for so many tokens at once, from shapes; nothing is allocated or run."""
        tokens = positions = np.zeros((1, length), np.int32)
        given = (cache, seen, tokens, positions, np.int32(0), interventions)
        more = (controls,) if self.choose is None else ()
        shapes = self._shapes(cache, length, interventions)
        self.feed.compile(shapes, self._weights, *given, *more)

    def _choice(self, given: tuple[Any, ...], short: bool) -> tuple[jax.Array, jax.Array]:
        assert self.choose is not None
        assert self.short is not None
        if short:
            token, words, enough = self.short(self.ends.dtypes, *given)
            # Whoever feeds several tokens waits for the choice anyway.
            if enough:
                return token, words
        return cast(tuple[jax.Array, jax.Array], self.choose(self.ends.dtypes, *given))

    def compile_choice(
        self,
        seen: jax.ShapeDtypeStruct,
        state: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
        controls: Controls,
    ) -> None:
        """Compiles `choose`, from shapes."""
        assert self.choose is not None
        self.choose.compile(self.ends.dtypes, self.ends.leaves, seen, state, controls)

    @property
    def _weights(self) -> Any:
        """As `feed` takes them."""
        return (self.ends, self.layers) if self.layers else self.ends.leaves

    def _shapes(
        self, cache: StreamCache, length: int, interventions: Interventions | None
    ) -> tuple[int, int, str] | None:
        """What tells the shapes of a step's arguments from those of other steps, for `Kept`."""
        return (cache.size, length, self.ends.dtypes) if interventions is None else None


# Static is the module (its configuration), the tree structure of the weights and what is captured.
# All else is traced, so no setting adds a compilation but the first that the shortlist does not
# suffice for, see `Program.short`.


@functools.cache
def _compiled_feed(transformer: Transformer, weights: Any, captured: Captured) -> Kept:
    """`Program.feed` of several tokens; compiled per number of tokens and cache size."""

    def feed_several(leaves: Sequence[jax.Array], *args: Any) -> Any:
        return feed(transformer, jax.tree.unflatten(weights, leaves), *args, captured=captured)

    return kept(feed_several, transformer, weights, captured, donate_argnums=(1, 2))


@functools.cache
def _choices(transformer: Transformer, weights: Any, top_k: int) -> tuple[Kept, Kept]:
    """`Program.choose` and `Program.short`; each is compiled once."""

    def made(short: bool) -> Kept:
        def choice(leaves: Sequence[jax.Array], *args: Any) -> Any:
            own = jax.tree.unflatten(weights, leaves)
            return _choose(transformer, own, *args, top_k=top_k, short=short)

        return kept(choice, transformer, weights, top_k, short)

    return made(False), made(True)


@functools.cache
def _compiled_step(transformer: Transformer, weights: Any, top_k: int, captured: Captured) -> Kept:
    """`Program.feed` of a single token, with the choice; compiled per cache size."""

    def step(leaves: Sequence[jax.Array], *args: Any) -> Any:
        own = jax.tree.unflatten(weights, leaves)
        *given, controls = args
        cache, seen, state, *kept = feed(transformer, own, *given, captured=captured)
        chosen = _choose(transformer, own, seen, state, controls, top_k=top_k)
        return cache, seen, chosen, *kept

    return kept(step, transformer, weights, top_k, captured, donate_argnums=(1, 2))


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
    """Chooses the token after a final-normed state (D,) at a position; see `Program.choose`."""
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
    made = evidence.token.reshape(1, 1), evidence.pack()
    return (*made, suffices(scores, controls)) if short else made
