"""Runs our model on a text, through what a user would call."""

from __future__ import annotations

import numpy as np

from gemma_nb.interp.trace import trace
from gemma_nb.model import GemmaInputs, GemmaTransformer
from tests.parity.measure import Result


def run(model: GemmaTransformer, tokens: np.ndarray) -> Result:
    """What `model` computes for (T,) tokens, uncached."""
    logits = model(GemmaInputs.from_basic_segments(tokens))
    attention = trace(model, tokens).attention.transpose("layer", "head", "query", "key")
    return Result(logits.values, attention.values)
