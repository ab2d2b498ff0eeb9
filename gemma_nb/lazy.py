"""Public names that are imported on first use (PEP 562): importing a package stays cheap."""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keeps Python from looking for garbage meanwhile; for a start of a second or two.

    Importing JAX makes some hundred thousand objects that stay, and looking through them time and
    again takes 0.2 to 0.4 s of a start.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def attach(
    package: str, names: dict[str, Any], public: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
      package: its dotted name.
      names: its `globals()`, where what was imported is kept.
      public: name -> the module that defines it; the module itself where that is
        `<package>.<name>`.

    Returns:
      `__getattr__`, which raises AttributeError for other names, and `__dir__`.
    """

    def get(name: str) -> Any:
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with uncollected():
            home = importlib.import_module(public[name])
        value = home if home.__name__ == f"{package}.{name}" else getattr(home, name)
        names[name] = value
        return value

    return get, lambda: sorted(names["__all__"])
