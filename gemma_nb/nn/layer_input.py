"""All that goes into a layer beside its cache: what comes from the layer before, and the rest."""

from __future__ import annotations

from typing import Any

import flax
import jax

from gemma_nb.nn.rope import Rotation


@flax.struct.dataclass
class Carry:
    """All that crosses from one layer to the next.

    A pass that keeps it, cuts it or hands it from one program to another does so with all of its
    arrays, each of which has the tokens on its second axis.

    Attributes:
      x: (B, T, D), the residual stream.
    """

    x: jax.Array


@flax.struct.dataclass
class LayerInput:
    """All that a layer is given beside the carry and its cache.

    Attributes:
      positions: (B, T) int32, of the tokens; -1 is padding.
      mask: (B, T, S) bool, replaces the causal rule; over cache slots where there is a cache.
      rotation: of the layer's kind; the layer computes its own where it is None.
      edit: `Interventions.at(...)` of the layer; None compiles to the program without.
    """

    positions: jax.Array
    mask: jax.Array | None = None
    rotation: Rotation | None = None
    edit: Any = None

    @classmethod
    def of(
        cls,
        layer: Any,
        positions: jax.Array,
        interventions: Any,
        *,
        mask: jax.Array | None = None,
        rotation: Rotation | None = None,
    ) -> LayerInput:
        """The input of one layer under `interventions`.

        Args:
          layer: its index, also a traced one.
          positions: (B, T).
          interventions: an `Interventions`, or None.
          mask: see the attributes.
          rotation: see the attributes.
        """
        edit = None if interventions is None else interventions.at(layer, positions)
        return cls(positions, mask, rotation, edit)
