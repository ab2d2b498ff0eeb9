"""A panel's side of a conversation: what was said, shown as it is said, and the next reply."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import traitlets

from gemma_nb.errors import BusyError
from gemma_nb.widgets import transcript
from gemma_nb.widgets.base import Panel, describe
from gemma_nb.widgets.runner import Job, Runner
from gemma_nb.widgets.transcript import Turn

SETTINGS = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")
MAX_SAVED_BYTES = 8_000_000
_EMPTY: Turn = {"id": -2, "role": "model"}


@dataclasses.dataclass(frozen=True)
class Wish:
    """A reply that is to be made.

    Attributes:
      stream: begins it, given the session.
      ahead: what is shown before the model has read anything: turns, each with its place, given
        those that are shown.
    """

    stream: Callable[[Any], Iterator[Any]]
    ahead: Callable[[list[Turn]], list[tuple[int, Turn]]] = lambda _: []


def message(text: str, turn: int | None = None) -> Wish:
    """`text` is said next, or in the place of the message whose id is `turn`."""

    def ahead(turns: list[Turn]) -> list[tuple[int, Turn]]:
        at = len(turns) if turn is None else [one["id"] for one in turns].index(turn)
        return [(at, {"id": -1, "role": "user", "text": text}), (at + 1, _EMPTY)]

    if turn is None:
        return Wish(lambda session: session.stream(text), ahead)
    return Wish(lambda session: session.stream_edit(turn, text), ahead)


def another_reply() -> Wish:
    """Another reply to the last message."""
    return Wish(
        lambda session: session.stream_regenerate(),
        lambda turns: [(max(i for i, t in enumerate(turns) if t["role"] == "model"), _EMPTY)],
    )


class ConversationPanel(Panel):
    """Mirrors a `ChatSession` in traits, and runs its replies on a worker thread.

    The transcript is kept in Python, changed in place, and reaches the front end as deltas; its
    trait is read only when a whole state is asked for (a view is opened, a page reloaded, the
    notebook's widget state saved).
    """

    transcript = traitlets.Any().tag(
        sync=True, echo_update=False, to_json=lambda _, panel: panel._feed.snapshot()
    )
    delta = traitlets.Dict().tag(sync=True, echo_update=False)
    ack = traitlets.Int(0).tag(sync=True, echo_update=False)
    status = traitlets.Dict().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)
    cache_used = traitlets.Int(0).tag(sync=True)
    cache_length = traitlets.Int(0).tag(sync=True)
    tokens_per_second = traitlets.Float(0.0).tag(sync=True)
    saved_bytes = traitlets.Int(0).tag(sync=True)
    waiting = traitlets.Unicode("").tag(sync=True)  # a message that came before the model

    def __init__(self, **unknown: object) -> None:
        self._feed = transcript.TranscriptFeed(self._send_delta, head=self._head)
        self._session: Any = None
        self._reply_job: Job | None = None
        self._replying = False  # whether that is a reply of the panel's own, and no cell's
        self._live = (0, 0.0)  # cache used and tokens per second of the reply being generated
        self._listeners: list[Callable[[], Any]] = []
        self._forget: Callable[[], None] = lambda: None  # ends watching the session's prompts
        super().__init__(**unknown)
        self._runner = Runner("gemma_nb chat", self.show_error)
        self.observe(self._on_ack, "ack")
        self.observe(self._on_settings, "settings")

    def on_reply(self, listener: Callable[[], Any]) -> None:
        """Calls `listener()` after each reply, on the worker thread, and when a session arrives."""
        self._listeners.append(listener)
        if self._session is not None:
            listener()

    def close(self) -> None:
        """Stops what it runs, ends the worker thread, takes the views away, drops the session."""
        runner = getattr(self, "_runner", None)
        if runner is not None and not runner.closed:
            if self._replying and self._session is not None:
                self._session.stop()
            runner.close()
            with self._state_lock:
                self._forget()
                self._forget = lambda: None  # the other one knows the session
                self._session = None
                self._listeners.clear()
                self._feed.strip_alternatives()
        super().close()

    def _set_status(self, phase: str, text: str, fraction: float = 0.0) -> None:
        self.publish(status={"phase": phase, "fraction": round(fraction, 3), "text": text})

    def _tell_listeners(self) -> None:
        for listener in self._listeners:
            with self.errors_shown():
                listener()

    def _refuse_when_busy(self) -> None:
        session = self._session
        if self._reply_job is not None or (session is not None and session.busy):
            raise BusyError("Gemma is still replying; press Stop or wait, your message is kept")

    # -- settings

    @staticmethod
    def _settings_of(session: Any) -> dict[str, Any]:
        return {name: getattr(session.sampling, name) for name in SETTINGS}

    def _on_settings(self, change: Any) -> None:
        session = self._session
        if session is None or change["new"] == self._settings_of(session):
            return
        try:
            if unknown := [name for name in change["new"] if name not in SETTINGS]:
                raise ValueError(f"there is no setting {unknown[0]!r:.99} in this panel")
            sampling = dataclasses.replace(session.sampling, **change["new"])
        except Exception as error:  # whatever a value of another type leads to
            self.publish(settings=self._settings_of(session), error=describe(error))
            return
        with self.errors_shown():
            # A reply that runs keeps its own settings: these hold from the next one on.
            session.sampling = sampling

    # -- replies, on the worker thread

    def _submit_reply(self, wish: Wish) -> None:
        with self._state_lock:
            self._refuse_when_busy()
            self._set_status("generating", "Reading the conversation")
            self._reply_job = self._runner.submit(lambda job: self._reply(job, wish))

    def _reply(self, job: Job, wish: Wish) -> None:
        session = self._session
        if session is None:  # closed meanwhile
            return
        try:
            while session.busy and not job.cancelled.is_set():
                time.sleep(0.05)  # a cell came first
            self._replying = True
            self._live = (session.cache_used, 0.0)
            self._announce(wish)
            self._follow(job, session, wish.stream(session))
        except Exception as error:
            self.show_error(error)
        finally:
            self._replying = False
            self._conclude(session)
        self._tell_listeners()

    def _watch(self, job: Job) -> None:
        """Shows a reply that a cell asked for, so that it can be followed and stopped here."""
        session = self._session
        if session is None:  # closed meanwhile
            return
        self._set_status("generating", "Replying to a cell")
        try:
            while session.busy and not self._runner.closed:
                with self._state_lock:
                    self._catch_up()
                time.sleep(0.1)
        finally:
            self._conclude(session)
        self._tell_listeners()

    def _announce(self, wish: Wish) -> None:
        """Shows the message and an empty reply before the model has read anything."""
        self._set_status("generating", "Reading the conversation")
        self.publish(waiting="", error="")
        with self._state_lock:
            for at, head in wish.ahead(self._feed.turns):
                self._feed.place(at, head)

    def _on_prefill(self, event: Any) -> None:
        # What is read at once is over when this could be seen.
        if self._reply_job is not None and event.done < event.total:
            read = f"{event.done:,} of {event.total:,} tokens"
            self._set_status("generating", f"Reading the conversation: {read}")

    def _follow(self, job: Job, session: Any, events: Any) -> None:
        began, stopped = 0.0, False
        for count, event in enumerate(events):
            now = time.monotonic()
            began = began or now
            # The first token's time is the prompt's, not decoding's.
            self._live = (event.cache_used, count / (now - began) if count else 0.0)
            with self._state_lock:
                if count == 0:
                    self._begin_reply(session)
                if event.index >= len(self._feed.turns[-1]["tokens"]):
                    self._feed.append(transcript.encode_token(event))
            if job.cancelled.is_set() and not stopped:
                stopped = True  # Stop came before the stream began
                session.stop()

    def _begin_reply(self, session: Any) -> None:
        """Gives the announced turns their ids, or shows the branch: the session knows by now."""
        feed, turns, partial = self._feed, session.turns, session.partial
        if partial is not None and feed.turns[-1]["id"] != _EMPTY["id"]:
            feed.follow((*turns, partial))
        elif partial is not None:
            if feed.turns[-2]["id"] < 0:
                feed.rehead(self._head(turns[-1]), at=len(turns) - 1)
            feed.rehead({"id": partial.id, "role": "model"})
        self._set_status("generating", "Replying")

    def _head(self, turn: Any) -> Turn:
        """A turn without its tokens, and the ids of all that were tried in its place."""
        head, session = transcript.encode_head(turn), self._session
        if session is None:  # closed meanwhile
            return head
        with contextlib.suppress(ValueError):  # the reply being made is not in the tree yet
            beside = [other.id for other in session.siblings(turn)]
            if len(beside) > 1:
                head["beside"] = beside
        return head

    def _conclude(self, session: Any) -> None:
        with self.errors_shown(), self._state_lock:
            self._reply_job = None
            self._feed.flush(force=True)
            self._catch_up()
            size = self._feed.weight()
            if size > MAX_SAVED_BYTES:
                self._feed.strip_alternatives(keep_turns=2)
                self.send_state("transcript")
                size = self._feed.weight()
            self.publish(saved_bytes=size)
            self._set_status("ready", "Ready", 1.0)

    def _catch_up(self) -> None:
        """Makes the transcript that of the session, sending only what differs."""
        session = self._session
        if session is None:
            return
        partial, turns = session.partial, session.turns
        # For a moment a reply that ends is both.
        if partial is not None and (not turns or turns[-1].id != partial.id):
            turns = (*turns, partial)
        self._feed.follow(turns)
        self._live = (session.cache_used, self._last_speed())
        self.publish(cache_used=self._live[0], tokens_per_second=self._live[1])

    def _last_speed(self) -> float:
        speeds = [turn.get("tps") for turn in self._feed.turns if turn["role"] == "model"]
        return float(speeds[-1] or 0.0) if speeds else 0.0

    # -- deltas

    def _send_delta(self, delta: dict[str, Any]) -> None:
        used, speed = self._live
        self.publish(delta=delta, cache_used=used, tokens_per_second=round(speed, 2))

    def _on_ack(self, change: Any) -> None:
        with self._state_lock:
            self._feed.acknowledge(change["new"])
