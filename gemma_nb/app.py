"""ChatApp: the panels composed into one widget, with one selection shared by all of them."""

from __future__ import annotations

from typing import Any, NoReturn

import ipywidgets

from gemma_nb.widgets.attention import AttentionPanel
from gemma_nb.widgets.base import (
    close_layout,
    refuse_to_copy,
    reject_unknown,
    view_mimebundle,
)
from gemma_nb.widgets.chat import ChatPanel
from gemma_nb.widgets.rerun import close_earlier


class ChatApp(ipywidgets.Box):
    """Chat on the left, the attention behind it on the right; stacked where there is little room.

    With a name or path the app shows at once, and loads and compiles in the background; a message
    sent meanwhile waits for the model.  A model that another app has already loaded from the same
    files is shared with it.

    Every app holds a session until it is closed.  A notebook cell that runs again closes the app of
    its last run, unless a variable still has it.

    Args:
      chat_or_source: a `ChatSession`, or what `gemma_nb.load` takes.

    Raises:
      TypeError: an unknown keyword argument.
    """

    def __init__(self, chat_or_source: Any = "gemma3-270m", **unknown: object) -> None:
        reject_unknown("ChatApp", unknown, ())
        self.chat_panel = ChatPanel(chat_or_source)
        self.attention_panel = AttentionPanel()
        # One child, so that the columns can ask how wide the app is (a container query).
        self._columns = ipywidgets.Box([self.chat_panel, self.attention_panel])
        self._columns.add_class("gnb-columns")
        super().__init__([self._columns])
        for panel in (self.chat_panel, self.attention_panel):
            panel.part_of = self
        self.add_class("gnb-app")
        # In the browser, so that it holds without a kernel.
        self._link = ipywidgets.jslink(
            (self.chat_panel, "selected"), (self.attention_panel, "selected")
        )
        self.chat_panel.on_reply(self._look_inside)
        close_earlier(self)

    def __repr__(self) -> str:
        return f"ChatApp({self.chat_panel!r}, {self.attention_panel!r})"

    def __reduce_ex__(self, _: object) -> NoReturn:
        refuse_to_copy(self)

    def _repr_mimebundle_(self, **_: object) -> tuple[dict[str, Any], dict[str, Any]]:
        html = self.static_html()  # first: it takes over what was said since
        return view_mimebundle(self.model_id, repr(self), html), {}

    @property
    def chat(self) -> Any:
        """The `ChatSession`.

        Raises:
          GemmaNbError: the model is still loading or could not be loaded, or the app was closed.
        """
        return self.chat_panel.chat

    def wait_until_ready(self, timeout: float | None = None) -> Any:
        """The session, once it is loaded and compiled.

        Raises:
          TimeoutError: not ready after `timeout` seconds.
          GemmaNbError: loading failed.
        """
        return self.chat_panel.wait_until_ready(timeout)

    def static_html(self) -> str:
        """The conversation with its evidence and the framed row's attention, without scripts."""
        return self.chat_panel.static_html() + self.attention_panel.static_html()

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Takes nothing: what the app consists of is not for a front end to change."""
        self.send_state([name for name in sync_data if name in self.keys])

    def close(self) -> None:
        """Stops what runs, takes the views away, and lets go of the session and its traces."""
        for name in ("chat_panel", "attention_panel", "_link", "_columns"):
            if (part := getattr(self, name, None)) is not None:
                part.close()
        super().close()
        for box in (getattr(self, "_columns", None), self):
            if box is not None:
                close_layout(box)

    def _look_inside(self) -> None:
        self.attention_panel.attach(self.chat_panel.chat)
