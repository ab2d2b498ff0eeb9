"""Interventions in a conversation's file: their structure as JSON, their numbers as arrays.

A reply's entry in `under` is {"start": position, "items": [{"kind", "fixed", "arrays"}, ...]}: the
intervention's class, its fields that are no arrays, and the names of those that are.  Array `a` of
item 2 is the column `under.2.a` of the reply's safetensors file; one that lies in a `Where` is
`under.2.where.start`.  bfloat16 is stored as float32, which holds it.

Only the classes of `gemma_nb.interventions` are stored and read, each with the axes that it has to
have.  Of a reply under another class, the file keeps the description alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_nb import interventions as known
from gemma_nb.interventions import Intervention, Interventions, Where
from gemma_nb.interventions.base import fill
from gemma_nb.sites import SITES

_METHODS = ("zero", "mean", "resample")
# Form of an array by its field in a `Where`.
_WHERE = {"start": "i", "stop": "i", "listed": "i X"}
# Kind -> its fields that are no arrays, with what they may be.
_FIXED: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "AblateHeads": {"method": _METHODS},
        "AblateMLP": {"method": _METHODS},
        "EditNeuron": {"method": ("set", "add", "multiply")},
        "ForceToken": {},
        "KnockOut": {},
        "Patch": {"site": tuple(SITES)},
        "ReplaceAttention": {},
        "ScaleHeads": {},
        "Steer": {"site": tuple(SITES)},
    }
)
# Kind -> the forms of its arrays: i for whole numbers or f for others, and the axes.  Axes of one
# letter are of one size in an intervention, "..." is any number of them; "?" may be None.
_ARRAYS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "AblateHeads": {"layers": "i M", "heads": "i M", "values": "f M P H", "where": "where"},
        "AblateMLP": {"layers": "i M", "values": "f M P D", "where": "where"},
        "EditNeuron": {"layer": "i", "neuron": "i", "value": "f", "where": "where"},
        "ForceToken": {"position": "i", "token": "i"},
        "KnockOut": {"layer": "i", "heads": "?i M", "queries": "where", "keys": "where"},
        "Patch": {"layer": "i", "positions": "i P", "value": "f P ...", "heads": "?i N"},
        "ReplaceAttention": {"layer": "i", "head": "i", "queries": "i P", "weights": "f P S"},
        "ScaleHeads": {"layers": "i M", "heads": "i M", "factors": "f M", "where": "where"},
        "Steer": {"layer": "i", "vector": "f ...", "scale": "f", "where": "where"},
    }
)
# A pass repeats part of its program for each head that is ablated.
_MOST_PARTS = 4096


def encode(under: Interventions | None) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
    """JSON and columns; (None, {}) where there is nothing, or something that no file can hold."""
    if under is None or any(_kind(item) is None for item in under.items):
        return None, {}
    items: list[dict[str, Any]] = []
    columns: dict[str, np.ndarray] = {}
    for index, item in enumerate(under.items):
        kind = type(item).__name__
        arrays: dict[str, Any] = {}
        for field, axes in _ARRAYS[kind].items():
            value = getattr(item, field)
            parts = {"": value}
            if axes == "where":
                parts = {f".{name}": getattr(value, name) for name in _WHERE}
            arrays |= {field + end: part for end, part in parts.items() if part is not None}
        fixed = {name: getattr(item, name) for name in _FIXED[kind]}
        items.append({"kind": kind, "fixed": fixed, "arrays": list(arrays)})
        columns |= {f"under.{index}.{name}": _stored(array) for name, array in arrays.items()}
    return {"start": int(under.start), "items": items}, columns


def decode(data: Any, columns: Mapping[str, np.ndarray], where: str) -> Interventions:
    """What `encode` was given.

    Raises:
      ValueError: `data` or `columns` are not of interventions.
    """
    entries = data.get("items") if isinstance(data, dict) else None
    start = data.get("start") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries or type(start) is not int:
        raise ValueError(f"{where}: expected a start and interventions, got {data!r:.60}")
    if not 0 <= start < 2**31:
        raise ValueError(f"{where}.start: expected a position, got {start}")
    items = []
    for index, entry in enumerate(entries):
        place = f"{where}.items[{index}]"
        if not isinstance(entry, dict) or entry.get("kind") not in _ARRAYS:
            raise ValueError(f"{place}: expected one of {', '.join(_ARRAYS)}, got {entry!r:.60}")
        items.append(_item(entry, _Columns(columns, f"under.{index}."), place))
    return Interventions(tuple(items), jnp.int32(start))


def _kind(item: Intervention) -> str | None:
    """The name that an intervention is stored by; None for a class that is not ours."""
    name = type(item).__name__
    return name if name in _ARRAYS and getattr(known, name) is type(item) else None


def _stored(array: Any) -> np.ndarray:
    host = np.asarray(array)
    return host.astype(np.float32) if host.dtype == jnp.bfloat16 else host


@dataclasses.dataclass
class _Columns:
    """The arrays of one intervention, and how long each of its axes is."""

    columns: Mapping[str, np.ndarray]
    prefix: str
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def take(self, name: str, form: str) -> Any:
        """The array called `name`, of the type and axes that `form` says."""
        kind, *axes = form.split()
        array = self.columns.get(self.prefix + name)
        if array is None:
            raise ValueError(f"expected the array {self.prefix + name}, got none")
        wanted = "iu" if kind == "i" else "f"
        anything = "..." in axes
        count = len(axes) - anything
        if array.dtype.kind not in wanted or not count <= array.ndim <= (9 if anything else count):
            raise ValueError(
                f"{self.prefix + name}: expected {form}, got {array.dtype} {array.shape}"
            )
        for axis, size in zip(axes, array.shape, strict=False):
            if axis != "..." and self.sizes.setdefault(axis, size) != size:
                raise ValueError(
                    f"{self.prefix + name}: axis {axis} is {size} long, others are not"
                )
        if self.sizes.get("M", 0) > _MOST_PARTS:
            raise ValueError(f"{self.prefix + name}: more than {_MOST_PARTS} parts")
        return jnp.asarray(array, jnp.int32) if kind == "i" else jnp.asarray(array)


def _item(entry: dict[str, Any], arrays: _Columns, place: str) -> Intervention:
    kind, fixed = entry["kind"], entry.get("fixed")
    if not isinstance(fixed, dict) or set(fixed) != set(_FIXED[kind]):
        raise ValueError(f"{place}.fixed: expected {', '.join(_FIXED[kind])}, got {fixed!r:.60}")
    for name, value in fixed.items():
        if value not in _FIXED[kind][name]:
            raise ValueError(f"{place}.fixed.{name}: {value!r:.60} is not one of those there are")
    names = entry.get("arrays")
    if not isinstance(names, list):
        raise ValueError(f"{place}.arrays: expected names, got {names!r:.60}")
    fields: dict[str, Any] = dict(fixed)
    for field, form in _ARRAYS[kind].items():
        if form == "where":
            arrays.sizes.pop("X", None)
            parts = {end: arrays.take(f"{field}.{end}", of) for end, of in _WHERE.items()}
            fields[field] = Where(**parts)
        elif form.startswith("?") and field not in names:
            fields[field] = None
        else:
            fields[field] = arrays.take(field, form.removeprefix("?"))
    item: Intervention = object.__new__(getattr(known, kind))
    fill(item, **fields)
    return item
