"""Many values of one type to columns of numbers and back, by the types of their fields.

As in `gemma_nb.chat.saving.codec`, a field that is added to a record is stored from then on, and
one that a file lacks takes its default.

A field of n records is an array of n numbers in the smallest dtype that holds every value exactly.
A string is its index in `Tables.strings`; `name.present` says which values are not None, and `name`
then holds only those; a tuple is its lengths in `name.count`, and its items one after the other, or
`name.0`, `name.1` where its type says how many it has; a dataclass is its fields, `name.field`;
arrays are `name.ndim`, `name.shape` and `name.data`, one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from gemma_nb.chat.saving.codec import Tables, expect, hints, required

Columns = dict[str, np.ndarray]


def to_columns(hint: Any, values: Sequence[Any], tables: Tables, name: str) -> Columns:
    """Columns of `values`, all of the type `hint`, under `name`.

    Raises:
      TypeError: a type that is not stored.
    """
    columns: Columns = {}
    _write(hint, values, tables, name, columns)
    return columns


def _write(hint: Any, values: Sequence[Any], tables: Tables, name: str, out: Columns) -> None:
    inner = _without_none(hint)
    if inner is not hint:
        present = [value is not None for value in values]
        out[f"{name}.present"] = np.array(present, np.uint8)
        values = [value for value in values if value is not None]
    kind = _kind(inner)
    if isinstance(kind, list):
        for place, item in enumerate(kind):
            _write(item, [value[place] for value in values], tables, f"{name}.{place}", out)
    elif kind is tuple:
        out[f"{name}.count"] = integers([len(value) for value in values])
        items = list(itertools.chain.from_iterable(values))
        _write(get_args(inner)[0], items, tables, name, out)
    elif kind is np.ndarray:
        out[f"{name}.ndim"] = integers([value.ndim for value in values])
        out[f"{name}.shape"] = integers([size for value in values for size in value.shape])
        flat = [np.ravel(value) for value in values]
        out[f"{name}.data"] = np.concatenate(flat) if flat else np.zeros(0, np.uint8)
    elif kind is str:
        out[name] = integers([tables.string(value) for value in values])
    elif kind is float:
        out[name] = floats(values)
    elif kind is int:
        out[name] = integers(values)
    else:
        for field, field_hint in hints(kind).items():
            column = [getattr(value, field) for value in values]
            _write(field_hint, column, tables, f"{name}.{field}", out)


def from_columns(hint: Any, count: int, columns: Columns, tables: Tables, name: str) -> list[Any]:
    """The values that `to_columns` was given.

    Args:
      hint: the type of the values.
      count: how many there are.
      columns: those of the file; more than are needed may be there.
      tables: of the same file.
      name: as `to_columns` was given.

    Raises:
      ValueError: a column is missing, of another length, or refers to nothing.
    """
    inner = _without_none(hint)
    if inner is not hint:
        present = _take(columns, f"{name}.present", count).tolist()
        values = iter(from_columns(inner, sum(map(bool, present)), columns, tables, name))
        return [next(values) if here else None for here in present]
    kind = _kind(inner)
    if isinstance(kind, list):
        places = [
            from_columns(item, count, columns, tables, f"{name}.{place}")
            for place, item in enumerate(kind)
        ]
        return list(zip(*places, strict=True))
    if kind is tuple:
        counts = _counts(columns, f"{name}.count", count)
        items = from_columns(get_args(inner)[0], sum(counts), columns, tables, name)
        return [tuple(items[end - size : end]) for size, end in _ends(counts)]
    if kind is np.ndarray:
        return _arrays(count, columns, name)
    if kind is str:
        indices = _take(columns, name, count)
        within = not count or (indices.min() >= 0 and int(indices.max()) < len(tables.strings))
        expect(within, f"indices of {len(tables.strings)} strings", "others", name)
        return [tables.strings[index] for index in indices.tolist()]
    if kind is int:
        values = _numbers("iu", "integers", count, columns, name).tolist()
        return [bool(value) for value in values] if inner is bool else values
    if kind is float:
        return _numbers("f", "floats", count, columns, name).tolist()
    return _records(kind, count, columns, tables, name)


def _records(cls: type, count: int, columns: Columns, tables: Tables, name: str) -> list[Any]:
    fields: dict[str, list[Any]] = {}
    for field, hint in hints(cls).items():
        prefix = f"{name}.{field}"
        if any(key == prefix or key.startswith(f"{prefix}.") for key in columns):
            fields[field] = from_columns(hint, count, columns, tables, prefix)
    lacking = [field for field in required(cls) if field not in fields]
    expect(not lacking, f"columns for {', '.join(lacking)}", ", ".join(fields), name)
    if list(fields) == _positional(cls):
        return list(map(cls, *fields.values()))  # much faster than by name
    return [
        cls(**dict(zip(fields, row, strict=True))) for row in zip(*fields.values(), strict=True)
    ]


def _arrays(count: int, columns: Columns, name: str) -> list[np.ndarray]:
    dims = _counts(columns, f"{name}.ndim", count)
    sizes = _counts(columns, f"{name}.shape", sum(dims))
    shapes = [tuple(sizes[end - size : end]) for size, end in _ends(dims)]
    lengths = [math.prod(shape) for shape in shapes]
    data = _take(columns, f"{name}.data", sum(lengths))
    parts = zip(shapes, _ends(lengths), strict=True)
    return [data[end - size : end].reshape(shape) for shape, (size, end) in parts]


def _numbers(kinds: str, wanted: str, count: int, columns: Columns, name: str) -> np.ndarray:
    numbers = _take(columns, name, count)
    expect(numbers.dtype.kind in kinds, wanted, str(numbers.dtype), name)
    return numbers


def _counts(columns: Columns, name: str, count: int) -> list[int]:
    counts = _take(columns, name, count)
    expect(counts.dtype.kind in "iu" and bool((counts >= 0).all()), "lengths", "others", name)
    return counts.tolist()


def _ends(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(count, running sum) pairs."""
    return list(zip(counts, itertools.accumulate(counts), strict=True))


def _take(columns: Columns, name: str, count: int) -> np.ndarray:
    column = columns.get(name)
    if column is None or column.shape != (count,):
        got = "none" if column is None else str(column.shape)
        raise ValueError(f"expected column {name!r} of {count} numbers, got {got}")
    return column


def _kind(hint: Any) -> Any:
    """The form of a type: tuple, np.ndarray, str, int, float, a dataclass, or a list of types."""
    origin = get_origin(hint) or hint
    if origin is Literal:
        return _kind(type(get_args(hint)[0]))
    if origin is tuple and get_args(hint)[1:] != (Ellipsis,):
        return list(get_args(hint))
    if origin in (tuple, np.ndarray, str, int, float):
        return origin
    if origin is bool:
        return int
    if dataclasses.is_dataclass(origin):
        return origin
    raise TypeError(f"values of type {hint} cannot be columns")


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`; any other type as it is."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    choices = [a for a in get_args(hint) if a is not type(None)]
    if len(choices) != 1:
        raise TypeError(f"values of type {hint} cannot be columns")
    return choices[0]


def integers(values: Sequence[int] | np.ndarray) -> np.ndarray:
    """Integers in the smallest dtype that holds all of them."""
    if isinstance(values, np.ndarray):
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    else:
        low, high = min(values, default=0), max(values, default=0)
    smallest = np.promote_types(np.min_scalar_type(low), np.min_scalar_type(high))
    return np.array(values, smallest if smallest.kind in "iu" else np.int64)


def floats(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Floats in float32 where that is exact, as it is for what the model computed."""
    exact = np.array(values, np.float64)
    with np.errstate(over="ignore"):
        short = exact.astype(np.float32)
    return short if np.array_equal(short, exact, equal_nan=True) else exact


@functools.cache
def _positional(cls: type) -> list[str]:
    """Names of the fields that are given by position; empty where some are not."""
    fields = dataclasses.fields(cls)
    return [] if any(field.kw_only for field in fields) else [field.name for field in fields]
