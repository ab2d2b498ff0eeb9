"""The base of every panel: strict arguments, commands, locking, errors that are seen, a record.

State flows one way.  Python publishes traits (`publish`), from any thread, under one lock; the
front end sends commands, which are answered by id; whatever raises ends in the `error` trait, which
every panel shows as a strip with role "alert".
"""

from __future__ import annotations

import importlib.resources
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import anywidget
import traitlets

from gemma_nb.errors import GemmaNbError
from gemma_nb.widgets.received import arguments

logger = logging.getLogger(__name__)

_LONGEST = 1000  # characters of an error that are shown: it may quote what came
_VIEW = "application/vnd.jupyter.widget-view+json"


def static_text(panel: str, suffix: str) -> str:
    """One script or style of all files `static/<panel>/*<suffix>`, which ship in the wheel.

    A front end loads one module and one style per widget, and cannot follow an import from them:
    so the files, in the order of their names, share one scope, led by what all panels share.  One
    of a panel's scripts has the `export default`.
    """
    folder = importlib.resources.files("gemma_nb.widgets") / "static"
    parts = sorted((folder / panel).iterdir(), key=lambda part: part.name)
    files = [folder / f"panel{suffix}", *(part for part in parts if part.name.endswith(suffix))]
    return "\n".join(part.read_text("utf-8") for part in files)


def reject_unknown(owner: str, unknown: Mapping[str, object], known: tuple[str, ...]) -> None:
    """Raises TypeError when `unknown` names an argument that `owner` does not take."""
    if unknown:
        names = ", ".join(repr(name) for name in sorted(unknown))
        takes = ", ".join(known) if known else "no keyword arguments"
        raise TypeError(f"{owner} got an unknown argument {names}; it takes {takes}")


def describe(error: BaseException) -> str:
    """One sentence for people: our own errors as they are, others with their type."""
    text = str(error).strip()
    if isinstance(error, GemmaNbError | ValueError | traitlets.TraitError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def view_mimebundle(model_id: str, text: str, html: str) -> dict[str, Any]:
    """A widget view, with the text and the static HTML that hold without a kernel."""
    view = {"version_major": 2, "version_minor": 0, "model_id": model_id}
    return {"text/plain": text, "text/html": html, _VIEW: view}


def close_layout(widget: Any) -> None:
    """Closes the layout of a closed widget, which ipywidgets would keep for ever."""
    if widget.trait_has_value("layout") and widget.layout is not None:
        widget.layout.close()


def refuse_to_copy(widget: object) -> NoReturn:
    """Raises TypeError, with what to do instead of pickling or copying a widget."""
    raise TypeError(
        f"a {type(widget).__name__} belongs to its notebook and cannot be pickled or copied: make "
        "another one of the same session, and save that with chat.save(path)"
    )


def command(method: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a method as callable from the front end, by its name."""
    method._panel_command = True  # type: ignore[attr-defined]
    return method


class Panel(anywidget.AnyWidget):
    """Base of the panels.

    Subclasses list their constructor's keywords in `_takes`, and in `_settable` the traits that a
    front end may change.
    """

    _takes: ClassVar[tuple[str, ...]] = ()
    _settable: ClassVar[tuple[str, ...]] = ()

    error = traitlets.Unicode("").tag(sync=True)

    part_of: Any = None  # the app that the panel is a part of

    _holding_sync: bool  # of ipywidgets: trait changes are collected, not sent

    def __init__(self, **unknown: object) -> None:
        reject_unknown(type(self).__name__, unknown, self._takes)
        self._state_lock = threading.RLock()
        super().__init__()
        self.on_msg(self._on_message)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __reduce_ex__(self, _: object) -> NoReturn:
        refuse_to_copy(self)

    def _repr_mimebundle_(self, **_: object) -> tuple[dict[str, Any], dict[str, Any]]:
        html = self.static_html()  # first: it takes over what was said since
        return view_mimebundle(self.model_id, repr(self), html), {}

    def static_html(self) -> str:
        """The panel's content as HTML without scripts."""
        raise NotImplementedError

    def open(self) -> None:
        """Opens the comm, whose messages are handled wherever the front end sends them."""
        super().open()
        # ipykernel 7 hands a comm's messages to the (sub)shell that published on it last.  Here
        # that would be the main one, where they wait while a cell runs; Stop must not wait.
        if hasattr(self.comm, "_reply_subshell_for"):
            self.comm._reply_subshell_for = lambda _data, sent_to: sent_to

    def close(self) -> None:
        """Takes the views away."""
        super().close()
        close_layout(self)

    # -- Python to front end

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Trait changes inside leave as one message; any thread may use it."""
        with self._state_lock:
            if self._holding_sync:
                yield
                return
            self._holding_sync = True
            try:
                yield
            finally:
                self._holding_sync = False
                keys = sorted(self._states_to_send)
                self._states_to_send.clear()
                if keys:
                    self.send_state(keys)

    def publish(self, **traits: Any) -> None:
        """Sets traits and sends them in one message."""
        with self.publishing():
            for name, value in traits.items():
                setattr(self, name, value)

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Takes over traits that the front end changed; what cannot be is put back, and said."""
        # traitlets swaps `notify_change` meanwhile: another thread's change would be lost.
        with self._state_lock:
            allowed = {k: value for k, value in sync_data.items() if k in self._settable}
            refused = [key for key in sync_data if key in self.keys and key not in allowed]
            try:
                super().set_state(allowed)
            except Exception:  # one of them: the others hold
                refused += [key for key in allowed if not self._set_one(key, allowed[key])]
            if refused:
                self.send_state(refused)

    def _set_one(self, key: str, value: Any) -> bool:
        """Take over the front end's `value`; False where it is not a valid one."""
        try:
            super().set_state({key: value})
        except Exception as error:
            self.show_error(error)
            return False
        return True

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """The synced traits, never while another thread changes them."""
        with self._state_lock:
            return super().get_state(key=key, drop_defaults=drop_defaults)

    # -- front end to Python

    def _handle_msg(self, msg: dict[str, Any]) -> None:
        # What is no message at all is nobody's to answer; ipywidgets would raise into the kernel.
        with self.errors_shown():
            super()._handle_msg(msg)

    def _on_message(self, _widget: object, content: Any, _buffers: object) -> None:
        if not isinstance(content, dict) or content.get("kind") != "command":
            return
        # Not called "id": ipykernel 7 remembers every message with such a key for ever.
        answer: dict[str, Any] = {"kind": "answer", "request": content.get("request")}
        try:
            answer["result"] = self._run_command(content)
        except Exception as error:
            answer["error"] = describe(error)
            if not isinstance(error, GemmaNbError | ValueError):
                self.show_error(error)
        self.send(answer)

    def _run_command(self, content: dict[str, Any]) -> Any:
        name = content.get("name")
        method = getattr(type(self), name, None) if isinstance(name, str) else None
        if method is None or not getattr(method, "_panel_command", False):
            raise ValueError(f"{type(self).__name__} has no command {name!r:.99}")
        return method(self, **arguments(method, content.get("args") or {}))

    # -- errors

    def show_error(self, error: BaseException) -> None:
        """Shows `error` in the panel, and logs its traceback for who asks for it.

        Not as a warning: from a thread that would be printed below some unrelated cell.
        """
        logger.info("%s: %s", type(self).__name__, describe(error), exc_info=error)
        self.publish(error=describe(error)[:_LONGEST])

    @contextmanager
    def errors_shown(self) -> Iterator[None]:
        """Exceptions inside end in the error strip: an observer's would otherwise be swallowed."""
        try:
            yield
        except Exception as error:
            self.show_error(error)

    @command
    def dismiss_error(self) -> None:
        """Takes the error strip away."""
        self.publish(error="")
