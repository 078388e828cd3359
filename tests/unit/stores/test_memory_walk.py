"""The newest jobs in memory are found without looking at all of them, and are the same as if one had."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koan_ray.domain.query import parse_query
from koan_ray.domain.status import JobStatus
from koan_ray.ports import Change
from koan_ray.stores import memory
from koan_ray.stores.memory import MemoryStore
from koan_ray.testing.contracts import AT, job


async def filled(times, **more):
    store = MemoryStore()
    for place, at in enumerate(times):
        await store.apply([Change(job(at=AT + at, name=f"n{place % 3}", **more), 0)])
    return store


@given(
    times=st.lists(st.integers(0, 30), max_size=40), limit=st.integers(1, 12), name=st.sampled_from([None, "n0"]),
    n_removed=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
async def test_the_walk_back_finds_what_a_look_at_everything_finds(times, limit, name, n_removed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_SLICE", 5)
        store = await filled(times)
        for job_id in list(store._jobs)[:n_removed]:
            await store.remove(job_id)
        expected = sorted(
            (j for j in store._jobs.values() if name in (None, j.particulars.name)), key=lambda j: (j.created_at, j.id)
        )
        seen, cursor = [], None
        while True:
            filters = {"limit": limit, "name": name, "cursor": cursor}
            page = await store.query(parse_query(filters))
            seen += [record.id for record in page.jobs]
            if (cursor := page.cursor) is None:
                break
        assert seen == [record.id for record in reversed(expected)]


async def test_the_first_page_looks_at_the_last_ones_only(monkeypatch):
    monkeypatch.setattr(memory, "_SLICE", 50)
    store = await filled(range(1000))
    looked = []

    class Query(type(parse_query({}))):
        def matches(self, record):
            looked.append(record)
            return True

    page = await store.query(Query(limit=10))
    assert [record.created_at for record in page.jobs] == [AT + at for at in range(999, 989, -1)]
    assert len(looked) <= 100


async def test_the_last_ends_are_at_hand():
    store = MemoryStore()
    ends = {}
    for place, status in enumerate([JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.COMPLETED, JobStatus.CANCELLED]):
        record = job(at=AT, status=status, completed_at=AT + place)
        ends[record.id] = record
        await store.apply([Change(record, 0)])
    assert [record.id for record in store.last_settled(3)] == list(ends)[:0:-1]
    assert store.n_settled() == {JobStatus.COMPLETED: 2, JobStatus.FAILED: 1, JobStatus.CANCELLED: 1}
    await store.remove(list(ends)[-1])
    assert [record.id for record in store.last_settled(2)] == list(ends)[2:3]
