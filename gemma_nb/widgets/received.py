"""Checks of values that a front end sends, before anything works with them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import traitlets

# Of text that comes along with a selection: a token's.
_LONGEST = 10_000


def arguments(method: Callable[..., Any], given: Any) -> dict[str, Any]:
    """`given`, once it is what the command `method` takes.

    Raises:
      ValueError: unknown, missing or mistyped arguments; the message names the first of them.
    """
    name = method.__name__
    if not isinstance(given, dict):
        raise ValueError(f"{name}: the arguments must be an object, got {type(given).__name__}")
    parameters = dict(list(inspect.signature(method).parameters.items())[1:])  # without self
    types = typing.get_type_hints(method)
    for key, value in given.items():
        if key not in parameters:
            takes = ", ".join(parameters) or "nothing"
            raise ValueError(f"{name} has no argument {key!r:.99}; it takes {takes}")
        if not isinstance(value, types[key]) or isinstance(value, bool):
            expected = getattr(types[key], "__name__", types[key])
            raise ValueError(f"{name}: {key} must be {expected}, got {value!r:.99}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in given:
            raise ValueError(f"{name} needs the argument {key!r}")
    return given


def selection(value: dict[str, Any]) -> dict[str, Any]:
    """A selected token, {turn, token, position, text}, or nothing, {}.

    Raises:
      TraitError: anything else.
    """
    for key, one in value.items():
        if key == "text":
            good = isinstance(one, str) and len(one) <= _LONGEST
        else:
            good = key in ("turn", "token", "position") and (
                one is None or (isinstance(one, int) and not isinstance(one, bool))
            )
        if not good:
            raise traitlets.TraitError(f"a selection cannot have {key!r:.99}: {one!r:.99}")
    return value
