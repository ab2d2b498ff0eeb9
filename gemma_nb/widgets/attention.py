"""AttentionPanel: which earlier tokens each head looked at, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import traitlets

from gemma_nb.errors import GemmaNbError
from gemma_nb.widgets import heatmap, html
from gemma_nb.widgets.base import Panel, command, static_text
from gemma_nb.widgets.received import selection
from gemma_nb.widgets.rerun import close_earlier
from gemma_nb.widgets.runner import Job, Runner
from gemma_nb.widgets.transcript import number

_IDLE = {"phase": "idle", "text": "No reply to look into yet."}


class AttentionPanel(Panel):
    """The attention behind the latest reply, one head at a time, all of them in an overview.

    The `Trace` stays in Python; what travels is one quantised map and the overview.

    Args:
      chat: the `ChatSession` to look into; None until `attach` is called.
    """

    _esm = static_text("attention", ".js")
    _css = static_text("attention", ".css")
    _settable = ("layer", "head", "hide_bos", "show_all", "selected")

    status = traitlets.Dict(_IDLE).tag(sync=True)
    shape = traitlets.Dict().tag(sync=True)  # {layers: [label], windows: [n|0], heads, kv_heads}
    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    hide_bos = traitlets.Bool(True).tag(sync=True)
    show_all = traitlets.Bool(False).tag(sync=True)
    selected = traitlets.Dict().tag(sync=True)
    labels: traitlets.List = traitlets.List().tag(sync=True)  # of the window's positions
    view = traitlets.Dict().tag(sync=True)  # what `head_map` holds
    head_map = traitlets.Bytes(b"").tag(sync=True)
    before = traitlets.Bytes(b"").tag(sync=True)
    atlas = traitlets.Bytes(b"").tag(sync=True)
    atlas_side = traitlets.Int(0).tag(sync=True)

    def __init__(self, chat: Any = None, **unknown: object) -> None:
        self._session: Any = None
        self._trace: Any = None
        self._traced: tuple[Any, int | None] | None = None  # turn id, the layer or None for all
        self._job: Job | None = None
        super().__init__(**unknown)
        self._runner = Runner("gemma_nb attention", self._show_failure)
        self.observe(self._on_choice, ["layer", "head", "selected", "show_all"])
        self.observe(self._on_hide_bos, "hide_bos")
        if chat is not None:
            self.attach(chat)
        close_earlier(self)

    def __repr__(self) -> str:
        return f"AttentionPanel(layer {self.layer}, head {self.head}, {self.status.get('phase')})"

    @traitlets.validate("layer", "head")
    def _check_index(self, proposal: Any) -> int:
        """A layer or head of the model; before there is one, whatever may turn out to be."""
        name, index = proposal["trait"].name, proposal["value"]
        layers = self.shape.get("layers")
        count = len(layers or ()) if name == "layer" else self.shape.get("heads", 0)
        if isinstance(index, bool) or index < 0 or (layers and index >= count):
            known = f"0 to {count - 1}" if layers else "counted from 0"
            raise traitlets.TraitError(f"{name} {index} is not here; the {name}s are {known}")
        return int(index)

    @traitlets.validate("selected")
    def _check_selected(self, proposal: Any) -> dict[str, Any]:
        return selection(proposal["value"])

    # -- for Python

    def attach(self, chat: Any) -> None:
        """Looks into `chat` from now on.

        Raises:
          GemmaNbError: the panel was closed.
        """
        if self._runner.closed:
            raise GemmaNbError("this panel was closed; make a new one")
        if chat is self._session:
            self.refresh()
            return
        self._session = chat
        config = chat.model.config
        kinds = [spec.kind for spec in config.layers]
        shape = {
            "layers": [kind.label for kind in kinds],
            "windows": [getattr(kind, "window", 0) for kind in kinds],
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
        }
        # Global layers are where a reply looks back at the question: open on the middle one.
        wide = [i for i, window in enumerate(shape["windows"]) if not window] or [0]
        with self.publishing():
            self.shape = shape
            self.layer, self.head = wide[len(wide) // 2], 0
        self.refresh()

    def static_html(self) -> str:
        """The strongest keys of the framed row, as a table."""
        if self._trace is None:
            return html.attended_html("Attention: no reply was traced when this cell ran.", [])
        query = self._row()
        try:
            rows = [(r["key"], r["token"], r["weight"]) for r in self.row(query)["rows"]]
        except ValueError:
            rows = []
        where = f"layer {self.layer} ({self.shape['layers'][self.layer]}), head {self.head}"
        text = html.visible(str(self._trace.labels[query]))
        return html.attended_html(f"Attention of {where} from “{text}” ({query})", rows)

    def close(self) -> None:
        """Ends the worker thread, takes the views away, lets go of the session and its trace."""
        runner = getattr(self, "_runner", None)
        if runner is not None and not runner.closed:
            runner.close()
            with self._state_lock:
                self._session = self._trace = self._traced = None
        super().close()

    # -- commands of the front end

    @command
    def refresh(self) -> None:
        """Traces the latest reply, unless that is what is shown."""
        session = self._session
        if session is None:
            return
        turn = self._latest(session)
        if turn is None and not session.busy:
            self._forget()
        elif self._job is None and (session.busy or self._wanted(turn) != self._traced):
            self._start()

    @command
    def row(self, query: int, count: int = 24) -> dict[str, Any]:
        """The strongest keys of one query with their exact weights."""
        maps = self._map()
        if maps is None or not 0 <= query < maps.shape[0]:
            raise ValueError(f"no attention was computed for query position {query}")
        if count < 0:
            raise ValueError(f"count must be 0 or more, got {count}")
        keys = heatmap.strongest(maps[query], query, count, hide_first=self.hide_bos)
        labels = self._trace.labels
        rows = [{"key": k, "token": labels[k], "weight": number(maps[query, k])} for k in keys]
        return {"query": query, "layer": self.layer, "head": self.head, "rows": rows}

    # -- tracing, on the worker thread

    @staticmethod
    def _latest(session: Any) -> Any:
        replies = [t for t in session.turns if t.role == "model" and t.tokens and t.finish_reason]
        return replies[-1] if replies else None

    def _wanted(self, turn: Any) -> tuple[Any, int | None]:
        """What should be traced: every layer when that fits, else the chosen one."""
        length = turn.tokens[-1].position + 1
        layers, heads = len(self.shape["layers"]), self.shape["heads"]
        fits = heatmap.trace_bytes(layers, heads, length) <= heatmap.MAX_TRACE_BYTES
        return turn.id, None if fits else self.layer

    def _start(self) -> None:
        with self._state_lock:
            if self._job is None:
                self._job = self._runner.submit(self._compute)

    def _compute(self, job: Job) -> None:
        session = self._session
        try:
            while session.busy:
                self._set_status("waiting", "Waiting for the reply to end")
                if job.cancelled.wait(0.1):
                    return
            turn = self._latest(session)
            if turn is None:
                self._forget()
                return
            wanted = self._wanted(turn)
            self._set_status("tracing", "Computing attention")
            layers = None if wanted[1] is None else [wanted[1]]
            trace = session.trace(turn, sites=("attention",), layers=layers)
            with self._state_lock:
                if self._runner.closed:
                    return
                self._trace, self._traced = trace, wanted
        finally:
            self._job = None
        self._show()
        latest = None if job.cancelled.is_set() else self._latest(session)
        if latest is not None and self._wanted(latest) != self._traced:
            self._start()  # the conversation, or the chosen layer, moved on meanwhile

    def _set_status(self, phase: str, text: str) -> None:
        self.publish(status={"phase": phase, "text": text})

    def _show_failure(self, error: Exception) -> None:
        self._set_status("error", "The attention could not be computed.")
        self.show_error(error)

    def _forget(self) -> None:
        with self.publishing():
            self._trace = self._traced = None
            self.status, self.view, self.labels = dict(_IDLE), {}, []
            self.head_map = self.before = self.atlas = b""
            self.atlas_side = 0

    # -- what is shown of the trace

    def _map(self) -> np.ndarray | None:
        """float32 (T, T), query before key, of the chosen head; None where it was not traced."""
        trace, traced = self._trace, self._traced
        if trace is None or traced is None or traced[1] not in (None, self.layer):
            return None
        at = 0 if traced[1] is not None else self.layer
        return trace.attention.isel(layer=at, head=self.head).values

    def _row(self) -> int:
        """The query position that chose the selected token; the last one without a selection."""
        length = len(self._trace.tokens)
        position = self.selected.get("position")
        return length - 1 if position is None else min(max(0, position - 1), length - 1)

    def _show(self) -> None:
        """Publishes the chosen head's window and, for a new trace, the overview."""
        with self.publishing():
            if self._trace is None:
                return
            self._publish_map()
            self._publish_atlas()
            self.error = ""
            self.status = {"phase": "ready", "text": ""}

    def _publish_map(self) -> None:
        maps = self._map()
        if maps is None:
            return
        length = maps.shape[0]
        limit = heatmap.MAX_WINDOW if self.show_all else heatmap.WINDOW
        window = heatmap.window_for(length, self._row(), limit=limit)
        self.head_map, self.before = heatmap.crop(maps, window, hide_first=self.hide_bos)
        self.labels = [str(label) for label in self._trace.labels[window.first : window.last]]
        self.view = {
            "turn": str((self._traced or ("",))[0]),
            "layer": self.layer,
            "head": self.head,
            "first": window.first,
            "size": window.size,
            "length": length,
            "hide_bos": self.hide_bos,
            "limit": heatmap.MAX_WINDOW,
        }

    def _publish_atlas(self) -> None:
        if self._traced is not None and self._traced[1] is not None:
            self.atlas, self.atlas_side = b"", 0  # one layer only: there is no overview
            return
        maps = self._trace.attention.values
        self.atlas, self.atlas_side = heatmap.thumbnails(maps, hide_first=self.hide_bos)

    def _on_choice(self, change: Any) -> None:
        with self.errors_shown(), self._state_lock:
            if self._trace is None:
                return
            if self._map() is None:
                self.refresh()
            elif change["name"] != "selected" or not self._row_is_shown():
                with self.publishing():
                    self._publish_map()

    def _row_is_shown(self) -> bool:
        first, size = self.view.get("first", 0), self.view.get("size", 0)
        return first <= self._row() < first + size

    def _on_hide_bos(self, _change: Any) -> None:
        with self.errors_shown(), self._state_lock:
            if self._trace is not None:
                self._show()
