"""The kernel's interrupt at a chosen moment of what a session does, the same in every run."""

from __future__ import annotations

import contextlib
import dis
import functools
import signal
import sys
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import gemma_nb

# Where Python looks whether a signal came: behind calls, at the beginning of functions and loops.
_LOOKS = ("CALL", "RESUME", "JUMP_BACKWARD")
_OURS = (str(Path(gemma_nb.__file__).parent), contextlib.__file__)


class Interrupt:
    """SIGINT to this thread at the n-th moment in a block where Python may raise it.

        with Interrupt(5):
            chat.chat("Hello")

    Moments are those of this package's code, and of the context managers that it uses.

    Attributes:
      moments: how many there were so far.
    """

    def __init__(self, at: int | None = None) -> None:
        """Of moment `at`; None only counts."""
        self.moments = 0
        self._at = at

    def __enter__(self) -> Interrupt:
        sys.settrace(self._called)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._runs

    def _runs(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode" and frame.f_lasti in _moments(frame.f_code):
            self.moments += 1
            if self.moments == self._at:
                signal.raise_signal(signal.SIGINT)
        return self._runs


@functools.cache
def _moments(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which Python looks for signals."""
    before, found = "", set()
    for instruction in dis.get_instructions(code):
        if before.startswith(_LOOKS):
            found.add(instruction.offset)
        before = instruction.opname
    return frozenset(found)
