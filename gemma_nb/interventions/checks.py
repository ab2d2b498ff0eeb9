"""Refusals of what a model cannot carry out: sites, layers, heads and shapes that it has not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gemma_nb.interventions.base import Intervention, sites_of
from gemma_nb.interventions.numbers import is_traced, plain
from gemma_nb.sites import SITES, check_heads, check_layers, site, spelled

if TYPE_CHECKING:
    from gemma_nb.config import TransformerConfig


def check(item: Any, config: TransformerConfig) -> None:
    """Raises ValueError for what is no intervention, or one that the model cannot carry out."""
    if isinstance(item, list | tuple) and item and isinstance(item[0], Intervention):
        raise ValueError(
            "interventions are given one by one: intervene(*interventions), got a list of them"
        )
    if not isinstance(item, Intervention):
        raise ValueError(
            f"expected interventions, such as gnb.AblateHeads({{5: [2]}}), got {item!r:.60}"
        )
    name = type(item).__name__
    if jax.tree_util.all_leaves([item]):
        raise ValueError(f"{name} is no pytree: decorate the class with @flax.struct.dataclass")
    editable = (*patchable(), "attention", "tokens")
    if unknown := set(sites_of(item)) - set(editable):
        raise ValueError(
            f"{name} names the sites {', '.join(sorted(unknown))}, which cannot be changed; what "
            f"can be is {spelled(editable)}"
        )
    for argument, length in item.masks:
        what = "layer" if argument.startswith("layer") else "head"
        count = config.num_layers if what == "layer" else _num_heads(item, config)
        if length != count:
            raise ValueError(
                f"{argument} is a mask of {length}, and there are {count} {what}s: a mask has one "
                f"truth value for each {what}"
            )
    item.check(config)


def _num_heads(item: Intervention, config: TransformerConfig) -> int:
    """Number of heads at the site where an intervention acts."""
    names = [name for name in sites_of(item) if name in patchable()]
    shape = shape_of(names[0], config, getattr(item, "layer", 0)) if names else ()
    return shape[0] if len(shape) > 1 else config.num_heads


def check_places(
    config: TransformerConfig,
    layers: jax.Array,
    heads: jax.Array | None = None,
    num_heads: int | None = None,
) -> None:
    """Raises ValueError for a layer or head that the model does not have.

    A negative one would act nowhere, as the modules count from 0.

    Args:
      config: of the model.
      layers: one or some.
      heads: one or some; None for all.
      num_heads: how many there are, where they are no query heads.
    """
    for name, given, count in (
        ("layer", layers, config.num_layers),
        ("head", heads, num_heads or config.num_heads),
    ):
        if given is None or is_traced(given):
            continue
        indices = plain(np.atleast_1d(given))
        (check_layers if name == "layer" else check_heads)(indices, count)
        if min(indices) < 0:
            raise ValueError(f"interventions count {name}s from 0, got {min(indices)}")


def check_width(given: int, expected: int, what: str) -> None:
    """Raises ValueError for a reference from a model of another size."""
    if given != expected:
        raise ValueError(f"{what} has {given} numbers, this model's has {expected}")


def patchable_site(name: str, layer: int | None) -> str:
    """The name of the site that `name` means, maybe as an alias.

    Raises:
      ValueError: one that is unknown, computed from others, or elsewhere.
    """
    found = site(name)
    if found.name not in patchable():
        raise ValueError(f"{name} cannot be changed there; what can be is {spelled(patchable())}")
    if found.per_layer != (layer is not None):
        raise ValueError(
            f"{name} exists {'in every layer: name one' if found.per_layer else 'once: layer=None'}"
        )
    return found.name


def patchable() -> list[str]:
    """Names of the sites whose values can be replaced: not maps, and not what is derived."""
    return [s.name for s in SITES.values() if s.home is not None and not s.sown and not s.is_map]


def shape_of(name: str, config: TransformerConfig, layer: Any) -> tuple[int, ...]:
    """Shape of one position's value of a site in a layer."""
    # Which layer is traced cannot be told: then it is taken to be like the first.
    concrete = SITES[name].per_layer and not is_traced(layer)
    sizes = config.axis_sizes(int(layer) if concrete else 0)
    return tuple(sizes[axis] for axis in SITES[name].dims[2:])
