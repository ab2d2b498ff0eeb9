"""The hook of every capture site: what a forward pass shows of itself, and lets be changed."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn


def observe(module: nn.Module, site: str, value: jax.Array, edit: Any = None) -> jax.Array:
    """`value`, edited where an intervention asks for it, and sown as `site`.

    Sowing is free unless the caller of `apply` makes the collection `intermediates` mutable.

    Args:
      module: the module that computed it.
      site: a name in `gemma_nb.sites`.
      value: what was computed.
      edit: `Interventions.at(...)` of this layer; None leaves the program as it is without.
    """
    if edit is not None:
        value = edit(site, value)
    module.sow("intermediates", site, value)
    return value
