"""What happens when processes die, hang or do not stop."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest
import ray

import koan_ray as koan
from koan_ray.runtime.ray import options
from tests.conftest import eventually
from tests.integration.conftest import is_alive, kill9

pytestmark = pytest.mark.ray


class Sleeper(koan.Job[float, int]):
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> int:
        progress.report(0.1, str(os.getpid()))
        if context and len(self.metadata) == 0:
            time.sleep(context)
        return os.getpid()


class DiesFirst(koan.Job[str, int]):
    """Kills its process the first time, as told by a file."""

    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> int:
        try:
            os.close(os.open(context, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return os.getpid()
        os._exit(1)


class SleepsFirst(koan.Job[str, int]):
    """Says where it runs, and waits to be killed the first time, as told by a file."""

    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> int:
        try:
            os.close(os.open(context, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return os.getpid()
        progress.report(0.1, str(os.getpid()))
        time.sleep(60)
        return 0


class Fresh(koan.Job[None, None]):
    """Has an actor started for itself."""

    isolation = koan.Isolation.DEDICATED

    async def execute(self, context, progress, cancellation) -> None:
        pass


class AlwaysDies(koan.Job[None, None]):
    def execute(self, context, progress, cancellation) -> None:
        os._exit(3)


class Spins(koan.Job[None, None]):
    timeout = 1.0
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> None:
        while True:
            pass


class SpinsForEver(koan.Job[None, None]):
    def execute(self, context, progress, cancellation) -> None:
        progress.report(0.5)
        while True:
            pass


class Add(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        return context + 1


class Neighbour(koan.Job[str, int]):
    """Two share an actor: one kills it when told to, the other only sleeps."""

    concurrency = 2
    retry = koan.RetryPolicy(max_attempts=1)

    async def execute(self, context, progress, cancellation) -> int:
        if context == "spins" and self.metadata.get("first"):
            while True:
                pass
        await asyncio.sleep(2.5)
        return 1


def pid_of(job) -> int | None:
    found = job.refresh().get(timeout=10).progress_message
    return int(found) if found else None


def test_a_killed_job_actor_costs_no_attempt_and_its_job_runs_again_within_two_seconds(engine, tmp_path):
    """Within the time, at most, that the start of two actors takes on this machine, if that is more."""
    fresh = Fresh.start().run().get(timeout=30)
    fresh.wait(timeout=30).get()
    start_s = (fresh.executions().get()[0].started_at - fresh.refresh().get(timeout=10).created_at).total_seconds()
    job = SleepsFirst.start(str(tmp_path / "was-here")).run().get(timeout=30)
    pid = eventually(lambda: pid_of(job))
    killed_at = time.time()
    kill9(pid)
    assert job.wait(timeout=20).get() not in {0, pid}
    first, second = job.executions().get()
    assert (first.status, first.reason) == (koan.ExecutionStatus.FAILED, "lost")
    assert first.attempt_number == 1
    assert second.status is koan.ExecutionStatus.SUCCEEDED
    assert second.started_at.timestamp() - killed_at < max(2.0, 2 * start_s)


def test_a_job_that_always_kills_its_process_ends_as_poison_and_its_neighbours_finish(engine):
    others = Add.start_many(range(50)).run().get(timeout=30)
    poison = AlwaysDies.start().run().get()
    more = Add.start_many(range(50)).run().get()
    with pytest.raises(koan.JobFailedError) as caught:
        poison.wait(timeout=60).get()
    assert caught.value.failure == "poison"
    assert [e.reason for e in poison.executions().get()] == ["lost"] * 3
    assert sorted(job.wait(timeout=30).get() for job in others + more) == sorted([*range(1, 51)] * 2)


def test_a_crash_is_counted_apart_from_failures(engine, tmp_path):
    job = DiesFirst.start(str(tmp_path / "was-here")).run().get(timeout=30)
    assert job.wait(timeout=30).get() > 0
    assert [e.reason for e in job.executions().get()] == ["lost", "succeeded"]


def test_a_body_that_never_stops_is_timed_out_its_process_is_gone_and_capacity_is_back(engine):
    began = time.monotonic()
    job = Spins.start().run().get(timeout=30)
    with pytest.raises(koan.JobFailedError) as caught:
        job.wait(timeout=30).get()
    execution = job.executions().get()[0]
    assert caught.value.failure == "timeout"
    assert execution.reason == "timeout"
    assert execution.duration.total_seconds() < 1.0 + 0.5 + 2.0, time.monotonic() - began
    assert execution.metrics["stopped_by"] == "kill"
    eventually(lambda: not is_alive(execution.metrics["pid"]), within=3)
    assert Add.start(1).run().get().wait(timeout=20).get() == 2


def test_a_body_that_never_stops_is_killed_when_cancelled(engine):
    job = SpinsForEver.start().run().get(timeout=30)
    eventually(lambda: job.refresh().get().status is koan.JobStatus.RUNNING and job.progress > 0)
    assert job.cancel("enough").get() is koan.JobStatus.RUNNING
    with pytest.raises(koan.JobCancelledError, match="enough"):
        job.wait(timeout=10).get()
    execution = job.executions().get()[0]
    assert execution.metrics["stopped_by"] == "kill"
    eventually(lambda: not is_alive(execution.metrics["pid"]), within=3)


def test_a_neighbour_of_a_killed_body_keeps_its_attempt(engine):
    warm = Neighbour.start("warm").run().get(timeout=30)
    warm.wait(timeout=30).get()
    quiet = Neighbour.start("quiet").run().get()
    eventually(lambda: quiet.refresh().get().status is koan.JobStatus.RUNNING)
    pid = engine.status().get()["actors"]
    spinner = Neighbour.start("spins").with_metadata(first=True).run().get()
    eventually(lambda: spinner.refresh().get().status is koan.JobStatus.RUNNING)
    spinner.cancel().get()
    with pytest.raises(koan.JobCancelledError):
        spinner.wait(timeout=15).get()
    assert quiet.wait(timeout=30).get() == 1, pid
    executions = quiet.executions().get()
    assert executions[-1].attempt_number == 1
    assert [e.reason for e in executions] in (["interrupted", "succeeded"], ["succeeded"])


def test_a_killed_broker_makes_a_gap_and_the_stream_ends_properly(engine):
    @koan.job
    def counts(n: int, progress: koan.JobProgress) -> int:
        for i in range(n):
            progress.report(i, n)
            time.sleep(0.02)
        return n

    job = counts.start(250).run().get(timeout=30)
    updates = []
    stream = job.progress_stream().blocking()
    for update in stream:
        updates.append(update)
        if len(updates) == 20:
            broker = ray.get_actor(options.BROKER_NAME, namespace=engine.namespace)
            kill9(ray.get(broker.pid.remote()))
    assert job.wait(timeout=30).get() == 250
    assert updates[-1].status is koan.JobStatus.COMPLETED
    sequences = [u.sequence for u in updates]
    assert sequences == sorted(set(sequences))
    after = [u for u in updates[20:] if not u.status.is_final]
    assert after, "no state arrived after the broker was killed"


def test_a_killed_coordinator_fails_its_waiters_within_seconds_and_the_engine_is_usable_again(engine):
    job = Sleeper.start(60.0).run().get(timeout=30)
    queued = Sleeper.start(60.0).delayed(60).run().get(timeout=30)
    old_actor = eventually(lambda: pid_of(job))
    waits = [job.wait(), queued.wait()]
    ended: list[object] = []

    def follow() -> None:
        try:
            ended.extend(job.progress_stream().blocking())
        except koan.JobLostError as error:
            ended.append(error)

    follower = threading.Thread(target=follow)
    follower.start()
    eventually(lambda: ended)
    kill9(engine.status().get()["pid"])
    began = time.monotonic()
    for pending in waits:
        with pytest.raises(koan.JobLostError):
            pending.get(timeout=15)
    follower.join(timeout=15)
    assert not follower.is_alive()
    assert isinstance(ended[-1], koan.JobLostError)
    assert time.monotonic() - began < 10
    assert Add.start(41).run().get(timeout=30).wait(timeout=30).get() == 42
    eventually(lambda: not is_alive(old_actor), within=10)
    with pytest.raises((koan.JobLostError, koan.JobNotFoundError)):
        job.refresh().get(timeout=10)
