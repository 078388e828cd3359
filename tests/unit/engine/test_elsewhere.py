"""Ends of jobs that other coordinators run are found, whatever else is in the store."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from koan_ray.domain.status import JobStatus
from koan_ray.engine import elsewhere
from koan_ray.engine.elsewhere import Elsewhere
from koan_ray.engine.tasks import Failures, Tasks
from koan_ray.errors import RecordCorruptError, StoreUnavailableError
from koan_ray.ports import Silence
from koan_ray.testing import ManualClock


async def test_a_document_that_cannot_be_read_does_not_keep_the_others_from_being_looked_at(monkeypatch, caplog):
    looks: list[str] = []

    async def get(job_id):
        looks.append(job_id)
        if job_id == "away":
            raise StoreUnavailableError("away")
        if job_id == "damaged":
            raise RecordCorruptError(job_id, "status", "unknown")
        return SimpleNamespace(id=job_id, status=JobStatus.COMPLETED if looks.count(job_id) > 1 else JobStatus.RUNNING)

    monkeypatch.setattr(elsewhere, "end_of", lambda job: job.id)
    ended: list[str] = []
    waiters = SimpleNamespace(is_watched=lambda job_id: True, ended=ended.append, wake=lambda: None)
    clock = ManualClock()
    tasks = Tasks(Failures(Silence()), clock)
    looking = Elsewhere({}, waiters, SimpleNamespace(get=get), clock, tasks)
    for job_id in ("away", "damaged", "fine"):
        looking.watch(job_id)
    for _ in range(3):
        for _ in range(10):
            await asyncio.sleep(0)
        clock.advance(1.0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert ended == ["fine"]
    assert "damaged" in looking
    assert "foreign_job_unreadable: job damaged: RecordCorruptError" in caplog.text
    tasks.cancel()
