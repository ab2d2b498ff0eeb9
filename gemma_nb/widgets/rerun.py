"""Cells that run again: what their last run made, and nobody has any more, is closed.

ipywidgets keeps every widget until it is closed, and the browser tells nobody that an output was
replaced: with each run of a cell, another session would stay in memory.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from typing import Any


@dataclasses.dataclass(frozen=True)
class _Made:
    """A widget, and the run (the id of its request) of a cell that made it."""

    run: str
    widget: weakref.ref[Any]


# By the id of their cell; where a front end tells none, by its code.
_made: dict[str, list[_Made]] = {}


def close_earlier(widget: Any) -> None:
    """Closes, when the running cell ends, what an earlier run of it made instead of `widget`.

    Left alone are widgets that a variable of the notebook still has, or a list, tuple, set, dict
    or container widget in one; IPython's own history of outputs does not count.  Outside of a
    kernel nothing happens.
    """
    shell = _shell()
    found = _running(shell)
    if found is None:
        return
    cell, run = found
    known = [made for made in _made.get(cell, ()) if made.widget() is not None]
    _made[cell] = [*known, _Made(run, weakref.ref(widget))]
    if not any(made.run != run for made in known):
        return

    def ended(*_: object) -> None:
        # Only now the cell's variables are what it made of them.
        shell.events.unregister("post_run_cell", ended)
        for made in known:
            old = made.widget()
            if old is not None and made.run != run and not _held(old, shell.user_ns):
                old.close()

    shell.events.register("post_run_cell", ended)


def _shell() -> Any:
    """IPython's shell; None where there is none.  Never imports IPython."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def _running(shell: Any) -> tuple[str, str] | None:
    """The cell that runs, and this run of it; None outside of a cell."""
    parent = shell.get_parent() if hasattr(shell, "get_parent") else None
    if not isinstance(parent, dict):
        return None
    header = parent.get("header") or {}
    if header.get("msg_type") != "execute_request":
        return None
    cell = (parent.get("metadata") or {}).get("cellId") or parent["content"].get("code", "")
    return str(cell), str(header["msg_id"])


def _held(widget: Any, names: dict[str, Any]) -> bool:
    """True where a variable of the user's leads to `widget`, or to the app that it is a part of."""
    while getattr(widget, "part_of", None) is not None:
        widget = widget.part_of
    for name, value in list(names.items()):
        if name.startswith("_") or name in ("In", "Out"):
            continue
        if isinstance(value, dict):
            value = list(value.values())
        elif not isinstance(value, list | tuple | set | frozenset):
            value = [value, *(getattr(value, "children", ()) if _is_widget(value) else ())]
        if any(one is widget for one in value):
            return True
    return False


def _is_widget(value: Any) -> bool:
    import ipywidgets

    return isinstance(value, ipywidgets.Widget)
