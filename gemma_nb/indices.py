"""Indices as people write them: numbers, lists, slices, boolean masks and arrays of any library.

Layers, heads, positions, neurons, features and tokens are all named through these functions, so
that what is an index is so everywhere: whole numbers of Python, numpy, JAX and xarray (0-d arrays
are numbers), lists, ranges and arrays of them, slices, and boolean masks as long as what they
choose from.  A lone truth value and floating-point numbers are none, even where `int` would take
them.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any, SupportsIndex, TypeAlias

import numpy as np

# Which layers, positions, heads, ... a user asks for; None means all.
Indices: TypeAlias = SupportsIndex | slice | Iterable[Any] | None
# One of them.
Index: TypeAlias = SupportsIndex | Iterable[Any]
_MISSING = "{what} {given} is not here; the {what}s are {known}"


def indices(
    given: Indices, count: int, what: str, *, owner: str = "there are", argument: str = ""
) -> tuple[int, ...]:
    """`given` as indices from 0 to `count` - 1, in its own order and as often as it names them.

    Args:
      given: what a user wrote; None means all.  Negative numbers count from the end.
      count: of how many.
      what: the noun for one, such as "layer".
      owner: how an error says what there is, such as "the model has layers".
      argument: the name of the argument; "" for the plural of `what`.

    Raises:
      ValueError: no index, one out of range, none at all, or a mask of another length; the message
        names the argument.
    """
    argument = argument or f"{what}s"
    if given is None:
        return tuple(range(count))
    if isinstance(given, slice):
        found = list(range(*_bounds(given, argument).indices(count)))
    else:
        numbers = listed(given, argument)
        found = _chosen(numbers, count, argument, what) if is_mask(numbers) else numbers
    for i in found:
        if not -count <= i < count:
            raise ValueError(f"{what} {i} does not exist: {owner} 0 to {count - 1}")
    if not found:
        raise ValueError(f"{argument} is empty: name at least one {what}, or pass None for all")
    return tuple(i % count for i in found)


def ascending(
    given: Indices, count: int, what: str, *, owner: str = "there are", argument: str = ""
) -> tuple[int, ...]:
    """`indices` in ascending order, each once."""
    found = indices(given, count, what, owner=owner, argument=argument)
    return tuple(sorted(set(found)))


def one(
    given: Index, count: int, what: str, *, owner: str = "there are", argument: str = ""
) -> int:
    """`given` as a single index; a list or mask that names one is as good.

    Raises:
      ValueError: as of `indices`, or several.
    """
    argument = argument or what
    if given is None:
        raise ValueError(f"{argument} must name one {what}, got None")
    found = indices(given, count, what, owner=owner, argument=argument)
    return _single(found, given, what, argument)


def among(
    given: Indices, known: Sequence[int], what: str, *, argument: str = "", missing: str = _MISSING
) -> list[int]:
    """Those of the numbers `known` that `given` names, in its order; None means all.

    For arrays that hold some layers, heads or positions: numbers are what the array calls them,
    a mask is as long as `known`, and a slice takes those of its range.

    Args:
      given: what a user wrote.
      known: ascending numbers.
      what: the noun for one, such as "layer".
      argument: the name of the argument; "" for the plural of `what`.
      missing: what an error says of a number that is not known, with {what}, {given} and {known}.

    Raises:
      ValueError: no index, one that is not known, none at all, or a mask of another length.
    """
    argument = argument or f"{what}s"
    if given is None:
        return list(known)
    if isinstance(given, slice):
        within = range(*_bounds(given, argument).indices(max(known, default=-1) + 1))
        found = [i for i in within if i in known]
    else:
        found = listed(given, argument)
        if is_mask(found):
            found = [known[i] for i in _chosen(found, len(known), argument, what)]
    for i in found:
        if i not in known:
            raise ValueError(missing.format(what=what, given=i, known=span(known)))
    if not found:
        raise ValueError(f"{argument} is empty: name at least one {what}, or pass None for all")
    return found


def one_among(
    given: Index | None, known: Sequence[int], what: str, *, missing: str = _MISSING
) -> int:
    """`among` of a single number."""
    if given is None:
        raise ValueError(missing.format(what=what, given=given, known=span(known)))
    return _single(among(given, known, what, argument=what, missing=missing), given, what, what)


def number(given: Any, argument: str, what: str = "whole number") -> int:
    """A whole number: of Python, numpy, JAX or xarray; of a list the only one.

    Args:
      given: what a user wrote.
      argument: its name, for errors.
      what: the noun for what it names, such as "layer".

    Raises:
      ValueError: a truth value, a floating-point number, or several.
    """
    found = [] if isinstance(given, slice | str) else listed(given, argument)
    if len(found) > 1 and not is_mask(found):
        raise _several(found, given, what, argument)
    if len(found) != 1 or is_mask(found):
        raise ValueError(f"{argument} must be a whole number, got {given!r:.60}")
    return int(found[0])


def listed(given: Any, argument: str) -> list[Any]:
    """`given` as Python numbers, or as truth values where it is a mask; see `is_mask`.

    Of how many is not known here: negative numbers stay what they are.

    Raises:
      ValueError: no whole numbers, a lone truth value, or truth values among numbers.
    """
    values = _array(given)
    if values is None:
        return _of_list(given, argument)
    if values.ndim == 0 and values.dtype.kind == "b":
        raise ValueError(
            f"{argument} must be whole numbers or a mask, got the truth value {bool(values)}"
        )
    if values.size == 0 and values.ndim == 1:
        return []
    if values.ndim > 1 or values.dtype.kind not in "iub":
        raise _no_indices(given, argument)
    found: list[Any] = np.atleast_1d(values).tolist()
    return found


def _of_list(given: Any, argument: str) -> list[Any]:
    """`listed` of what is no array."""
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise _no_indices(given, argument)
    found: list[Any] = []
    for each in given:
        value = _array(each, inside=True)
        if value is None or value.ndim or value.dtype.kind not in "iub":
            raise _no_indices(given, argument)
        found.append(value.item())
    if len({isinstance(x, bool) for x in found}) > 1:
        raise ValueError(
            f"{argument} mixes truth values and numbers, got {given!r:.60}: pass a mask or indices"
        )
    return found


def is_mask(values: Collection[Any]) -> bool:
    """Whether `listed` found truth values."""
    return bool(values) and isinstance(next(iter(values)), bool)


def span(known: Sequence[int]) -> str:
    """Numbers in words: "0 to 17" of a range, or a list of them."""
    return f"{known[0]} to {known[-1]}" if isinstance(known, range) else str(list(known))


def _array(given: Any, *, inside: bool = False) -> np.ndarray | None:
    """A number or an array of any library as numpy's; None for a list, and for what is neither."""
    if isinstance(given, bool | int | float | np.generic | np.ndarray):
        return np.asarray(given)
    if isinstance(given, range) and not inside:
        return np.arange(given.start, given.stop, given.step)
    if hasattr(given, "dtype") and hasattr(given, "shape"):
        return np.asarray(given)
    if isinstance(given, SupportsIndex):
        return np.asarray(operator.index(given))
    return None


def _bounds(given: slice, argument: str) -> slice:
    parts = (given.start, given.stop, given.step)
    return slice(*(None if x is None else number(x, argument) for x in parts))


def _chosen(mask: Sequence[Any], count: int, argument: str, what: str) -> list[int]:
    if len(mask) != count:
        raise ValueError(
            f"{argument} is a mask of {len(mask)}, and there are {count} {what}s: a mask has one "
            f"truth value for each {what}"
        )
    return [i for i, chosen in enumerate(mask) if chosen]


def _single(found: Sequence[int], given: Any, what: str, argument: str) -> int:
    if len(found) != 1:
        raise _several(found, given, what, argument)
    return found[0]


def _several(found: Sequence[int], given: Any, what: str, argument: str) -> ValueError:
    return ValueError(
        f"{argument} takes one {what}, got {len(found)}: {given!r:.60}; for several, repeat it for "
        "each"
    )


def _no_indices(given: Any, argument: str) -> ValueError:
    return ValueError(
        f"{argument} must be whole numbers, a slice or a boolean mask, got {given!r:.60}"
    )
