"""Settings as they come from Python, JSON or numpy: taken where they can mean one thing only.

Each function returns a plain Python value, or raises a ValueError that names the setting, says what
it has to be and what came.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn


def refuse(name: str, expected: str, got: object) -> NoReturn:
    """Raise the ValueError that names a setting."""
    shown = repr(got)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise ValueError(f"{name} must be {expected}; got {shown}")


def real(name: str, value: Any, expected: str = "a number") -> float:
    """A number: Python's, numpy's, or a 0-dimensional array; no text, no truth value, no NaN."""
    plain = _scalar(value)
    if isinstance(plain, bool | str | bytes | None):
        refuse(name, expected, value)
    try:
        number = float(plain)
    except (TypeError, ValueError, OverflowError):
        refuse(name, expected, value)
    if math.isnan(number):
        refuse(name, expected, value)
    return number


def whole(name: str, value: Any, expected: str = "a whole number") -> int:
    """A whole number, also spelled as a float (40.0), as JSON of other programs has it."""
    plain = _scalar(value)
    if isinstance(plain, float) and plain.is_integer():
        return int(plain)
    if isinstance(plain, bool):
        refuse(name, expected, value)
    try:
        return operator.index(plain)
    except TypeError:
        refuse(name, expected, value)


def flag(name: str, value: Any) -> bool:
    """True or False, of Python or numpy."""
    plain = _scalar(value)
    return plain if isinstance(plain, bool) else refuse(name, "True or False", value)


def path(name: str, value: Any, expected: str = "a path") -> Any:
    """A path: text, or what stands for one; not bytes, which differ from system to system."""
    plain = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(plain, str) or not plain:
        refuse(name, expected, value)
    if "\0" in plain:
        refuse(name, f"{expected} without a zero byte", value)
    return value


def wholes(name: str, value: Any, expected: str) -> tuple[int, ...]:
    """Whole numbers: a list, a tuple, an array, a set, or a lone one; None is none."""
    if value is None:
        return ()
    if type(value) is tuple and all(type(item) is int for item in value):
        return value
    plain = _scalar(value)
    if isinstance(plain, int | float) and not isinstance(plain, bool):
        return (whole(name, plain, expected),)
    if isinstance(plain, str | bytes | Mapping) or not isinstance(plain, Iterable):
        refuse(name, expected, value)
    return tuple(whole(name, item, expected) for item in plain)


def texts(name: str, value: Any, expected: str) -> tuple[str, ...]:
    """Texts that are not empty: a list, a tuple, or a lone one; None is none."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        refuse(name, expected, value)
    found = tuple(value)
    if not all(isinstance(item, str) and item for item in found):
        refuse(name, expected, value)
    return tuple(map(str, found))


def record(cls: Any, name: str, value: Any) -> Any:
    """An instance of a dataclass, given as one or as a mapping of its fields.

    Raises:
      ValueError: it is neither, or names a field that there is not.
    """
    if isinstance(value, cls):
        return value
    title = f"gnb.{cls.__name__}"
    if not isinstance(value, Mapping):
        refuse(name, f"a {title} or a mapping of its fields", value)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f" (do you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"{name} has no field {key!r}{hint}: those of {title} are {', '.join(known)}"
            )
    return cls(**value)


def _scalar(value: Any) -> Any:
    """The content of a 0-dimensional array or a number of numpy or JAX; anything else as it is."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value
