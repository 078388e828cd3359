"""The database in memory keeps the promises of a real one, and fails on demand."""

from __future__ import annotations

import pytest

from koan_ray.domain.records import VALUES
from koan_ray.domain.status import JobStatus
from koan_ray.errors import StoreUnavailableError
from koan_ray.ports import Change
from koan_ray.testing import DocumentStoreContract, MemoryDatabase, MemoryDocumentStore
from koan_ray.testing.contracts import audited, execution, job, part


@pytest.fixture
def database():
    return MemoryDatabase()


@pytest.fixture
def another(database):
    async def open_another(**options):
        store = MemoryDocumentStore(database, **options)
        await store.open()
        return store

    return open_another


@pytest.fixture
async def store(another):
    return await another()


@pytest.fixture
def add_field(database):
    async def add(job_id, name, value):
        if value is not None:
            database.jobs[""][job_id][name] = value
        return database.jobs[""][job_id][name]

    return add


class TestMemoryDocuments(DocumentStoreContract):
    async def test_after_a_lost_answer_the_write_is_there_and_may_be_repeated(self, store):
        change = Change(audited(), 0)
        store.faults.lose_replies = 1
        with pytest.raises(StoreUnavailableError, match="answer"):
            await store.apply([change])
        assert await store.get(change.job.id) is not None
        assert await store.apply([change._replace(executions=(execution(change.job),))]) == []
        assert len(await store.executions(change.job.id)) == 1

    async def test_after_a_lost_request_nothing_is_there(self, store):
        change = Change(job(), 0)
        store.faults.lose_requests = 1
        with pytest.raises(StoreUnavailableError):
            await store.apply([change])
        assert await store.get(change.job.id) is None
        assert await store.apply([change]) == []

    async def test_while_nobody_answers_nothing_is_read_or_written(self, store, another):
        record = job()
        store.faults.unavailable = True
        for call in (store.get(record.id), store.apply([Change(record, 0)]), store.read_lease("koan/0")):
            with pytest.raises(StoreUnavailableError):
                await call
        with pytest.raises(StoreUnavailableError):
            await another()
        store.faults.unavailable = False
        assert await store.get(record.id) is None
        assert store.faults.n_fired == 4

    async def test_documents_that_cannot_be_read_are_skipped_and_told(self, another, database):
        told = []
        store = await another(on_corrupt=lambda job_id, error: told.append((job_id, error.field)))
        good, bad = job(), job()
        await store.apply([Change(good, 0), Change(bad, 0)])
        database.jobs[""][bad.id]["created_at"] = "yesterday"
        found = [record.id for batch in [batch async for batch in store.unfinished(range(256), 0)] for record in batch]
        assert found == [good.id]
        assert told == [(bad.id, "created_at")]

    async def test_what_a_client_was_given_is_its_own(self, store, database):
        record = job(metadata={"tags": ["a"]})
        await store.apply([Change(record, 0)])
        record.particulars.metadata["tags"].append("b")
        found = await store.get(record.id)
        assert found.particulars.metadata == {"tags": ["a"]}
        assert found.status is JobStatus.QUEUED

    async def test_a_torn_batch_of_parts_has_its_first_half_and_may_be_repeated(self, store):
        record = job()
        parts = [part(record, n) for n in range(4)]
        store.faults.tear = 1
        with pytest.raises(StoreUnavailableError, match="between two parts"):
            await store.write_parts("", parts)
        assert await store.read_parts("", record.id, VALUES) == parts[:2]
        await store.write_parts("", parts)
        assert await store.read_parts("", record.id, VALUES) == parts
