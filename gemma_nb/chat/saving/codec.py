"""Dataclasses to JSON and back, by the types of their fields.

Nothing here knows what a conversation is: a field that is added to a record is stored from then on,
and one that a file lacks takes its default.  What is repeated in a conversation (the text of a
token, a long list of ids) is stored once, in `Tables`.  Many records are not JSON but columns, see
`gemma_nb.chat.saving.columns`.

Dataclasses and mappings are objects, tuples are arrays, a float that is not finite is the string
"nan", "inf" or "-inf", more than 16 integers in a row are `{"list": index}`, and a long text inside
of a dataclass is `{"string": index}`.
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


class Tables:
    """Strings and lists that are stored once and referred to by index.  They only grow.

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
    """The value that `to_json` was given, by the type that it has to be.

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
        return expect(data is None, "nothing", data, where)
    if origin in (tuple, list, Sequence):
        return _items(origin, arguments, data, tables, where)
    if origin in (dict, Mapping):
        expect(isinstance(data, dict), "an object", data, where)
        return {k: from_json(arguments[1], v, tables, f"{where}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint), data, tables, where)
    if hint is str and isinstance(data, dict) and set(data) == {"string"}:
        return _entry(tables.strings, data["string"], where)
    return _scalar(hint, data, where)


def _entry(table: list[Any], index: Any, where: str) -> Any:
    known = type(index) is int and 0 <= index < len(table)
    return table[index] if known else expect(known, f"one of {len(table)} entries", index, where)


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
    expect(isinstance(data, list | tuple), "a list", data, where)
    hints = itertools.repeat(arguments[0])
    if origin is tuple and arguments[1:] != (Ellipsis,):
        expect(len(data) == len(arguments), f"{len(arguments)} items", data, where)
        hints = iter(arguments)  # type: ignore[assignment]
    pairs = enumerate(zip(data, hints, strict=False))
    items = [from_json(hint, item, tables, f"{where}[{i}]") for i, (item, hint) in pairs]
    return items if origin is list else tuple(items)


def _record(cls: type, data: Any, tables: Tables, where: str) -> Any:
    expect(isinstance(data, dict), "an object", data, where)
    fields = hints(cls)
    unknown = sorted(set(data) - set(fields))
    expect(not unknown, f"only {', '.join(fields)}", ", ".join(unknown), where)
    values = {k: from_json(fields[k], v, tables, f"{where}.{k}") for k, v in data.items()}
    return _build(cls, values, where)


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A record of `values`; what they lack takes its default."""
    lacking = [name for name in required(cls) if name not in values]
    expect(not lacking, f"also {', '.join(lacking)}", ", ".join(values), where)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # its own checks
        raise ValueError(f"{where}: {error}") from None


def _scalar(hint: Any, data: Any, where: str) -> Any:
    if hint is float:
        if isinstance(data, str) and data in _NOT_FINITE:
            return float(data)
        expect(type(data) in (int, float), "a number", data, where)
        return float(data)
    if hint not in (int, str, bool):
        raise TypeError(f"{where}: values of type {hint} cannot be read")
    return expect(type(data) is hint, f"a value of type {hint.__name__}", data, where)


def _one_of(choices: tuple[Any, ...], data: Any, where: str) -> Any:
    known = any(type(data) is type(choice) and data == choice for choice in choices)
    return expect(known, f"one of {', '.join(map(repr, choices))}", data, where)


def expect(holds: bool, expected: str, got: Any, where: str) -> Any:
    """`got`, where it `holds` that it is what was expected.

    Raises:
      ValueError: it is not; with what was expected, what came, and `where`.
    """
    if not holds:
        shown = repr(got)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ValueError(f"{where.lstrip('.') or 'the file'}: expected {expected}, got {shown}")
    return got


def hints(cls: Any) -> dict[str, Any]:
    """Field name -> type, of a dataclass."""
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    known = typing.get_type_hints(cls)
    return {field.name: known[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def required(cls: type) -> tuple[str, ...]:
    """Names of the fields without a default."""
    missing = dataclasses.MISSING
    return tuple(
        field.name
        for field in dataclasses.fields(cls)
        if field.default is missing and field.default_factory is missing
    )
