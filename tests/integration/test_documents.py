"""Jobs in documents on a real Ray and a real document server: crashes, restarts, takeovers."""

from __future__ import annotations

import os
import time

import pytest
import ray
from pymongo import MongoClient

import koan_ray as koan
from koan_ray.runtime.ray import options
from tests.conftest import eventually
from tests.integration.conftest import end_namespace, kill9
from tests.servers import MongoServer

pytestmark = pytest.mark.ray


class Append(koan.Job[dict, int]):
    """One line for each time its body runs."""

    retry = koan.RetryPolicy(max_attempts=3, initial_delay=0.1)

    def execute(self, context, progress, cancellation) -> int:
        fd = os.open(context["ledger"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{self.id} {os.getpid()}\n".encode())
        os.close(fd)
        time.sleep(context["takes"])
        return context["n"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = MongoServer(tmp_path_factory.mktemp("documents") / "db").start()
    yield started
    started.end()


@pytest.fixture(scope="module", params=[1, 3], ids=["1 shard", "3 shards"])
def engine(request, cluster, server):
    sections = {"max_actors": 2, "cancel_grace": 0.5, "namespace": "test-documents", "lease_ttl": 6, "shards": request.param}
    with koan.init(engine=sections, sources={"default": {"url": server.url("ray")}}) as engine:
        yield engine
        end_namespace("test-documents")


@pytest.fixture
def db(server):
    with MongoClient(server.url("ray")) as client:
        yield client.get_default_database()


def kill_coordinator() -> None:
    handle = ray.get_actor(options.COORDINATOR_NAME, namespace="test-documents")
    kill9(ray.get(handle.pid.remote()))


def ledger_of(path) -> list[str]:
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_persisted_job_is_a_document(engine, db, tmp_path):
    job = Append.start({"ledger": str(tmp_path / "l"), "takes": 0, "n": 7}).persist().audit().run().get(30)
    assert job.wait().get(30) == 7
    document = db.jobs.find_one({"_id": job.id})
    assert (document["status"], document["result"], document["context"]["n"]) == ("completed", 7, 7)
    assert db.executions.count_documents({"job_id": job.id, "status": "succeeded"}) == 1
    assert [e.status for e in job.executions().get(10)] == [koan.ExecutionStatus.SUCCEEDED]


def test_a_killed_coordinator_adopts_what_runs_and_repeats_nothing(engine, db, tmp_path):
    ledger = tmp_path / "l"
    jobs = Append.start_many({"ledger": str(ledger), "takes": 4, "n": n} for n in range(2)).persist().audit().run().get(30)
    eventually(lambda: db.jobs.count_documents({"_id": {"$in": [job.id for job in jobs]}, "status": "running"}) == 2)
    kill_coordinator()
    assert [job.wait().get(60) for job in jobs] == [0, 1]
    assert sorted(ledger_of(ledger)) == sorted(job.id for job in jobs)
    for job in jobs:
        assert [e.status for e in job.executions().get(10)] == [koan.ExecutionStatus.SUCCEEDED]


def test_a_queue_outlives_its_coordinator_and_a_job_in_memory_does_not(engine, db, tmp_path):
    ledger = tmp_path / "l"
    contexts = [{"ledger": str(ledger), "takes": 0.05, "n": n} for n in range(60)]
    jobs = Append.start_many(contexts).persist().audit().run().get(30)
    lost = Append.start({**contexts[0], "takes": 30}).run().get(30)
    waiting = lost.wait()
    kill_coordinator()
    assert [job.wait().get(90) for job in jobs] == list(range(60))
    with pytest.raises(koan.JobLostError):
        waiting.get(30)
    assert db.executions.count_documents({"job_id": {"$in": [job.id for job in jobs]}, "status": "running"}) == 0


def test_a_killed_job_actor_loses_one_execution(engine, tmp_path):
    ledger = tmp_path / "l"
    job = Append.start({"ledger": str(ledger), "takes": 2, "n": 1}).persist().audit().run().get(30)
    eventually(lambda: ledger_of(ledger))
    kill9(int(ledger.read_text().split()[1]))
    assert job.wait().get(30) == 1
    assert [e.reason for e in job.executions().get(10)] == ["lost", "succeeded"]


def test_a_store_that_is_killed_and_comes_back_has_everything_that_was_acknowledged(engine, server, db, tmp_path):
    ledger = tmp_path / "l"
    acknowledged = []
    for round_ in range(3):
        contexts = [{"ledger": str(ledger), "takes": 0, "n": n} for n in range(10)]
        acknowledged += Append.start_many(contexts).persist().audit().run().get(60)
        server.kill9()
        waiting = Append.start({**contexts[0], "n": round_}).persist().run()
        time.sleep(1)
        assert not waiting.done
        server.restart()
        acknowledged.append(waiting.get(60))
    results = [job.wait().get(60) for job in acknowledged]
    assert len(results) == 33
    assert db.jobs.count_documents({"_id": {"$in": [job.id for job in acknowledged]}, "status": "completed"}) == 33
