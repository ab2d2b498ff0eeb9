"""The compiled step, and the stream of tokens that it makes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
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
from gemma_nb.sampling.cache import Archive, StreamCache, grow, next_size, rewind, size_for
from gemma_nb.sampling.choose import choose, exact_logit
from gemma_nb.sampling.evidence import Evidence
from gemma_nb.sampling.head import Scores
from gemma_nb.sampling.look import Look, compiled_look, look
from gemma_nb.sampling.methods import Controls, Sampling
from gemma_nb.sampling.prefill import BUCKETS, chunks
from gemma_nb.sampling.weights import DecodingWeights, decoding_weights
from gemma_nb.text.prefix import shared_prefix

# The name of the threads that compile what is not needed yet.
COMPILING = "gemma-nb-compile"


@functools.cache
def compiled(transformer: Transformer, weights: Any, top_k: int) -> Any:
    """The jitted step of a model.

    All but the module (its configuration), the structure of the weights and the number of
    alternatives is traced, so a compilation is made per (number of tokens, cache size) and no
    setting adds one.

    Args:
      transformer: the module.
      weights: the tree structure of its `DecodingWeights`.  The step takes their leaves, since
        flattening hundreds of arrays anew takes part of a millisecond.
      top_k: number of alternatives.
    """

    def step(leaves: Sequence[jax.Array], *args: Any) -> Any:
        return _step(transformer, jax.tree.unflatten(weights, leaves), *args, top_k=top_k)

    return jax.jit(step, donate_argnums=(1, 2), compiler_options=compiler_options())


def compiler_options() -> dict[str, Any] | None:
    """What XLA is told when it compiles a step.

    XLA:CPU uses half of AVX-512's width unless it is told otherwise: products of a matrix and a
    vector then take up to 1.7 times as long.
    """
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None


def _step(
    transformer: Transformer,
    weights: DecodingWeights,
    cache: StreamCache,
    seen: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    last: jax.Array,
    controls: Controls,
    interventions: Interventions | None,
    *,
    top_k: int,
) -> tuple[StreamCache, jax.Array, _Made]:
    """Feeds tokens (1, T), and chooses the one after index `last`."""
    result = transformer.apply(
        weights.variables,
        tokens,
        cache=cache.to_model(transformer.config),
        positions=positions,
        return_hidden_states=True,
        interventions=interventions,
        mutable=["intermediates"] if any(cache.rings) else False,
    )
    output, rows = cast(Output, result), None
    if any(cache.rings):
        output, state = cast(Any, result)
        rows = _new_rows(state["intermediates"], cache.rings)
    assert output.hidden_states is not None
    assert output.cache is not None
    # Only the last token's logits: the vocabulary is most of a small model's work.
    hidden, forced_logit = output.hidden_states[0, last], None
    if weights.head is not None:
        cap = transformer.config.final_logit_soft_cap
        scores = weights.head.scores(hidden, weights.table, cap)
        forced_logit = exact_logit(controls.forced, hidden, weights.table, cap)
    else:
        logits = transformer.apply(weights.variables, hidden, method="unembed")
        scores = Scores.of(cast(jax.Array, logits))
    padded = jnp.where(positions[0] >= 0, tokens[0], seen.shape[0])
    seen = seen.at[padded].set(True, mode="drop")
    evidence = choose(scores, controls, seen, positions[0, last], top_k, forced_logit)
    made = _Made(evidence.token.reshape(1, 1), evidence.pack(), rows)
    return cache.updated(output.cache), seen, made


def _new_rows(sown: Any, rings: Sequence[bool]) -> jax.Array:
    """Keys and values (ring layers, 2, T, K*H) that a step has added, float32."""
    layers = [sown[f"layer_{i}"]["attn"] for i, ring in enumerate(rings) if ring]
    rows = [[layer[site][0][0] for site in ("k", "v")] for layer in layers]
    stacked = jnp.stack([jnp.stack(pair) for pair in rows])
    return stacked.reshape(*stacked.shape[:3], -1).astype(jnp.float32)


class Decoder:
    """One stream of tokens: what is in the cache, and the next choice.

    While a choice is on its way to the host, the step that feeds it is already running, on the
    guess that its token will be wanted: what the host does between two tokens costs no time.  A
    step that nobody asks for is taken back.

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
        self._many = _Program.of(model.transformer, self._weights, top_k)
        # One token is given less.
        self._one = _Program.of(model.transformer, self._weights.for_one_token(), top_k)
        # Rings of a spread cache would have to be gathered; somebody else's module knows none.
        self._roll = self._mesh is None and isinstance(model.transformer, Transformer)
        self._cache: StreamCache | None = None
        self._archive = Archive()
        self._seen: Any = None
        self._controls: Controls | None = None
        self._next: int | None = None  # the token chosen last, not yet fed
        self._ahead: _Made | None = None  # what the step that feeds it makes

    @property
    def interventions(self) -> Interventions | None:
        """What it computes under."""
        return self._interventions

    @property
    def cache(self) -> StreamCache | None:
        """What is cached of `ids`, for reading: the next step takes its arrays away."""
        return self._cache

    @property
    def looks(self) -> bool:
        """Whether `look` works: with our own module, on one device."""
        return self._mesh is None and isinstance(self._transformer, Transformer)

    @property
    def full(self) -> bool:
        """Whether no further token can be fed."""
        return len(self.ids) >= self.limit

    def reset(self) -> None:
        """Forgets everything; the next prompt is computed from its first token."""
        self.ids, self._cache, self._next, self._ahead = [], None, None, None
        self._archive = Archive()

    def keep(self, ids: Sequence[int]) -> None:
        """Takes back what is in the cache beyond the prefix that it shares with `ids`."""
        shared = shared_prefix(self.ids, ids)
        held = len(self.ids) + (self._ahead is not None)
        if self._cache is not None and shared < held:
            ring = self._cache.ring_size
            # A ring has lost what the token before the last saw first.
            if held > ring > 0 and shared + 1 < held:
                rows = self._archive.last(min(shared, ring), shared)
                self._cache = self._cache.with_rings(rows, shared)
            else:
                self._cache = rewind(self._cache, jnp.int32(shared))
        self.ids, self._next, self._ahead = self.ids[:shared], None, None

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
        if self._cache is None:
            size = size_for(len(ids) + 1, self.limit)
            self._cache = StreamCache.empty(config, size, self._mesh, roll=self._roll)
        self._make_room(len(ids) + 1)
        self._controls = Controls.of(sampling, config.num_embed)
        seen = np.zeros(config.num_embed, bool)
        seen[self.ids] = True
        where = placement.vocabulary_sharding(config, self._mesh)
        self._seen = placement.put(jnp.asarray(seen), where)
        return list(ids[len(self.ids) :])

    def prefill(
        self,
        ids: Sequence[int],
        between: Callable[[int], bool] | None = None,
        *,
        token: int | None = None,
    ) -> Evidence | None:
        """Feeds a prompt and chooses the token after it.

        Args:
          ids: what `begin` returned.
          between: called between pieces with the number of tokens fed; False ends the prefill.
          token: chosen whatever is drawn, with the evidence of this choice.

        Returns:
          The evidence on the host, or None where `between` ended it.

        Raises:
          ValueError: `token` lies outside the vocabulary.
        """
        controls = self._forcing(token)
        result = None
        for tokens, positions, last in chunks(ids, len(self.ids)):
            if result is not None and between is not None and not between(len(self.ids)):
                return None
            fed = [int(token) for token in tokens[0, : last + 1]]
            result = self._take(fed, self._feed(tokens, positions, last, controls))
        return result

    def step(self, token: int | None = None) -> Evidence:
        """Feeds the token chosen last, and chooses the next; evidence on the host.

        Args:
          token: chosen whatever is drawn, with the evidence of this choice.  What follows it is not
            computed ahead, since it may be given too.

        Raises:
          RuntimeError: nothing was chosen yet, or the cache is full.
          ValueError: `token` lies outside the vocabulary.
        """
        if self._next is None or self.full:
            raise RuntimeError("step() needs a prefilled stream with room for one more token")
        controls, fed = self._forcing(token), self._next
        if token is not None:
            self.keep(self.ids)  # a step ahead has chosen already
        made = self._ahead or self._feed_one(np.array([[fed]], np.int32), len(self.ids), controls)
        self._ahead = None
        position = len(self.ids) + 1
        if token is None and position < self.limit:
            self._ahead = self._feed_one(made.token, position, controls)
        return self._take([fed], made)

    def look(self, position: int) -> Look:
        """What the model computes at a position that is in the cache, in about the time of a step.

        It is computed from the weights that decoding runs on and from the cached keys and values,
        under the interventions that the stream has, and equals a pass over all tokens up to there
        as nearly as decoding does.  The stream is left as it is.

        The first look at each cache size compiles a program of its own, which takes seconds.

        Args:
          position: an index into `ids`.

        Raises:
          ValueError: no such position.
          RuntimeError: this decoder does not show what it computes, see `looks`.
        """
        if not self.looks:
            raise RuntimeError("another library's module, or one on a mesh, cannot be looked into")
        if self._cache is None or not 0 <= position < len(self.ids):
            raise ValueError(f"the cache holds positions 0 to {len(self.ids) - 1}, not {position}")
        return look(
            compiled_look(self._transformer, self._one.structure),
            *(self._one.leaves, self._cache, self._archive, self._interventions),
            *(self.ids[position], position),
        )

    def compile(self, progress: Callable[[float], None] | None = None) -> None:
        """Compiles every step that a short conversation needs, and leaves the stream empty.

        Those of a longer one are compiled on another thread afterwards, while nobody waits.
        """
        self.reset()
        sizes = (*BUCKETS[:2], 1)
        for i, size in enumerate(sizes):
            rest = self.begin([0] * min(size, self.limit - 1), Sampling(seed=0))
            self.prefill(rest)
            self.reset()
            if progress is not None:
                progress((i + 1) / len(sizes))
        self._compile_ahead(next_size(size_for(1, self.limit), self.limit))

    # --- inside ---------------------------------------------------------------------------------

    def _forcing(self, token: int | None) -> Controls:
        assert self._controls is not None
        return self._controls if token is None else self._controls.forcing(int(token))

    def _feed_one(self, token: Any, position: int, controls: Controls) -> _Made:
        return self._feed(token, np.array([[position]], np.int32), 0, controls)

    def _feed(self, tokens: Any, positions: np.ndarray, last: int, controls: Controls) -> _Made:
        """Starts a step; what it makes is not there yet."""
        self._make_room(int(positions[0, last]) + 1)
        args = (self._seen, tokens, positions, np.int32(last), controls, self._interventions)
        with self._undone():
            self._cache, self._seen, made = self._step(self._cache, *args)
        return cast(_Made, made)

    def _step(self, cache: StreamCache | None, seen: jax.Array, tokens: Any, *rest: Any) -> Any:
        program = self._one if tokens.shape[1] == 1 else self._many
        return program.run(program.leaves, cache, seen, tokens, *rest)

    def _take(self, fed: Sequence[int], made: _Made) -> Evidence:
        """Waits for what a step has made of `fed`, and keeps it."""
        with self._undone():
            words, rows = jax.device_get((made.words, made.rows))
            evidence = Evidence.unpack(words)
        if rows is not None:
            self._archive.write(len(self.ids), rows[:, :, : len(fed)])
        self.ids.extend(fed)
        self._next = int(evidence.token)
        assert self._cache is not None
        if 2 * len(self.ids) >= self._cache.size:
            self._compile_ahead(next_size(self._cache.size, self.limit))
        return evidence

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """A step that fails has been given the cache, so what is left cannot be trusted."""
        try:
            yield
        except BaseException:
            self.reset()
            raise

    def _make_room(self, length: int) -> None:
        assert self._cache is not None
        size = size_for(length, self.limit)
        if self._cache.size < size:
            self._cache = grow(self._cache, size, self._transformer.config)

    def _compile_ahead(self, size: int | None) -> None:
        """Compiles the steps for a cache size on another thread, before they are needed."""
        what = (size, jax.tree.structure(self._interventions))
        begun = _begun(self._one.run)
        # Several hosts must run the same programs in the same order.
        if size is None or what in begun or self._mesh is not None:
            return
        begun.add(what)
        empty = partial(StreamCache.empty, self._transformer.config, size, roll=self._roll)
        # Shapes: the arrays themselves are given away by the next step.
        seen = jax.ShapeDtypeStruct(self._seen.shape, self._seen.dtype)
        arguments = (self._one, self._many, jax.eval_shape(empty), seen)
        settings = (self._controls, self._interventions)
        # Not a daemon: XLA must not be stopped in the middle of a compilation when Python ends.
        thread = threading.Thread(target=_compile, args=(*arguments, *settings))
        thread.name = COMPILING
        thread.start()


@functools.cache
def _begun(run: Any) -> set[tuple[int | None, Any]]:
    """What of a jitted step was compiled ahead: cache sizes, and structures of interventions."""
    del run
    return set()


@dataclasses.dataclass(frozen=True)
class _Program:
    """A jitted step and the weights that it is given."""

    run: Any
    leaves: list[jax.Array]
    structure: Any

    @classmethod
    def of(cls, transformer: Any, weights: DecodingWeights, top_k: int) -> _Program:
        leaves, structure = jax.tree.flatten(weights)
        return cls(compiled(transformer, structure, top_k), leaves, structure)


@flax.struct.dataclass
class _Made:
    """What a step makes beside the cache.

    Attributes:
      token: (1, 1) int32, the chosen id, as the next step takes it.
      words: the evidence, packed.
      rows: the new tokens' keys and values on the layers whose cache is a ring, (layers, 2, T, K*H)
        float32; None where there are none.
    """

    token: jax.Array
    words: jax.Array
    rows: jax.Array | None


def _compile(
    one: _Program,
    many: _Program,
    cache: StreamCache,
    seen: jax.ShapeDtypeStruct,
    controls: Controls,
    interventions: Interventions | None,
) -> None:
    """Compiles the steps that come first at a cache size; nothing is allocated or run.

    JAX keeps what it has compiled for these shapes, and a later call of `step` finds it.
    """
    for length in (1, *BUCKETS[:2]):
        tokens = positions = np.zeros((1, length), np.int32)
        last = np.int32(0)
        program = one if length == 1 else many
        arguments = (cache, seen, tokens, positions, last, controls, interventions)
        program.run.lower(program.leaves, *arguments).compile()
