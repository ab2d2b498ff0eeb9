"""Dataclasses to JSON and to columns of numbers, and back, by the types of their fields.

Nothing here knows what a conversation is: a field that is added to a record is stored from then on,
and one that a file lacks takes its default.  What is repeated in a conversation (the text of a
token, a long list of ids) is stored once, in `Tables`.

JSON: dataclasses and mappings are objects, tuples are arrays, a float that is not finite is the
string "nan", "inf" or "-inf", more than 16 integers in a row are `{"list": index}`, and a long text
inside of a dataclass is `{"string": index}`.

Columns: a field of n records is an array of n numbers in the smallest dtype that holds every value
exactly.  A string is its index in `Tables.strings`; `name.present` says which values are not None,
and `name` then holds only those; a tuple is its lengths in `name.count`, and its items one after
the other, or `name.0`, `name.1` where its type says how many it has; a dataclass is its fields,
`name.field`; arrays are `name.ndim`, `name.shape` and `name.data`, one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

_LONG = 16  # integers; longer tuples of them are stored once
_LONG_TEXT = 64  # characters; longer texts inside of dataclasses are, such as a system text
_NOT_FINITE = ("nan", "inf", "-inf")
Columns = dict[str, np.ndarray]


class Tables:
    """What is stored once and referred to by its index.  It only grows.

    Attributes:
      strings: texts of tokens.
      lists: long tuples of integers.
    """

    def __init__(self, strings: Sequence[str] = (), lists: Sequence[tuple[int, ...]] = ()) -> None:
        self.strings = list(strings)
        self.lists = list(lists)
        self._strings = {string: index for index, string in enumerate(self.strings)}
        self._lists = {items: index for index, items in enumerate(self.lists)}

    def string(self, string: str) -> int:
        """The index of `string`, which is added if it is new."""
        index = self._strings.setdefault(string, len(self.strings))
        if index == len(self.strings):
            self.strings.append(string)
        return index

    def list(self, items: tuple[int, ...]) -> int:
        """The index of `items`, which are added if they are new."""
        index = self._lists.setdefault(items, len(self.lists))
        if index == len(self.lists):
            self.lists.append(items)
        return index


# --- JSON -----------------------------------------------------------------------------------------


def to_json(value: Any, tables: Tables) -> Any:
    """`value` as what `json.dumps(..., allow_nan=False)` takes.

    Raises:
      TypeError: a value of a type that is not stored.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, np.generic):
        return to_json(value.item(), tables)
    if isinstance(value, tuple | list):
        if len(value) > _LONG and all(type(item) is int for item in value):
            return {"list": tables.list(tuple(value))}
        return [to_json(item, tables) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item, tables) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        fields = {name: getattr(value, name) for name in hints(type(value))}
        return {name: _once(item, tables) for name, item in fields.items()}
    raise TypeError(f"a value of type {type(value).__name__} cannot be stored: {value!r}")


def _once(value: Any, tables: Tables) -> Any:
    if isinstance(value, str) and len(value) > _LONG_TEXT:
        return {"string": tables.string(value)}
    return to_json(value, tables)


def from_json(hint: Any, data: Any, tables: Tables, where: str = "") -> Any:
    """What `to_json` was given, by the type that it has to be.

    Args:
      hint: a type as in annotations.
      data: from `json.loads`.
      tables: of the same file.
      where: what `data` is, for messages.

    Raises:
      ValueError: `data` is not of that type.
    """
    if hint is Any:
        return data
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _one_of(arguments, data, where)
    if origin in (Union, types.UnionType):
        return _any_of(arguments, data, tables, where)
    if hint is type(None):
        return _expect(data is None, "nothing", data, where)
    if origin in (tuple, list, Sequence):
        return _items(origin, arguments, data, tables, where)
    if origin in (dict, Mapping):
        _expect(isinstance(data, dict), "an object", data, where)
        return {k: from_json(arguments[1], v, tables, f"{where}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint), data, tables, where)
    if hint is str and isinstance(data, dict) and set(data) == {"string"}:
        return _entry(tables.strings, data["string"], where)
    return _scalar(hint, data, where)


def _entry(table: list[Any], index: Any, where: str) -> Any:
    known = type(index) is int and 0 <= index < len(table)
    return table[index] if known else _expect(known, f"one of {len(table)} entries", index, where)


def _any_of(arguments: tuple[Any, ...], data: Any, tables: Tables, where: str) -> Any:
    if data is None and type(None) in arguments:
        return None
    choices = [a for a in arguments if a is not type(None)]
    for choice in choices[:-1]:
        try:
            return from_json(choice, data, tables, where)
        except ValueError:
            continue
    return from_json(choices[-1], data, tables, where)


def _items(origin: Any, arguments: tuple[Any, ...], data: Any, tables: Tables, where: str) -> Any:
    if isinstance(data, dict) and set(data) == {"list"}:
        data = _entry(tables.lists, data["list"], where)
        if arguments == (int, Ellipsis):
            return data
    _expect(isinstance(data, list | tuple), "a list", data, where)
    hints = itertools.repeat(arguments[0])
    if origin is tuple and arguments[1:] != (Ellipsis,):
        _expect(len(data) == len(arguments), f"{len(arguments)} items", data, where)
        hints = iter(arguments)  # type: ignore[assignment]
    pairs = enumerate(zip(data, hints, strict=False))
    items = [from_json(hint, item, tables, f"{where}[{i}]") for i, (item, hint) in pairs]
    return items if origin is list else tuple(items)


def _record(cls: type, data: Any, tables: Tables, where: str) -> Any:
    _expect(isinstance(data, dict), "an object", data, where)
    fields = hints(cls)
    unknown = sorted(set(data) - set(fields))
    _expect(not unknown, f"only {', '.join(fields)}", ", ".join(unknown), where)
    values = {k: from_json(fields[k], v, tables, f"{where}.{k}") for k, v in data.items()}
    return _build(cls, values, where)


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A record of `values`; what they lack takes its default."""
    lacking = [name for name in required(cls) if name not in values]
    _expect(not lacking, f"also {', '.join(lacking)}", ", ".join(values), where)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # its own checks
        raise ValueError(f"{where}: {error}") from None


def _scalar(hint: Any, data: Any, where: str) -> Any:
    if hint is float:
        if isinstance(data, str) and data in _NOT_FINITE:
            return float(data)
        _expect(type(data) in (int, float), "a number", data, where)
        return float(data)
    if hint not in (int, str, bool):
        raise TypeError(f"{where}: values of type {hint} cannot be read")
    return _expect(type(data) is hint, f"a value of type {hint.__name__}", data, where)


def _one_of(choices: tuple[Any, ...], data: Any, where: str) -> Any:
    known = any(type(data) is type(choice) and data == choice for choice in choices)
    return _expect(known, f"one of {', '.join(map(repr, choices))}", data, where)


def _expect(holds: bool, expected: str, got: Any, where: str) -> Any:
    if not holds:
        shown = repr(got)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ValueError(f"{where.lstrip('.') or 'the file'}: expected {expected}, got {shown}")
    return got


def hints(cls: Any) -> dict[str, Any]:
    """Field name -> type, of a dataclass, without fields whose metadata says "stored": False."""
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    known = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.metadata.get("stored", True)]
    return {field.name: known[field.name] for field in fields}


@functools.cache
def required(cls: type) -> tuple[str, ...]:
    """Names of the fields without a default."""
    missing = dataclasses.MISSING
    return tuple(
        field.name
        for field in dataclasses.fields(cls)
        if field.default is missing and field.default_factory is missing
    )


@functools.cache
def _positional(cls: type) -> list[str]:
    """Names of the fields that are given by position; empty where some are not."""
    fields = dataclasses.fields(cls)
    return [] if any(field.kw_only for field in fields) else [field.name for field in fields]


# --- columns --------------------------------------------------------------------------------------


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
        out[f"{name}.count"] = _integers([len(value) for value in values])
        items = list(itertools.chain.from_iterable(values))
        _write(get_args(inner)[0], items, tables, name, out)
    elif kind is np.ndarray:
        out[f"{name}.ndim"] = _integers([value.ndim for value in values])
        out[f"{name}.shape"] = _integers([size for value in values for size in value.shape])
        flat = [np.ravel(value) for value in values]
        out[f"{name}.data"] = np.concatenate(flat) if flat else np.zeros(0, np.uint8)
    elif kind is str:
        out[name] = _integers([tables.string(value) for value in values])
    elif kind is float:
        out[name] = _floats(values)
    elif kind is int:
        out[name] = _integers(values)
    else:
        for field, field_hint in hints(kind).items():
            column = [getattr(value, field) for value in values]
            _write(field_hint, column, tables, f"{name}.{field}", out)


def from_columns(hint: Any, count: int, columns: Columns, tables: Tables, name: str) -> list[Any]:
    """What `to_columns` was given.

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
        _expect(within, f"indices of {len(tables.strings)} strings", "others", name)
        return [tables.strings[index] for index in indices.tolist()]
    if kind is int:
        numbers = _take(columns, name, count)
        _expect(numbers.dtype.kind in "iu", "integers", str(numbers.dtype), name)
        values = numbers.tolist()
        return [bool(value) for value in values] if inner is bool else values
    if kind is float:
        numbers = _take(columns, name, count)
        _expect(numbers.dtype.kind == "f", "floats", str(numbers.dtype), name)
        return numbers.tolist()
    return _records(kind, count, columns, tables, name)


def _records(cls: type, count: int, columns: Columns, tables: Tables, name: str) -> list[Any]:
    fields: dict[str, list[Any]] = {}
    for field, hint in hints(cls).items():
        prefix = f"{name}.{field}"
        if any(key == prefix or key.startswith(f"{prefix}.") for key in columns):
            fields[field] = from_columns(hint, count, columns, tables, prefix)
    lacking = [field for field in required(cls) if field not in fields]
    _expect(not lacking, f"columns for {', '.join(lacking)}", ", ".join(fields), name)
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


def _counts(columns: Columns, name: str, count: int) -> list[int]:
    counts = _take(columns, name, count)
    _expect(counts.dtype.kind in "iu" and bool((counts >= 0).all()), "lengths", "others", name)
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
    """How a type is stored: tuple, np.ndarray, str, int, float, a dataclass, or a list of types."""
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


def _integers(values: Sequence[int]) -> np.ndarray:
    """In the smallest integer dtype that holds all of them."""
    low, high = min(values, default=0), max(values, default=0)
    smallest = np.promote_types(np.min_scalar_type(low), np.min_scalar_type(high))
    return np.array(values, smallest if smallest.kind in "iu" else np.int64)


def _floats(values: Sequence[float]) -> np.ndarray:
    """float32 where that is exact, as it is for what the model computed."""
    exact = np.array(values, np.float64)
    with np.errstate(over="ignore"):
        short = exact.astype(np.float32)
    return short if np.array_equal(short, exact, equal_nan=True) else exact
