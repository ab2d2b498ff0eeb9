"""Processes that answer, and what is said of those that do not."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import closing

import pytest

from tests.bench import worker
from tests.bench.worker import Worker

SERVED = """
import os, sys, time
from tests.bench.worker import serve

class Served:
    def add(self, a, b):
        print("a library's remark")
        return a + b

    def noise(self, size):
        sys.stderr.write("x" * size)

    def sleep_for_ever(self):
        time.sleep(1000)

    def fail(self):
        raise ValueError("no such prompt")

    def pid(self):
        return os.getpid()

serve(Served, patience={patience})
"""


def started(patience: float) -> Worker:
    command = [sys.executable, "-c", SERVED.format(patience=patience)]
    return Worker("a rival", command, patience)


def test_it_answers_whatever_libraries_print() -> None:
    with closing(started(60)) as rival:
        assert rival.ask("add", 1, 2) == 3
        assert rival.ask("noise", 1 << 20) is None  # more than any pipe holds
        assert rival.ask("add", [1], [2]) == [1, 2]


def test_one_that_fails_says_why_as_often_as_it_is_asked() -> None:
    with closing(started(60)) as rival:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="process ended with 1: ValueError: no such"):
                rival.ask("fail")


def test_one_that_hangs_is_named_and_says_where_it_was() -> None:
    with closing(started(0.5)) as rival:
        with pytest.raises(RuntimeError, match="a rival has not answered in time") as caught:
            rival.ask("sleep_for_ever")
        assert "in sleep_for_ever" in str(caught.value)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="nobody stops processes here")
def test_one_that_somebody_has_stopped_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_GRACE", 0.5)
    with closing(started(20)) as rival:
        rival._limit = 0.5
        os.kill(rival.ask("pid"), signal.SIGSTOP)
        with pytest.raises(RuntimeError, match="a rival has not answered for"):
            rival.ask("add", 1, 2)
