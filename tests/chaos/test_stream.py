"""`Jobs.stream` over many documents, in the memory of one page."""

from __future__ import annotations

import asyncio

import psutil
import pytest

import koan_ray as koan
from koan_ray.domain.ids import new_id
from koan_ray.domain.records import ActorSpec, JobRecord, Particulars, Residence, Terms, identified
from koan_ray.domain.status import JobStatus
from koan_ray.ports import Change
from koan_ray.stores.mongo import MongoStore

AT = 1_790_000_000.0
CHUNK = 1000
MOST_MB = 50


async def fill(url, n):
    """Store ``n`` finished jobs with a context of a kilobyte each, ten in a millisecond."""
    store = MongoStore(url, source="default")
    await store.open()
    terms = identified(Terms("", "Stored", "c", koan.RetryPolicy(), None, ActorSpec()))
    about = Particulars(residence=Residence("default", "", False))
    for start in range(0, n, CHUNK):
        jobs = []
        for number in range(start, start + CHUNK):
            at = AT + number // 10 * 0.001
            job = JobRecord(new_id(), terms, about, b'"%s"' % (b"x" * 1000), at, JobStatus.COMPLETED)
            job.queued_at = job.started_at = job.completed_at = job.last_modified = at
            job.rev, job.attempts, job.result = 1, 1, b"1"
            jobs.append(Change(job, 0))
        assert await store.apply(jobs) == []
    await store.close()


@pytest.mark.parametrize("n", [pytest.param(10_000, marks=pytest.mark.quick), 100_000])
def test_a_stream_over_all_jobs_takes_the_memory_of_a_page(server, database, n):
    """Reader and coordinator share this process, so that both are measured."""
    url = server.url(database)
    asyncio.run(fill(url, n))
    process = psutil.Process()
    archival = {"enabled": False}  # which would move them meanwhile: they are old
    with koan.init(runtime="local", sources={"default": {"url": url}}, archival=archival):
        stream = koan.Jobs.stream(source="default").blocking()
        seen = {next(stream).id}
        before, most = process.memory_info().rss, 0
        for place, job in enumerate(stream):
            seen.add(job.id)
            if place % 1000 == 0:
                most = max(most, process.memory_info().rss)
    assert len(seen) == n
    of_the_test = n * 150  # the ids that it remembers, at most
    assert most - before - of_the_test < MOST_MB * 1024**2
