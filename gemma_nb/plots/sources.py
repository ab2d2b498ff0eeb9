"""Arguments of plots: values, or the trace that they can be computed from; what they are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import xarray

from gemma_nb.expected import a
from gemma_nb.interp.trace import Trace
from gemma_nb.plots.labels import drawable, isolated

_METHODS = {
    "gradient_x_input": "gradient × input",
    "integrated_gradients": "integrated gradients",
}


def values_of(
    given: xarray.Dataset | Trace,
    compute: Callable[[Trace], xarray.Dataset],
    names: Sequence[str] = (),
    *,
    others: str = "",
) -> xarray.Dataset:
    """`given`, or what `compute` makes of it where it is a trace.

    Args:
      given: what a user passed.
      compute: the public function whose result is drawn.
      names: of variables that are needed.
      others: what else the plot takes, for errors.

    Raises:
      TypeError: neither of them.
      ValueError: a dataset of something else.
    """
    if isinstance(given, Trace):
        return compute(given)
    public = f"gnb.{compute.__name__}"
    if not isinstance(given, xarray.Dataset):
        raise TypeError(
            f"expected {others}a Trace or the Dataset of {public}, got {a(given)}: "
            "gnb.trace(model, text, tokenizer=tokenizer) makes a trace"
        )
    if missing := [name for name in names if name not in given]:
        raise ValueError(
            f"expected the Dataset of {public}, with {missing[0]!r}; this one has "
            f"{', '.join(map(repr, map(str, given.data_vars))) or 'nothing'}"
        )
    return given


def expect_array(given: Any, argument: str, way: str) -> None:
    """Raises TypeError where no labelled array is given; `way` says what makes one."""
    if not isinstance(given, xarray.DataArray):
        raise TypeError(f"{argument} must be an xarray.DataArray, got {a(given)}: {way}")


def attributed(values: xarray.DataArray) -> list[str]:
    """A remark on what `gnb.token_attribution` attributed and how; none on other values."""
    attrs = values.attrs
    if "query" not in attrs or "target" not in attrs:
        return []
    target, method = drawable(str(attrs["target"])), str(attrs.get("method", ""))
    how = f", by {_METHODS.get(method, method)}" if method else ""
    return [f"of log p({isolated(target)}) after position {int(attrs['query'])}{how}"]
