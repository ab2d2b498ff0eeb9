"""The compiled step: tokens in, the next one out, with what is known about the choice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.executables import Kept
from gemma_nb.interventions import Interventions
from gemma_nb.nn import Output, Transformer
from gemma_nb.nn.storage import IN_STREAMS
from gemma_nb.processor import streams
from gemma_nb.sampling.cache import StreamCache, smallest_window
from gemma_nb.sampling.choose import choose, exact_logit
from gemma_nb.sampling.head import Scores
from gemma_nb.sampling.methods import Controls
from gemma_nb.sampling.residuals import sown_residuals
from gemma_nb.sampling.weights import DecodingWeights
from gemma_nb.sites import SITES


def compiler_options() -> dict[str, Any] | None:
    """What XLA is told when it compiles a step.

    XLA:CPU uses half of AVX-512's width unless it is told otherwise: products of a matrix and a
    vector then take up to 1.7 times as long.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_cpu_prefer_vector_width": 512, **(IN_STREAMS if max(streams()) > 1 else {})}


def kept(function: Callable[..., Any], *static: object, **options: Any) -> Kept:
    """A `Kept` that is compiled with `compiler_options`."""
    return Kept(function, *static, compiler_options=compiler_options(), **options)


@flax.struct.dataclass
class Made:
    """What a step makes beside the cache.

    Attributes:
      token: (1, 1) int32, the chosen id, as the next step takes it; None where none was wanted.
      words: the evidence, packed, or None.
      rows: the new tokens' keys and values on the layers whose cache is a ring, (layers, 2, T, K*H)
        float32; None where there are none.
      attention: see `sown_attention`, in float16; None where no layers were asked for.
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
      feed: takes `leaves`, a `StreamCache` and the tokens seen (V,), both given away, tokens and
        positions (1, T), the index of the last token, and `Interventions`; returns the cache, the
        tokens seen, the last token's final-normed state with its position, and `rows`, `attention`
        and `residuals` of `Made`.  Where there is no `choose` it takes `Controls`, too, and returns
        what that does in place of the state.
      choose: takes `leaves`, the tokens seen, that state and position, and `Controls`; returns
        `token` and `words` of `Made`.
      leaves: the weights' arrays.
      structure: what makes `DecodingWeights` of them.
    """

    feed: Kept
    choose: Kept | None
    leaves: list[jax.Array]
    structure: Any

    @classmethod
    def of(
        cls,
        transformer: Any,
        weights: DecodingWeights,
        top_k: int,
        captured: Captured,
        *,
        single: bool = False,
        first: bool = False,
    ) -> Program:
        """The step of a model.

        Args:
          transformer: the module.
          weights: what it is given.
          top_k: number of alternatives.
          captured: what comes with the tokens.
          single: it is for single tokens.
          first: the cache that it is given is empty, so the tokens attend to each other alone (with
            Gemma 3 270M 16, 64 and 256 tokens take 0.90, 0.97 and 0.83 of the time).  For our own
            module only.
        """
        leaves, structure = jax.tree.flatten(weights)
        if single:
            step = compiled_step(transformer, structure, top_k, captured)
            return cls(step, None, leaves, structure)
        feed = compiled_feed(transformer, structure, captured, first)
        choose = compiled_choice(transformer, structure, top_k)
        return cls(feed, choose, leaves, structure)

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
    ) -> tuple[StreamCache, jax.Array, Made]:
        """Feeds tokens (1, T), and chooses the one after index `last` where it is `wanted`.

        Returns:
          The cache and the tokens seen, in place of those that were given away, and what is made.
        """
        given = (cache, seen, tokens, positions, np.int32(last), interventions)
        shapes = self._shapes(cache, tokens.shape[1], interventions)
        if self.choose is None:
            cache, seen, (token, words), *kept = self.feed(shapes, self.leaves, *given, controls)
        else:
            cache, seen, state, *kept = self.feed(shapes, self.leaves, *given)
            token, words = None, None
            if wanted:
                token, words = self.choose(self._dtypes, self.leaves, seen, state, controls)
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
        self.feed.compile(shapes, self.leaves, *given, *more)

    def _shapes(
        self, cache: StreamCache, length: int, interventions: Interventions | None
    ) -> tuple[int, int, str] | None:
        """What tells the shapes of a step's arguments from those of other steps, for `Kept`."""
        return (cache.size, length, self._dtypes) if interventions is None else None

    @functools.cached_property
    def _dtypes(self) -> str:
        """The weights' dtypes: models of one structure may differ in them."""
        return " ".join(str(leaf.dtype) for leaf in self.leaves)


@dataclasses.dataclass(frozen=True)
class Captured:
    """What a step makes beside the choice.

    Attributes:
      attention_layers: whose attention weights come with a choice, ascending.
      residuals: whether the residual stream comes with the tokens.
    """

    attention_layers: tuple[int, ...] = ()
    residuals: bool = False


# Static is the module (its configuration), the tree structure of the weights and what is captured.
# All else is traced, so no setting adds a compilation.  They take the weights' leaves, since
# flattening hundreds of arrays anew takes part of a millisecond.


@functools.cache
def compiled_feed(transformer: Transformer, weights: Any, captured: Captured, first: bool) -> Kept:
    """`Program.feed` of several tokens; compiled per number of tokens and cache size."""

    def feed(leaves: Sequence[jax.Array], *args: Any) -> Any:
        own = jax.tree.unflatten(weights, leaves)
        return _feed(transformer, own, *args, captured=captured, first=first)

    return kept(feed, transformer, weights, captured, first, donate_argnums=(1, 2))


@functools.cache
def compiled_choice(transformer: Transformer, weights: Any, top_k: int) -> Kept:
    """`Program.choose`; compiled once."""

    def choice(leaves: Sequence[jax.Array], *args: Any) -> Any:
        return _choose(transformer, jax.tree.unflatten(weights, leaves), *args, top_k=top_k)

    return kept(choice, transformer, weights, top_k)


@functools.cache
def compiled_step(transformer: Transformer, weights: Any, top_k: int, captured: Captured) -> Kept:
    """`Program.feed` of a single token, with the choice; compiled per cache size."""

    def step(leaves: Sequence[jax.Array], *args: Any) -> Any:
        own = jax.tree.unflatten(weights, leaves)
        *given, controls = args
        cache, seen, state, *kept = _feed(transformer, own, *given, captured=captured)
        chosen = _choose(transformer, own, seen, state, controls, top_k=top_k)
        return cache, seen, chosen, *kept

    return kept(step, transformer, weights, top_k, captured, donate_argnums=(1, 2))


def _feed(
    transformer: Transformer,
    weights: DecodingWeights,
    cache: StreamCache,
    seen: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    last: jax.Array,
    interventions: Interventions | None,
    *,
    captured: Captured,
    first: bool = False,
) -> tuple[Any, ...]:
    """Feeds tokens (1, T); see `Program.feed`."""
    layers, residuals = captured.attention_layers, captured.residuals
    observed = any(cache.rings) or bool(layers) or residuals or first
    result = transformer.apply(
        weights.variables,
        tokens,
        cache=None if first else cache.to_model(transformer.config),
        positions=positions,
        return_hidden_states=True,
        interventions=interventions,
        mutable=["intermediates"] if observed else False,
    )
    output, rows, attention, streams = cast(Output, result), None, None, None
    if observed:
        output, collections = cast(Any, result)
        sown = collections["intermediates"]
        rows = _new_rows(sown, cache.rings) if any(cache.rings) else None
        if layers:
            attention = sown_attention(sown, cache.rings, layers, last, jnp.float16)
            if first:
                attention = _behind_ring(attention, smallest_window(transformer.config))
        if residuals:
            streams = sown_residuals(sown, len(cache.rings))
    if first:
        filled = cache.filled(transformer.config, sown, positions)
    else:
        assert output.cache is not None
        filled = cache.updated(output.cache)
    padded = jnp.where(positions[0] >= 0, tokens[0], seen.shape[0])
    seen = seen.at[padded].set(True, mode="drop")
    assert output.hidden_states is not None
    state = output.hidden_states[0, last], positions[0, last]
    return filled, seen, state, rows, attention, streams


def _choose(
    transformer: Transformer,
    weights: DecodingWeights,
    seen: jax.Array,
    state: tuple[jax.Array, jax.Array],
    controls: Controls,
    *,
    top_k: int,
) -> tuple[jax.Array, jax.Array]:
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
    evidence = choose(scores, controls, seen, position, top_k, forced_logit)
    return evidence.token.reshape(1, 1), evidence.pack()


def _behind_ring(
    found: tuple[jax.Array | None, jax.Array | None], window: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """`sown_attention` of a pass over T tokens without a cache, as over an empty one."""
    near, far = found
    # Up to a window, `rows.in_order` takes them in the order of positions as they are.
    if near is not None and near.shape[-1] > window:
        near = jnp.pad(near, ((0, 0), (0, 0), (window, 0)))
    return near, far


def _new_rows(sown: Any, rings: Sequence[bool]) -> jax.Array:
    """Keys and values (ring layers, 2, T, K*H) that a step has added, float32."""
    layers = [sown[f"layer_{i}"]["attn"] for i, ring in enumerate(rings) if ring]
    rows = [[layer[site][0][0] for site in ("k", "v")] for layer in layers]
    stacked = jnp.stack([jnp.stack(pair) for pair in rows])
    return stacked.reshape(*stacked.shape[:3], -1).astype(jnp.float32)


def sown_attention(
    sown: Any,
    rings: Sequence[bool],
    layers: Sequence[int],
    last: jax.Array | int,
    dtype: Any,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Attention weights of one query, in the layers' own order of keys.

    Args:
      sown: `intermediates` of a pass of T tokens over a `StreamCache`.
      rings: per layer of the model, whether its cache is a ring.
      layers: whose weights.
      last: index of the query among the tokens.
      dtype: of the result.

    Returns:
      Of the ring layers (L, N, W), or (L, N, W + T) for several tokens; of the others (L, N, S).
      `rows.Row.of` sorts them by position.  None where there are no such layers.
    """

    def stacked(are_rings: bool) -> jax.Array | None:
        which = [i for i in layers if rings[i] == are_rings]
        found = [SITES["attention"].value(sown, i)[0, last].astype(dtype) for i in which]
        return jnp.stack(found) if found else None

    return stacked(True), stacked(False)
