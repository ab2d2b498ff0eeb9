"""What a plot is given: values, or the trace that they can be computed from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gemma_nb.interp.trace import Trace

if TYPE_CHECKING:
    import xarray


def values_of(
    given: xarray.Dataset | Trace, compute: Callable[[Trace], xarray.Dataset]
) -> xarray.Dataset:
    """`given`, or what `compute` makes of it where it is a trace."""
    values: Any = compute(given) if isinstance(given, Trace) else given
    return values
