"""Logit lens: predictions read from the residual stream, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_nb.executables import pinned
from gemma_nb.expected import expect
from gemma_nb.indices import Indices, number
from gemma_nb.interp.sizes import check_positions
from gemma_nb.interp.trace import Trace
from gemma_nb.interp.vocabulary import normalise, read
from gemma_nb.model import GemmaTransformer
from gemma_nb.sites import check_layers

if TYPE_CHECKING:
    import xarray


def model_of(trace: Trace) -> GemmaTransformer:
    """The model that made a trace.

    Raises:
      TypeError: no trace.
      ValueError: the trace was loaded from a file, without its model.
    """
    expect(trace, Trace, "trace", "gnb.trace(model, text, tokenizer=tokenizer) makes one")
    if trace.source is None:
        raise ValueError(
            "this trace was loaded from a file, without its model: trace the text again"
        )
    return trace.source.model


@pinned
def logit_lens(
    trace: Trace,
    k: int = 10,
    *,
    layers: Indices = None,
    positions: Indices = None,
    watch: Sequence[int | str] = (),
) -> xarray.Dataset:
    """Predictions that the model would make if it ended after each layer.

    logits = softcap(W_E norm_final(residual_l)): the residual stream after layer l, through the
    final norm, the vocabulary head and, where the model has one, the soft-cap.  The last layer is
    the model's output.  Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.

    What it does not mean: early layers need not write in the coordinates that the head reads (the
    tuned lens, arXiv:2303.08112, was made for that), so that a token which does not show up may
    still be decided.

    Args:
      trace: of any sites.
      k: how many of the best tokens.
      layers: which; None for all.
      positions: which; None for all.  What stands at a position is the prediction of the next one.
      watch: tokens, by id or by a text that is one token, whose log-probability and rank are wanted
        everywhere.

    Returns:
      token_id, token, logit, logprob and probability (layer, position, rank); entropy and kl, of
      the output's distribution from the layer's in nats (layer, position); watched_logprob and
      watched_rank, 0 for the best (layer, position, watched).

    Raises:
      ValueError: an unknown layer, position or token, k below 1, or a trace without its model.
    """
    model, config = model_of(trace), trace.config
    k = number(k, "k")
    chosen = check_layers(layers, config.num_layers)
    at = check_positions(positions, len(trace.tokens)) or tuple(range(len(trace.tokens)))
    single = isinstance(watch, str) or np.ndim(watch) == 0
    wanted: Any = [watch] if single else watch
    ids = np.array([trace.labels_of.id_of(token) for token in wanted], np.int32)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    k = min(k, config.num_embed)

    before = [i for i in chosen if i != config.num_layers - 1]
    states: list[Any] = [normalise(model, trace.get("residual", i, at).values[0]) for i in before]
    states.append(trace.get("final", positions=at).values)
    reading = read(model, np.stack(states), k, np.broadcast_to(ids, (len(at), ids.size)))
    shown = slice(None) if len(before) < len(chosen) else slice(len(before))

    per_state = ("layer", "position")
    total = reading.logsumexp[shown]
    logprob = reading.top_logits[shown] - total[..., None]
    top = reading.top_ids[shown]
    pieces = {int(i): trace.labels_of.piece(int(i)) for i in np.unique(top)}
    names = np.vectorize(pieces.__getitem__, otypes=[object])(top)
    dataset = trace.labels_of.dataset(
        {
            "token_id": ((*per_state, "rank"), top),
            "token": ((*per_state, "rank"), names),
            "logit": ((*per_state, "rank"), reading.top_logits[shown]),
            "logprob": ((*per_state, "rank"), logprob),
            "probability": ((*per_state, "rank"), np.exp(logprob)),
            "entropy": (per_state, reading.entropy[shown]),
            "kl": (per_state, reading.kl[shown]),
            "watched_logprob": (
                (*per_state, "watched"),
                reading.watched_logits[shown] - total[..., None],
            ),
            "watched_rank": ((*per_state, "watched"), reading.watched_ranks[shown]),
        },
        layers=chosen,
        positions=at,
    )
    return dataset.assign_coords(
        rank=np.arange(k),
        watched=ids,
        watched_token=("watched", [trace.labels_of.piece(int(i)) for i in ids]),
    )


@pinned
def token_statistics(trace: Trace) -> xarray.Dataset:
    """Log-probability, entropy and rank of each token of the text, given those before it.

    logprob = log softmax(logits at the position before)[token], in nats; entropy is of that
    distribution; rank counts the tokens that were likelier.  The first token is predicted by
    nothing: NaN, and rank -1.

    What it does not mean: a surprising token is not a wrong one.

    Returns:
      logprob, probability, entropy and rank (position).
    """
    model, count = model_of(trace), len(trace.tokens)
    columns = {n: np.full(count, np.nan, np.float32) for n in ("logprob", "entropy")}
    rank = np.full(count, -1, np.int32)
    if count > 1:
        final = trace.get("final", positions=range(count - 1)).values
        reading = read(model, final[None], 1, trace.tokens[1:, None].astype(np.int32))
        columns["logprob"][1:] = reading.watched_logits[0, :, 0] - reading.logsumexp[0]
        columns["entropy"][1:] = reading.entropy[0]
        rank[1:] = reading.watched_ranks[0, :, 0]
    columns["probability"] = np.exp(columns["logprob"])
    data = {name: (("position",), values) for name, values in columns.items()}
    return trace.labels_of.dataset({**data, "rank": (("position",), rank)})


def residual_norms(trace: Trace) -> xarray.Dataset:
    """Euclidean norms of the residual stream and of what each layer adds to it.

    What it does not mean: a large contribution need not matter, since the final norm divides by the
    size of the whole and the head reads few directions.

    Returns:
      residual, attn_out and mlp_out (layer, position).
    """
    dims = ("layer", "position")
    data = {}
    for site in ("residual", "attn_out", "mlp_out"):
        layers = range(trace.config.num_layers)
        norms = [np.linalg.norm(trace.get(site, i).values[0], axis=-1) for i in layers]
        data[site] = (dims, np.stack(norms))
    return trace.labels_of.dataset(data)
