"""The promises of a store, as a suite of tests: subclass it and supply ``store``.

::

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self):
            return MyStore(...)
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from koan_ray.domain.ids import new_id
from koan_ray.domain.query import parse_query
from koan_ray.domain.records import ActorSpec, ErrorInfo, ExecutionRecord, JobRecord, Particulars, Terms
from koan_ray.domain.retry import RetryPolicy
from koan_ray.domain.status import ExecutionStatus, JobStatus, Reason
from koan_ray.ports import Change

if TYPE_CHECKING:
    from koan_ray.ports import JobStore

AT = 1_800_000_000.0


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
