"""ChatPanel: the conversation, each token's alternatives, the settings."""

from __future__ import annotations

import threading
from typing import Any

import traitlets

from gemma_nb.errors import BusyError, GemmaNbError
from gemma_nb.widgets import html
from gemma_nb.widgets.base import command, static_text
from gemma_nb.widgets.conversation import ConversationPanel, Wish, another_reply, message
from gemma_nb.widgets.loading import Loader, model_chips, model_title
from gemma_nb.widgets.received import selection
from gemma_nb.widgets.rerun import close_earlier
from gemma_nb.widgets.runner import Job


class ChatPanel(ConversationPanel):
    """A chat whose every reply token shows what else the model considered.

    Args:
      chat_or_source: a `ChatSession`, or what `gemma_nb.load` takes; then the panel shows at once
        and loads in the background.
    """

    _esm = static_text("chat", ".js")
    _css = static_text("chat", ".css")
    _settable = ("ack", "settings", "selected", "show_tint")

    about = traitlets.Dict().tag(sync=True)  # {title, chips} of the model
    selected = traitlets.Dict().tag(sync=True)  # {turn, token, position, text}
    show_tint = traitlets.Bool(True).tag(sync=True)

    def __init__(self, chat_or_source: Any = "gemma3-270m", **unknown: object) -> None:
        self._settled = threading.Event()
        super().__init__(**unknown)
        self._loader = Loader(self._set_status)
        if isinstance(chat_or_source, str) or hasattr(chat_or_source, "__fspath__"):
            self._source: Any = chat_or_source
            self.publish(about={"title": model_title(chat_or_source), "chips": []})
            self._start_loading()
        else:
            with self._state_lock:
                self._adopt(chat_or_source)
            self._settled.set()
        close_earlier(self)

    @traitlets.validate("selected")
    def _check_selected(self, proposal: Any) -> dict[str, Any]:
        return selection(proposal["value"])

    def __repr__(self) -> str:
        title = self.about.get("title", "no model")
        return f"ChatPanel({title}, {len(self._feed.turns)} turns, {self.status.get('phase')})"

    # -- for Python

    @property
    def chat(self) -> Any:
        """The `ChatSession` behind the panel.

        Raises:
          GemmaNbError: it is not there yet, loading failed, or the panel was closed; the message
            says which.
        """
        if self._session is None:
            if self._runner.closed:
                raise GemmaNbError("this panel was closed; make a new one")
            if self.status.get("phase") == "error":
                raise GemmaNbError(f"the model could not be loaded: {self.error}")
            raise GemmaNbError(
                f"the model is not ready ({self.status.get('text')}); "
                "call wait_until_ready() first, or watch the panel"
            )
        return self._session

    def wait_until_ready(self, timeout: float | None = None) -> Any:
        """The session, once it is loaded and compiled.

        Raises:
          TimeoutError: not ready after `timeout` seconds.
          GemmaNbError: loading failed.
        """
        if not self._settled.wait(timeout):
            raise TimeoutError(f"not ready after {timeout} s: {self.status.get('text')}")
        return self.chat

    def static_html(self) -> str:
        """The conversation with its evidence, as HTML without scripts."""
        with self._state_lock:
            if self._reply_job is None:
                self._catch_up()
            turns = self._feed.snapshot()["turns"]
        return html.conversation_html(turns, self.about.get("title", "Gemma"))

    def close(self) -> None:
        """Stops what it runs, ends the worker thread, takes the views away, drops the session."""
        super().close()
        self._settled.set()  # who waits in a cell is told that it was closed

    # -- loading

    def _start_loading(self) -> None:
        self._settled.clear()
        self._set_status("loading", "Loading the model")
        self._loader.expect(self._source)
        self._runner.submit(self._load)

    def _load(self, job: Job) -> None:
        try:
            session = self._loader.load(self._source, job)
        except Exception as error:
            if not job.cancelled.is_set():
                self.show_error(error)
                self._set_status("error", "Not loaded")
            self._settled.set()
            return
        with self._state_lock:
            if self._runner.closed:
                return
            self._adopt(session)
            text = self.waiting
            self._reply_job = job if text else None
        self._tell_listeners()
        if text:
            self._reply(job, message(text))
        # Last: who waits in a cell comes after the message that waits here.
        self._settled.set()

    def _adopt(self, session: Any) -> None:
        self._session = session
        self._forget = session.on_prefill(self._on_prefill)
        self._catch_up()
        with self.publishing():
            self.error = ""
            self.about = {"title": model_title(session), "chips": model_chips(session)}
            self.settings = self._settings_of(session)
            self.cache_length = session.cache_length
            self._set_status("ready", "Ready", 1.0)

    # -- commands of the front end

    @command
    def send_message(self, text: str) -> None:
        """Sends `text`; while the model loads it waits."""
        if not text.strip():
            raise ValueError("the message is empty: type something first")
        if self.waiting:
            raise BusyError("one message is waiting for the model already; yours is kept below")
        with self._state_lock:
            if self._session is not None:
                self._submit_reply(message(text))
            elif self.status.get("phase") == "error":
                raise GemmaNbError("the model is not loaded: press Retry, then send again")
            else:
                self.publish(waiting=text)

    @command
    def regenerate(self) -> None:
        """Replaces the last reply by another one."""
        self._refuse_when_busy()
        if not any(turn.role == "model" for turn in self.chat.turns):
            raise ValueError("there is no reply to regenerate yet")
        self._submit_reply(another_reply())

    @command
    def edit(self, turn: int, text: str) -> None:
        """Says `text` in the place of a message, on a branch of its own."""
        self._refuse_when_busy()
        if not text.strip():
            raise ValueError("the message is empty: type something first")
        self._submit_reply(message(text, turn))

    @command
    def fork(self, turn: int, token: int, with_token: int | None = None) -> None:
        """Makes another end of a reply, with another token in a place or, by default, after it."""
        self._refuse_when_busy()
        self._submit_reply(Wish(lambda session: session.stream_fork(token, with_token, turn=turn)))

    @command
    def select(self, turn: int) -> None:
        """Shows the branch of a turn."""
        self._refuse_when_busy()
        self.chat.select(turn)
        self._moved()

    @command
    def undo(self) -> None:
        """Takes the last message and its reply back."""
        self._refuse_when_busy()
        self.chat.undo()
        self._moved()

    @command
    def stop(self) -> str:
        """Stops the reply at once, on the thread of the message; returns a text that waited."""
        job, session, text = self._reply_job, self._session, self.waiting
        if job is not None:
            job.cancel()
        if session is not None and (job is not None or session.busy):
            session.stop()
        if text:
            self.publish(waiting="")
        return text

    @command
    def new_conversation(self) -> None:
        """Starts over with an empty context."""
        self._refuse_when_busy()
        self.chat.new_conversation()
        self._moved()

    def _moved(self) -> None:
        """Shows where the conversation stands now."""
        with self._state_lock:
            self._catch_up()
            self.publish(selected={}, error="")
        self._tell_listeners()

    @command
    def retry(self) -> None:
        """Loads the model again after a failure."""
        if self._session is None and not self._runner.busy:
            self.publish(error="")
            self._start_loading()

    @command
    def refresh(self) -> None:
        """Takes over what was said elsewhere, such as `chat.chat(...)` in a cell."""
        session = self._session
        with self._state_lock:
            if session is None or self._reply_job is not None:
                return
            before = self._feed.seq
            if session.busy:
                self._reply_job = self._runner.submit(self._watch)
                return
            self._catch_up()
            self.publish(settings=self._settings_of(session))
        if self._feed.seq != before:
            self._tell_listeners()

    @command
    def resync(self) -> None:
        """Sends the whole transcript to a front end that missed a delta."""
        with self._state_lock:
            self.send_state("transcript")

    @command
    def strip_evidence(self) -> None:
        """Drops the alternatives from what is synced and saved; the session keeps them."""
        self._refuse_when_busy()
        with self._state_lock:
            self._feed.strip_alternatives()
            self.send_state("transcript")
            self.publish(saved_bytes=self._feed.weight())
