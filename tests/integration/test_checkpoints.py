"""Checkpoints and parts of jobs on Ray and in this process, in documents on a real server: kills, and going on."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta

import pytest
import ray
from pymongo import MongoClient

import koan_ray as koan
from koan_ray import ambient
from koan_ray.domain.records import VALUES, Checkpoint, ItemCounts, Part
from koan_ray.errors import ConflictError
from koan_ray.runtime.ray import options
from tests.conftest import eventually
from tests.integration.conftest import end_namespace, kill9
from tests.servers import MongoServer

pytestmark = pytest.mark.ray

NAMESPACE = "test-checkpoints"


class Trek(koan.Job[dict, int]):
    """So many items, one a checkpoint; a line in the ledger for each time one is processed."""

    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> int:
        order = ambient.attempt.get().order
        done = order.checkpoint or Checkpoint(0, b"0", context["n"], 0, 0, 0, 0.0)
        assert ambient.engine().resume_state(self.id, order.execution_id).get(timeout=30) == order.checkpoint
        for n in range(json.loads(done.body), context["n"]):
            cancellation.raise_if_requested()
            if n == context.get("fails_at") and not os.path.exists(context["ledger"] + ".healed"):
                raise koan.NonRetryable("as asked")
            with open(context["ledger"], "a") as ledger:
                ledger.write(f"{n} {os.getpid()}\n")
            time.sleep(context["takes"])
            done = done._replace(sequence=n + 1, body=b"%d" % (n + 1), processed=n + 1, updated_at=time.time())
            part = Part(self.id, VALUES, n, b"[%d]" % n, 1)
            if not ambient.engine().checkpoint(self.id, order.execution_id, done, [part]).get(timeout=60):
                raise koan.NonRetryable("superseded")
        return context["n"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = MongoServer(tmp_path_factory.mktemp("checkpoints") / "db").start()
    yield started
    started.end()


@pytest.fixture(scope="module", params=["local", "ray"])
def engine(request, server):
    sections = {"max_actors": 2, "cancel_grace": 0.5, "namespace": NAMESPACE, "lease_ttl": 6}
    sources = {"default": {"url": server.url(request.param)}}
    if request.param == "ray":
        request.getfixturevalue("cluster")
    with koan.init(runtime=request.param, engine=sections, sources=sources) as engine:
        yield engine
        if request.param == "ray":
            end_namespace(NAMESPACE)


@pytest.fixture
def db(server, engine):
    with MongoClient(server.url(engine.runtime)) as client:
        yield client.get_default_database()


def begin(tmp_path, n, takes=0.05, **more):
    context = {"n": n, "takes": takes, "ledger": str(tmp_path / "ledger"), **more}
    return Trek.start(context).persist(partition="hot").run().get(timeout=60)


def processed(tmp_path):
    lines = (tmp_path / "ledger").read_text().split("\n")
    return [int(line.split()[0]) for line in lines if line], [int(line.split()[1]) for line in lines if line]


def produced(job_id):
    after, found = -1, []
    while page := ambient.engine().parts(job_id, VALUES, after, 7).get(timeout=30):
        found += [item for part in page for item in json.loads(part.body)]
        after = page[-1].seq
    return found


def stored(db, job_id):
    return db["jobs.hot"].find_one({"_id": job_id}).get("items", {}).get("processed", 0)


def test_a_job_is_checkpointed_and_shows_what_it_has_produced(engine, db, tmp_path):
    job = begin(tmp_path, 20, takes=0.0)
    assert job.wait().get(timeout=60) == 20
    assert job._view.items == ItemCounts(20, 20, 0, 0)
    assert produced(job.id) == list(range(20))
    assert stored(db, job.id) == 20
    assert db["items.hot"].count_documents({"job_id": job.id}) == 20
    job.remove().get(timeout=30)
    assert db["items.hot"].count_documents({"job_id": job.id}) == 0


def test_a_failed_and_a_cancelled_job_go_on_as_new_ones(engine, db, tmp_path):
    job = begin(tmp_path, 12, takes=0.02, fails_at=5)
    with pytest.raises(koan.JobFailedError, match="as asked"):
        job.wait().get(timeout=60)
    (tmp_path / "ledger.healed").touch()
    again = koan.Jobs.retry(job.id, resume=True).get(timeout=30)
    eventually(lambda: stored(db, again.id) > 6)
    again.cancel().get(timeout=30)
    with pytest.raises(koan.JobCancelledError):
        again.wait().get(timeout=60)
    last = koan.Jobs.retry(again.id, resume=True).get(timeout=30)
    assert last.wait().get(timeout=60) == 12
    assert processed(tmp_path)[0] == list(range(12))  # each once, over three jobs
    assert produced(last.id) == list(range(12))
    assert produced(job.id) == list(range(5))
    with pytest.raises(ConflictError, match="only a failed or cancelled job"):
        koan.Jobs.retry(last.id, resume=True).get(timeout=30)


def test_parts_follow_their_job_to_the_archive(engine, db, tmp_path):
    job = begin(tmp_path, 10, takes=0.0)
    job.wait().get(timeout=60)
    grow_old(db, job.id)
    counts = koan.Jobs.archive().get(timeout=60)
    assert sum(each["moved"] for each in counts.values()) >= 1
    assert db["items.hot"].count_documents({"job_id": job.id}) == 0
    assert db["items.archive"].count_documents({"job_id": job.id}) == 10
    assert produced(job.id) == list(range(10))
    koan.Jobs.restore(job.id).get(timeout=30)
    assert db["items.archive"].count_documents({"job_id": job.id}) == 0
    assert produced(job.id) == list(range(10))


def grow_old(db, job_id):
    document = db["jobs.hot"].find_one({"_id": job_id})
    older = {name: document[name] - timedelta(days=40) for name in ("completed_at", "last_modified")}
    db["jobs.hot"].update_one({"_id": job_id}, {"$set": older})


def test_a_killed_actor_and_a_killed_coordinator_repeat_at_most_what_was_in_flight(engine, db, tmp_path):
    if engine.runtime == "local":
        pytest.skip("there are no processes to kill")
    job = begin(tmp_path, 60)
    eventually(lambda: stored(db, job.id) > 5)
    kill9(processed(tmp_path)[1][-1])
    eventually(lambda: len(set(processed(tmp_path)[1])) == 2)
    at = stored(db, job.id)
    eventually(lambda: stored(db, job.id) > at + 3)
    handle = ray.get_actor(options.COORDINATOR_NAME, namespace=NAMESPACE)
    kill9(ray.get(handle.pid.remote()))
    assert job.wait().get(timeout=120) == 60
    items, pids = processed(tmp_path)
    assert len(set(pids)) == 2  # the coordinator's death stopped nothing
    assert set(items) == set(range(60))
    assert len(items) <= 61
    assert produced(job.id) == list(range(60))
