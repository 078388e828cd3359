"""Stored jobs are read as a coordinator would tell of them, and nothing else is done."""

from __future__ import annotations

import pytest

from koan_ray.engine.reading import Reader, Shelf
from koan_ray.errors import JobNotFoundError, RuntimeUnavailableError
from koan_ray.ports import Change
from koan_ray.stores.memory import MemoryStore
from koan_ray.testing import MemoryDatabase, MemoryDocumentStore
from koan_ray.testing.contracts import audited, execution, job


async def shelf(name: str, *changes: Change) -> Shelf:
    store = MemoryDocumentStore(MemoryDatabase())
    await store.open()
    assert await store.apply(changes) == []
    return Shelf(name, store, store)


@pytest.fixture
async def jobs():
    return audited(kind="mail", at=100.0), job(kind="mail", at=200.0), job(kind="report", at=300.0)


@pytest.fixture
async def reader(jobs):
    first, second, third = jobs
    shelves = [
        await shelf("one", Change(first, 0, (execution(first),)), Change(second, 0)),
        await shelf("two", Change(third, 0)),
    ]
    return Reader(shelves, MemoryStore())


async def test_jobs_of_all_sources_are_found_counted_and_paged(reader, jobs):
    assert [(await reader.get(each.id)).kind for each in jobs] == ["mail", "mail", "report"]
    page, cursor = await reader.query({"limit": 2})
    rest, end = await reader.query({"limit": 2, "cursor": cursor})
    assert [view.id for view in [*page, *rest]] == [each.id for each in jobs[::-1]]
    assert end is None
    assert await reader.count({"kind": "mail"}) == 2
    assert await reader.count({"source": "two"}) == 1


async def test_executions_are_read_where_the_job_lives(reader, jobs):
    assert [found.record[1] for found in await reader.executions(jobs[0].id)] == [jobs[0].id]
    assert await reader.executions(jobs[2].id) == []


async def test_what_is_not_there_or_would_change_something_is_refused(reader):
    for ask in (reader.get, reader.executions):
        with pytest.raises(JobNotFoundError):
            await ask("0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10")
    with pytest.raises(RuntimeUnavailableError, match="cancel: needs an engine"):
        await reader.refuse("cancel")
