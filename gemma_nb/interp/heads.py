"""Statistics of attention heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gemma_nb.interp.trace import Trace, trace
from gemma_nb.model import GemmaTransformer

if TYPE_CHECKING:
    import xarray

_LOCAL = 8  # positions, the query's own included
_BOS = 2  # <bos> of every Gemma vocabulary


def head_statistics(trace: Trace) -> xarray.Dataset:
    """Means over the queries of a text of how each head spreads its attention.

    previous_token: weight on the position before the query.  bos_sink: on position 0 (attention
    sinks, arXiv:2309.17453).  local: on the last 8 positions, the query's own among them, without
    position 0.  entropy: of the weights, in nats.  induction: where the query's token came earlier,
    the weight on what followed it then (Olsson et al. 2022, arXiv:2209.11895); NaN where nothing is
    repeated.  Queries from position 1 on count.

    What it does not mean: a score describes the pattern on this text.  What a head does with what
    it reads, and whether that matters, only an intervention tells.

    Returns:
      previous_token, bos_sink, local, entropy and induction (layer, head), weights from 0 to 1.
    """
    ids = trace.tokens
    count, layers = len(ids), range(trace.config.num_layers)
    if count < 2:
        raise ValueError("head statistics need a text of at least 2 tokens")
    query, key = np.ogrid[:count, :count]
    # Keys that stand right behind an earlier occurrence of the query's token.
    follows = np.zeros((count, count), bool)
    follows[:, 1:] = (ids[:, None] == ids[None, :-1]) & (key[:, 1:] <= query)
    follows[0] = False
    follows &= (key - 1 < query) & (key > 0) & (key != query + 1)
    repeated = follows.any(axis=1)
    masks = {
        "previous_token": key == query - 1,
        "bos_sink": np.broadcast_to(key == 0, (count, count)),
        "local": (key > query - _LOCAL) & (key <= query) & (key > 0),
    }
    found: dict[str, list[np.ndarray]] = {n: [] for n in (*masks, "entropy", "induction")}
    for i in layers:
        weights = trace.get("attention", i).values[0]
        for name, mask in masks.items():
            found[name].append((weights * mask).sum(axis=-1)[:, 1:].mean(axis=-1))
        logs = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
        found["entropy"].append(-(weights * logs).sum(axis=-1)[:, 1:].mean(axis=-1))
        induction = (weights * follows).sum(axis=-1)[:, repeated]
        empty = np.full(len(weights), np.nan, np.float32)
        found["induction"].append(induction.mean(axis=-1) if repeated.any() else empty)
    data = {n: (("layer", "head"), np.stack(x).astype(np.float32)) for n, x in found.items()}
    return trace.labels_of.dataset(data, {"tokens": count, "repeated": int(repeated.sum())})


def repeated_tokens(model: GemmaTransformer, length: int, seed: int) -> np.ndarray:
    """<bos> and `length` random tokens, twice: (1 + 2 * length,) int32."""
    ordinary = np.random.default_rng(seed).integers(
        min(1000, model.config.num_embed // 2), model.config.num_embed, length
    )
    return np.concatenate([[_BOS], ordinary, ordinary]).astype(np.int32)


def head_scores(model: GemmaTransformer, *, length: int = 50, seed: int = 0) -> xarray.Dataset:
    """`head_statistics` on random tokens that are repeated once.

    Nothing but the repetition is there to be learned from such a text, so a head with a high
    induction score copies by looking up what came after the last occurrence.  Only the repetition's
    queries have an earlier occurrence to look up.

    Args:
      model: whose heads.
      length: how many tokens are repeated.
      seed: of the tokens.
    """
    return head_statistics(trace(model, repeated_tokens(model, length, seed), sites=()))
