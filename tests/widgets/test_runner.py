from __future__ import annotations

import threading

import pytest

from gemma_nb.widgets.runner import Runner
from tests.widgets.front_end import wait_until


def test_jobs_run_one_after_another_on_one_thread() -> None:
    seen: list[tuple[int, str]] = []
    runner = Runner("worker under test", seen.append)
    jobs = [
        runner.submit(lambda _, i=i: seen.append((i, threading.current_thread().name)))
        for i in range(20)
    ]
    assert jobs[-1].finished.wait(5)
    assert seen == [(i, "worker under test") for i in range(20)]
    wait_until(lambda: not runner.busy)
    runner.close(5)


def test_an_exception_is_reported_and_the_next_job_runs() -> None:
    errors: list[Exception] = []
    runner = Runner("t", errors.append)
    runner.submit(lambda _: 1 / 0)
    ran = threading.Event()
    runner.submit(lambda _: ran.set())
    assert ran.wait(5)
    assert [type(error) for error in errors] == [ZeroDivisionError]
    runner.close(5)


def test_closing_cancels_what_runs_and_what_waits() -> None:
    started, seen = threading.Event(), []
    runner = Runner("ends", seen.append)

    def work(job) -> None:
        started.set()
        seen.append(job.cancelled.wait(5))

    runner.submit(work)
    waiting = runner.submit(lambda _: seen.append("never"))
    assert started.wait(5)
    runner.close(5)
    assert seen == [True]
    assert waiting.cancelled.is_set()
    assert not any(thread.name == "ends" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        runner.submit(work)
