"""Every store keeps the same promises."""

from __future__ import annotations

import pytest

from koan_ray.domain.query import parse_query
from koan_ray.domain.records import VALUES
from koan_ray.domain.status import JobStatus
from koan_ray.errors import LimitExceededError
from koan_ray.ports import Change
from koan_ray.stores.memory import MemoryStore
from koan_ray.testing import StoreContract
from koan_ray.testing.contracts import AT, job, part


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

    async def test_parts_of_expired_jobs_are_forgotten(self, store):
        done = job(status=JobStatus.COMPLETED, completed_at=AT)
        await store.apply([Change(done, 0)])
        await store.write_parts("", [part(done, n) for n in range(3)])
        await store.expire(AT + 3600)
        assert await store.read_parts("", done.id, VALUES) == []

    async def test_parts_above_the_limit_cost_finished_jobs_their_place_and_are_then_refused(self):
        store = MemoryStore(max_part_bytes=100)
        done, running = job(status=JobStatus.COMPLETED, completed_at=AT), job(status=JobStatus.RUNNING)
        await store.apply([Change(done, 0), Change(running, 0)])
        await store.write_parts("", [part(done, 0, b"[" + b"1" * 58 + b"]")])
        await store.write_parts("", [part(running, 0, b"[" + b"2" * 58 + b"]")])
        assert await store.get(done.id) is None
        assert await store.read_parts("", done.id, VALUES) == []
        with pytest.raises(LimitExceededError, match=r"120 exceeds the limit of 100.*memory\.max_part_bytes"):
            await store.write_parts("", [part(running, 1, b"[" + b"3" * 58 + b"]")])
        assert [each.seq for each in await store.read_parts("", running.id, VALUES)] == [0]
        await store.write_parts("", [part(running, 0, b"[" + b"4" * 98 + b"]")])  # in the place of the first
        await store.drop_parts("", running.id, VALUES, 0, below=1)
        await store.write_parts("", [part(running, 0, b"[" + b"5" * 98 + b"]")])
