"""Evidence of tokens that were given, not drawn: by the plain pass over the text (teacher forcing),
or by steps from what is in the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb.chat.interrupts import between_steps
from gemma_nb.chat.records import token_label, token_record
from gemma_nb.chat.reply_settings import ReplySettings
from gemma_nb.chat.tokens import Tokens
from gemma_nb.cpu.scores import Scores
from gemma_nb.executables import pinned
from gemma_nb.interventions import Interventions
from gemma_nb.model import GemmaTransformer
from gemma_nb.nn import Transformer
from gemma_nb.sampling.decode import Decoder
from gemma_nb.sampling.evidence import Evidence, observe
from gemma_nb.sampling.filters import Controls, distribution
from gemma_nb.sampling.settings import Sampling
from gemma_nb.text.tokenizer import Tokenizer
from gemma_nb.typing import EMPTY, KVCache, Params

# Tokens fed at once.  The logits of so many are materialised, 130 MB for Gemma 3's vocabulary.
_CHUNK = 128
_SMALLEST_CACHE = 512

# A step takes as long as the plain pass takes for so many tokens.
_STEP = 8


class Scorer:
    """Computes the evidence of tokens that are given, as records."""

    def __init__(
        self,
        model: GemmaTransformer,
        tokenizer: Tokenizer,
        decoder: Decoder,
        settings: ReplySettings,
        *,
        top_k: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._settings = settings
        self._top_k = top_k

    def records(
        self,
        ids: Sequence[int],
        index: int,
        begin: int,
        sampling: Sampling,
        under: Interventions | None,
    ) -> Tokens:
        """Records of given tokens, with the evidence of having been chosen.

        Few of them are computed by the decoder from its cache, many by one pass over everything.

        Args:
          ids: everything, up to the last of these tokens.
          index: of the first of them in the reply.
          begin: where in `ids` the reply begins.
          sampling: for the probabilities after the sampler.
          under: what is changed in the model.
        """
        start, settings = begin + index, self._settings.barred(sampling)
        self._decoder.intervene(under)
        evidence = score_cached(self._decoder, ids, start, settings)
        if evidence is None:
            model = self._model.replace(interventions=under)
            evidence = score(model, ids, start, settings, self._top_k)
        return Tokens(
            token_record(self._tokenizer, found, index=index + i, position=start + i)
            for i, found in enumerate(evidence)
        )

    def logprobs(self, ids: Sequence[int], start: int, under: Interventions | None) -> list[float]:
        """Log-probabilities in nats of `ids[start:]`, each after all that stand before it.

        Args:
          ids: everything, up to the last of these tokens.
          start: index of the first of them.
          under: what is changed in the model.
        """
        model = self._model.replace(interventions=under)
        evidence = score(model, ids, start, Sampling(seed=0), 1)
        return [float(found.logprob) for found in evidence]

    def label(self, token: int) -> str:
        """The text of a lone token."""
        return token_label(self._tokenizer, token)


@pinned
def score(
    model: GemmaTransformer,
    ids: Sequence[int],
    start: int,
    sampling: Sampling,
    top_k: int,
) -> list[Evidence]:
    """The evidence of `ids[start:]`, each chosen after all that stand before it.

    Computed by the plain module from the model's own parameters, whatever the decoder stores, under
    the model's interventions.

    Args:
      model: what computes.
      ids: token ids of the whole context.
      start: index of the first token to score, at least 1.
      sampling: what the probabilities after the sampler are computed for; its seed is not used.
      top_k: number of alternatives.

    Returns:
      Evidence on the host, one for each token of `ids[start:]`.

    Raises:
      ValueError: `start` is 0: nothing stands before the first token.
    """
    if start < 1:
        raise ValueError("the first token of a context follows nothing: start must be at least 1")
    if start >= len(ids):
        return []
    config = model.config
    controls = Controls.of(_with_seed(sampling), config.num_embed)
    size = _SMALLEST_CACHE
    while size < len(ids):
        size *= 2
    cache = model.transformer.init_cache(batch_size=1, dtype=jnp.float32, cache_length=size)
    seen = np.zeros(config.num_embed, bool)
    found: list[Evidence] = []
    # The last token is scored, not fed.
    for begin in range(0, len(ids) - 1, _CHUNK):
        fed = np.asarray(ids[begin : min(begin + _CHUNK, len(ids) - 1)], np.int32)
        given = np.asarray(ids[begin + 1 : begin + 1 + len(fed)], np.int32)
        tokens, following = (np.pad(x, (0, _CHUNK - len(fed))) for x in (fed, given))
        positions = np.full(_CHUNK, EMPTY, np.int32)
        positions[: len(fed)] = begin + np.arange(len(fed))
        cache, hidden = _feed(
            *(model.transformer, model.params, cache, tokens, positions, model.interventions)
        )
        first = max(start - 1 - begin, 0)
        if first < len(fed):
            rows = jax.device_get(
                _observe(
                    *(model.transformer, model.params, hidden, tokens, following, seen, controls),
                    top_k=top_k,
                )
            )
            found += [jax.tree.map(lambda x, t=t: x[t], rows) for t in range(first, len(fed))]
        seen[fed] = True
    return found


def score_cached(
    decoder: Decoder, ids: Sequence[int], start: int, sampling: Sampling
) -> list[Evidence] | None:
    """The evidence as of `score`, by a step for each token, after what the decoder holds of `ids`.

    It is the evidence that the decoder's own choices come with, under the interventions that it
    has.  Afterwards the decoder holds all but the last of `ids`.

    Returns:
      The evidence; None where the plain pass is faster, or `ids` exceed what the decoder can hold.
    """
    count = len(ids) - start
    if not 0 < _STEP * count <= len(ids) or len(ids) > decoder.limit:
        return None
    found: list[Evidence] = []
    with between_steps():
        evidence = decoder.prefill(
            decoder.begin(ids[:start], _with_seed(sampling)), token=ids[start]
        )
        assert evidence is not None
        found.append(evidence)
    for token in ids[start + 1 :]:
        with between_steps():
            found.append(decoder.step(token=token))
    return found


def _with_seed(sampling: Sampling) -> Sampling:
    return sampling if sampling.seed is not None else dataclasses.replace(sampling, seed=0)


# Static: the module.  The number of tokens is fixed, so a compilation is made per cache size.
@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _feed(
    transformer: Transformer,
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array,
    interventions: Interventions | None,
) -> tuple[KVCache, jax.Array]:
    """Feeds tokens (T,); returns the cache and the states (T, D) behind their logits."""
    output: Any = transformer.apply(
        {"params": params},
        tokens[None],
        cache=cache,
        positions=positions[None],
        return_hidden_states=True,
        interventions=interventions,
    )
    return output.cache, output.hidden_states[0]


# Static: the module and the number of alternatives.
@partial(jax.jit, static_argnums=0, static_argnames="top_k")
def _observe(
    transformer: Transformer,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    following: jax.Array,
    seen: jax.Array,
    controls: Controls,
    *,
    top_k: int,
) -> Evidence:
    """Evidence of the tokens `following` (T,) those that were fed, with a leading T axis."""
    logits: Any = transformer.apply({"params": params}, hidden, method="unembed")

    def row(seen: jax.Array, at: Any) -> tuple[jax.Array, Evidence]:
        logits, token, given = at
        seen = seen.at[token].set(True)
        dist = distribution(logits, controls, seen)
        return seen, observe(Scores.of(logits), dist, given, top_k)

    # Row by row: the repetition penalty depends on what was seen so far.
    return jax.lax.scan(row, seen, (logits, tokens, following))[1]
