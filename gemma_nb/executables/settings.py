"""JAX's settings that this package computes under, whatever is set around it.

A notebook may switch on 64-bit numbers, another random generator or checks for NaN for code of its
own.  What a model says must not depend on that, nor may its programs, which are found by the
settings that they were traced under.  So what is called from outside runs under settings of its
own, in its own thread and for the time of the call.

The precision of matrix products is set aside on a CPU, where it would hold for some of the products
of a trace and for none of a decoded token: what is shown would not be what was computed.  There all
are as exact as their dtype.  On other devices it holds for everything alike, and is left as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax

from gemma_nb.executables.limits import relieve

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Names of JAX's context managers, and what they are given.
_OURS: dict[str, Any] = {
    "enable_x64": False,
    "numpy_rank_promotion": "allow",
    "debug_nans": False,
    "debug_infs": False,
    "default_matmul_precision": None,
    "default_prng_impl": "threefry2x32",
    "threefry_partitionable": True,
    "check_tracer_leaks": False,
    "debug_key_reuse": False,
    "enable_custom_prng": False,
    "enable_checks": False,
    "no_tracing": False,
}
# What leaves transfers between host and device alone.
_FREE = (None, "allow")
_GUARDS = ("host_to_device", "device_to_host", "device_to_device")


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """The settings, for the time of a block."""
    with contextlib.ExitStack() as stack:
        for state, value in zip(*_states(), strict=True):
            stack.enter_context(state(value))
        stack.enter_context(jax.disable_jit(False))
        stack.enter_context(jax.transfer_guard("allow"))
        yield


def pinned(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """A function that runs under the settings; not a generator, which would leave them set."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        relieve()
        if _hold():
            return function(*args, **kwargs)
        with ours():
            return function(*args, **kwargs)

    return run


def _hold() -> bool:
    """True where all is set as it should be; every token asks."""
    states, values = _states()
    return (
        tuple([state.value for state in states]) == values
        and not jax.config.jax_disable_jit  # type: ignore[attr-defined]
        and all(guard.value in _FREE for guard in _guards())
    )


@functools.cache
def _states() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The context managers that this version of JAX has, and what they are given."""
    found = {name: getattr(jax, name, None) for name in _OURS}
    if jax.default_backend() != "cpu":
        found["default_matmul_precision"] = None
    there = {state: _OURS[name] for name, state in found.items() if hasattr(state, "value")}
    return tuple(there), tuple(there.values())


@functools.cache
def _guards() -> tuple[Any, ...]:
    found = [getattr(jax, f"transfer_guard_{direction}", None) for direction in _GUARDS]
    return tuple(guard for guard in found if hasattr(guard, "value"))
