"""The engine in this process, with real threads: agents, sessions, child processes, definitions."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import types
from dataclasses import dataclass

import pytest
from pydantic import BaseModel
from typing_extensions import TypedDict

import koan_ray as koan

VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)


class Context(BaseModel):
    n: int


@dataclass
class Point:
    x: int


class Pair(TypedDict):
    a: int


class Child(koan.Job[int, int]):
    isolation = koan.Isolation.PROCESS
    retry = koan.RetryPolicy(max_attempts=1)
    timeout = 20

    def execute(self, context, progress, cancellation) -> int:
        progress.report(1, 2, "in a child")
        if context < 0:
            os._exit(-context)
        while context == 99 and not cancellation.requested:
            pass
        cancellation.raise_if_requested()
        return os.getpid()


class Waits(koan.Job[str, str]):
    async def execute(self, context, progress, cancellation) -> str:
        progress.report(0.5)
        await cancellation.wait()
        cancellation.raise_if_requested()
        return "never"


class Leaf(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        return context


class Parent(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        jobs = [self.start_child(Leaf, n).run().get() for n in range(context)]
        return sum(job.wait().get() for job in jobs)


class BlocksItsLoop(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        if context == 0:
            return 0
        return 1 + self.start_child(BlocksItsLoop, context - 1).run().get().wait().get()


class LeavesAVariable(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        found = VARIABLE.get()
        VARIABLE.set(context)
        return found


def job_class(**body):
    return types.new_class("J", (koan.Job[int, int],), {}, lambda namespace: namespace.update(body))


def test_contexts_and_results_may_be_of_any_kind_that_pydantic_takes(local_engine):
    @koan.job
    def point(p: Point) -> Point:
        return Point(p.x + 1)

    @koan.job
    async def pair(p: Pair) -> list[Pair]:
        return [p]

    @koan.job
    def nothing() -> None:
        pass

    assert point.start(Point(1)).run().get().wait().get(timeout=10) == Point(2)
    assert pair.start({"a": 1}).run().get().wait().get(timeout=10) == [{"a": 1}]
    assert nothing.start().run().get().wait().get(timeout=10) is None


def test_functions_become_jobs_with_parameters_found_by_name(local_engine):
    @koan.job(kind="counts", timeout=5)
    def counts(n: int, cancellation: koan.CancellationToken, progress: koan.JobProgress) -> tuple[int, bool]:
        progress.report(0.5)
        return n, cancellation.requested

    assert counts.kind == "counts"
    assert counts.start(3).run().get().wait().get(timeout=10) == (3, False)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: koan.job(lambda a, b: 1), r"expected .*\(context, progress, cancellation\)"),
        (lambda: koan.job(color=1)(lambda a: 1), "'color' is no job attribute"),
        (lambda: koan.job(7), "expected a function"),
        (lambda: job_class(execute=lambda self: 1), "execute.*cannot be called with"),
        (lambda: job_class(execute=5), "must be a plain or async method"),
        (lambda: job_class(retry=3), "retry must be a RetryPolicy"),
        (lambda: job_class(isolation="moon"), "isolation must be one of"),
        (lambda: job_class(concurrency=0), "concurrency must be"),
        (lambda: job_class(timeout=0), "longer than 0"),
        (lambda: job_class(timeout=-5), "cannot be negative"),
        (lambda: job_class(kind=""), "kind must be"),
        (lambda: koan.Resources(num_cpus=-1), "resources.num_cpus"),
        (lambda: koan.Job.start(1), "has no body"),
    ],
)
def test_a_class_that_cannot_work_is_refused_when_it_is_defined(make, told):
    with pytest.raises((koan.JobDefinitionError, koan.ConfigurationError), match=told):
        make()


def test_a_child_process_runs_reports_stops_and_crashes_apart_from_this_one(local_engine, eventually):
    job = Child.start(0).run().get()
    assert job.wait(timeout=30).get() not in (0, os.getpid())
    assert job.progress_message == "in a child"
    crashed = Child.start(-3).run().get()
    with pytest.raises(koan.JobFailedError, match="exit code 3"):
        crashed.wait(timeout=60).get()
    stopped = Child.start(99).run().get()
    eventually(lambda: stopped.refresh().get().progress == 0.5, within=20)
    stopped.cancel().get()
    with pytest.raises(koan.JobCancelledError):
        stopped.wait(timeout=20).get()


def test_waiting_bodies_give_their_place_away(local_engine):
    assert [job.wait(timeout=30).get() for job in Parent.start_many([4] * 12).run().get()] == [6] * 12
    assert BlocksItsLoop.start(6).run().get().wait(timeout=30).get() == 6


def test_what_a_body_sets_is_not_seen_by_the_next(local_engine):
    jobs = LeavesAVariable.start_many(range(1, 40)).run().get()
    assert {job.wait(timeout=20).get() for job in jobs} == {0}


def test_cancellation_reaches_a_body_that_watches_its_token(local_engine, eventually):
    job = Waits.start("x").run().get()
    eventually(lambda: job.refresh().get().progress == 0.5)
    job.cancel("bye").get()
    with pytest.raises(koan.JobCancelledError, match="bye"):
        job.wait(timeout=10).get()
    assert job.executions().get()[0].metrics["stopped_by"] == "token"


def test_a_wait_that_times_out_leaves_the_job_alone(local_engine):
    job = Waits.start("x").run().get()
    with pytest.raises(TimeoutError, match="it goes on"):
        job.wait(timeout=0.05).get()
    with pytest.raises(TimeoutError):
        job.wait().get(timeout=0.05)
    assert job.refresh().get().status is koan.JobStatus.RUNNING
    job.cancel().get()


def test_progress_reaches_handlers_of_every_kind(local_engine):
    plain, coroutine = [], []

    async def handler(update):
        coroutine.append(update.status)

    def broken(update):
        raise ValueError("a handler's own problem")

    async def main():
        job = await Leaf.start(1).delayed(0.2).run()
        subscriptions = [job.on_progress(handler), job.on_progress(plain.append), job.on_progress(broken)]
        await job.wait()
        updates = [update async for update in job.progress_stream()]
        for _ in range(200):
            if all(subscription.closed for subscription in subscriptions):
                break
            await asyncio.sleep(0.01)
        return updates

    updates = asyncio.run(main())
    assert updates[-1].status is koan.JobStatus.COMPLETED
    assert plain[-1].status is koan.JobStatus.COMPLETED
    assert coroutine[-1] is koan.JobStatus.COMPLETED


def test_many_loops_and_threads_wait_for_one_job(local_engine):
    job = Leaf.start(5).delayed(0.2).run().get()
    results = []

    def in_loop():
        async def wait():
            return await job.wait()

        results.append(asyncio.run(wait()))

    threads = [threading.Thread(target=in_loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [5] * 4


def test_the_builder_is_immutable_and_the_recipe_merges(local_engine):
    builder = Leaf.start(1).with_metadata(a=1)
    other = builder.with_metadata({"b": 2}, a=3).named("n", "d").with_correlation("c")
    first, second = builder.run().get(), other.run().get()
    assert (first.metadata, first.name, first.correlation_id) == ({"a": 1}, None, None)
    assert (second.metadata, second.name, second.description) == ({"a": 3, "b": 2}, "n", "d")
    assert second.correlation_id == "c"
    recipe = koan.Jobs.recipe().with_defaults(metadata={"a": 0, "z": 9}).audit().build(Leaf)
    assert recipe.start(1, correlation_id="r").with_metadata(a=1).run().get().metadata == {"a": 1, "z": 9}
    assert len(recipe.start_many([1, 2]).run().get()) == 2


@pytest.mark.parametrize(
    ("act", "error", "told"),
    [
        (lambda: Leaf.start(1).persist().run().get(), koan.ConfigurationError, "persist"),
        (lambda: Leaf.start("x"), koan.InvalidContextError, "integer"),
        (lambda: Leaf.start(1).delayed(-1), koan.ConfigurationError, "negative"),
        (lambda: Leaf.start(1).named(5), koan.ConfigurationError, "named"),
        (lambda: Leaf.start(1).with_metadata({"a.b": 1}), koan.InvalidContextError, "keys are"),
        (lambda: Leaf.start(1).with_metadata(a=object()), koan.InvalidContextError, "the metadata was refused: .*JSON"),
        (lambda: Leaf.start(1).with_metadata(3), koan.ConfigurationError, "with_metadata: expected a mapping.*3"),
        (lambda: Leaf.start(1).with_correlation(3), koan.ConfigurationError, "with_correlation: .*as text, got 3"),
        (lambda: Leaf.start(1, correlation_id=3), koan.ConfigurationError, "start: .*as text, got 3"),
        (lambda: Leaf.start(1).child_of("x"), koan.ConfigurationError, "child_of: expected a job in hand, got 'x'"),
        (lambda: Leaf.start(1).persist(3), koan.ConfigurationError, "source=3"),
        (lambda: koan.Jobs.recipe().persist(partition=3), koan.ConfigurationError, "partition=3"),
        (lambda: koan.Jobs.recipe().build(3), koan.ConfigurationError, "build: expected a job class, got 3"),
        (lambda: koan.Jobs.query(metadata={"$where": 1}).get(), koan.ConfigurationError, r"metadata: '\$where'"),
        (lambda: koan.Jobs.count(metadata={"a.b": 1}).get(), koan.ConfigurationError, "metadata: 'a.b'"),
        (lambda: koan.init("auto", runtime="local"), koan.ConfigurationError, "address: .*'auto'"),
        (lambda: koan.Jobs.recipe().use_policy(retry=3), koan.ConfigurationError, "RetryPolicy"),
        (lambda: koan.Jobs.recipe().use_policy(timeout=0), koan.ConfigurationError, "longer than 0"),
        (lambda: koan.Jobs.cancel("nope").get(), koan.JobNotFoundError, "An id is a UUID"),
        (lambda: Leaf.start_many(5).run().get(), TypeError, "not iterable"),
        (lambda: koan.init(runtime="moon"), koan.ConfigurationError, "runtime"),
        (lambda: koan.init(runtime="local", engine={"max_actors": 9}), koan.ConfigurationError, "max_actors: 2 != 9"),
        (lambda: Leaf.start(1).run().get().wait(timeout=-1), koan.ConfigurationError, "negative"),
    ],
)
def test_bad_input_is_refused(local_engine, act, error, told):
    with pytest.raises(error, match=told):
        act()


@pytest.mark.parametrize("is_watched", [True, False])
def test_what_a_plain_body_returns_after_its_timeout_is_no_result(local_engine, is_watched):
    class Late(koan.Job[None, str]):
        timeout = 0.1
        retry = koan.RetryPolicy(max_attempts=1)

        def execute(self, context, progress, cancellation) -> str:
            return "stopped in time" if is_watched and wait_for(cancellation) else asyncio.run(asyncio.sleep(0.3)) or "late"

    def wait_for(cancellation) -> bool:
        asyncio.run(cancellation.wait())
        return True

    job = Late.start().run().get()
    with pytest.raises(koan.JobFailedError, match=r"\(timeout\).*longer than .*0.1 ?s"):
        job.wait().get(timeout=10)
    assert [e.reason for e in job.executions().get()] == ["timeout"]


@pytest.mark.parametrize(("method", "told"), [("should_retry", "RuntimeError: broken"), ("get_retry_delay", "got 'soon'")])
def test_a_retry_policy_that_fails_is_told_beside_the_error(local_engine, method, told):
    def judge(_self, _last_execution):
        if method == "should_retry":
            raise RuntimeError("broken")
        return "soon"

    def execute(self, context, progress, cancellation):
        raise ValueError("first")

    job = job_class(execute=execute, retry=koan.RetryPolicy(max_attempts=1), **{method: judge}).start(1).run().get()
    with pytest.raises(koan.JobFailedError, match=rf"ValueError: first \(and its own retry policy raised .*{told}"):
        job.wait().get(timeout=10)


def test_what_cannot_be_reported_is_logged_and_what_cannot_be_called_is_told(local_engine, caplog):
    @koan.job
    def says(progress: koan.JobProgress) -> str:
        progress.report({"half"})  # fails no job
        return "done"

    job = says.start().run().get()
    with caplog.at_level("WARNING", logger="koan_ray.progress"):
        assert job.wait().get(timeout=10) == "done"
    assert "a set first; expected a number, 0 to 1 or the step reached" in caplog.text
    with pytest.raises(koan.ConfigurationError, match=r"on_progress: expected a function .*got 3"):
        job.on_progress(3)


def test_a_source_in_memory_keeps_jobs_as_any_other_while_the_engine_lives():
    sources = {"default": {"url": "memory://"}, "jobs": {"url": "memory://"}}
    with koan.init(runtime="local", sources=sources):
        there = koan.Jobs.recipe().persist(source="jobs", partition="hot").audit().build(Leaf)
        hot, cold, plain = there.start(1).run().get(), Leaf.start(2).persist().run().get(), Leaf.start(3).run().get()
        assert [job.wait().get(timeout=10) for job in (hot, cold, plain)] == [1, 2, 3]
        assert len(hot.executions().get()) == 1
        assert list(koan.Jobs.query(source="jobs", partition="hot").get()) == [hot]
        assert koan.Jobs.count(partition="").get() == 2
        assert koan.Jobs.count().get() == koan.Jobs.count(partition="*").get() == 3
        with pytest.raises(koan.ConfigurationError, match="no such source"):
            Leaf.start(1).persist("elsewhere").run().get()
        with pytest.raises(koan.ConfigurationError, match=r"partition: expected 1 to 64 of a-z.*'Ä b'"):
            Leaf.start(1).persist(partition="Ä b").run().get()


def test_init_is_idempotent_and_shutdown_fails_what_waits():
    with koan.init(runtime="local") as engine:
        assert koan.init(runtime="local") is engine is koan.init()
        pending = Waits.start("x").run().get().wait()
    with pytest.raises(koan.RuntimeUnavailableError, match="shut down"):
        pending.get(timeout=5)
    koan.shutdown()


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"engine": {"max_actor": 1}}, r"engine\.max_actor: is no setting; did you mean 'max_actors'"),
        ({"engine": {"idle_ttl": -1}, "memory": {"max_finished": "x"}}, r"engine\.idle_ttl: (.|\n)*|memory\.max_finished"),
        ({"sources": {"a": {"url": "http://user:secret@host"}}}, r"//\*\*\*@host"),
    ],
)
def test_settings_that_are_wrong_are_all_told(sections, told):
    with pytest.raises(koan.ConfigurationError, match=told) as caught:
        koan.Settings(**sections)
    assert "secret" not in str(caught.value)


def test_settings_come_from_keywords_then_environment_then_file(tmp_path, monkeypatch):
    (tmp_path / "koan.toml").write_text('[engine]\nmax_actors = 3\nmax_queued = 30\nidle_ttl = "2m"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOAN_RAY_ENGINE__MAX_QUEUED", "20")
    found = koan.Settings(engine={"max_actors": 1}).engine
    assert (found.max_actors, found.max_queued, found.idle_ttl.total_seconds()) == (1, 20, 120)
    (tmp_path / "koan.toml").write_text("[engine")
    with pytest.raises(koan.ConfigurationError, match=r"koan\.toml: cannot be read"):
        koan.Settings()
    monkeypatch.setenv("KOAN_RAY_CONFIG_FILE", "absent.toml")
    with pytest.raises(koan.ConfigurationError, match=r"absent\.toml"):
        koan.Settings()


def test_one_trace_goes_from_submit_into_the_body(local_engine):
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    @koan.job
    def traced() -> str:
        return f"{trace.get_current_span().get_span_context().trace_id:032x}"

    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("outer") as span:
        job = traced.start().run().get()
        expected = f"{span.get_span_context().trace_id:032x}"
    assert job.correlation_id == expected
    assert job.wait(timeout=10).get() == expected
