"""Abilities of the engine, by model and device."""

from __future__ import annotations

import dataclasses

import jax

from gemma_nb.model import GemmaTransformer
from gemma_nb.nn import Transformer


@dataclasses.dataclass(frozen=True)
class EngineTraits:
    """Abilities of the engine of a model, and the storages and programs that it uses.

    Attributes:
      can_capture: what the model computes at a position can be shown, also with each token.
      can_capture_residuals: the residual stream comes with the tokens as a pass computes it, which
        does so in the parameters' own precision.
      can_batch: several streams can stand in one cache, see `gemma_nb.sampling.batch`.
      ring_cache: sliding layers have rings and transposed values, see `StreamCache.empty`.
      layerwise_prefill: several tokens go through programs of one layer each.
      compiles_ahead: programs are compiled on another thread before they are needed.
    """

    can_capture: bool
    can_capture_residuals: bool
    can_batch: bool
    ring_cache: bool
    layerwise_prefill: bool
    compiles_ahead: bool

    @classmethod
    def of(cls, model: GemmaTransformer) -> EngineTraits:
        """The traits of the engine for a model on this process's default device."""
        # Another library's module shows nothing and knows no rings; those of a mesh would have to
        # be gathered.
        own = model.mesh is None and isinstance(model.transformer, Transformer)
        return cls(
            can_capture=own,
            can_capture_residuals=own and model.storage == "exact",
            can_batch=own,
            ring_cache=own,
            layerwise_prefill=own and jax.default_backend() == "cpu",
            # Several hosts must run the same programs in the same order.
            compiles_ahead=model.mesh is None,
        )
