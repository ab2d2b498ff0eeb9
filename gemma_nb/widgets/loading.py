"""From a model's name or path to a session that is compiled, with progress."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_nb.widgets.runner import Job


class Cancelled(Exception):
    """The panel was closed while it loaded."""


class Loader:
    """Loads and compiles, telling `show(phase, text, fraction)` how far it is.

    Progress is passed on at most ten times a second.
    """

    def __init__(self, show: Callable[[str, str, float], None]) -> None:
        self._show = show

    def load(self, source: Any, job: Job) -> Any:
        """A warmed-up `ChatSession` for `source`.

        Raises:
          Cancelled: the job was cancelled meanwhile.
        """
        # Late: importing a panel must not start JAX.
        from gemma_nb.chat.session import ChatSession
        from gemma_nb.checkpoints.load import load

        model, tokenizer = load(source, progress=self._progress("loading", job))
        session = ChatSession(model, tokenizer)
        self._show("compiling", "Compiling for this machine", 0.0)
        session.warmup(progress=self._progress("compiling", job))
        return session

    def _progress(self, phase: str, job: Job) -> Callable[[float, str], None]:
        last = 0.0

        def progress(fraction: float, text: str) -> None:
            nonlocal last
            if job.cancelled.is_set():
                raise Cancelled
            now = time.monotonic()
            if now - last >= 0.1 or fraction >= 1:
                last = now
                self._show(phase, text, fraction)

        return progress


def model_title(chat_or_source: Any) -> str:
    """How the panel names the model."""
    if isinstance(chat_or_source, str | Path):
        return Path(chat_or_source).name if "/" in str(chat_or_source) else str(chat_or_source)
    return str(getattr(chat_or_source.model, "title", "Gemma"))


def model_chips(session: Any) -> list[str]:
    """Short facts beside the title: tuning and template, storage of the weights."""
    info = getattr(session.model, "info", None)
    template = getattr(session.template, "name", "")
    chips = [" · ".join(part for part in (getattr(info, "tuning", ""), template) if part)]
    # A wrapped model may keep its parameters elsewhere.
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        dtype = str(session.model.params["embedder"]["input_embedding"].dtype)
        chips.append(dtype.replace("bfloat", "bf").replace("float", "f"))
    return [chip for chip in chips if chip]
