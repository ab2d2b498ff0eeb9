"""Interventions that a text does not reach, as it ends before, or that a cache cannot compute."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gemma_nb.errors import InterventionWarning
from gemma_nb.interventions.base import Interventions
from gemma_nb.interventions.numbers import is_traced

if TYPE_CHECKING:
    from gemma_nb.config import TransformerConfig


def unreached(
    under: Interventions | None, length: int, text: str = "the text has {} tokens"
) -> tuple[str, ...]:
    """One sentence for each intervention that names positions beyond a text of `length` tokens."""
    if under is None or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(under)):
        return ()
    text = f"{text.format(length)}, positions 0 to {length - 1}"
    if int(under.start) >= length:
        return (f"{under}: position {int(under.start)} is not reached; {text}",)
    said = ((item, item.unreached(length)) for item in under.items)
    return tuple(f"{item}: {words}; {text}" for item, words in said if words)


def warn_of_too_late(under: Interventions) -> None:
    """Warns, where the caller was called, of what would act before all may, and so nowhere."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(under)):
        return
    start = int(under.start)
    for item in under.items if start else ():
        if item.last is not None and item.last < start:
            words = f"{item}: it acts nowhere, as interventions act from position {start} on here"
            warnings.warn(words, InterventionWarning, stacklevel=3)


def warn_of_unreached(under: Interventions | None, length: int, *text: str) -> None:
    """Warns, where the caller was called, of what a whole text of `length` tokens does not reach.

    Args:
      under: what is changed.
      length: of the text, to which nothing will be added.
      *text: what has that length, as of `unreached`.
    """
    for sentence in unreached(under, length, *text):
        warnings.warn(sentence, InterventionWarning, stacklevel=3)


def refuse_uncached(under: Interventions | None, config: TransformerConfig) -> None:
    """Refuses what decoding with a cache would compute otherwise than a pass over the whole text.

    Raises:
      ValueError: names the intervention, and why.
    """
    if under is None or is_traced(under):
        return
    for item in under.items:
        if words := item.uncached(config, int(under.start)):
            raise ValueError(
                f"{item}: {words}, so it cannot be decoded token by token; trace the whole text "
                "(gnb.trace), or give weights on keys that the query sees"
            )


def unsampled(item: Any, length: int) -> str:
    """A remark where a resampling ablation's reference ends before a text of `length`; else ""."""
    if item.method != "resample":
        return ""
    # The rest is padding.
    end = int((~np.isnan(np.asarray(item.values)).all(axis=(0, 2))).sum())
    where: Any = jax.tree.map(np.asarray, item.where)
    if not where(np.arange(end, max(length, end))[None]).any():
        return ""
    return f"its reference has {end} positions, and nothing is replaced from position {end} on"
