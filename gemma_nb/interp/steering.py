"""Vectors to steer with, from contrasting prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from gemma_nb.interp.trace import trace
from gemma_nb.model import GemmaTransformer
from gemma_nb.sites import check_layer, site_of
from gemma_nb.text.tokenizer import Tokenizer

Prompts = str | Sequence[Any]


def steering_vector(
    model: GemmaTransformer,
    positive: Prompts,
    negative: Prompts,
    layer: int,
    *,
    tokenizer: Tokenizer | None = None,
    site: str = "residual",
    positions: Literal["last", "mean"] = "last",
) -> np.ndarray:
    """The mean difference that contrasting prompts make in the residual stream.

        vector = mean over positive prompts of x_p - mean over negative prompts of x_p

    Source: Turner et al. 2023, "Activation addition", arXiv:2308.10248; with several prompts on
    each side, Rimsky et al. 2023, arXiv:2312.06681 (contrastive activation addition).

    What it does not mean: whatever differs between the two sides is in it, length and wording too;
    more and better matched pairs leave more of what is meant.

    Args:
      model: what computes, under its interventions.
      positive: one text, several, or several lists of token ids: what to steer to.
      negative: the same: what to steer away from.
      layer: after which layer.
      tokenizer: for texts.
      site: of the width of the residual stream.
      positions: "last" takes each prompt's last position, "mean" the mean over all but the first.

    Returns:
      (D,) float32, not normalised: for `gnb.Steer(layer, vector, scale)`.

    Raises:
      ValueError: no prompts, an unknown layer or site, or texts without a tokenizer.
    """
    found = site_of(model, site)
    if found.dims != ("B", "T", "D") or not found.per_layer:
        raise ValueError(f"a vector is taken from a site of the residual stream, got {site!r}")
    if positions not in ("last", "mean"):
        raise ValueError(f'positions must be "last" or "mean", got {positions!r}')
    layer = check_layer(layer, model.config.num_layers)

    def mean(prompts: Prompts) -> np.ndarray:
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        if not listed:
            raise ValueError("a vector needs at least one prompt on each side")
        rows = []
        for prompt in listed:
            traced = trace(model, prompt, tokenizer=tokenizer, sites=())
            at = -1 if positions == "last" or len(traced.tokens) == 1 else None
            value = traced.get(site, layer, at).values[0]
            rows.append(value.mean(axis=0) if at == -1 else value[1:].mean(axis=0))
        return np.mean(rows, axis=0)

    return (mean(positive) - mean(negative)).astype(np.float32)
