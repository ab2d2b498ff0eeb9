"""Interventions in a conversation's file: their structure as JSON, their numbers as arrays.

A reply's entry in `under` is {"start": position, "items": [{"kind", "fixed", "arrays"}, ...]}: the
intervention's class, its fields that are no arrays, and the names of those that are.  Array `a` of
item 2 is the column `under.2.a` of the reply's safetensors file; one that lies in a `Where` is
`under.2.where.start`.  bfloat16 is stored as float32, which holds it.

The classes of `gemma_nb.interventions` are read with the axes that they have to have.  A class of
the user's own ("own": true) is stored where its fields are arrays, `Where`, or plain values, and
read where the class is given: a file names no code to run.  Until then it is `Unresolved`, and
saved again as it was.  Of a reply under anything else, the file keeps the description alone.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_nb import interventions as known
from gemma_nb.chat.interventions import Unresolved
from gemma_nb.chat.user_warnings import warn_user
from gemma_nb.errors import ConversationError, ConversationWarning
from gemma_nb.executables import pinned
from gemma_nb.interventions import Intervention, Interventions, Where
from gemma_nb.interventions.pytrees import fill
from gemma_nb.sites import SITES

if TYPE_CHECKING:
    from gemma_nb.chat.tree import ConversationTree

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
# JSON and columns, as `encode` gives them.
_Encoded = tuple[Mapping[str, Any], Mapping[str, np.ndarray]]
# More than any model has heads: what a file says must not take all memory.
_MOST_PARTS = 4096


def encode(
    under: Interventions | Unresolved | None,
) -> tuple[Mapping[str, Any] | None, dict[str, np.ndarray]]:
    """JSON and columns; (None, {}) where there is nothing, or something that no file can hold."""
    if isinstance(under, Unresolved):
        data, arrays = typing.cast(_Encoded, under.stored)
        return data, dict(arrays)
    items: list[dict[str, Any]] = []
    columns: dict[str, np.ndarray] = {}
    for index, item in enumerate(() if under is None else under.items):
        entry, arrays = _parts(item)
        if entry is None:
            return None, {}
        items.append({**entry, "arrays": list(arrays)})
        columns |= {f"under.{index}.{name}": _stored(array) for name, array in arrays.items()}
    return (None if under is None else {"start": int(under.start), "items": items}), columns


def _parts(item: Intervention) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The entry of one intervention, None for what cannot be stored, and its arrays by name."""
    kind, ours = type(item).__name__, _kind(item) is not None
    if not ours and not dataclasses.is_dataclass(item):
        return None, {}
    names = (*_FIXED[kind], *_ARRAYS[kind]) if ours else [f.name for f in dataclasses.fields(item)]
    fixed: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for name in names:
        value = getattr(item, name)
        if isinstance(value, Where):
            arrays |= {f"{name}.{end}": getattr(value, end) for end in _WHERE}
        elif isinstance(value, jax.Array | np.ndarray | np.generic):
            arrays[name] = value
        elif isinstance(value, bool | int | float | str) or (value is None and not ours):
            fixed[name] = value
        elif value is not None:
            return None, {}
    return {"kind": kind, "fixed": fixed, **({} if ours else {"own": True})}, arrays


@pinned
def decode(
    data: Any,
    columns: Mapping[str, np.ndarray],
    where: str,
    classes: Sequence[type[Intervention]] = (),
) -> Interventions | Unresolved:
    """The interventions that `encode` was given.

    Args:
      data: the JSON.
      columns: the arrays.
      where: in the file, for errors.
      classes: of the user's own.

    Raises:
      ValueError: `data` or `columns` are not of interventions.
      ConversationError: a class of the user's own has other fields now.
    """
    entries = data.get("items") if isinstance(data, dict) else None
    start = data.get("start") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries or type(start) is not int:
        raise ValueError(f"{where}: expected a start and interventions, got {data!r:.60}")
    if not 0 <= start < 2**31:
        raise ValueError(f"{where}.start: expected a position, got {start}")
    given = {each.__name__: each for each in classes}
    items, missing = [], []
    for index, entry in enumerate(entries):
        place, prefix = f"{where}.items[{index}]", f"under.{index}."
        own = isinstance(entry, dict) and entry.get("own") is True
        if own and isinstance(entry.get("kind"), str):
            if entry["kind"] in given:
                items.append(_own(given[entry["kind"]], entry, columns, prefix, place))
            else:
                missing.append(entry["kind"])
            continue
        if not isinstance(entry, dict) or entry.get("kind") not in _ARRAYS:
            raise ValueError(f"{place}: expected one of {', '.join(_ARRAYS)}, got {entry!r:.60}")
        items.append(_item(entry, _Columns(columns, prefix), place))
    if missing:
        kept = {name: array for name, array in columns.items() if name.startswith("under.")}
        return Unresolved(tuple(dict.fromkeys(missing)), (data, kept))
    return Interventions(tuple(items), jnp.int32(start))


def _own(
    cls: type[Intervention],
    entry: dict[str, Any],
    columns: Mapping[str, np.ndarray],
    prefix: str,
    place: str,
) -> Intervention:
    """An intervention of a class of the user's own."""
    fixed, names = entry.get("fixed"), entry.get("arrays")
    if not isinstance(fixed, dict) or not isinstance(names, list):
        raise ValueError(f"{place}: expected fields and arrays, got {entry!r:.60}")
    fields: dict[str, Any] = dict(fixed)
    ranges: dict[str, dict[str, Any]] = {}
    for name in names:
        if prefix + str(name) not in columns:
            raise ValueError(f"{place}: expected the array {prefix}{name}, got none")
        field, _, end = str(name).partition(".")
        value = jnp.asarray(columns[prefix + name])
        if end:
            ranges.setdefault(field, {})[end] = value
        else:
            fields[field] = value
    fields |= {field: Where(**parts) for field, parts in ranges.items()}
    has: set[str] = (
        {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    )
    if has != set(fields):
        raise ConversationError(
            f"{cls.__name__} has the fields {', '.join(sorted(has)) or 'none'}, and had "
            f"{', '.join(sorted(fields))} when the conversation was saved"
        )
    item: Intervention = object.__new__(cls)
    fill(item, **fields)
    return item


def warn_of_unresolved(tree: ConversationTree) -> None:
    """Warns of replies whose interventions cannot be computed with, as a class was not given."""
    unresolved = [under for under in tree.interventions.values() if isinstance(under, Unresolved)]
    if unresolved:
        missing = tuple(dict.fromkeys(name for under in unresolved for name in under.missing))
        warn_user(
            f"{len(unresolved)} of the replies were made under {', '.join(missing)}: they can be "
            "read, but not traced or gone on with; to do that, "
            f"{dataclasses.replace(unresolved[0], missing=missing).remedy}",
            ConversationWarning,
        )


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
