"""What an attempt shares its process with, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

import koan_ray as koan
from tests.integration.conftest import is_alive, kill9

pytestmark = pytest.mark.ray


class InChild(koan.Job[str, int]):
    isolation = koan.Isolation.PROCESS
    retry = koan.RetryPolicy(max_attempts=1)
    timeout = 30

    def execute(self, context, progress, cancellation) -> int:
        progress.report(0.5, "half")
        assert threading.current_thread() is threading.main_thread()
        if context == "exit":
            os._exit(7)
        if context == "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        if context == "spin":
            while True:
                pass
        if context == "engine":
            koan.Jobs.count().get()
        return os.getpid()


class InChildAsync(koan.Job[None, int]):
    isolation = koan.Isolation.PROCESS

    async def execute(self, context, progress, cancellation) -> int:
        await asyncio.sleep(0.01)
        return os.getpid()


class Dedicated(koan.Job[None, int]):
    isolation = koan.Isolation.DEDICATED

    def execute(self, context, progress, cancellation) -> int:
        return os.getpid()


class Where(koan.Job[None, dict]):
    def execute(self, context, progress, cancellation) -> dict:
        return {"pid": os.getpid(), "cwd": os.getcwd(), "env": os.environ.get("LEFT_BEHIND")}


class Leaves(koan.Job[str, int]):
    def execute(self, context, progress, cancellation) -> int:
        if context == "cwd":
            os.chdir("/")
        elif context == "env":
            os.environ["LEFT_BEHIND"] = "1"
        else:
            for _ in range(40):
                threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
        return os.getpid()


class Overlap(koan.Job[None, int]):
    """Returns how many bodies of its process ran at the same time at most."""

    concurrency = 5
    active = 0

    async def execute(self, context, progress, cancellation) -> int:
        Overlap.active += 1
        await asyncio.sleep(0.3)
        most = Overlap.active
        await asyncio.sleep(0.1)
        Overlap.active -= 1
        return most


class Alone(koan.Job[None, int]):
    active = 0

    async def execute(self, context, progress, cancellation) -> int:
        Alone.active += 1
        await asyncio.sleep(0.05)
        most = Alone.active
        Alone.active -= 1
        return most


def test_each_attempt_in_a_child_has_a_process_of_its_own(engine):
    jobs = InChild.start_many(["ok"] * 4).run().get(timeout=30)
    pids = {job.wait(timeout=60).get() for job in jobs}
    assert len(pids) == 4
    actor_pids = {job.executions().get()[0].metrics["pid"] for job in jobs}
    assert not pids & actor_pids
    assert InChildAsync.start().run().get().wait(timeout=60).get() not in actor_pids


@pytest.mark.parametrize(("how", "seen"), [("exit", "exit code 7"), ("segv", "signal 11")])
def test_a_child_that_dies_is_a_crash_and_spares_the_actor(engine, how, seen):
    killed = engine.status().get()["counters"]["actors_lost"]
    job = InChild.start(how).run().get(timeout=30)
    with pytest.raises(koan.JobFailedError, match=re.escape(seen)) as caught:
        job.wait(timeout=60).get()
    assert caught.value.failure == "poison"
    assert engine.status().get()["counters"]["actors_lost"] == killed


def test_a_child_that_does_not_stop_is_killed_and_the_actor_lives(engine, eventually):
    job = InChild.start("spin").run().get(timeout=30)
    eventually(lambda: job.refresh().get().progress == 0.5)
    job.cancel().get()
    with pytest.raises(koan.JobCancelledError):
        job.wait(timeout=10).get()
    execution = job.executions().get()[0]
    assert execution.metrics["stopped_by"] == "kill"
    assert is_alive(execution.metrics["pid"])


def test_the_engine_cannot_be_used_inside_a_child_and_says_so(engine):
    with pytest.raises(koan.JobFailedError, match=r"Isolation\.PROCESS"):
        InChild.start("engine").run().get(timeout=30).wait(timeout=60).get()


def test_a_dedicated_job_has_a_fresh_actor_each_time(engine):
    pids = [Dedicated.start().run().get(timeout=30).wait(timeout=60).get() for _ in range(3)]
    assert len(set(pids)) == 3


@pytest.mark.parametrize("what", ["cwd", "env", "threads"])
def test_what_a_job_leaves_behind_is_not_found_by_the_next(engine, eventually, what):
    before = engine.status().get()["counters"]["actors_recycled"]
    dirty = Leaves.start(what).run().get(timeout=30).wait(timeout=30).get()
    eventually(lambda: engine.status().get()["counters"]["actors_recycled"] > before)
    found = [job.wait(timeout=60).get() for job in Where.start_many([None] * 6).run().get()]
    assert all(state["pid"] != dirty and state["env"] is None and state["cwd"] != "/" for state in found)


def test_jobs_share_an_actor_only_where_they_say_so(engine):
    jobs = Overlap.start_many([None] * 10).run().get(timeout=30)
    assert max(job.wait(timeout=60).get() for job in jobs) > 1
    jobs = Alone.start_many([None] * 10).run().get(timeout=30)
    assert {job.wait(timeout=60).get() for job in jobs} == {1}


class Shell(koan.Job[str, None]):
    """Runs a shell that starts a program, and does not stop."""

    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> None:
        shell = subprocess.Popen("sleep 61 & echo $!; wait", shell=True, stdout=subprocess.PIPE, text=True)
        progress.report(0.5, f"{shell.pid} {int(shell.stdout.readline())}")
        while True:
            time.sleep(1)


class DedicatedShell(Shell):
    isolation = koan.Isolation.DEDICATED


class ChildShell(Shell):
    isolation = koan.Isolation.PROCESS


@pytest.mark.parametrize("job_type", [Shell, DedicatedShell, ChildShell])
def test_the_programs_of_a_body_that_does_not_stop_end_with_it(engine, eventually, job_type):
    job = job_type.start("").run().get(timeout=30)
    pids = [int(pid) for pid in eventually(lambda: job.refresh().get().progress_message).split()]
    assert all(map(is_alive, pids))
    job.cancel().get()
    with pytest.raises(koan.JobCancelledError):
        job.wait(timeout=20).get()
    eventually(lambda: not any(map(is_alive, pids)), within=5)


def test_the_programs_of_a_child_end_also_when_its_actor_is_killed_from_outside(engine, eventually):
    job = ChildShell.start("").run().get(timeout=30)
    pids = [int(pid) for pid in eventually(lambda: job.refresh().get().progress_message).split()]
    kill9(job.executions().get()[0].metrics.get("pid") or _actor_of(pids[0]))
    eventually(lambda: not any(map(is_alive, pids)), within=5)
    job.cancel().get()


def _actor_of(pid: int) -> int:
    """Return the ancestor of a process that is a job actor of Ray."""
    while not Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::"):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid
