"""A process that computes when it is asked to, a line of JSON for a line of JSON.

It sleeps otherwise, so the rounds of the benchmark stay interleaved; threads, locks and settings of
one library do not meet another's; and one that crashes or hangs ends alone.  No wait is without an
end: whatever takes longer than PATIENCE is ended by the process itself, which says where each of
its threads was, and by whoever asked if it does not even do that.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]

# Seconds for one answer, compilation included: ten times what the slowest one takes here.
PATIENCE = 240.0
# Seconds that a process is given to say where it was, and to end.
_GRACE = 10.0


@contextlib.contextmanager
def bounded(seconds: float = PATIENCE) -> Iterator[None]:
    """Ends this process, and prints the stacks of its threads, if the block takes longer."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Worker:
    """Such a process, as seen from the one that asks."""

    def __init__(self, name: str, command: Sequence[str], patience: float = PATIENCE) -> None:
        """Starts it and waits until it is ready.

        Args:
          name: whose it is, for messages.
          command: what runs `serve`.
          patience: seconds, as the process itself has them.

        Raises:
          RuntimeError: it ended, or did not answer; with the last line of what it said, or with
            the stacks of its threads.
        """
        self._name, self._limit = name, patience + _GRACE
        with contextlib.ExitStack() as stack:
            # A file: nobody reads along, and a pipe would be full at some time.
            self._said = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                cwd=REPO,
            )
            stack.callback(self._end)
            # A thread reads: it may wait without an end, and takes nobody along.
            self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
            self._answer()
            self._closing = stack.pop_all()

    def ask(self, method: str, *args: Any) -> Any:
        """What a method of the served object returns.

        Raises:
          RuntimeError: as for starting it.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` says why
            self._process.stdin.write(json.dumps([method, *args]) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._closing.close()

    # --- inside ---------------------------------------------------------------------------------

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._answers.put(line)
        self._answers.put(None)

    def _answer(self) -> Any:
        try:
            line = self._answers.get(timeout=self._limit)
        except queue.Empty:
            state = _state_of(self._process.pid)
            self._process.kill()
            raise RuntimeError(
                f"{self._name} has not answered for {self._limit:g} s, nor said where it was "
                f"({state}); its process was ended"
            ) from None
        if line is not None:
            return json.loads(line)
        self._answers.put(None)  # for whoever asks again
        code = self._process.wait(_GRACE)
        self._said.seek(0)
        said = self._said.read()
        stacks = said.rfind("Timeout (")  # as `faulthandler` has it
        if stacks >= 0:
            raise RuntimeError(f"{self._name} has not answered in time; {said[stacks:].strip()}")
        last = [line.strip() for line in said.splitlines() if line.strip()][-1:]
        raise RuntimeError(f"{self._name}'s process ended with {code}: {' '.join(last)}")

    def _end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_GRACE)
        self._reader.join(_GRACE)


def serve(make: Callable[[], Any], patience: float = PATIENCE) -> None:
    """Answers with the methods of what `make` returns, until nobody asks any more."""
    # What libraries print belongs to stderr; the first stdout is for answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    with bounded(patience):
        served = make()
    say("ready")
    for line in sys.stdin:
        method, *args = json.loads(line)
        with bounded(patience):
            answer = getattr(served, method)(*args)
        say(answer)


def _state_of(pid: int) -> str:
    """What a process is doing, in words, where the system tells."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    except OSError:
        return "its state is not known"
    letter = after_name.split()[0]
    words = {"T": "stopped by a signal", "R": "running", "S": "asleep", "D": "waiting for a disk"}
    return f"it is {words.get(letter, f'in state {letter}')}"
