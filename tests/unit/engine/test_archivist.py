"""The archive: what moves and when, that a job is never nowhere, and that every interruption is made up for."""

from __future__ import annotations

import asyncio
import copy
import json
from datetime import timedelta

import pytest

import koan_ray as koan
from koan_ray import ambient, testing
from koan_ray.domain.archival import ArchivalPolicy, fingerprint
from koan_ray.domain.ids import new_id
from koan_ray.domain.records import FAILED, STREAMS, VALUES, Checkpoint, Part, Residence
from koan_ray.domain.status import JobStatus
from koan_ray.errors import ConfigurationError, JobNotFoundError, NonRetryable, RecordCorruptError, StoreUnavailableError
from koan_ray.ports import Change
from koan_ray.stores.codec import part_id
from koan_ray.testing.contracts import AT, audited, execution, job

AGE_S = 10.0
SOON = ArchivalPolicy("soon", older_than_s=AGE_S)


class Mail(koan.Job[str, str]):
    """Has produced something, as a job over items has."""

    async def execute(self, context, progress, cancellation) -> str:
        progress.report(0.5, "half")
        done = Checkpoint(1, b'{"done":[[0,3]]}', 4, 2, 0, 1, AT)
        parts = [Part(self.id, VALUES, n, b'["%b"]' % context.encode(), 1) for n in range(2)]
        dead = Part(self.id, FAILED, 0, b'[{"index":2,"a.b":[1.0]}]', 1)
        execution_id = ambient.attempt.get().order.execution_id
        assert await ambient.engine().checkpoint(self.id, execution_id, done, [*parts, dead])
        if context == "bad":
            raise NonRetryable("refused")
        await asyncio.sleep(0.01 if context != "long" else 1000)
        return context.upper()


class Report(Mail):
    kind = "report"


class Long(Mail):
    when_parent_ends = koan.ParentPolicy.ABANDON


class Parent(koan.Job[str, str]):
    async def execute(self, context, progress, cancellation) -> str:
        return (await self.start_child(Long, "long", key="x").run()).id


class Tampering(testing.MemoryDocumentStore):
    """Tells of each step of a move, before and after it is done: ``("put_copy", "before")``."""

    async def step(self, name, when, job_id):
        """Do nothing; a test replaces it."""

    async def put_copy(self, job, executions, partition):
        await self.step("put_copy", "before", job.id)
        await super().put_copy(job, executions, partition)
        await self.step("put_copy", "after", job.id)

    async def write_parts(self, partition, parts):
        await self.step("write_parts", "before", parts[0].job_id)
        await super().write_parts(partition, parts)
        await self.step("write_parts", "after", parts[0].job_id)

    async def read_parts(self, partition, job_id, stream, after=-1, limit=50):
        await self.step("read_parts", "before", job_id)
        return await super().read_parts(partition, job_id, stream, after, limit)

    async def get_copy(self, job_id, partition):
        await self.step("get_copy", "before", job_id)
        found = await super().get_copy(job_id, partition)
        await self.step("get_copy", "after", job_id)
        return found

    async def delete_if(self, job, partition):
        await self.step("delete_if", "before", job.id)
        is_deleted = await super().delete_if(job, partition)
        await self.step("delete_if", "after", job.id)
        return is_deleted


@pytest.fixture
def database():
    return testing.MemoryDatabase()


@pytest.fixture
def step():
    """What happens at each step; to be filled in."""
    return {}


@pytest.fixture
def documents(database, step):
    def open_engine(*policies, others=(), **settings):
        def connect(name, database):
            store = Tampering(database, source=name)
            if "does" in step:
                store.step = step["does"]
            return store

        databases = {"default": database, **dict(others)}
        sources = {name: lambda name=name, kept=kept: connect(name, kept) for name, kept in databases.items()}
        return testing.engine(sources=sources, archival_policies=policies or (SOON,), **settings)

    return open_engine


def run(scenario):
    return testing.run(scenario())


def where(database, job_id):
    return [partition for partition, jobs in database.jobs.items() if job_id in jobs]


async def ended(*contexts, of=Mail, partition="hot", age_s=AGE_S + 1):
    """Run jobs to their ends, and let them grow old."""
    jobs = [await of.start(context).persist(partition=partition).audit().run() for context in contexts]
    for one in jobs:
        try:
            await one.wait()
        except koan.JobFailedError:
            continue
    await asyncio.sleep(age_s)
    return jobs


async def seen(one):
    """What a reader can see of a job."""
    found = await koan.Jobs.get(one.id)
    produced = [await ambient.engine().parts(one.id, stream) for stream in STREAMS]
    fields = ("id", "status", "context", "progress", "error", "metadata", "created_at", "started_at", "completed_at")
    shown = [str(getattr(found, name, None)) for name in fields]
    return [
        *shown,
        found._view.items,
        produced,
        [(e.id, e.status, e.reason, e.started_at, e.completed_at) for e in await one.executions()],
    ]


# --- what moves ------------------------------------------------------------------------------------------------------


def test_old_jobs_move_with_their_executions_and_can_be_read_as_before(database, documents):
    async def scenario():
        async with documents() as engine:
            jobs = await ended("a", "bad", age_s=0)
            running = await Mail.start("long").persist(partition="hot").run()
            before = [await seen(one) for one in jobs]
            assert (await engine.coordinator.archive(False))["soon"]["due"] == 0  # not old enough
            await asyncio.sleep(AGE_S + 1)
            counts = await engine.coordinator.archive(False)
            assert counts["soon"] == {"due": 2, "moved": 2, "gone": 0, "changed": 0, "mismatched": 0, "interrupted": 0}
            assert [where(database, one.id) for one in jobs] == [["archive"]] * 2
            assert where(database, running.id) == ["hot"]
            assert not database.executions["hot"].keys() & database.executions["archive"].keys()
            assert len(database.executions["archive"]) == 2
            assert [await seen(one) for one in jobs] == before
            found = {one.id for one in await koan.Jobs.query(partition="*")}
            assert found == {running.id, *(one.id for one in jobs)}
            assert [one.id for one in await koan.Jobs.query()] == [running.id]
            await koan.Jobs.cancel(running.id)

    run(scenario)


def test_passes_come_by_themselves_and_are_counted(database, documents):
    async def scenario():
        async with documents(archive_interval_s=30.0) as engine:
            (one,) = await ended("a", age_s=0)
            await asyncio.sleep(29)
            assert where(database, one.id) == ["hot"]
            await asyncio.sleep(2)
            assert where(database, one.id) == ["archive"]
            told = (await engine.coordinator.status())["archival"]
            assert (told["enabled"], told["moved"], told["passes"]) == (True, 1, 1)
            assert told["batch_seconds"]["count"] == sum(told["batch_seconds"]["counts"]) == 1
            json.dumps(told)

    run(scenario)


def test_disabled_does_nothing_and_by_default_thirty_days_pass(database, documents):
    async def scenario():
        async with documents(archives=False, archive_interval_s=30.0):
            (one,) = await ended("a", age_s=1000)
            assert where(database, one.id) == ["hot"]
        async with documents(ArchivalPolicy()) as engine:
            for days, due in ((29.9, 0), (0.2, 1)):
                for name in ("completed_at", "last_modified"):
                    database.jobs["hot"][one.id][name] -= timedelta(days=days)
                assert (await engine.coordinator.archive(True))["default"]["due"] == due
            await asyncio.sleep(61)
            assert where(database, one.id) == ["archive"]

    run(scenario)


def test_a_dry_run_counts_and_changes_nothing(database, documents):
    async def scenario():
        async with documents(ArchivalPolicy("soon", older_than_s=AGE_S, batch=2)) as engine:
            await ended(*"abcde")
            before = copy.deepcopy((database.jobs, database.executions))
            assert (await engine.coordinator.archive(True))["soon"]["due"] == 5
            assert (database.jobs, database.executions) == before

    run(scenario)


def test_the_first_policy_that_covers_a_job_decides(database, documents):
    policies = (
        ArchivalPolicy("reports", kinds=("report",), older_than_s=1000),
        ArchivalPolicy("failures", statuses=(JobStatus.FAILED,), older_than_s=AGE_S, target_partition="archive-failed"),
        ArchivalPolicy("elsewhere", partition="cold", older_than_s=0),
        SOON,
    )

    async def scenario():
        async with documents(*policies) as engine:
            (good, bad), (report,) = await ended("a", "bad"), await ended("bad", of=Report)
            counts = await engine.coordinator.archive(False)
            assert {name: count["moved"] for name, count in counts.items()} == {
                "reports": 0, "failures": 1, "elsewhere": 0, "soon": 1,
            }  # fmt: skip
            assert where(database, good.id) == ["archive"]
            assert where(database, bad.id) == ["archive-failed"]
            assert where(database, report.id) == ["hot"]
            assert (await koan.Jobs.get(bad.id)).status is JobStatus.FAILED

    run(scenario)


def test_the_newest_of_each_kind_and_status_stay(database, documents):
    policy = ArchivalPolicy("soon", older_than_s=AGE_S, keep=2, batch=1)

    async def scenario():
        async with documents(policy) as engine:
            mails = await ended(*"abcd", age_s=0)
            reports = await ended(*"ab", of=Report, partition="cold")
            assert (await engine.coordinator.archive(False))["soon"]["moved"] == 2
            assert [where(database, one.id) for one in mails] == [["archive"]] * 2 + [["hot"]] * 2
            assert [where(database, one.id) for one in reports] == [["cold"]] * 2
            assert (await engine.coordinator.archive(False))["soon"]["due"] == 0

    run(scenario)


def test_a_parent_moves_while_its_child_goes_on(database, documents):
    async def scenario():
        async with documents() as engine:
            parent = await Parent.start("p").persist().run()
            await parent.wait()
            await asyncio.sleep(AGE_S + 1)
            (child,) = await parent.get_children()
            assert (await engine.coordinator.archive(False))["soon"]["moved"] == 1
            assert (await child.get_parent()).id == parent.id
            await koan.Jobs.cancel(child.id)

    run(scenario)


# --- never in neither place --------------------------------------------------------------------------------------------

STEPS = [(name, when) for name in ("get_copy", "write_parts", "put_copy", "delete_if") for when in ("before", "after")]
STEPS += [("read_parts", "before")]


async def watch(job_id, misses):
    """Look for a job again and again; also while no coordinator is there."""
    while True:
        try:
            await koan.Jobs.get(job_id)
        except JobNotFoundError:
            misses.append(job_id)
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("direction", ["archive", "restore"])
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("at", STEPS, ids="-".join)
def test_a_crash_at_any_step_is_made_up_for(database, documents, step, at, nth, direction):
    """The second job is on its way when the coordinator is gone; get_copy comes three times in a move, read_parts six."""
    crashed, armed = [], []

    async def scenario():
        async with documents(archive_interval_s=20.0) as engine:
            jobs = await ended("a", "bad", "c", age_s=0)
            before = [await seen(one) for one in jobs]
            n_seen = 0
            if direction == "restore":
                await asyncio.sleep(AGE_S + 1)
                await engine.coordinator.archive(False)

            another = testing.MemoryDocumentStore(database)
            await another.open()
            misses = []

            async def does(name, when, job_id):
                nonlocal n_seen
                await asyncio.sleep(0.002)
                misses.extend([one.id for one in jobs if await another.get(one.id) is None])
                n_seen += armed == [True] and job_id == jobs[1].id and (name, when) == at
                if n_seen == nth and not crashed:
                    crashed.append(at)
                    engine.crash()
                    await asyncio.Event().wait()

            step["does"] = engine.coordinator._catalog.sources["default"].tenures[0].store.step = does
            readers = [asyncio.ensure_future(watch(one.id, misses)) for one in jobs]
            armed.append(True)
            if direction == "restore":
                engine.coordinator._tasks.spawn(engine.coordinator.restore(jobs[1].id))
            await asyncio.sleep(AGE_S + 12 if direction == "archive" else 1)
            assert all(where(database, one.id) for one in jobs)
            if crashed:
                await engine.restart()
            if direction == "restore":
                await koan.Jobs.restore(jobs[1].id)
                assert where(database, jobs[1].id) == ["hot"]
            else:
                await asyncio.sleep(41)
                assert [where(database, one.id) for one in jobs] == [["archive"]] * 3
                assert not database.executions["hot"]
                assert not database.parts["hot"]
            assert misses == []
            assert [await seen(one) for one in jobs] == before
            for reader in readers:
                reader.cancel()

    run(scenario)
    assert crashed or nth > 1


@pytest.mark.parametrize("fault", ["lose_replies", "lose_requests"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_an_answer_that_is_lost_is_looked_up(database, documents, fault, n):
    async def scenario():
        async with documents(lease_ttl_s=600) as engine:
            jobs = await ended("a", "b")
            before = [await seen(one) for one in jobs]
            setattr(database.faults, fault, n)
            await engine.coordinator.archive(False)
            await engine.coordinator.archive(False)
            assert database.faults.n_fired == n
            assert [where(database, one.id) for one in jobs] == [["archive"]] * 2
            assert not database.executions["hot"]
            assert not database.parts["hot"]
            assert [await seen(one) for one in jobs] == before

    run(scenario)


def test_an_outage_leaves_the_rest_to_the_next_pass(database, documents, step):
    async def scenario():
        async with documents() as engine:
            jobs = await ended("a", "b")

            async def does(name, when, job_id):
                database.faults.unavailable = (name, when) == ("put_copy", "before")

            store = engine.coordinator._catalog.sources["default"].tenures[0].store
            store.step = does
            counts = (await engine.coordinator.archive(False))["soon"]
            assert (counts["moved"], counts["interrupted"]) == (0, 1)
            database.faults.unavailable = False
            assert all("hot" in where(database, one.id) for one in jobs)
            del store.step
            await asyncio.sleep(20)
            assert (await engine.coordinator.archive(False))["soon"]["moved"] == 2

    run(scenario)


def test_a_copy_that_cannot_be_read_back_equal_keeps_the_source(database, documents):
    async def scenario():
        async with documents() as engine:
            bad, good = await ended("a", "b")
            store = engine.coordinator._catalog.sources["default"].tenures[0].store

            async def does(name, when, job_id):
                if (name, when, job_id) == ("put_copy", "after", bad.id):
                    database.jobs["archive"][job_id]["result"] = "rotten"

            store.step = does
            began = asyncio.get_running_loop().time()
            counts = (await engine.coordinator.archive(False))["soon"]
            assert (counts["moved"], counts["mismatched"]) == (1, 1)
            assert asyncio.get_running_loop().time() - began == pytest.approx(10)  # three tries, five seconds apart
            assert where(database, bad.id) == ["hot", "archive"]
            assert where(database, good.id) == ["archive"]
            assert (await koan.Jobs.get(bad.id)).result == "A"
            del store.step
            assert (await engine.coordinator.archive(False))["soon"]["moved"] == 1
            assert database.jobs["archive"][bad.id]["result"] == "A"
            assert (await engine.coordinator.status())["archival"]["mismatched"] == 1

    run(scenario)


@pytest.mark.parametrize("harm", ["changed", "missing", "missing in the source"])
def test_a_job_stays_whose_parts_could_not_be_read_back_equal(database, documents, harm):
    async def scenario():
        async with documents() as engine:
            bad, good = await ended("a", "b")
            before = await seen(bad)
            key = part_id(bad.id, VALUES, 1)
            store = engine.coordinator._catalog.sources["default"].tenures[0].store

            async def does(name, when, job_id):
                if (name, when, job_id) == ("put_copy", "after", bad.id):
                    if harm == "changed":
                        database.parts["archive"][key]["items_json"] = '["rotten"]'
                    elif harm == "missing":
                        del database.parts["archive"][key]

            store.step = does
            kept = database.parts["hot"].pop(key) if harm == "missing in the source" else None
            counts = (await engine.coordinator.archive(False))["soon"]
            assert (counts["moved"], counts["mismatched"]) == (1, 1)
            assert "hot" in where(database, bad.id)
            assert where(database, good.id) == ["archive"]
            del store.step
            if kept is not None:
                with pytest.raises(RecordCorruptError, match=r"parts\.values\.1: is missing"):
                    await ambient.engine().parts(bad.id, VALUES, 0)
                database.parts["hot"][key] = kept
            assert await seen(bad) == before
            assert (await engine.coordinator.archive(False))["soon"]["moved"] == 1
            assert await seen(bad) == before

    run(scenario)


def test_parts_are_read_whole_at_every_step_of_a_move(database, documents):
    async def scenario():
        async with documents() as engine:
            (one,) = await ended("a")
            before, read = (await seen(one))[-2], []
            store = engine.coordinator._catalog.sources["default"].tenures[0].store

            async def does(name, when, job_id):
                if name != "read_parts":
                    read.append([await ambient.engine().parts(one.id, stream) for stream in STREAMS])

            store.step = does
            assert (await engine.coordinator.archive(False))["soon"]["moved"] == 1
            await koan.Jobs.restore(one.id)
            assert len(read) > 20
            assert all(found == before for found in read)

    run(scenario)


def test_what_was_copied_of_a_job_that_was_then_removed_goes_too(database, documents, step):
    async def scenario():
        async with documents(archives=False) as engine:
            (one,) = await ended("a")
            store = engine.coordinator._catalog.sources["default"].tenures[0].store

            async def does(name, when, job_id):
                if (name, when) == ("put_copy", "before"):  # the answer is lost, and somebody removes the job
                    del store.step
                    del database.jobs["hot"][job_id]
                    database.parts["hot"].clear()
                    raise StoreUnavailableError("cut off")

            store.step = does
            assert (await engine.coordinator.archive(False))["soon"]["gone"] == 1
            assert where(database, one.id) == []
            assert not any(database.parts.values())

    run(scenario)


def test_a_copy_that_is_there_is_compared_and_not_written_again(database, documents):
    async def scenario():
        async with documents() as engine:
            (one,) = await ended("a")
            store = engine.coordinator._catalog.sources["default"].tenures[0].store
            record, executions = await store.get_copy(one.id, "hot")
            for stream in STREAMS:
                await store.write_parts("archive", await store.read_parts("hot", one.id, stream))
            await store.put_copy(record, executions, "archive")
            assert [found.id for found in await koan.Jobs.query(partition="*")] == [one.id]  # it is in both
            written = []

            async def does(name, when, job_id):
                written.extend([name] if name in ("put_copy", "write_parts") else [])

            store.step = does
            assert (await engine.coordinator.archive(False))["soon"]["moved"] == 1
            assert written == []
            assert where(database, one.id) == ["archive"]

    run(scenario)


def test_a_lost_lease_stops_a_pass_at_once(database, documents):
    async def scenario():
        async with documents() as engine:
            jobs = await ended("a", "b", "c")
            tenure = engine.coordinator._catalog.sources["default"].tenures[0]

            async def does(name, when, job_id):
                if (name, when) == ("put_copy", "after"):
                    tenure._note_replaced()

            tenure.store.step = does
            counts = (await engine.coordinator.archive(False))["soon"]
            assert (counts["moved"], counts["interrupted"]) == (0, 1)
            assert all("hot" in where(database, one.id) for one in jobs)

    run(scenario)


def test_a_job_that_is_removed_while_it_moves_does_not_come_back(database, documents):
    async def scenario():
        async with documents() as engine:
            (one,) = await ended("a")

            async def does(name, when, job_id):
                await asyncio.sleep(0.01)

            engine.coordinator._catalog.sources["default"].tenures[0].store.step = does
            passing = asyncio.ensure_future(engine.coordinator.archive(False))
            await asyncio.sleep(0.015)
            await koan.Jobs.remove(one.id)
            await passing
            assert where(database, one.id) == []
            assert not any(database.executions.values())
            assert not any(database.parts.values())

    run(scenario)


# --- another source ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attic", "zoo"])
def test_the_target_may_be_another_source(database, documents, name):
    other = testing.MemoryDatabase()
    policies = (ArchivalPolicy("away", older_than_s=AGE_S, source="default", target_source=name),)

    async def scenario():
        async with documents(*policies, others={name: other}) as engine:
            (one,) = await ended("a")
            before, misses = await seen(one), []
            reader = asyncio.ensure_future(watch(one.id, misses))
            assert (await engine.coordinator.archive(False))["away"]["moved"] == 1
            assert (where(database, one.id), where(other, one.id)) == ([], ["archive"])
            assert await seen(one) == before
            await koan.Jobs.restore(one.id)
            assert (where(database, one.id), where(other, one.id)) == (["hot"], [])
            assert await seen(one) == before
            assert misses == []
            reader.cancel()

    run(scenario)


def test_a_policy_that_names_no_source_of_ours_is_told(database, documents):
    async def scenario():
        async with documents(ArchivalPolicy("away", older_than_s=0, target_source="nowhere")) as engine:
            (one,) = await ended("a")
            assert (await engine.coordinator.archive(False))["away"]["interrupted"] == 1
            assert where(database, one.id) == ["hot"]

    run(scenario)


# --- back --------------------------------------------------------------------------------------------------------------


def test_a_job_comes_back_to_where_it_was_and_stays_for_its_age(database, documents):
    async def scenario():
        async with documents() as engine:
            (one,) = await ended("a")
            before = await seen(one)
            await engine.coordinator.archive(False)
            for _ in range(2):
                assert (await koan.Jobs.restore(one.id)).id == one.id
                assert where(database, one.id) == ["hot"]
                assert not database.executions["archive"]
                assert not database.parts["archive"]
            assert await seen(one) == before
            assert (await engine.coordinator.archive(False))["soon"]["due"] == 0
            await asyncio.sleep(AGE_S + 1)
            assert (await engine.coordinator.archive(False))["soon"]["moved"] == 1
            with pytest.raises(JobNotFoundError):
                await koan.Jobs.restore(new_id())

    run(scenario)


def test_a_delete_of_an_earlier_holder_does_not_match_what_was_brought_back(database, documents):
    async def scenario():
        async with documents() as engine:
            (one,) = await ended("a")
            store = engine.coordinator._catalog.sources["default"].tenures[0].store
            stale = await store.get(one.id)
            await engine.coordinator.archive(False)
            await koan.Jobs.restore(one.id)
            assert await store.delete_if(stale, "hot") is False
            assert where(database, one.id) == ["hot"]

    run(scenario)


def test_a_holder_that_was_paused_in_the_middle_of_a_move_does_no_harm(database, documents):
    """Its copy arrives after its successor has archived the job and brought it back."""

    async def scenario():
        async with documents(seed=1, archives=False) as first:
            (one,) = await ended("a")
            before, go_on = await seen(one), asyncio.Event()
            tenure = first.coordinator._catalog.sources["default"].tenures[0]

            async def does(name, when, job_id):
                if (name, when) == ("put_copy", "before"):
                    await go_on.wait()

            tenure.store.step = does
            passing = asyncio.ensure_future(first.coordinator.archive(False))
            await asyncio.sleep(0)
            tenure._stop_beating()
            async with documents(seed=2, archives=False) as second:
                await second.coordinator._catalog.sources["default"].tenures[0].ready()
                assert (await second.coordinator.archive(False))["soon"]["moved"] == 1
                await second.coordinator.restore(one.id)
                go_on.set()
                assert (await passing)["soon"]["interrupted"] == 1
                assert where(database, one.id) == ["hot", "archive"]
                assert await seen(one) == before
                await asyncio.sleep(AGE_S + 1)
                assert (await second.coordinator.archive(False))["soon"]["moved"] == 1
                assert where(database, one.id) == ["archive"]
                assert await seen(one) == before

    run(scenario)


def test_an_archived_job_is_run_again_where_it_came_from(database, documents):
    async def scenario():
        async with documents() as engine:
            (one,) = await ended("bad")
            await engine.coordinator.archive(False)
            again = await koan.Jobs.retry(one.id)
            assert where(database, again.id) == ["hot"]

    run(scenario)


def test_nothing_is_brought_back_without_the_lease(database, documents):
    async def scenario():
        async with documents() as engine:
            (one,) = await ended("a")
            await engine.coordinator.archive(False)
            engine.coordinator._catalog.sources["default"].tenures[0]._beat_at = float("-inf")
            database.faults.lose_requests = 1000
            with pytest.raises(StoreUnavailableError):
                await engine.coordinator.restore(one.id)
            database.faults.lose_requests = 0
            assert where(database, one.id) == ["archive"]

    run(scenario)


# --- policies and fingerprints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"name": "a b"}, "name"),
        ({"statuses": ()}, "statuses"),
        ({"statuses": (JobStatus.RUNNING,)}, "statuses"),
        ({"kinds": ()}, "kinds"),
        ({"older_than_s": -1}, "older_than_s"),
        ({"older_than_s": float("nan")}, "older_than_s"),
        ({"partition": "archive-old"}, "partition"),
        ({"target_partition": "hot"}, "target_partition"),
        ({"target_partition": "archive-É"}, "target_partition"),
        ({"keep": -1}, "keep"),
        ({"batch": 0}, "batch"),
    ],
)
def test_a_policy_that_cannot_be_used_is_refused_by_field(fields, names):
    with pytest.raises(ConfigurationError, match=f"archival policy .*: {names}: "):
        ArchivalPolicy(**fields)


CHANGES = {
    "status": JobStatus.FAILED, "result": b"[2]", "context": b'{"a":1}', "reason": "x", "attempts": 9, "crashes": 1,
    "completed_at": AT + 1, "execution_id": "e", "cancel_requested_at": AT, "ordinal": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_fingerprint_tells_what_a_reader_can_tell(name):
    record = job(status=JobStatus.COMPLETED, completed_at=AT, result=b"[1]")
    assert fingerprint(record, []) != fingerprint(record.evolve(**{name: CHANGES[name]}), [])


def test_a_fingerprint_ignores_bookkeeping_and_the_form_of_json():
    record = job(status=JobStatus.COMPLETED, completed_at=AT, result=b'{"a": 1, "b": 2}')
    run_ = execution(record)
    place = record.particulars._replace(residence=Residence("x", "archive", audit=False, origin=(None, "hot")))
    same = record.evolve(rev=9, term=3, last_modified=AT + 5, result=b'{"b":2,"a":1}', particulars=place)
    assert fingerprint(record, [run_]) == fingerprint(same, [run_])
    assert fingerprint(record, [run_]) != fingerprint(record, [])


def test_where_a_job_came_from_is_kept_with_its_copy():
    async def scenario():
        store = testing.MemoryDocumentStore()
        await store.open()
        record = audited(status=JobStatus.COMPLETED, completed_at=AT, partition="hot")
        await store.apply([Change(record, 0)])
        residence = Residence(None, "archive", audit=True, origin=("jobs", "hot"))
        await store.put_copy(record.evolve(particulars=record.particulars._replace(residence=residence)), [], "archive")
        found, _ = await store.get_copy(record.id, "archive")
        assert found.particulars.residence == residence

    run(scenario)


def test_executions_that_an_interrupted_delete_left_are_gone_after_the_next_pass(database, documents):
    async def scenario():
        async with documents() as engine:
            (one,) = await ended("a")
            before = await seen(one)
            database.faults.tear_delete = 1
            passing = asyncio.ensure_future(engine.coordinator.archive(False))
            await asyncio.sleep(0.1)
            assert where(database, one.id) == ["archive"]
            assert len(database.executions["hot"]) == len(database.executions["archive"]) == 1
            engine.crash()
            passing.cancel()
            await engine.restart()
            assert await seen(one) == before
            await engine.coordinator.archive(False)
            assert not database.executions["hot"]
            assert database.moves is None
            assert await seen(one) == before

    run(scenario)


def test_finishing_moves_leaves_alone_what_has_not_moved(database, documents):
    async def scenario():
        async with documents() as engine:
            one, two = await ended("a", "b", age_s=0)
            store = engine.coordinator._catalog.sources["default"].store
            await store.note_moves("hot", [one.id])
            await engine.coordinator.archive(False)
            assert len(database.executions["hot"]) == 2
            assert {len(await each.executions()) for each in (one, two)} == {1}

    run(scenario)
