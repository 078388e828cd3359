"""Jobs that wait for what is not there say so: at the submit, and wherever they are shown, until it is there."""

from __future__ import annotations

import asyncio
import warnings

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.feasibility import Node
from koan_ray.testing.simulation import Faults

SMALL = Node({"CPU": 2.0}, {})
GPU = Node({"CPU": 8.0, "GPU": 1.0}, {})
LACKS = "no node of the cluster has GPU: 1 (none has any); waits until one joins"


class Trains(koan.Job[int, int]):
    resources = koan.Resources(num_gpus=1)

    async def execute(self, context, progress, cancellation) -> int:
        return context


class Plain(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        return context


class TrainsItems(koan.FiniteJob[int, int, int]):
    resources = koan.Resources(num_gpus=1)

    def get_items(self, context):
        return range(context)

    def process_item(self, item, index, progress):
        return koan.ItemResult.success(item)

    def build_result(self, summary):
        return summary.processed_items


class Log:
    def __init__(self):
        self.told = []

    def bind(self, **_fields):
        return self

    def __getattr__(self, level):
        return lambda event, **fields: self.told.append((level, event, fields))


@pytest.fixture
def warned():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(each.message) for each in caught if issubclass(each.category, koan.JobWaitsWarning)]


def on_cluster(scenario, *nodes, **more):
    async def main():
        async with testing.engine(max_actors=2, **more) as engine:
            engine.launcher.cluster = list(nodes)
            await scenario(engine)

    testing.run(main())


async def reasons_of(engine, job) -> list[str | None]:
    """What each of those says that show a job."""
    (queried,) = await koan.Jobs.query(kind=job.kind)
    (outlined,), _ = await engine.coordinator.look("page", {"kind": job.kind})
    complete = await engine.coordinator.look("job", job.id)
    by_id = await engine.coordinator.look("reasons", [job.id])
    return [
        (await job.details()).reason, (await job.refresh())._view.reason, queried._view.reason, outlined.reason,
        complete.reason, by_id.get(job.id),
    ]  # fmt: skip


def test_the_submit_warns_once_for_a_spec_and_every_view_of_the_job_says_why(warned):
    async def scenario(engine):
        log = engine.coordinator._dispatcher.obstacles._log = Log()
        jobs = [await Trains.start(n).run() for n in range(3)]
        more = await Trains.start_many(range(20)).run()
        assert warned() == [f"job 'Trains': {LACKS}"]
        assert set(await reasons_of_first(engine, jobs[0])) == {LACKS}
        await asyncio.sleep(5)
        assert [told[:2] for told in log.told] == [("warning", "jobs_cannot_run")]
        (stuck,) = (await engine.coordinator.status())["cannot_run"]
        assert stuck == {"spec": "cpu=1 gpu=1", "reason": LACKS, "queued": 23}
        assert await (await Plain.start(7).run()).wait() == 7  # others are not held up

        engine.launcher.join(GPU)
        assert [await job.wait() for job in jobs] == [0, 1, 2]
        assert (await more[-1].wait(), (await jobs[0].details()).reason) == (19, None)
        assert (await engine.coordinator.status())["cannot_run"] == []
        await asyncio.sleep(1)
        assert [told[:2] for told in log.told][1:] == [("info", "jobs_can_run")]
        assert len(warned()) == 1

    async def reasons_of_first(engine, job):
        found = await koan.Jobs.query(kind=job.kind, limit=1)
        return [*await reasons_of_alone(engine, job), found[0]._view.reason]

    async def reasons_of_alone(engine, job):
        complete = await engine.coordinator.look("job", job.id)
        page, _ = await engine.coordinator.look("page", {"kind": job.kind, "limit": 1})
        by_id = await engine.coordinator.look("reasons", [job.id])
        return [
            (await job.details()).reason, (await job.refresh())._view.reason, page[0].reason, complete.reason,
            by_id[job.id],
        ]  # fmt: skip

    on_cluster(scenario, SMALL)


def test_items_that_no_node_can_process_are_told_of_by_the_job_that_they_belong_to(warned):
    async def scenario(engine):
        job = await TrainsItems.start(3).run()
        assert warned() == [f"job 'TrainsItems': {LACKS}"]
        await asyncio.sleep(3)
        await job.refresh()
        assert job.status is koan.JobStatus.RUNNING
        assert (await job.details()).reason == f"its items wait: {LACKS}"
        engine.launcher.join(GPU)
        assert await job.wait() == 3

    on_cluster(scenario, SMALL)


def test_a_class_that_no_process_has_introduced_is_named_until_one_does():
    async def main():
        database = testing.MemoryDatabase()
        sources = {"default": lambda: testing.MemoryDocumentStore(database, source="default")}
        async with testing.engine(sources=sources) as engine:
            job = await Plain.start(5).persist().delayed(1).run()
            terms, code = engine.coordinator._kinds._newest.copy(), dict(engine.coordinator._kinds._code)
            engine.launcher._kept.clear()
            engine.crash()
            await engine.restart()
            await asyncio.sleep(3)
            said = set(await reasons_of_stored(engine, job))
            assert len(said) == 1
            assert "no process of this engine has introduced the class 'Plain'" in said.pop()
            await engine.coordinator.introduce(list(terms.values()), code)
            assert await job.wait() == 5

    async def reasons_of_stored(engine, job):
        (queried,) = await koan.Jobs.query(kind=job.kind)
        by_id = await engine.coordinator.look("reasons", [job.id])
        return [
            (await job.details()).reason, (await job.refresh())._view.reason, queried._view.reason,
            (await engine.coordinator.look("job", job.id)).reason, by_id[job.id],
        ]  # fmt: skip

    testing.run(main())


def test_an_environment_that_cannot_be_built_is_the_reason_while_it_is_tried_again(warned):
    async def scenario(engine):
        job = await Plain.start(1).run()
        await asyncio.sleep(1)
        reason = (await job.details()).reason
        assert reason == "no job actor with cpu=1 could be started so far: simulated: could not be started"
        (stuck,) = (await engine.coordinator.status())["cannot_run"]
        assert stuck["reason"] == reason
        engine.launcher.faults.fail_start = 0.0
        assert await job.wait() == 1
        assert (await engine.coordinator.status())["cannot_run"] == []

    async def main():
        async with testing.engine(max_actors=1, faults=Faults(fail_start=1.0)) as engine:
            await scenario(engine)

    testing.run(main())


def test_where_nothing_is_reserved_nothing_is_missing(warned):
    with koan.init(runtime="local", engine={"max_actors": 1}):
        job = Trains.start(3).run().get(timeout=20)
        assert job.wait(timeout=20).get() == 3
    assert warned() == []


# --- details ---------------------------------------------------------------------------------------------------------------


class Fails(koan.Job[None, None]):
    retry = koan.RetryPolicy(max_attempts=2, initial_delay=60, jitter=0)

    async def execute(self, context, progress, cancellation) -> None:
        raise ValueError("always")


@pytest.mark.parametrize("persisted", [False, True], ids=["in memory", "as a document"])
def test_details_are_what_the_engine_keeps_of_a_job(persisted):
    async def main():
        database = testing.MemoryDatabase()
        sources = {"default": lambda: testing.MemoryDocumentStore(database, source="default")}
        async with testing.engine(sources=sources) as engine:
            start = Fails.start(None)
            job = await (start.persist(partition="hot").audit() if persisted else start).run()
            await asyncio.sleep(10)
            first = await job.details()
            assert isinstance(first, koan.JobDetails)
            assert (first.attempts, first.crashes, first.reason) == (1, 0, "retry")
            assert 45 < first.due_at.timestamp() - engine.clock.now() < 60
            assert (first.source, first.partition) == (("default", "hot") if persisted else (None, ""))
            assert first.actor.startswith("koan_ray.job/")
            assert first.node == "sim"
            with pytest.raises(koan.JobFailedError):
                await job.wait()
            again = await koan.Jobs.retry(job.id)
            last, new = await job.details(), await again.details()
            assert (last.attempts, last.reason, last.due_at, last.retried_by) == (2, "exhausted", None, again.id)
            assert (new.retry_of, new.retried_by) == (job.id, None)

    testing.run(main())


def test_details_of_a_job_that_is_nowhere_are_an_error():
    async def scenario(engine):
        job = await Plain.start(1).run()
        await job.wait()
        await job.remove()
        with pytest.raises(koan.JobNotFoundError):
            await job.details()

    on_cluster(scenario, SMALL)
