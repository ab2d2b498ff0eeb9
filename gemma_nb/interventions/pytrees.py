"""Interventions as frozen dataclasses that JAX takes apart: pytrees with static fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax

_T = TypeVar("_T")


def node(cls: type[_T]) -> type[_T]:
    """A frozen dataclass and pytree with an `__init__` of its own.

    flax's decorator would call `__init__` with the fields to put a tree together again.
    """
    cls = dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    static = [f.name for f in fields if f.metadata.get("static")]
    traced = [f.name for f in fields if not f.metadata.get("static")]

    def flatten(item: Any) -> tuple[Any, tuple[Any, ...]]:
        keys = [(jax.tree_util.GetAttrKey(name), getattr(item, name)) for name in traced]
        return keys, tuple(getattr(item, name) for name in static)

    def unflatten(names: tuple[Any, ...], leaves: Iterable[Any]) -> Any:
        item = object.__new__(cls)
        fill(item, **dict(zip(traced, leaves, strict=True)))
        fill(item, **dict(zip(static, names, strict=True)))
        return item

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


def static() -> Any:
    """A field that is part of the program: another value compiles anew."""
    return dataclasses.field(metadata={"static": True})


def fill(target: Any, **fields: Any) -> None:
    """Sets fields of a frozen dataclass in its own `__init__`."""
    for name, value in fields.items():
        object.__setattr__(target, name, value)
