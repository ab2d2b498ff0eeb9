"""Public names that are imported on first use (PEP 562): importing a package stays cheap."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


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
        home = importlib.import_module(public[name])
        value = home if home.__name__ == f"{package}.{name}" else getattr(home, name)
        names[name] = value
        return value

    return get, lambda: sorted(names["__all__"])
