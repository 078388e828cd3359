"""The engine as users meet it on a cluster: where classes come from, who asks, what is refused."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import ray
from pydantic import BaseModel

import koan_ray as koan

pytestmark = pytest.mark.ray
ENGINE = {"inline_limit": 10_000}


class Context(BaseModel):
    to: str
    times: int = 1


class Result(BaseModel):
    sent: bool


class Email(koan.Job[Context, Result]):
    async def execute(self, context, progress, cancellation) -> Result:
        progress.report(0.5, "Sending email...")
        return Result(sent=True)


class WrongResult(koan.Job[None, Result]):
    def execute(self, context, progress, cancellation) -> Result:
        return {"sent": "maybe"}


class Cooperative(koan.Job[str, str]):
    async def execute(self, context, progress, cancellation) -> str:
        progress.report(0.5)
        if context == "token":
            await cancellation.wait()
            cancellation.raise_if_requested()
        await asyncio.sleep(600)
        return "not reached"


class Slow(koan.Job[float, None]):
    timeout = timedelta(seconds=0.3)
    retry = koan.RetryPolicy(max_attempts=2, strategy=koan.RetryStrategy.FIXED_DELAY, initial_delay=0.1)

    async def execute(self, context, progress, cancellation) -> None:
        await asyncio.sleep(context)


def test_a_job_runs_reports_and_returns_its_result(engine):
    job = Email.start(Context(to="a@b"), correlation_id="c1").with_metadata(user="u1").named("mail").run().get(timeout=30)
    seen = []
    with job.on_progress(seen.append):
        assert job.wait(timeout=30).get() == Result(sent=True)
    assert (job.status, job.progress, job.result) == (koan.JobStatus.COMPLETED, 1.0, Result(sent=True))
    assert job.context == Context(to="a@b")
    assert (job.correlation_id, job.metadata, job.name) == ("c1", {"user": "u1"}, "mail")
    assert job.created_at <= job.queued_at <= job.completed_at
    found = Email.query(metadata={"user": "u1"}).get()
    assert found == [job]
    assert type(found[0]) is Email


def test_a_module_that_the_cluster_cannot_import_is_shipped(engine, tmp_path, monkeypatch):
    (tmp_path / "only_here").mkdir()
    (tmp_path / "only_here" / "__init__.py").write_text("")
    (tmp_path / "only_here" / "helpers.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "only_here" / "jobs.py").write_text(
        textwrap.dedent("""
            import koan_ray as koan
            from only_here.helpers import double

            @koan.job
            def twice(x: int) -> int:
                return double(x)
            """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from only_here import jobs

    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    (tmp_path / "only_here" / "helpers.py").rename(tmp_path / "gone.py")
    assert jobs.twice.start(21).run().get(timeout=30).wait(timeout=30).get() == 42


def test_a_class_made_in_a_function_is_shipped_with_what_it_closes_over(engine):
    factor = 3

    class Times(koan.Job[int, int]):
        def execute(self, context, progress, cancellation) -> int:
            return context * factor

    assert Times.start(14).run().get(timeout=30).wait(timeout=30).get() == 42


def test_a_class_that_cannot_be_pickled_is_named(engine):
    lock = threading.Lock()

    class Locked(koan.Job[None, None]):
        def execute(self, context, progress, cancellation) -> None:
            lock.acquire()

    with pytest.raises(koan.JobDefinitionError, match=r"Locked.*pickle"):
        Locked.start().run().get(timeout=30)


@pytest.mark.parametrize(("how", "by"), [("token", "token"), ("deaf", "cancelled_error")])
def test_a_cancelled_body_says_how_it_was_stopped(engine, eventually, how, by):
    job = Cooperative.start(how).run().get(timeout=30)
    eventually(lambda: job.refresh().get().progress == 0.5)
    job.cancel("stop").get()
    with pytest.raises(koan.JobCancelledError):
        job.wait(timeout=10).get()
    assert job.executions().get()[0].metrics["stopped_by"] == by


def test_an_attempt_that_takes_too_long_is_timed_out_and_tried_again(engine):
    job = Slow.start(30.0).run().get(timeout=30)
    with pytest.raises(koan.JobFailedError) as caught:
        job.wait(timeout=20).get()
    assert caught.value.failure == "timeout"
    assert [e.reason for e in job.executions().get()] == ["timeout", "timeout"]


def test_jobs_can_be_used_in_ray_tasks_that_fill_the_cluster(engine):
    @ray.remote(num_cpus=1)
    def in_task(n: int) -> int:
        jobs = [Email.start(Context(to=str(i))).run().get() for i in range(n)]
        return sum(job.wait().get(timeout=60).sent for job in jobs)

    assert ray.get([in_task.remote(3) for _ in range(2)], timeout=120) == [3, 3]


def test_jobs_can_be_used_in_actors_threads_and_running_loops(engine):
    @ray.remote(num_cpus=0)
    class Actor:
        def run(self) -> bool:
            return Email.start(Context(to="x")).run().get().wait().get(timeout=60).sent

    actor = Actor.remote()
    assert ray.get(actor.run.remote(), timeout=60)
    ray.kill(actor)

    async def in_loop() -> bool:
        job = Email.start(Context(to="x")).run().get()  # blocks, as in a notebook cell
        return (await job.wait()).sent

    assert asyncio.run(in_loop())
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(Email.start(Context(to="x")).run().get().wait().get(timeout=30).sent))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8


def test_a_second_driver_joins_the_same_engine(engine):
    job = Cooperative.start("deaf").named("shared").run().get(timeout=30)
    script = textwrap.dedent(f"""
        import koan_ray as koan
        koan.init({ray.get_runtime_context().gcs_address!r}, engine={{"namespace": {engine.namespace!r},
                  "max_actors": 2, "cancel_grace": 0.5, "inline_limit": 10000}})
        job = koan.Jobs.get({job.id!r}).get(timeout=30)
        assert job.name == "shared", job.name
        print(job.cancel("by another driver").get().name)
        """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(koan.JobCancelledError, match="by another driver"):
        job.wait(timeout=20).get()


def test_bad_input_is_refused_with_a_message_that_names_it(engine):
    with pytest.raises(koan.InvalidContextError, match=r"times: .*integer"):
        Email.start({"to": "x", "times": "many"})
    with pytest.raises(koan.PayloadTooLargeError, match=r"context takes 20,0\d\d bytes.*10,000"):
        Email.start(Context(to="x" * 20_000)).run().get(timeout=30)
    with pytest.raises(koan.JobNotFoundError, match="01a20c6f"):
        koan.Jobs.get("01a20c6f-6160-747e-bf9c-40cedc36e91f").get(timeout=30)
    with pytest.raises(koan.JobNotFoundError, match="'not-an-id'"):
        koan.Jobs.get("not-an-id").get(timeout=30)
    with pytest.raises(koan.ConfigurationError, match="did you mean 'status'"):
        koan.Jobs.query(stauts="failed").get(timeout=30)
    with pytest.raises(koan.JobFailedError, match="returned dict, declared result is Result") as caught:
        WrongResult.start().run().get(timeout=30).wait(timeout=30).get()
    assert (caught.value.failure, caught.value.attempts) == ("result_rejected", 1)
    with pytest.raises(koan.ConfigurationError, match=r"max_actors: 2 != 7"):
        koan.init(engine={"namespace": engine.namespace, "max_actors": 7, "cancel_grace": 0.5, **ENGINE})
    job = Email.start(Context(to="x")).run().get()
    job.wait().get(timeout=30)
    job.remove().get(timeout=30)
    with pytest.raises(koan.JobNotFoundError):
        job.wait(timeout=5).get()


def test_a_refused_context_of_many_cancels_those_before_it(engine):
    def contexts():
        for i in range(300):
            yield {"to": str(i), "times": 600}
        yield {"to": 5}

    before = Cooperative.count().get()
    with pytest.raises(koan.InvalidContextError) as caught:
        Email.start_many(contexts()).delayed(60).named("batch").run().get(timeout=30)
    assert "place 300" in "".join(caught.value.__notes__)
    assert Cooperative.count().get() == before


def test_no_ray_at_the_address_is_told_quickly():
    script = textwrap.dedent("""
        import koan_ray as koan
        try:
            koan.init('127.0.0.1:1')
        except koan.RuntimeUnavailableError as error:
            print('TOLD', error)
        """)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import koan_ray, ray"], check=True, timeout=60)
    imported = time.monotonic()  # what the imports take on this machine, busy as it is, says nothing about us
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert "TOLD no Ray at '127.0.0.1:1'" in done.stdout, done.stdout + done.stderr
    assert time.monotonic() - imported < 30 + 2 * (imported - began)


def test_a_cluster_that_was_killed_is_not_waited_for():
    """Ray notes the newest cluster of the machine in a file, and would try for ever to join one that is gone."""
    script = textwrap.dedent("""
        import koan_ray as koan
        with koan.init(engine={"max_actors": 1}) as engine:
            print("UP", engine.status().get(timeout=30)["pid"])
        """)
    with tempfile.TemporaryDirectory(prefix="koan-") as directory:  # a short path: sockets live below it
        temp = Path(directory)
        (temp / "ray").mkdir()
        (temp / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        environment = {**os.environ, "RAY_TMPDIR": directory}
        environment.pop("RAY_ADDRESS", None)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=False, env=environment
        )
    assert "UP" in done.stdout, done.stdout + done.stderr
