"""The promises of a store and of a launcher, as suites of tests: subclass one and supply its fixture.

::

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self):
            return MyStore(...)


    class TestMyLauncher(LauncherContract):
        @pytest.fixture
        async def yard(self):
            yard = Yard(ship)
            yard.launcher = MyLauncher(YARD_SETTINGS, ...)
            yield yard
            yard.launcher.stop()
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from koan_ray.domain.ids import new_id
from koan_ray.domain.query import parse_query
from koan_ray.domain.records import ActorSpec, ErrorInfo, ExecutionRecord, JobRecord, Particulars, Terms
from koan_ray.domain.retry import RetryPolicy
from koan_ray.domain.status import ExecutionStatus, JobStatus, Reason
from koan_ray.engine.settings import EngineSettings
from koan_ray.ports import Change
from koan_ray.testing.yard import Echo, Lingers

if TYPE_CHECKING:
    from koan_ray.ports import JobStore
    from koan_ray.testing.yard import Yard

AT = 1_800_000_000.0
YARD_SETTINGS = EngineSettings(overrun_s=0.25, cancel_grace_s=0.5)


def job(*, kind: str = "mail", at: float = AT, status: JobStatus = JobStatus.QUEUED, rev: int = 1, **more: Any) -> JobRecord:
    """Return a record; ``more`` are fields of `Particulars` or of `JobRecord`."""
    about = {name: more.pop(name) for name in list(more) if name in Particulars._fields}
    terms = Terms(f"terms-{kind}", kind, "code", RetryPolicy(), None, ActorSpec())
    record = JobRecord(new_id(), terms, Particulars(**about), b"{}", at, status, rev, queued_at=at, last_modified=at)
    return record.evolve(**more)


def execution(of: JobRecord, *, attempt: int = 1, at: float = AT) -> ExecutionRecord:
    """Return an open execution of a job."""
    return ExecutionRecord(new_id(), of.id, attempt, at)


class StoreContract:
    """What every `koan_ray.ports.JobStore` keeps."""

    async def test_what_was_written_is_read(self, store: JobStore) -> None:
        """A record comes back with the values it was given."""
        record = job(name="n", metadata={"a": [1, {"b": None}]}, correlation_id="c")
        assert await store.apply([Change(record, 0)]) == []
        found = await store.get(record.id)
        assert found is not None
        assert (found.id, found.rev, found.status, found.context) == (record.id, 1, JobStatus.QUEUED, b"{}")
        assert found.particulars == record.particulars
        assert found.terms == record.terms

    async def test_a_job_that_is_not_there_is_none(self, store: JobStore) -> None:
        """Neither the job nor executions of it."""
        assert await store.get(new_id()) is None
        assert await store.executions(new_id()) == []

    async def test_an_id_is_inserted_once(self, store: JobStore) -> None:
        """A second insert is refused and changes nothing."""
        record = job(name="first")
        await store.apply([Change(record, 0)])
        second = Change(record.evolve(particulars=Particulars(name="second")), 0)
        assert await store.apply([second]) == [second]
        found = await store.get(record.id)
        assert found is not None
        assert found.particulars.name == "first"

    async def test_a_write_under_an_old_rev_changes_nothing(self, store: JobStore) -> None:
        """Compare-and-set: of two writers that read the same rev, one is refused."""
        record = job()
        await store.apply([Change(record, 0)])
        assert await store.apply([Change(record.evolve(rev=2, status=JobStatus.RUNNING), 1)]) == []
        late = Change(record.evolve(rev=2, status=JobStatus.CANCELLED), 1)
        assert await store.apply([late]) == [late]
        early = Change(record.evolve(rev=9, status=JobStatus.CANCELLED), 8)
        assert await store.apply([early]) == [early]
        found = await store.get(record.id)
        assert found is not None
        assert (found.status, found.rev) == (JobStatus.RUNNING, 2)

    async def test_a_refused_change_does_not_hold_up_its_neighbours(self, store: JobStore) -> None:
        """Changes of one batch are independent."""
        first, second, third = job(), job(), job()
        await store.apply([Change(second, 0)])
        refused = Change(second.evolve(), 0)
        assert await store.apply([Change(first, 0), refused, Change(third, 0)]) == [refused]
        assert await store.get(first.id) is not None
        assert await store.get(third.id) is not None

    async def test_a_refused_change_writes_none_of_its_executions(self, store: JobStore) -> None:
        """The executions belong to the change."""
        record = job()
        await store.apply([Change(record, 0)])
        await store.apply([Change(record.evolve(rev=5), 4, (execution(record),))])
        assert await store.executions(record.id) == []

    async def test_executions_are_listed_oldest_first_and_closed_once(self, store: JobStore) -> None:
        """A closed execution is never rewritten."""
        record = job()
        first, second = execution(record), execution(record, attempt=2, at=AT + 10)
        ended = first.close(status=ExecutionStatus.FAILED, reason=Reason.RETRY, at=AT + 1, error=ErrorInfo("E", "m", "t"))
        await store.apply([Change(record, 0, (first,))])
        await store.apply([Change(record.evolve(rev=2), 1, (ended,))])
        await store.apply([Change(record.evolve(rev=3), 2, (second,))])
        again = first.close(status=ExecutionStatus.SUCCEEDED, reason=Reason.SUCCEEDED, at=AT + 2)
        await store.apply([Change(record.evolve(rev=4), 3, (again,))])
        found = await store.executions(record.id)
        assert [(e.id, e.status) for e in found] == [
            (first.id, ExecutionStatus.FAILED), (second.id, ExecutionStatus.RUNNING)
        ]  # fmt: skip
        assert found[0].error == ErrorInfo("E", "m", "t")
        assert found[0].completed_at == AT + 1

    async def test_removing_takes_the_executions_along(self, store: JobStore) -> None:
        """Removing twice is told apart from removing once."""
        record = job()
        await store.apply([Change(record, 0, (execution(record),))])
        assert await store.remove(record.id) is True
        assert await store.remove(record.id) is False
        assert await store.get(record.id) is None
        assert await store.executions(record.id) == []

    async def test_queries_find_what_the_reference_finds(self, store: JobStore) -> None:
        """Filters, order and limit agree with `Query.matches` and `Query.sort_key` on a random population."""
        random = Random(7)
        parent = new_id()
        everything = [
            job(
                kind=random.choice(["mail", "report"]), at=AT + random.randrange(50),
                status=status, correlation_id=random.choice([None, "c1", "c2"]),
                name=random.choice([None, "Nightly backup", "import"]), parent_job_id=random.choice([None, parent]),
                metadata=random.choice([None, {"tenant": 1}, {"tenant": 2, "x": {"y": [1]}}]),
                completed_at=AT + random.randrange(50) if status.is_final else None,
            )
            for status in random.choices(list(JobStatus), k=200)
        ]  # fmt: skip
        await store.apply([Change(record, 0) for record in everything])
        for filters in (
            {}, {"kind": "mail"}, {"kind": ["mail", "report"]}, {"status": "failed"}, {"status": ["queued", "running"]},
            {"correlation_id": "c1"}, {"parent_job_id": parent}, {"name": "import"}, {"text": "BACKUP"},
            {"metadata": {"tenant": 1}}, {"metadata": {"x": {"y": [1]}}},
            {"created_after": AT + 10, "created_before": AT + 30},
            {"completed_after": AT + 5, "completed_before": AT + 40, "order_by": "completed_at"},
            {"order_by": "created_at", "limit": 7}, {"kind": "mail", "status": "completed", "order_by": "-queued_at"},
        ):  # fmt: skip
            query = parse_query(filters)
            expected = sorted((r for r in everything if query.matches(r)), key=query.sort_key, reverse=query.descending)
            page = await store.query(query)
            assert [r.id for r in page.jobs] == [r.id for r in expected[: query.limit]], filters
            assert (page.cursor is None) == (len(expected) <= query.limit), filters
            assert await store.count(query) == len(expected), filters

    async def test_pages_are_stable_while_jobs_are_added_and_removed(self, store: JobStore) -> None:
        """Every job that was there throughout is seen exactly once."""
        kept = [job(at=AT + n // 3) for n in range(60)]
        await store.apply([Change(record, 0) for record in kept])
        seen: list[str] = []
        cursor: str | None = None
        while True:
            page = await store.query(parse_query({"order_by": "created_at", "limit": 7, "cursor": cursor}))
            seen += [record.id for record in page.jobs]
            cursor = page.cursor
            if cursor is None:
                break
            passing = job(at=AT - 5)  # before the cursor: must not be seen, and must not shift the pages
            await store.apply([Change(passing, 0)])
        assert seen == [record.id for record in sorted(kept, key=lambda r: (r.created_at, r.id))]


class LauncherContract:
    """What every `koan_ray.ports.Launcher` keeps; ``yard`` holds one that was made with `YARD_SETTINGS`."""

    async def test_a_started_actor_becomes_ready(self, yard: Yard) -> None:
        """Once, and before anything else."""
        name = await yard.ready()
        assert [told.what for told in yard.of(name)][:1] == ["actor_ready"]
        assert len(yard.of(name, "actor_ready")) == 1
        assert yard.launcher.capacity() >= 1

    async def test_bodies_that_end_in_time_are_in_the_answer(self, yard: Yard) -> None:
        """With their results, and nothing is pushed as well."""
        name = await yard.ready()
        batch, orders = yard.order(name, *((Echo, n) for n in range(20)))
        reply = await yard.reply(batch)
        assert [report.result for report in reply.ended] == [str(n).encode() for n in range(20)]
        assert [report.execution_id for report in reply.ended] == [order.execution_id for order in orders]
        assert (reply.running, reply.returned, yard.pushed_reports()) == ([], [], [])

    async def test_every_order_is_in_exactly_one_list_of_the_answer(self, yard: Yard) -> None:
        """What ended, what goes on, and what was not begun."""
        name = await yard.ready()
        batch, orders = yard.order(name, (Echo, 1), (Lingers, 0.75), (Echo, 2), (Echo, 3))
        reply = await yard.reply(batch)
        first, long, *others = [order.execution_id for order in orders]
        assert [report.execution_id for report in reply.ended] == [first]
        assert [running.execution_id for running in reply.running] == [long]
        assert reply.returned == others

    async def test_a_long_body_is_answered_as_running_and_its_end_is_pushed(self, yard: Yard) -> None:
        """The answer does not wait for it."""
        name = await yard.ready()
        batch, (order,) = yard.order(name, (Lingers, 0.75))
        (running,) = (await yard.reply(batch)).running
        assert running.job_id == order.job_id
        assert 0 < running.age_s < 0.75
        (report,) = await yard.ends(order)
        assert report.outcome == "succeeded"
        assert yard.pushed_reports() == [report]

    async def test_what_came_back_can_be_ordered_again(self, yard: Yard) -> None:
        """The actor has forgotten it; it takes new orders while a body goes on, and gives them back."""
        name = await yard.ready()
        first, (long, echo) = yard.order(name, (Lingers, 1.0), (Echo, 1))
        assert (await yard.reply(first)).returned == [echo.execution_id]
        second, (again,) = yard.order(name, (Echo, 1))
        assert (await yard.reply(second)).returned == [again.execution_id]
        await yard.ends(long)
        third, (last,) = yard.order(name, (Echo, 1))
        assert [report.execution_id for report in (await yard.reply(third)).ended] == [last.execution_id]

    async def test_two_batches_are_taken_at_a_time(self, yard: Yard) -> None:
        """Each has its own answer."""
        name = await yard.ready()
        sent = [yard.order(name, *((Echo, n) for n in range(5))) for _ in range(2)]
        for batch, orders in sent:
            reply = await yard.reply(batch)
            assert {report.execution_id for report in reply.ended} == {order.execution_id for order in orders}

    async def test_as_many_bodies_run_at_a_time_as_the_spec_says(self, yard: Yard) -> None:
        """The next one comes back."""
        name = await yard.ready(ActorSpec(num_cpus=0.5, concurrency=3))
        batch, orders = yard.order(name, *[(Lingers, 0.75)] * 4)
        reply = await yard.reply(batch)
        assert [running.execution_id for running in reply.running] == [order.execution_id for order in orders[:3]]
        assert reply.returned == [orders[3].execution_id]

    async def test_a_batch_that_should_have_been_brief_is_answered_when_hurried(self, yard: Yard) -> None:
        """Once; its body goes on."""
        name = await yard.ready()
        batch, (order,) = yard.order(name, (Lingers, 0.75), is_brief=True)
        await yard.begun(order)
        yard.launcher.hurry(name, batch)
        assert [running.execution_id for running in (await yard.reply(batch)).running] == [order.execution_id]
        await yard.ends(order)
        yard.launcher.hurry(name, batch)
        await self._exchange(yard, name)
        assert (await yard.reply(batch)).ended == []

    async def test_an_order_that_was_cancelled_before_it_began_never_begins(self, yard: Yard) -> None:
        """It ends as cancelled, without a body."""
        name = await yard.ready()
        batch, (long, waits) = yard.order(name, (Lingers, 0.75), (Lingers, 0.0))
        await yard.begun(long)
        yard.launcher.cancel(name, waits.execution_id, "cancelled")
        (report,) = await yard.ends(waits)
        assert (report.outcome, report.duration_s, report.progress) == ("cancelled", 0.0, None)
        assert (await yard.reply(batch)).returned == []

    async def test_cancelling_a_running_async_body_ends_it(self, yard: Yard) -> None:
        """Whether its batch was answered or not; the actor goes on."""
        name = await yard.ready()
        for is_answered in (False, True):
            batch, (order,) = yard.order(name, (Lingers, 3600.0))
            await yard.begun(order)
            if is_answered:
                await yard.reply(batch)
            yard.launcher.cancel(name, order.execution_id, "cancelled")
            (report,) = await yard.ends(order)
            assert report.outcome == "cancelled"
        await self._exchange(yard, name)

    async def test_a_cancel_that_comes_too_late_changes_nothing(self, yard: Yard) -> None:
        """Nor does one for an execution that the actor never had."""
        name = await yard.ready()
        _, (order,) = yard.order(name, (Echo, 1))
        await yard.ends(order)
        yard.launcher.cancel(name, order.execution_id, "cancelled")
        yard.launcher.cancel(name, "nobody", "cancelled")
        await self._exchange(yard, name)
        assert [report.outcome for report in await yard.ends(order)] == ["succeeded"]

    async def test_a_killed_actor_is_dead_once_and_says_nothing_more(self, yard: Yard) -> None:
        """Whatever it was doing."""
        name = await yard.ready()
        _, (order,) = yard.order(name, (Lingers, 3600.0))
        await yard.begun(order)
        yard.order(name, (Echo, 1))
        yard.launcher.kill(name)
        yard.launcher.kill(name)
        assert await yard.dead(name)
        yard.launcher.kill(name)
        n_told = len(yard.of(name))
        await self._exchange(yard, await yard.ready())
        assert len(yard.of(name)) == n_told
        assert yard.of(name)[-1].what == "actor_dead"
        assert len(yard.of(name, "actor_dead")) == 1

    async def test_an_actor_that_is_killed_while_it_starts_is_dead(self, yard: Yard) -> None:
        """It may have been ready in between."""
        name = yard.start()
        yard.launcher.kill(name)
        assert await yard.dead(name)
        await self._exchange(yard, await yard.ready())
        assert [told.what for told in yard.of(name)][-1:] == ["actor_dead"]

    async def test_an_actor_that_cannot_start_is_dead(self, yard: Yard) -> None:
        """Once, with a cause, and it was never ready."""
        if yard.fails_to_start is not None:
            name = yard.start(yard.fails_to_start)
            assert await yard.dead(name)
            assert [told.what for told in yard.of(name)] == ["actor_dead"]

    async def test_an_idle_actor_can_be_retired(self, yard: Yard) -> None:
        """It is dead once."""
        name = await yard.ready()
        yard.launcher.retire(name)
        assert await yard.dead(name)
        await self._exchange(yard, await yard.ready())
        assert len(yard.of(name, "actor_dead")) == 1

    async def test_what_is_asked_of_an_actor_that_is_gone_changes_nothing(self, yard: Yard) -> None:
        """Nor does it raise: the coordinator may not have heard of the death."""
        name = await yard.ready()
        yard.launcher.kill(name)
        await yard.dead(name)
        n_told = len(yard.of(name))
        batch, (order,) = yard.order(name, (Echo, 1))
        yard.launcher.hurry(name, batch)
        yard.launcher.cancel(name, order.execution_id, "cancelled")
        yard.launcher.attend(name, order.execution_id, "Echo")
        yard.launcher.retire(name)
        await self._exchange(yard, await yard.ready())
        assert len(yard.of(name)) == n_told

    async def _exchange(self, yard: Yard, name: str) -> None:
        """Send a batch and take in its answer, so that what was under way before has arrived."""
        batch, orders = yard.order(name, (Echo, 7))
        assert [report.execution_id for report in (await yard.reply(batch)).ended] == [orders[0].execution_id]
