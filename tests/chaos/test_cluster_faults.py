"""Nodes of a Ray cluster that die, are cut off, or lose their control store. The ids are those of the fault table.

The head holds coordinator and broker and has no CPU for job actors; the two other nodes have one each. The drivers are
processes of their own, because this one may be connected to another Ray. What became of the jobs is read from the database.

Health checks are made four times a second and a node is given up after three of them failed, instead of after a minute.
The GCS keeps its tables in RocksDB where it is started again (F11); with the memory backend, Ray 2.60 takes a GCS that
comes back for another cluster, and so do we (F12).
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from pymongo import MongoClient
from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster

from tests.chaos import other
from tests.chaos.bench import Checker, stored_in
from tests.conftest import eventually
from tests.integration.conftest import is_alive
from tests.servers import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(180)]

TTL = 2.0
ENGINE = {"max_actors": 2, "cancel_grace": 0.5, "lease_ttl": TTL, "orphan_timeout": 8}
HEALTH = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "250",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_AUTH_MODE": "disabled",
}


@pytest.fixture
def new_cluster(monkeypatch, tmp_path):
    """Starts clusters of a head and two nodes."""
    for name, value in HEALTH.items():
        monkeypatch.setenv(name, value)
    started = []

    def start():
        head = {"num_cpus": 0, "include_dashboard": False, "gcs_server_port": free_port()}
        with newest_ray_kept():
            cluster = Cluster(initialize_head=True, head_node_args=head)
        started.append(cluster)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        return cluster

    yield start
    for cluster in started:
        for node in [*cluster.worker_nodes, *([cluster.head_node] if cluster.head_node else [])]:
            cluster.remove_node(node, allow_graceful=False)


@contextmanager
def newest_ray_kept():
    """`Cluster` writes its head down as the newest Ray of this machine, which others would join: put back what was there."""
    file = Path(get_ray_address_file(None))
    before = file.read_text() if file.exists() else None
    try:
        yield
    finally:
        if before is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(before)


@pytest.fixture
def new_driver(server, database):
    """Starts drivers that submit jobs to a cluster and stay."""
    started = []

    def start(cluster, contexts=(), **engine):
        driver = other.start(
            runtime="ray", address=cluster.address, engine={**ENGINE, **engine}, url=server.url(database),
            contexts=list(contexts),
        )  # fmt: skip
        started.append(driver)
        return driver, other.said(driver, 90)["jobs"]

    yield start
    for driver in started:
        other.end(driver)


@pytest.fixture
def stored(server, database):
    """Reads everything that is stored."""
    with MongoClient(server.url(database), tz_aware=True) as client:
        yield lambda: stored_in(client.get_default_database())


def contexts(ledger, n, takes):
    return [{"ledger": str(ledger.path), "takes": takes, "n": i} for i in range(n)]


def all_ended(stored, job_ids):
    places = stored().places
    return all(places[job_id][0][0].status.is_final for job_id in job_ids)


def node_of(cluster, pid):
    """The node whose raylet is the parent of a process."""
    with open(f"/proc/{pid}/stat") as file:
        parent = int(file.read().rpartition(")")[2].split()[1])
    (node,) = [node for node in cluster.worker_nodes if raylet_of(node) == parent]
    return node


def raylet_of(node):
    return node.all_processes["raylet"][0].process.pid


def lost(stored, job_ids):
    return [e for job_id in job_ids for e in stored().executions.get(job_id, []) if e.reason == "lost"]


def test_f09_what_ran_on_a_node_that_died_runs_again_on_another(
    new_cluster, new_driver, server, database, stored, ledger, history
):
    cluster = new_cluster()
    _, job_ids = new_driver(cluster, contexts(ledger, 12, 1.0))
    history.acknowledged.update(dict.fromkeys(job_ids))
    eventually(lambda: len({effect.pid for effect in ledger.effects()}) == 2, within=60)
    time.sleep(0.2)  # what has begun is stored by now
    victim = ledger.effects()[-1].pid
    n_before = len(ledger.effects())
    cluster.remove_node(node_of(cluster, victim), allow_graceful=False)
    eventually(lambda: not is_alive(victim), within=20)
    eventually(lambda: all_ended(stored, job_ids), within=60)
    found = lost(stored, job_ids)
    assert len(found) == 1
    assert found[0].error.message, "it does not say why"
    assert {effect.pid for effect in ledger.effects()[n_before + 1 :]}.isdisjoint({victim})
    assert len(ledger.effects()) == 12 + 1
    Checker(server.url(database), history, ledger).check()


def test_f10_of_a_body_on_a_node_that_was_cut_off_nothing_counts_and_its_process_exits(
    new_cluster, new_driver, server, database, stored, ledger, history
):
    """The raylet stands still, its job actor does not: for a while two processes run one job, and one of them counts.

    Job actors look after their coordinator every quarter of ``orphan_timeout``; the body ends before that, so that the
    first that the coordinator hears of the zombie is its report.
    """
    cluster = new_cluster()
    takes = 5.0
    short, long = contexts(ledger, 4, 1.0), contexts(ledger, 1, takes)
    driver, job_ids = new_driver(cluster, [*short, *long], orphan_timeout=30)
    history.acknowledged.update(dict.fromkeys(job_ids))
    eventually(lambda: len(ledger.effects()) == 5, within=60)
    assert len({effect.pid for effect in ledger.effects()}) == 2, "only one node has a job actor"
    time.sleep(0.2)  # what has begun is stored by now
    zombie = ledger.effects()[-1]
    os.kill(raylet_of(node_of(cluster, zombie.pid)), signal.SIGSTOP)
    eventually(lambda: len(ledger.of(zombie.job)) == 2, within=60)
    second = ledger.of(zombie.job)[1]
    assert is_alive(zombie.pid), "the process of the first execution was gone when the second began"
    assert second.at < zombie.at + takes, "the first body had ended when the second began"
    assert other.status(driver)["counters"]["reports_refused"] == 0
    eventually(lambda: not is_alive(zombie.pid), within=20)
    assert other.status(driver)["counters"]["reports_refused"] == 1
    eventually(lambda: all_ended(stored, job_ids), within=60)
    executions = stored().executions[zombie.job]
    assert [(e.status.value, e.reason.value) for e in executions] == [("failed", "lost"), ("succeeded", "succeeded")]
    assert [e.id for e in executions] == [zombie.execution, second.execution]
    Checker(server.url(database), history, ledger).check()


def test_f11_attempts_survive_a_restart_of_the_gcs_and_jobs_start_again_after_it(
    new_cluster, new_driver, server, database, stored, ledger, history, monkeypatch, tmp_path
):
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path / "gcs"))
    cluster = new_cluster()
    driver, job_ids = new_driver(cluster, contexts(ledger, 16, 1.0))
    history.acknowledged.update(dict.fromkeys(job_ids))
    eventually(lambda: len(ledger.effects()) >= 3, within=60)
    pid = other.status(driver)["pid"]
    killed = cluster.head_node.all_processes["gcs_server"][0].process.pid
    cluster.head_node.kill_gcs_server()
    assert not is_alive(killed)
    n_before = len(ledger.effects())
    time.sleep(3)
    during = len(ledger.effects()) - n_before
    cluster.head_node.start_gcs_server()
    assert during > 0, "actors that live are talked to without the GCS"
    eventually(lambda: all_ended(stored, job_ids), within=60)
    _, more = new_driver(cluster, contexts(ledger, 4, 0.1))
    history.acknowledged.update(dict.fromkeys(more))
    eventually(lambda: all_ended(stored, more), within=60)
    assert other.status(driver)["pid"] == pid, "the coordinator was started again"
    assert lost(stored, [*job_ids, *more]) == []
    assert len(ledger.effects()) == 20
    Checker(server.url(database), history, ledger).check()


def test_f12_another_cluster_on_the_same_database_finishes_what_a_lost_one_has_begun(
    new_cluster, new_driver, server, database, stored, ledger, history
):
    cluster = new_cluster()
    driver, job_ids = new_driver(cluster, contexts(ledger, 12, 1.0))
    history.acknowledged.update(dict.fromkeys(job_ids))
    eventually(lambda: len(ledger.effects()) >= 4, within=60)
    time.sleep(0.2)  # what has begun is stored by now
    pids = {effect.pid for effect in ledger.effects()} | {other.status(driver)["pid"]}
    other.end(driver)
    for node in [cluster.head_node, *cluster.worker_nodes]:
        cluster.remove_node(node, allow_graceful=False)
    eventually(lambda: not any(map(is_alive, pids)), within=30)
    assert not all_ended(stored, job_ids), "they were done before the cluster was lost"
    again = new_cluster()
    driver, _ = new_driver(again)
    eventually(lambda: all_ended(stored, job_ids), within=90)
    assert other.status(driver)["sources"]["default"]["term"] == 2
    assert len(lost(stored, job_ids)) == 2, "one body ran on each node"
    assert len(ledger.effects()) == 12 + 2
    Checker(server.url(database), history, ledger).check()
