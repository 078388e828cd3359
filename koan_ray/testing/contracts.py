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
`DocumentStoreContract` asks for two fixtures more: ``another``, which opens a second client of the same database, and
``add_field``, which writes a field that we do not know into a job's document.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING, Any

from koan_ray.domain.ids import new_id
from koan_ray.domain.lease import SLOTS, slot_of
from koan_ray.domain.query import parse_query
from koan_ray.domain.records import (
    FAILED,
    MAX_PART,
    STREAMS,
    VALUES,
    ActorSpec,
    Checkpoint,
    ErrorInfo,
    ExecutionRecord,
    JobRecord,
    Part,
    Particulars,
    Progress,
    Residence,
    Terms,
)
from koan_ray.domain.retry import RetryPolicy
from koan_ray.domain.status import ExecutionStatus, JobStatus, Reason
from koan_ray.engine.settings import EngineSettings
from koan_ray.errors import ConfigurationError, StoreUnavailableError
from koan_ray.ports import ActorInfo, Change
from koan_ray.stores.codec import stored_terms
from koan_ray.testing.yard import Echo, Lingers, Obeys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from koan_ray.ports import DocumentStore, JobStore
    from koan_ray.testing.yard import Yard

AT = 1_800_000_000.0
# Long enough for brief bodies to end, and for a body to act on its token, on a machine that is busy with something else.
YARD_SETTINGS = EngineSettings(overrun_s=0.5, cancel_grace_s=10.0)


def job(*, kind: str = "mail", at: float = AT, status: JobStatus = JobStatus.QUEUED, rev: int = 1, **more: Any) -> JobRecord:
    """Return a record; ``more`` are fields of `Particulars` or of `JobRecord`."""
    about = {name: more.pop(name) for name in list(more) if name in Particulars._fields}
    terms = Terms(f"terms-{kind}", kind, "code", RetryPolicy(), None, ActorSpec())
    record = JobRecord(new_id(), terms, Particulars(**about), b"{}", at, status, rev, queued_at=at, last_modified=at)
    return record.evolve(**more)


def batch(**more: Any) -> JobRecord:
    """Return a record of a job over items."""
    record = job(**more)
    return record.evolve(terms=record.terms._replace(id="terms-batch", spec=ActorSpec(num_cpus=0.0, lead=True)))


def audited(*, partition: str = "", **more: Any) -> JobRecord:
    """Return a record of a job whose executions are kept."""
    return job(residence=Residence(partition=partition, audit=True), **more)


def execution(of: JobRecord, *, attempt: int = 1, at: float = AT) -> ExecutionRecord:
    """Return an open execution of a job."""
    return ExecutionRecord(new_id(), of.id, attempt, at)


def part(of: JobRecord | str, seq: int, body: bytes = b"[1]", *, stream: str = VALUES, fence: int = 0) -> Part:
    """Return a part of a job."""
    return Part(of if isinstance(of, str) else of.id, stream, seq, body, body.count(b",") + 1, fence)


def assert_same(found: JobRecord, expected: JobRecord) -> None:
    """Check that two records say the same, as far as every store keeps it."""
    for name in JobRecord.__slots__:
        ours, theirs = getattr(found, name), getattr(expected, name)
        if name == "terms":
            assert stored_terms(ours) == stored_terms(theirs)
        elif isinstance(theirs, float):
            assert abs(ours - theirs) <= 0.001, name
        else:
            assert ours == theirs, name


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
        assert stored_terms(found.terms) == stored_terms(record.terms)  # the shipped class need not be kept

    async def test_every_field_of_a_record_is_kept(self, store: JobStore) -> None:
        """Instants to the millisecond; texts of any script, contents of any JSON."""
        context = '{"a.b":1,"$c":[1.0,1,-0.0,123456789012345678901],"d":{"e":null,"":"ż\\u0000"}}'.encode()
        record = job(
            status=JobStatus.RUNNING, description="Ω\n", metadata={"k": True, "n": {"f": 1.0, "i": 1}}, traceparent="00-ab",
            parent_job_id=new_id(), depth=2, retry_of=new_id(), residence=Residence(None, "", audit=True), context=context,
            term=7, reason="retry", due_at=AT + 1.2345, started_at=AT + 2.5, attempts=2, crashes=1, ordinal=3,
            execution_id=new_id(), progress=Progress(1 << 40, 12.5, "half", 1, 2, AT + 9.25, AT + 3.125), result=b"[1,{}]",
            error=ErrorInfo("E", "m", "t"), cancel_requested_at=AT + 4.0,
            checkpoint=Checkpoint(7, b'{"done":[[0,90],[95,1]],"cursor":"p.9"}', 100, 85, 4, 2, AT + 3.25, 3, 1),
        )  # fmt: skip
        await store.apply([Change(record, 0)])
        found = await store.get(record.id)
        assert found is not None
        assert_same(found, record)

    async def test_a_checkpoint_replaces_the_one_before(self, store: JobStore) -> None:
        """And goes with the rest of the job's state; its body may be any JSON."""
        first = Checkpoint(1, b"{}", None, 1, 0, 0, AT)
        then = Checkpoint(2, '{"$c":{"a.b":[1.0,"\u00fc"]}}'.encode(), 10, 2, 0, 0, AT + 1, 1, 0)
        record = job(status=JobStatus.RUNNING, checkpoint=first)
        await store.apply([Change(record, 0)])
        await store.apply([Change(record.evolve(rev=2, checkpoint=then), 1)])
        await store.apply([Change(record.evolve(rev=2, checkpoint=first), 1)])  # too late: refused by its guard
        found = await store.get(record.id)
        assert found is not None
        assert found.checkpoint == then

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
        refused = Change(second.evolve(reason="another"), 0)
        assert await store.apply([Change(first, 0), refused, Change(third, 0)]) == [refused]
        assert await store.get(first.id) is not None
        assert await store.get(third.id) is not None

    async def test_a_refused_change_writes_none_of_its_executions(self, store: JobStore) -> None:
        """The executions belong to the change."""
        record = audited()
        await store.apply([Change(record, 0)])
        await store.apply([Change(record.evolve(rev=5), 4, (execution(record),))])
        assert await store.executions(record.id) == []

    async def test_executions_are_listed_oldest_first_and_closed_once(self, store: JobStore) -> None:
        """A closed execution is never rewritten."""
        record = audited()
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
        record = audited()
        await store.apply([Change(record, 0, (execution(record),))])
        assert await store.remove(record.id) is True
        assert await store.remove(record.id) is False
        assert await store.get(record.id) is None
        assert await store.executions(record.id) == []

    async def test_parts_are_read_in_order_and_by_stream(self, store: JobStore) -> None:
        """Whatever the order of their writes; a page begins after the number that it is asked for."""
        record, other = job(), job()
        bodies = [b'[1,{"a.b":[2.0,"$c"]}]', b"[]", '["ü",null]'.encode()]
        parts = [part(record, n, body, stream=stream) for stream in (VALUES, FAILED) for n, body in enumerate(bodies)]
        await store.apply([Change(record, 0), Change(other, 0)])
        await store.write_parts("", [*reversed(parts), part(other, 0)])
        for stream in (VALUES, FAILED):
            kept = [each for each in parts if each.stream == stream]
            assert await store.read_parts("", record.id, stream) == kept
            assert await store.read_parts("", record.id, stream, 0) == kept[1:]
            assert await store.read_parts("", record.id, stream, -1, 2) == kept[:2]
            assert await store.read_parts("", record.id, stream, 2) == []
        assert await store.read_parts("", new_id(), VALUES) == []

    async def test_parts_keep_their_order_beyond_any_number_of_digits(self, store: JobStore) -> None:
        """9 comes before 10, and 99,999 before 100,000."""
        record = job()
        seqs = [0, 9, 10, 99, 100, 99_999, 100_000]
        await store.write_parts("", [part(record, seq) for seq in seqs])
        found: list[int] = []
        while page := await store.read_parts("", record.id, VALUES, found[-1] if found else -1):
            found += [each.seq for each in page]
        assert found == seqs

    async def test_a_part_is_replaced_but_not_by_a_superseded_execution(self, store: JobStore) -> None:
        """Written again it is the same; with a lower fence it changes nothing, and its neighbours are written."""
        record = job()
        written = part(record, 0, b"[1]", fence=5)
        for _ in range(2):
            await store.write_parts("", [written])
        assert await store.read_parts("", record.id, VALUES) == [written]
        again, newer = part(record, 0, b"[2]", fence=5), part(record, 0, b"[3,3]", fence=6)
        await store.write_parts("", [again])
        assert await store.read_parts("", record.id, VALUES) == [again]
        await store.write_parts("", [newer])
        late = [part(record, 0, b"[4]", fence=5), part(record, 1, b"[5]", fence=5)]
        await store.write_parts("", late)
        assert await store.read_parts("", record.id, VALUES) == [newer, late[1]]

    async def test_parts_are_dropped_from_a_number_on(self, store: JobStore) -> None:
        """Of one stream, and only those of earlier executions."""
        record = job()
        kept = [part(record, n, fence=n) for n in range(5)]
        other = part(record, 3, stream=FAILED)
        await store.write_parts("", [*kept, other])
        for _ in range(2):
            await store.drop_parts("", record.id, VALUES, 2, below=4)
        assert await store.read_parts("", record.id, VALUES) == [kept[0], kept[1], kept[4]]
        assert await store.read_parts("", record.id, FAILED) == [other]

    async def test_a_page_of_large_parts_is_bounded(self, store: JobStore) -> None:
        """Several pages bring them all; one part is never too large for a page."""
        record = job()
        large = b'["' + b"x" * (MAX_PART - 4) + b'"]'
        await store.write_parts("", [part(record, n, large) for n in range(12)])
        seqs: list[int] = []
        while page := await store.read_parts("", record.id, VALUES, seqs[-1] if seqs else -1):
            assert sum(len(each.body) for each in page) <= 8 * MAX_PART
            seqs += [each.seq for each in page]
        assert seqs == list(range(12))

    async def test_removing_takes_the_parts_along(self, store: JobStore) -> None:
        """Those of other jobs stay."""
        record, other = job(), job()
        await store.apply([Change(record, 0), Change(other, 0)])
        await store.write_parts("", [part(each, n, stream=s) for each in (record, other) for n in range(3) for s in STREAMS])
        await store.remove(record.id)
        for stream in STREAMS:
            assert await store.read_parts("", record.id, stream) == []
            assert len(await store.read_parts("", other.id, stream)) == 3

    async def test_queries_find_what_the_reference_finds(self, store: JobStore) -> None:
        """Filters, order and limit agree with `Query.matches` and `Query.sort_key` on a random population."""
        random = Random(7)
        parent = new_id()
        everything = [
            random.choice([job, job, batch])(
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
            {"metadata": {"tenant": 1}}, {"metadata": {"x": {"y": [1]}}}, {"has_items": True}, {"has_items": False},
            {"has_items": True, "limit": 9, "order_by": "created_at"}, {"has_items": True, "parent_job_id": parent},
            {"has_items": True, "status": ["failed", "queued"], "kind": "mail"}, {"has_items": False, "status": "failed"},
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

    async def test_a_job_is_found_by_the_metadata_that_it_has_and_by_no_other(self, store: JobStore) -> None:
        """Numbers by what they count, and a truth value is no number; also what no document holds as it is."""
        values: list[Any] = [
            True, False, 1, 0, 1.5, 2**53 + 1, 2**63, 2**70, -(2**63), -(2**70), "1", "", "true", None, [], {}, [1, 2],
            [2, 1], [True], [1], {"a": 1, "b": 2}, {"a": True}, {"a.b": 1}, {"$ne": 1}, {"": {}}, [[2**70]], "nul\0",
        ]  # fmt: skip
        records = [job(metadata={"k": value, "n": place, "odd": {"$": 1}}) for place, value in enumerate(values)]
        records += [job(metadata={"k": value, "n": place}) for place, value in enumerate(values)]
        await store.apply([Change(record, 0) for record in [*records, job(metadata={"other": 1}), job()]])
        for place, value in enumerate(values):
            expected = {records[place].id, records[place + len(values)].id}
            for sought in ({"k": value}, {"n": place, "k": value}):
                query = parse_query({"metadata": sought})
                assert {record.id for record in (await store.query(query)).jobs} == expected, sought
                assert await store.count(query) == 2, sought
        for sought, places in (({"k": 1.0}, [2]), ({"k": {"b": 2, "a": 1}}, [20]), ({"odd": {"$": 1}}, range(len(values)))):
            query = parse_query({"metadata": sought})
            found = {record.id for record in (await store.query(query)).jobs}
            assert {records[place].id for place in places} <= found, sought
            assert len(found) == (len(places) if "odd" in sought else 2 * len(places)), sought
        for record in records[:3]:
            kept = await store.get(record.id)
            assert kept is not None
            assert kept.particulars.metadata == record.particulars.metadata

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
        batch, orders = yard.order(name, (Echo, 1), (Obeys, 0), (Echo, 2), (Echo, 3))
        reply = await yard.reply(batch)
        first, long, *others = [order.execution_id for order in orders]
        assert [report.execution_id for report in reply.ended] == [first]
        assert [running.execution_id for running in reply.running] == [long]
        assert reply.returned == others

    async def test_a_long_body_is_answered_as_running_and_its_end_is_pushed(self, yard: Yard) -> None:
        """The answer does not wait for it."""
        name = await yard.ready()
        sent_at = asyncio.get_running_loop().time()
        batch, (order,) = yard.order(name, (Obeys, 5))
        (running,) = (await yard.reply(batch)).running
        assert running.job_id == order.job_id
        assert 0 < running.age_s <= asyncio.get_running_loop().time() - sent_at
        yard.launcher.cancel(name, order.execution_id, "cancelled")
        (report,) = await yard.ends(order)
        assert (report.outcome, report.result) == ("succeeded", b"5")
        assert yard.pushed_reports() == [report]

    async def test_what_came_back_can_be_ordered_again(self, yard: Yard) -> None:
        """The actor has forgotten it; it takes new orders while a body goes on, and gives them back."""
        name = await yard.ready()
        first, (long, echo) = yard.order(name, (Obeys, 0), (Echo, 1))
        assert (await yard.reply(first)).returned == [echo.execution_id]
        second, (again,) = yard.order(name, (Echo, 1))
        assert (await yard.reply(second)).returned == [again.execution_id]
        yard.launcher.cancel(name, long.execution_id, "cancelled")
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
        batch, orders = yard.order(name, *[(Obeys, 0)] * 4)
        reply = await yard.reply(batch)
        assert [running.execution_id for running in reply.running] == [order.execution_id for order in orders[:3]]
        assert reply.returned == [orders[3].execution_id]

    async def test_a_batch_that_should_have_been_brief_is_answered_when_hurried(self, yard: Yard) -> None:
        """Once; its body goes on."""
        name = await yard.ready()
        batch, (order,) = yard.order(name, (Obeys, 0), is_brief=True)
        await yard.begun(order)
        yard.launcher.hurry(name, batch)
        assert [running.execution_id for running in (await yard.reply(batch)).running] == [order.execution_id]
        yard.launcher.cancel(name, order.execution_id, "cancelled")
        await yard.ends(order)
        yard.launcher.hurry(name, batch)
        await self._exchange(yard, name)
        assert (await yard.reply(batch)).ended == []

    async def test_an_order_that_was_cancelled_before_it_began_never_begins(self, yard: Yard) -> None:
        """It ends as cancelled, without a body; or it came back before, which the coordinator takes for the same."""
        name = await yard.ready()
        batch, (_, waits) = yard.order(name, (Obeys, 0), (Lingers, 0.0))
        yard.launcher.cancel(name, waits.execution_id, "cancelled")
        reply = await yard.reply(batch)
        if waits.execution_id not in reply.returned:
            (report,) = await yard.ends(waits)
            assert (report.outcome, report.duration_s, report.progress) == ("cancelled", 0.0, None)
        assert waits.execution_id not in {running.execution_id for running in reply.running}

    async def test_a_cancel_may_overtake_its_order(self, yard: Yard) -> None:
        """And it stops it whichever is there first: calls of an actor are taken in no order."""
        name = await yard.ready()
        for _ in range(10):
            batch = yard.batch((Lingers, 3600.0))
            yard.launcher.cancel(name, batch.orders[0].execution_id, "cancelled")
            number = yard.send(name, batch)
            (report,) = await yard.ends(*batch.orders)
            assert report.outcome == "cancelled"
            assert (await yard.reply(number)).returned == []
        await self._exchange(yard, name)

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


class DocumentStoreContract(StoreContract):
    """What every `koan_ray.ports.DocumentStore` keeps."""

    # --- what no document can hold -------------------------------------------------------------------------------------

    async def test_a_record_that_no_document_can_hold_is_found_by_asking(self, store: DocumentStore) -> None:
        """What is in a batch with it may be written or not; without it, all are."""
        odd: Any = b"text"
        others = [audited() for _ in range(3)]
        unwritable = [
            job(description=5), audited(metadata={"k": 2**70, "odd": object()}),
            job(status=JobStatus.RUNNING, progress=Progress(1, 0.5, odd)),
            job(status=JobStatus.RUNNING, attempts=2**70),
        ]  # fmt: skip
        assert [store.objection(record) for record in others] == [None] * 3
        assert store.objection(execution(others[0])) is None
        for bad in unwritable:
            assert store.objection(bad) is not None
            try:
                await store.apply([Change(others[0], 0), Change(bad, 0), Change(others[1], 0)])
            except Exception as error:  # noqa: BLE001 - whatever the codec stumbles over
                assert not isinstance(error, StoreUnavailableError)  # noqa: PT017
            else:
                raise AssertionError(bad)
        assert await store.apply([Change(record, 0, (execution(record),)) for record in others]) == []
        for record in others:
            assert await store.get(record.id) is not None
            assert len(await store.executions(record.id)) == 1

    # --- leases ------------------------------------------------------------------------------------------------------

    async def test_a_shard_that_nobody_held_has_no_lease(self, store: DocumentStore) -> None:
        """And the first term is 1."""
        assert await store.read_lease("koan/0") is None
        taken = await store.take_lease("koan/0", holder="a", seen=None)
        assert taken is not None
        assert (taken.shard, taken.holder, taken.term) == ("koan/0", "a", 1)
        assert await store.read_lease("koan/0") == taken

    async def test_of_many_takers_one_gets_the_lease(
        self, store: DocumentStore, another: Callable[[], Awaitable[DocumentStore]]
    ) -> None:
        """Whether the shard was ever held or not; the term grows by one with each holder."""
        stores = [store, await another()]
        seen = None
        for term in (1, 2, 3):
            takers = [
                stores[n % 2].take_lease("koan/0", holder=f"{term}-{n}", seen=seen) for n in range(8)
            ]  # fmt: skip
            winners = [lease for lease in await asyncio.gather(*takers) if lease is not None]
            assert [lease.term for lease in winners] == [term]
            seen = await store.read_lease("koan/0")
            assert seen == winners[0]

    async def test_a_lease_that_has_beaten_since_it_was_seen_is_not_taken(self, store: DocumentStore) -> None:
        """The holder lives, so the observation is worth nothing."""
        held = await store.take_lease("koan/0", holder="a", seen=None)
        assert held is not None
        beaten = await store.beat(held)
        assert beaten is not None
        assert (beaten.term, beaten.holder) == (1, "a")
        assert beaten.beat > held.beat
        assert await store.take_lease("koan/0", holder="b", seen=held) is None
        taken = await store.take_lease("koan/0", holder="b", seen=beaten)
        assert taken is not None
        assert taken.term == 2

    async def test_a_beat_after_a_takeover_is_none(self, store: DocumentStore) -> None:
        """That is how the old holder learns of it."""
        held = await store.take_lease("koan/0", holder="a", seen=None)
        taken = await store.take_lease("koan/0", holder="b", seen=held)
        assert held is not None
        assert taken is not None
        assert await store.beat(held) is None
        await store.release(held)  # changes nothing: it is not ours
        assert await store.beat(taken) is not None

    async def test_a_released_lease_has_no_holder_and_keeps_its_term(self, store: DocumentStore) -> None:
        """The next holder takes it without waiting."""
        held = await store.take_lease("koan/0", holder="a", seen=None)
        assert held is not None
        await store.release(held)
        free = await store.read_lease("koan/0")
        assert free is not None
        assert (free.holder, free.term) == ("", 1)
        assert await store.beat(held) is None
        taken = await store.take_lease("koan/0", holder="b", seen=free)
        assert taken is not None
        assert taken.term == 2

    async def test_shards_have_leases_of_their_own(self, store: DocumentStore) -> None:
        """Taking one does not touch another."""
        first = await store.take_lease("koan/0", holder="a", seen=None)
        second = await store.take_lease("koan/1", holder="b", seen=None)
        assert first == await store.read_lease("koan/0")
        assert second == await store.read_lease("koan/1")

    async def test_a_term_is_at_least_what_is_asked_for(self, store: DocumentStore) -> None:
        """So that a stamp reaches what was written under other leases."""
        assert await store.latest_term(["koan/0", "koan/1"]) == 0
        first = await store.take_lease("koan/0", holder="a", seen=None, at_least=7)
        assert first is not None
        assert (first.term, await store.latest_term(["koan/0", "koan/1"])) == (7, 7)
        second = await store.take_lease("koan/0", holder="b", seen=first, at_least=3)
        assert second is not None
        assert second.term == 8
        third = await store.take_lease("koan/0", holder="c", seen=second, at_least=20)
        assert third is not None
        assert (third.term, third.beat) == (20, 3)
        assert await store.take_lease("koan/0", holder="d", seen=second, at_least=30) is None
        assert await store.latest_term(["koan/1"]) == 0

    # --- taking over -------------------------------------------------------------------------------------------------

    async def test_claiming_refuses_what_the_old_holder_still_writes(self, store: DocumentStore) -> None:
        """Unfinished jobs below the term get it and a higher rev; a second claim finds nothing."""
        queued, running = job(term=1), job(term=1, status=JobStatus.RUNNING)
        done = job(term=1, status=JobStatus.COMPLETED, completed_at=AT)
        newer = job(term=2)
        await store.apply([Change(record, 0) for record in (queued, running, done, newer)])
        assert await store.claim(range(SLOTS), 2) == 2
        assert await store.claim(range(SLOTS), 2) == 0
        for record in (queued, running):
            found = await store.get(record.id)
            assert found is not None
            assert (found.term, found.rev) == (2, 2)
            late = Change(record.evolve(rev=2, status=JobStatus.CANCELLED), 1)
            assert await store.apply([late]) == [late]
        for record in (done, newer):
            found = await store.get(record.id)
            assert found is not None
            assert (found.term, found.rev) == (record.term, 1)

    async def test_a_claim_is_for_its_slots_only(self, store: DocumentStore) -> None:
        """Another shard's jobs stay as they are, in every partition."""
        records = [job(term=1, residence=Residence(partition=name)) for name in ("", "hot") for _ in range(20)]
        await store.apply([Change(record, 0) for record in records])
        mine = [slot for slot in range(SLOTS) if slot % 2]
        n_mine = sum(slot_of(record.id) % 2 for record in records)
        assert await store.claim(mine, 3) == n_mine
        for record in records:
            found = await store.get(record.id)
            assert found is not None
            assert found.term == (3 if slot_of(record.id) % 2 else 1)

    async def test_unfinished_jobs_come_oldest_first_in_batches(self, store: DocumentStore) -> None:
        """Over statuses and partitions; finished ones are left out."""
        records = [
            job(at=AT + n * 7 % 600, status=(JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.CREATED)[n % 3],
                residence=Residence(partition=("", "hot")[n % 2]))
            for n in range(600)
        ]  # fmt: skip
        done = [job(status=JobStatus.FAILED, completed_at=AT) for _ in range(10)]
        await store.apply([Change(record, 0) for record in records + done])
        batches = [batch async for batch in store.unfinished(range(SLOTS), 0)]
        found = [record for batch in batches for record in batch]
        assert len(batches) > 1
        assert [r.id for r in found] == [r.id for r in sorted(records, key=lambda r: (r.created_at, r.id))]
        assert {r.particulars.residence.partition for r in found} == {"", "hot"}
        mine = [slot for slot in range(SLOTS) if slot % 2]
        found = [record for batch in [batch async for batch in store.unfinished(mine, 0)] for record in batch]
        assert {r.id for r in found} == {r.id for r in records if slot_of(r.id) % 2}

    async def test_only_jobs_that_carry_the_term_are_read(self, store: DocumentStore) -> None:
        """A late insert of an earlier holder is not ours to write before it is stamped."""
        stamped, late = job(), job()
        await store.apply([Change(stamped, 0)])
        await store.claim(range(SLOTS), 5)
        await store.apply([Change(late, 0)])
        assert [r.id async for batch in store.unfinished(range(SLOTS), 5) for r in batch] == [stamped.id]
        assert await store.claim(range(SLOTS), 5) == 1
        assert {r.id async for batch in store.unfinished(range(SLOTS), 5) for r in batch} == {stamped.id, late.id}

    async def test_jobs_are_taken_over_in_batches_oldest_first(self, store: DocumentStore) -> None:
        """Each is stamped when it is read; finished ones, other statuses and newer terms are left alone."""
        queued = [job(at=AT + n * 7 % 700, residence=Residence(partition=("", "hot")[n % 2])) for n in range(700)]
        others = [job(status=JobStatus.RUNNING), job(status=JobStatus.FAILED, completed_at=AT), job(term=9)]
        await store.apply([Change(record, 0) for record in [*queued, *others]])
        batches = [batch async for batch in store.take_over(range(SLOTS), 5, [JobStatus.QUEUED])]
        assert len(batches) > 1
        taken = [record for batch in batches for record in batch]
        assert [r.id for r in taken] == [r.id for r in sorted(queued, key=lambda r: (r.created_at, r.id))]
        assert {(r.term, r.rev) for r in taken} == {(5, 2)}
        late = Change(queued[0].evolve(rev=2, status=JobStatus.RUNNING, term=1), 1)
        assert await store.apply([late]) == [late]
        assert [r.id async for batch in store.take_over(range(SLOTS), 5, [JobStatus.QUEUED]) for r in batch] == []
        assert [r.id async for b in store.take_over(range(SLOTS), 5, [JobStatus.RUNNING]) for r in b] == [others[0].id]

    async def test_the_jobs_that_ended_last_come_newest_first(self, store: DocumentStore) -> None:
        """Unfinished and archived ones are left out."""
        ended = [job(status=JobStatus.COMPLETED, completed_at=AT + n) for n in range(5)]
        archived = job(status=JobStatus.COMPLETED, completed_at=AT + 9, residence=Residence(partition="archive"))
        await store.apply([Change(record, 0) for record in [*ended, archived, job()]])
        found = [record.id async for batch in store.last_settled(range(SLOTS), 3) for record in batch]
        assert found == [record.id for record in reversed(ended)][:3]

    async def test_executions_are_filed_for_jobs_that_are_written(self, store: DocumentStore) -> None:
        """Once; a closed one stays as it is."""
        record = audited()
        opened = execution(record)
        closed = opened.close(status=ExecutionStatus.SUCCEEDED, reason=Reason.SUCCEEDED, at=AT + 1)
        await store.apply([Change(record, 0)])
        await store.file_executions([Change(record, 0, (closed,))])
        await store.file_executions([Change(record, 0, (opened,))])
        assert [e.status for e in await store.executions(record.id)] == [ExecutionStatus.SUCCEEDED]

    async def test_open_executions_are_found_and_closed_once(self, store: DocumentStore) -> None:
        """Closing tells how many changed; what is closed stays as it is."""
        records = [audited() for _ in range(3)] + [audited(partition="hot")]
        opened = [execution(record) for record in records]
        await store.apply([Change(record, 0, (begun,)) for record, begun in zip(records, opened, strict=True)])
        found = [e for batch in [b async for b in store.open_executions(range(SLOTS))] for e in batch]
        assert {e.id for e in found} == {e.id for e in opened}
        others = [slot for slot in range(SLOTS) if slot not in {slot_of(record.id) for record in records}]
        assert [b async for b in store.open_executions(others)] == []
        lost = [
            (
                begun.close(status=ExecutionStatus.FAILED, reason=Reason.LOST, at=AT + 5),
                record.particulars.residence.partition,
            )
            for record, begun in zip(records, opened, strict=True)
        ]
        assert await store.close_executions(lost[:1]) == 1
        assert await store.close_executions(lost) == 3
        assert await store.close_executions(lost) == 0
        assert [b async for b in store.open_executions(range(SLOTS))] == []
        other = opened[3].close(status=ExecutionStatus.SUCCEEDED, reason=Reason.SUCCEEDED, at=AT + 9)
        assert await store.close_executions([(other, "hot")]) == 0
        assert [(e.status, e.reason) for e in await store.executions(records[3].id)] == [
            (ExecutionStatus.FAILED, Reason.LOST)
        ]

    async def test_an_execution_that_was_never_stored_is_stored_closed(self, store: DocumentStore) -> None:
        """Its opening may have been overtaken; coming late, the opening changes nothing."""
        record = audited()
        begun = execution(record)
        where = ActorInfo("node", "actor", 7)
        ended = begun.close(
            status=ExecutionStatus.SUCCEEDED, reason=Reason.SUCCEEDED, at=AT + 1, metrics=(("cpu_s", 1.5), ("where", where))
        )
        await store.apply([Change(record, 0, (ended,))])
        await store.apply([Change(record.evolve(rev=2), 1, (begun,))])
        found = await store.executions(record.id)
        assert [(e.id, e.status, dict(e.metrics)) for e in found] == [
            (begun.id, ExecutionStatus.SUCCEEDED, {"cpu_s": 1.5, "where": where})
        ]

    async def test_executions_are_kept_only_where_asked_for(self, store: DocumentStore) -> None:
        """``audit`` is the job's choice."""
        record = job()
        await store.apply([Change(record, 0, (execution(record),))])
        assert await store.executions(record.id) == []

    # --- repeating ---------------------------------------------------------------------------------------------------

    async def test_a_change_may_be_applied_again(self, store: DocumentStore) -> None:
        """After an unknown outcome: what is stored already as given counts as written, executions are made up for."""
        record = audited()
        begun = execution(record)
        await store.apply([Change(record, 0)])
        assert await store.apply([Change(record, 0, (begun,)), Change(job(), 0)]) == []
        moved = Change(record.evolve(rev=2, status=JobStatus.RUNNING, progress=Progress(1, 5.0)), 1)
        assert await store.apply([moved]) == []
        assert await store.apply([moved]) == []
        assert [e.id for e in await store.executions(record.id)] == [begun.id]
        other_term = Change(moved.job.evolve(term=9), 1)
        assert await store.apply([other_term]) == [other_term]

    # --- partitions and the archive ----------------------------------------------------------------------------------

    async def test_a_job_is_found_whatever_its_partition(self, store: DocumentStore) -> None:
        """Queries ask one partition, all but the archives unless told otherwise, or all."""
        records = {name: job(residence=Residence(partition=name), at=AT + n) for n, name in enumerate(("", "hot", "cold"))}
        await store.apply([Change(record, 0) for record in records.values()])
        assert set(await store.partitions()) == set(records)
        for name, record in records.items():
            found = await store.get(record.id)
            assert found is not None
            assert found.particulars.residence.partition == name
            page = await store.query(parse_query({"partition": name}))
            assert [r.id for r in page.jobs] == [record.id]
        page = await store.query(parse_query({"partition": "*", "limit": 2}))
        assert [r.id for r in page.jobs] == [records["cold"].id, records["hot"].id]
        page = await store.query(parse_query({"partition": "*", "limit": 2, "cursor": page.cursor}))
        assert [r.id for r in page.jobs] == [records[""].id]
        assert await store.count(parse_query({"partition": "*"})) == 3
        assert (await store.query(parse_query({"partition": "nowhere"}))).jobs == []
        assert await store.remove(records["hot"].id) is True
        assert await store.get(records["hot"].id) is None

    async def test_a_partition_has_a_plain_name(self, store: DocumentStore) -> None:
        """Names become names of collections or tables."""
        for name in ("Hot", "a.b", "$x", "a" * 65, "é"):
            try:
                await store.apply([Change(job(residence=Residence(partition=name)), 0)])
            except ConfigurationError:
                continue
            raise AssertionError(name)

    async def test_a_partition_begun_by_one_client_is_seen_by_another(
        self, store: DocumentStore, another: Callable[[], Awaitable[DocumentStore]]
    ) -> None:
        """Without opening it anew."""
        second = await another()
        record = job(residence=Residence(partition="late"))
        await store.apply([Change(record, 0)])
        assert "late" in await second.partitions()
        assert await second.get(record.id) is not None

    async def test_settled_jobs_are_found_oldest_end_first(self, store: DocumentStore) -> None:
        """By status, kind and age, in one partition."""
        both = (JobStatus.COMPLETED, JobStatus.FAILED)
        ends = {n: AT + 40 - n for n in range(40)}
        done = [
            job(kind=("mail", "report")[n % 2], status=both[n // 2 % 2], completed_at=end) for n, end in ends.items()
        ]  # fmt: skip
        await store.apply([Change(record, 0) for record in [*done, job()]])
        expected = [record for record in reversed(done) if record.completed_at is not None and record.completed_at < AT + 30]
        found = await store.settled_before("", both, AT + 30, 10)
        assert [r.id for r in found] == [r.id for r in expected[:10]]
        found = await store.settled_before("", (JobStatus.FAILED,), AT + 30, 100, kinds=["mail"])
        assert [r.id for r in found] == [r.id for r in expected if r.status is JobStatus.FAILED and r.terms.kind == "mail"]
        assert await store.settled_before("nowhere", both, AT + 30, 10) == []
        last = expected[9]
        found = await store.settled_before("", both, AT + 30, 10, after=(last.completed_at or 0, last.id))
        assert [r.id for r in found] == [r.id for r in expected[10:20]]
        last = expected[-1]
        assert await store.settled_before("", both, AT + 30, 10, after=(last.completed_at or 0, last.id)) == []

    async def test_a_job_moves_to_the_archive_by_copy_and_guarded_delete(self, store: DocumentStore) -> None:
        """At every step it is found, with its executions; the delete takes only what was copied."""
        record = audited(status=JobStatus.COMPLETED, completed_at=AT + 1, context=b'{"n":1}', result=b"[2]")
        ended = execution(record).close(status=ExecutionStatus.SUCCEEDED, reason=Reason.SUCCEEDED, at=AT + 1)
        await store.apply([Change(record, 0, (ended,))])
        assert await store.get_copy(record.id, "archive") is None
        for _ in range(2):  # a copy may be repeated
            await store.put_copy(record, [ended], "archive")
        copy = await store.get_copy(record.id, "archive")
        assert copy is not None
        assert (copy[0].context, copy[0].result, copy[0].rev) == (b'{"n":1}', b"[2]", 1)
        assert [e.id for e in copy[1]] == [ended.id]
        assert await store.delete_if(record.evolve(rev=7), "") is False
        assert await store.get_copy(record.id, "") is not None
        assert await store.delete_if(record, "") is True
        assert await store.delete_if(record, "") is False
        assert await store.get_copy(record.id, "") is None
        found = await store.get(record.id)
        assert found is not None
        assert found.particulars.residence.partition == "archive"
        assert [e.id for e in await store.executions(record.id)] == [ended.id]

    async def test_parts_move_with_their_job(self, store: DocumentStore) -> None:
        """A copy of the job leaves those that were written before it; the guarded delete takes only its own partition's."""
        record = job(status=JobStatus.COMPLETED, completed_at=AT)
        parts = [part(record, n, fence=n) for n in range(3)]
        await store.apply([Change(record, 0)])
        await store.write_parts("", parts)
        for _ in range(2):
            await store.write_parts("archive", parts)
            await store.put_copy(record, [], "archive")
        assert await store.read_parts("archive", record.id, VALUES) == parts
        assert await store.delete_if(record.evolve(rev=7), "") is False
        assert await store.read_parts("", record.id, VALUES) == parts
        assert await store.delete_if(record, "") is True
        assert await store.read_parts("", record.id, VALUES) == []
        assert await store.read_parts("archive", record.id, VALUES) == parts

    async def test_what_an_interrupted_delete_left_of_the_parts_goes_with_the_next(self, store: DocumentStore) -> None:
        """The job is gone already."""
        record = job(status=JobStatus.COMPLETED, completed_at=AT)
        await store.write_parts("hot", [part(record, 0)])
        assert await store.delete_if(record, "hot") is False
        assert await store.read_parts("hot", record.id, VALUES) == []

    async def test_jobs_with_parts_are_listed_once_and_in_order(self, store: DocumentStore) -> None:
        """By partition, in batches, whether there is such a job or not."""
        ids = sorted(new_id() for _ in range(600))
        await store.write_parts("", [part(job_id, n, stream=s) for job_id in ids for n, s in ((0, VALUES), (1, FAILED))])
        await store.write_parts("hot", [part(ids[0], 0)])
        batches = [batch async for batch in store.jobs_with_parts("")]
        assert len(batches) > 1
        assert [job_id for batch in batches for job_id in batch] == ids
        assert [batch async for batch in store.jobs_with_parts("hot")] == [ids[:1]]
        assert [batch async for batch in store.jobs_with_parts("nowhere")] == []

    async def test_executions_are_those_beside_their_job(self, store: DocumentStore) -> None:
        """A delete that was interrupted leaves some behind; the copy has them all."""
        record = audited(status=JobStatus.COMPLETED, completed_at=AT, partition="hot")
        both = [execution(record).close(status=ExecutionStatus.FAILED, reason=Reason.RETRY, at=AT + n) for n in range(2)]
        await store.put_copy(record, both, "archive")
        await store.close_executions([(both[0], "hot")])
        assert {e.id for e in await store.executions(record.id)} == {e.id for e in both}

    async def test_an_unfinished_job_is_not_deleted_by_the_archivist(self, store: DocumentStore) -> None:
        """Whatever its rev."""
        record = job()
        await store.apply([Change(record, 0)])
        assert await store.delete_if(record, "") is False
        assert await store.get(record.id) is not None

    # --- looking at everything ----------------------------------------------------------------------------------------

    async def test_a_scan_sees_every_job_of_its_partition_once(self, store: DocumentStore) -> None:
        """Finished or not, in the order of their ids, in batches."""
        statuses = (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.COMPLETED)
        records = [job(status=statuses[n % 3]) for n in range(1001)]
        other = job(residence=Residence(partition="hot"))
        await store.apply([Change(record, 0) for record in [*reversed(records), other]])
        batches = [batch async for batch in store.scan("")]
        assert len(batches) > 1
        assert [r.id for batch in batches for r in batch] == sorted(r.id for r in records)
        assert [r.id async for batch in store.scan("hot") for r in batch] == [other.id]
        assert [batch async for batch in store.scan("nowhere")] == []

    async def test_statuses_and_executions_are_read_for_many_jobs_of_a_partition(self, store: DocumentStore) -> None:
        """Those that are elsewhere, or nowhere, are left out."""
        here = [audited(status=JobStatus.RUNNING), audited(status=JobStatus.QUEUED)]
        there = audited(partition="hot")
        begun = [execution(record, at=AT - n) for n, record in enumerate((*here, there))]
        await store.apply([Change(record, 0, (e,)) for record, e in zip((*here, there), begun, strict=True)])
        ids = [*(record.id for record in (*here, there)), new_id()]
        assert await store.statuses(ids, "") == {here[0].id: JobStatus.RUNNING, here[1].id: JobStatus.QUEUED}
        assert await store.statuses(ids, "nowhere") == {}
        assert [e.id for e in await store.executions_in(ids, "")] == [begun[1].id, begun[0].id]
        assert [e.id for e in await store.executions_in(ids, "hot")] == [begun[2].id]

    # --- documents ---------------------------------------------------------------------------------------------------

    async def test_fields_that_we_do_not_know_survive(
        self, store: DocumentStore, add_field: Callable[[str, str, Any], Awaitable[Any]]
    ) -> None:
        """A newer version, or the user, may have added them."""
        record = job()
        await store.apply([Change(record, 0)])
        assert await add_field(record.id, "x_note", {"by": "somebody"}) == {"by": "somebody"}
        await store.apply([Change(record.evolve(rev=2, status=JobStatus.RUNNING), 1)])
        await store.claim(range(SLOTS), 5)
        assert await add_field(record.id, "x_other", 1) == 1
        assert await add_field(record.id, "x_note", None) == {"by": "somebody"}

    async def test_a_reopened_store_has_everything(
        self, store: DocumentStore, another: Callable[[], Awaitable[DocumentStore]]
    ) -> None:
        """Jobs, executions, partitions, leases; opening twice changes nothing."""
        record = audited(partition="hot")
        begun = execution(record)
        await store.apply([Change(record, 0, (begun,))])
        lease = await store.take_lease("koan/0", holder="a", seen=None)
        await store.open()
        await store.close()
        second = await another()
        await second.open()
        found = await second.get(record.id)
        assert found is not None
        assert_same(found, record)
        assert [e.id for e in await second.executions(record.id)] == [begun.id]
        assert await second.read_lease("koan/0") == lease
        await store.open()
        assert await store.get(record.id) is not None
