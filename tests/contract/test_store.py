"""Every store keeps the same promises."""

from __future__ import annotations

import pytest

from koan_ray.domain.query import parse_query
from koan_ray.domain.status import JobStatus
from koan_ray.ports import Change
from koan_ray.stores.memory import MemoryStore
from koan_ray.testing import StoreContract
from koan_ray.testing.contracts import AT, job


class TestMemory(StoreContract):
    @pytest.fixture
    def store(self):
        return MemoryStore()

    async def test_finished_jobs_expire_after_their_retention(self, store):
        done, failed, queued = (
            job(status=s, completed_at=AT) for s in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.QUEUED)
        )
        queued = queued.evolve(completed_at=None)
        await store.apply([Change(record, 0) for record in (done, failed, queued)])
        assert await store.expire(AT + 3599) == 0
        assert await store.expire(AT + 3600) == 1
        assert await store.get(done.id) is None
        assert await store.expire(AT + 7200) == 1
        assert await store.get(queued.id) is not None

    async def test_above_the_cap_the_job_that_finished_first_is_forgotten(self):
        store = MemoryStore(max_finished=10)
        records = [job(status=JobStatus.COMPLETED, completed_at=AT + n) for n in range(25)]
        for record in records:
            await store.apply([Change(record, 0)])
        assert len(store) == 10
        assert await store.get(records[14].id) is None
        assert await store.get(records[15].id) is not None

    async def test_removed_jobs_do_not_count_against_the_cap(self):
        store = MemoryStore(max_finished=10)
        records = [job(status=JobStatus.COMPLETED, completed_at=AT + n) for n in range(20)]
        await store.apply([Change(record, 0) for record in records[:10]])
        for record in records[:10]:
            await store.remove(record.id)
        await store.apply([Change(record, 0) for record in records[10:]])
        assert await store.count(parse_query({})) == 10
