"""The doctor on a real server, as it is built from settings."""

from __future__ import annotations

import pytest
from pymongo import MongoClient

from koan_ray import wiring
from koan_ray.config import Settings
from koan_ray.domain.status import ExecutionStatus, JobStatus, Reason
from koan_ray.errors import ConfigurationError, StoreUnavailableError
from koan_ray.ports import Change
from koan_ray.stores.mongo import MongoStore
from koan_ray.testing.contracts import AT, audited, execution
from tests.servers import free_port


@pytest.fixture
def audit_url(mongo_server, mongo_url):
    """A second database, for executions."""
    url = mongo_url.replace(mongo_url.partition("?")[0].rpartition("/")[2], "a" + mongo_url.partition("?")[0][-8:])
    yield url
    with MongoClient(url) as client:
        client.drop_database(client.get_default_database().name)


async def examined(only=None, **sections):
    async with wiring.doctor(wiring.engine_settings(Settings(**sections)), only) as doctor:
        found = [(finding.violation.invariant, finding.violation.job_id) async for finding in doctor.findings()]
        return doctor.n_jobs, found


async def test_executions_are_read_where_they_are_kept(mongo_url, audit_url):
    records = [
        audited(status=JobStatus.COMPLETED, completed_at=AT + 1, result=b"1", attempts=1, partition=("", "hot")[n % 2])
        for n in range(10)
    ]
    changes = [
        Change(record, 0, (execution(record).close(status=ExecutionStatus.SUCCEEDED, reason=Reason.SUCCEEDED, at=AT + 1),))
        for record in records
    ]
    jobs, audit = MongoStore(mongo_url, keeps_executions=False), MongoStore(audit_url)
    for store in (jobs, audit):
        await store.open()
    await jobs.apply(changes)
    await audit.file_executions(changes)
    sources = {"default": {"url": mongo_url}, "audit": {"url": audit_url}, "none": {"url": "memory://"}}
    assert await examined(sources=sources, jobs={"audit_source": "audit"}) == (10, [])
    assert await examined("default", sources=sources, jobs={"audit_source": "audit"}) == (10, [])
    with MongoClient(audit_url) as client:
        client.get_default_database()["executions.hot"].delete_one({"job_id": records[1].id})
    n_jobs, found = await examined(sources=sources, jobs={"audit_source": "audit"})
    assert (n_jobs, found) == (10, [("I6", records[1].id)])
    for store in (jobs, audit):
        await store.close()


async def test_what_cannot_be_looked_at_is_said():
    nobody = {"default": {"url": f"mongodb://127.0.0.1:{free_port()}/x?serverSelectionTimeoutMS=200"}}
    with pytest.raises(StoreUnavailableError, match="'default'"):
        await examined(sources=nobody)
    with pytest.raises(ConfigurationError, match=r"no source 'x' \(known: default\)"):
        await examined("x", sources=nobody)
    with pytest.raises(ConfigurationError, match="no source keeps documents"):
        await examined(sources={"none": {"url": "memory://"}})
    with pytest.raises(ConfigurationError, match="audit_source"):
        await examined(sources=nobody, jobs={"audit_source": "x"})
