"""A coordinator of a real Ray, killed at named places in its code; see `koan_ray.killpoints`. Ids as in the fault table.

The coordinator is created with the killpoint in its environment, and Ray starts it again with the same one: a marker, made
by the process that dies, keeps the next from dying too, and tells the test that its fault happened.
"""

from __future__ import annotations

import threading
import uuid
from contextlib import contextmanager

import pytest
import ray
from pymongo import MongoClient

import koan_ray as koan
from koan_ray import wiring
from koan_ray.config import load_settings
from koan_ray.runtime.ray import options
from koan_ray.runtime.ray.actors import CoordinatorActor
from tests.chaos.bench import Checker, Effectful, have_effect, local_engine, stored_in
from tests.integration.conftest import end_namespace

pytestmark = pytest.mark.ray
UNRECORDED = 4  # effects of executions that a killed coordinator began in its last 50 ms and had not written
TTL = 2.0


def quick(at):
    return pytest.param(at, marks=pytest.mark.quick)


def slow(at):
    return pytest.param(at, marks=pytest.mark.slow)


class Accounted(koan.Job[dict, int]):
    """As `Effectful`, and never without a trace."""

    kind = "chaos.Accounted"
    claim = "write_ahead"
    retry = koan.RetryPolicy(max_attempts=3, initial_delay=0.1)

    def execute(self, context, progress, cancellation) -> int:
        have_effect(context["ledger"], self)
        return Effectful.execute(self, {**context, "ledger": "/dev/null"}, progress, cancellation)


class Fault:
    """The death that a test asked for."""

    def __init__(self, marker, namespace):
        self._marker, self._namespace = marker, namespace

    def happened(self, at):
        """Tell whether the coordinator died at ``at``, and another one is there."""
        pid, where = self._marker.read_text().split()
        handle = ray.get_actor(options.COORDINATOR_NAME, namespace=self._namespace)
        return where == at.partition(":")[0] and ray.get(handle.pid.remote(), timeout=30) != int(pid)


@pytest.fixture
def namespace():
    """One that nobody else uses. An earlier holder must have had the same: the lease is a namespace's."""
    return f"kill-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def engine_killed(cluster, server, database, namespace, tmp_path):
    """Starts an engine of its own whose coordinator dies at a killpoint, once."""

    @contextmanager
    def start(at, **sections):
        given = {
            "engine": {"max_actors": 2, "cancel_grace": 0.5, "namespace": namespace, "lease_ttl": TTL},
            "sources": {"default": {"url": server.url(database)}},
            **sections,
        }
        marker = tmp_path / "killed"
        environment = {"KOAN_RAY_KILL": at, "KOAN_RAY_KILL_ONCE": str(marker)}
        shell = options.shell(CoordinatorActor, options.COORDINATOR_GROUPS)
        chosen = shell.options(**options.COORDINATOR, namespace=namespace, runtime_env={"env_vars": environment})
        chosen.remote(wiring.engine_settings(load_settings(None, given)), namespace)
        try:
            with koan.init(**given):
                yield Fault(marker, namespace)
        finally:
            end_namespace(namespace)

    return start


def several(ledger, n, takes, job_type=Effectful):
    contexts = [{"ledger": str(ledger.path), "takes": takes, "n": i} for i in range(n)]
    return job_type.start_many(contexts).persist().audit()


# --- F02: between the decision to dispatch and the actor ---------------------------------------------------------------


@pytest.mark.parametrize("at", [quick("dispatch.decided"), slow("dispatch.decided:5"), slow("dispatch.sent")])
def test_f02_a_job_whose_dispatch_was_cut_off_runs_again(engine_killed, server, database, ledger, history, at):
    with engine_killed(at) as fault:
        history.submit(several(ledger, 8, 0.2))
        history.wait_for_all(60)
        assert fault.happened(at)
    unrecorded = 0 if at == "dispatch.decided" else UNRECORDED
    Checker(server.url(database), history, ledger, unrecorded=unrecorded).check()
    assert len(ledger.effects()) >= 8


@pytest.mark.parametrize(
    "at", [quick("dispatch.sent:3"), slow("claim.before_flush"), slow("claim.after_flush:2"), slow("dispatch.decided:2")]
)
def test_f02_no_effect_of_a_job_that_is_claimed_ahead_is_without_its_execution(
    engine_killed, server, database, ledger, history, at
):
    with engine_killed(at) as fault:
        history.submit(several(ledger, 8, 0.2, Accounted))
        history.wait_for_all(60)
        assert fault.happened(at)
    Checker(server.url(database), history, ledger, unrecorded=0).check()
    with MongoClient(server.url(database), tz_aware=True) as client:
        executions = stored_in(client.get_default_database()).executions
    known = {execution.id for records in executions.values() for execution in records}
    assert {effect.execution for effect in ledger.effects()} <= known


def check_one_body_and_one_end(killed, at, url, ledger, history):
    """Run one job while the coordinator is killed: its body is not repeated, and its only execution is closed."""
    with killed as fault:
        job = history.submit(several(ledger, 1, 0.6))[0]
        assert history.wait(job) == 0
        assert fault.happened(at)
        assert [(e.attempt_number, e.status) for e in job.executions().get(10)] == [(1, koan.ExecutionStatus.SUCCEEDED)]
    assert len(ledger.effects()) == 1
    Checker(url, history, ledger).check()


# --- F03: after the body, before its end is stored -------------------------------------------------------------------


@pytest.mark.parametrize("at", [quick("settle.before_flush"), slow("settle.after_flush"), slow("flush.before_jobs:3")])
def test_f03_an_end_that_was_not_stored_is_asked_of_the_actor_and_the_body_not_repeated(
    engine_killed, server, database, ledger, history, at
):
    check_one_body_and_one_end(engine_killed(at), at, server.url(database), ledger, history)


# --- F04: between the documents of a job and of its execution ----------------------------------------------------------


@pytest.mark.parametrize("at", [slow("flush.between:1"), quick("flush.between:2"), slow("flush.after_executions:3")])
def test_f04_a_flush_that_was_torn_leaves_no_execution_open_and_repeats_no_body(
    engine_killed, server, database, ledger, history, at
):
    """The first flush with an execution says that the job runs, the second how it ended."""
    check_one_body_and_one_end(engine_killed(at), at, server.url(database), ledger, history)


# --- the lease and the take-over -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("at", ["lease.before_take", "lease.after_take", "lease.before_beat:3", "lease.after_beat:3"])
def test_f05_a_coordinator_that_dies_over_its_lease_takes_it_again(engine_killed, server, database, ledger, history, at):
    with engine_killed(at) as fault:
        history.submit(several(ledger, 8, 0.5))
        history.wait_for_all(60)
        assert fault.happened(at)
    Checker(server.url(database), history, ledger, unrecorded=UNRECORDED).check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "at",
    [
        "takeover.before_adopt", "takeover.after_adopt", "takeover.before_stamp", "takeover.after_stamp",
        "takeover.before_close", "takeover.after_close",
    ],
)  # fmt: skip
def test_f05_a_take_over_that_was_cut_off_is_finished_by_the_next(
    engine_killed, server, database, namespace, ledger, history, at
):
    """An earlier holder left a job that ran, jobs that waited, and an execution that the end of its job left open."""
    with local_engine(server.url(database), namespace=namespace):
        history.submit(several(ledger, 1, 0.0))
        history.wait_for_all()
        history.submit(several(ledger, 5, 0.1).delayed(1))
    with MongoClient(server.url(database)) as client:
        db = client.get_default_database()
        opened = {"$set": {"status": "running", "open": 0}, "$unset": {"completed_at": "", "reason": "", "metrics": ""}}
        assert db.executions.update_one({"status": "succeeded"}, opened).modified_count == 1
        ran = {"status": "running", "execution_id": str(uuid.uuid4()), "attempts": 1, "ordinal": 1}
        ran["last_execution_id"] = ran["execution_id"]
        assert db.jobs.update_one({"status": "queued"}, {"$set": ran, "$unset": {"due_at": ""}}).modified_count == 1
    with engine_killed(at) as fault:
        koan.Jobs.count().get(60)  # somebody has to call it
        history.wait_for_all(60)
        assert fault.happened(at)
    Checker(server.url(database), history, ledger).check()


# --- F44: in the middle of archiving -----------------------------------------------------------------------------------


ARCHIVE_AT = [
    slow("archive.before_copy:2"), quick("archive.between_copies:2"), slow("archive.after_copy:2"),
    slow("archive.before_delete:2"), slow("archive.between_deletes:2"), slow("archive.after_delete:2"),
]  # fmt: skip


@pytest.mark.parametrize("at", ARCHIVE_AT)
def test_f44_a_job_whose_archiving_was_cut_off_is_never_in_neither_place(
    engine_killed, server, database, namespace, ledger, history, at
):
    with local_engine(server.url(database), namespace=namespace):
        history.submit(several(ledger, 6, 0.0))
        history.wait_for_all()
    gone, n_looks, stopping = [], 0, threading.Event()

    def look():
        """In the order in which a reader has to: here, in the archive, and here again."""
        nonlocal n_looks
        with MongoClient(server.url(database)) as client:
            db = client.get_default_database()
            while not stopping.is_set():
                for job_id in history.acknowledged:
                    places = (db["jobs"], db["jobs.archive"], db["jobs"])
                    if not any(place.find_one({"_id": job_id}, {"_id": 1}) for place in places):
                        gone.append(job_id)
                    n_looks += 1

    reader = threading.Thread(target=look)
    with engine_killed(at, archival={"retention": 0}) as fault:
        reader.start()
        try:
            koan.Jobs.archive().get(60)  # the call is made again when there is a coordinator again
            assert fault.happened(at)
            assert koan.Jobs.archive().get(60)["default"]["due"] == 0
        finally:
            stopping.set()
            reader.join(20)
    assert n_looks > 20
    assert gone == []
    with MongoClient(server.url(database)) as client:
        db = client.get_default_database()
        counts = [db[name].count_documents({}) for name in ("jobs", "executions", "jobs.archive", "executions.archive")]
    assert counts == [0, 0, 6, 6]
    Checker(server.url(database), history, ledger).check()
