"""What a plot is given: values, or the trace that they can be computed from; what they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gemma_nb.interp.trace import Trace
from gemma_nb.plots.labels import drawable, isolated

if TYPE_CHECKING:
    import xarray

_METHODS = {
    "gradient_x_input": "gradient × input",
    "integrated_gradients": "integrated gradients",
}


def values_of(
    given: xarray.Dataset | Trace, compute: Callable[[Trace], xarray.Dataset]
) -> xarray.Dataset:
    """`given`, or what `compute` makes of it where it is a trace."""
    values: Any = compute(given) if isinstance(given, Trace) else given
    return values


def attributed(values: xarray.DataArray) -> list[str]:
    """Of `gnb.token_attribution`, what is attributed and how; nothing of other values."""
    attrs = values.attrs
    if "query" not in attrs or "target" not in attrs:
        return []
    target, method = drawable(str(attrs["target"])), str(attrs.get("method", ""))
    how = f", by {_METHODS.get(method, method)}" if method else ""
    return [f"of log p({isolated(target)}) after position {int(attrs['query'])}{how}"]
