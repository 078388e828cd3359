"""Bodies that end their process, stop it, hold its interpreter, or copy it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time

import pytest

import koan_ray as koan
from tests.conftest import eventually
from tests.integration.conftest import is_alive, kill9

pytestmark = pytest.mark.ray
ENGINE = {"stuck_after": 3, "overrun": 0.1}
ONCE = koan.RetryPolicy(max_attempts=1)


class Ends(koan.Job[str, None]):
    """Ends its process in one of the ways there are."""

    retry = ONCE

    def execute(self, context, progress, cancellation) -> None:
        if context == "exit":
            os._exit(0)
        if context == "abort":
            os.abort()
        if context == "segfault":
            ctypes.string_at(0)
        sys.exit(context)


class EndsAsync(Ends):
    async def execute(self, context, progress, cancellation) -> None:
        super().execute(context, progress, cancellation)


class Stays(koan.Job[float, int]):
    """Says where it runs."""

    retry = ONCE

    async def execute(self, context, progress, cancellation) -> int:
        progress.report(0.1, str(os.getpid()))
        await asyncio.sleep(0 if self.last_error else context)
        return os.getpid()


class HoldsInterpreter(koan.Job[float, None]):
    """Lets no other thread of its process run, after ``context`` seconds."""

    retry = ONCE
    timeout = 1.0

    def execute(self, context, progress, cancellation) -> None:
        time.sleep(context)
        ctypes.PyDLL(None).sleep(600)


class HoldsOnce(koan.Job[str, str]):
    """Has no timeout; the second time it ends at once."""

    retry = ONCE

    def execute(self, context, progress, cancellation) -> str:
        if not self.last_error:
            ctypes.PyDLL(None).sleep(600)
        return "done"


class Forks(koan.Job[str, int]):
    """The first of a batch copies its process; both copies go on."""

    retry = ONCE

    def execute(self, context, progress, cancellation) -> int:
        with open(context, "a") as ledger:
            print(self.id, file=ledger)
        if self.metadata.get("forks") and os.fork() == 0:
            with open(f"{context}.child", "w") as file:
                print(os.getpid(), file=file)
        return os.getpid()


class ForksInChild(Forks):
    isolation = koan.Isolation.PROCESS


class Greedy(koan.Job[None, None]):
    retry = ONCE

    def execute(self, context, progress, cancellation) -> None:
        bytearray(1 << 60)


class Add(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        return context + 1


def works(engine) -> None:
    """Every place that the engine has runs jobs."""
    jobs = Add.start_many(range(20)).run().get(timeout=30)
    assert [job.wait(timeout=60).get() for job in jobs] == list(range(1, 21))


def said_in(path: str) -> str:
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        return file.read()
    return ""


def pid_of(job) -> int:
    return int(eventually(lambda: job.refresh().get(timeout=10).progress_message, within=30))


@pytest.mark.parametrize("body", [Ends, EndsAsync])
@pytest.mark.parametrize("how", ["exit", "abort", "segfault"])
def test_a_body_that_ends_its_process_is_lost_until_it_is_poison(engine, body, how):
    neighbours = Add.start_many(range(20)).run().get(timeout=30)
    job = body.start(how).run().get(timeout=30)
    with pytest.raises(koan.JobFailedError, match="died 3 times") as caught:
        job.wait(timeout=60).get()
    assert caught.value.failure == "poison"
    assert [e.reason for e in job.executions().get()] == ["lost"] * 3
    assert [neighbour.wait(timeout=60).get() for neighbour in neighbours] == list(range(1, 21))


@pytest.mark.parametrize("body", [Ends, EndsAsync])
def test_sys_exit_in_a_body_is_a_failure_and_its_process_goes_on(engine, body):
    lost = engine.status().get()["counters"]["actors_lost"]
    job = body.start("enough").run().get(timeout=30)
    with pytest.raises(koan.JobFailedError, match="SystemExit: enough") as caught:
        job.wait(timeout=60).get()
    assert caught.value.failure == "exhausted"
    assert [e.reason for e in job.executions().get()] == ["failed"]
    assert engine.status().get()["counters"]["actors_lost"] == lost


def test_a_memory_error_is_an_ordinary_failure(engine):
    job = Greedy.start().run().get(timeout=30)
    with pytest.raises(koan.JobFailedError, match="MemoryError") as caught:
        job.wait(timeout=60).get()
    assert caught.value.failure == "exhausted"
    assert [e.reason for e in job.executions().get()] == ["failed"]


def test_a_stopped_job_actor_is_killed_and_its_job_runs_again(engine):
    job = Stays.start(600.0).run().get(timeout=30)
    pid = pid_of(job)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert job.wait(timeout=40).get() != pid
        assert [e.reason for e in job.executions().get()] == ["lost", "succeeded"]
        eventually(lambda: not is_alive(pid))
    finally:
        if is_alive(pid):
            kill9(pid)
    works(engine)


def test_a_long_body_whose_process_is_well_is_not_taken_for_stuck(engine):
    job = Stays.start(8.0).run().get(timeout=30)
    assert job.wait(timeout=40).get() == pid_of(job)
    assert [e.reason for e in job.executions().get()] == ["succeeded"]


@pytest.mark.parametrize("after", [0.0, 0.5], ids=["from-its-begin", "after-its-batch-was-answered"])
def test_a_body_that_holds_the_interpreter_is_timed_out_and_its_place_is_back(engine, after):
    job = HoldsInterpreter.start(after).run().get(timeout=30)
    with pytest.raises(koan.JobFailedError) as caught:
        job.wait(timeout=30).get()
    (execution,) = job.executions().get()
    assert (caught.value.failure, execution.reason) == ("timeout", "timeout")
    assert execution.metrics["stopped_by"] == "kill"
    eventually(lambda: not is_alive(execution.metrics["pid"]))
    works(engine)


def test_a_body_without_a_timeout_that_holds_the_interpreter_is_lost_and_runs_again(engine):
    job = HoldsOnce.start("x").run().get(timeout=30)
    assert job.wait(timeout=40).get() == "done"
    assert [e.reason for e in job.executions().get()] == ["lost", "succeeded"]


@pytest.mark.parametrize("body", [Forks, ForksInChild])
def test_a_copy_of_the_process_that_a_body_made_settles_nothing_and_runs_nothing_else(engine, tmp_path, body):
    ledger = str(tmp_path / "ledger")
    warm = body.start_many([ledger] * 5).run().get(timeout=30)
    assert all(job.wait(timeout=60).get() for job in warm)
    first = body.start(ledger).with_metadata(forks=True).run().get(timeout=30)
    others = body.start_many([ledger] * 30).run().get(timeout=30)
    child = int(eventually(lambda: said_in(f"{ledger}.child")))
    jobs = [first, *others]
    assert first.wait(timeout=60).get() != child
    assert all(job.wait(timeout=60).get() != child for job in jobs)
    eventually(lambda: not is_alive(child))
    with open(ledger) as file:
        assert sorted(file.read().split()) == sorted(job.id for job in [*warm, *jobs])
