"""Processes of a real Ray that are killed and paused, over a real document server. The ids are those of the fault table."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest
import ray
from pymongo import MongoClient

import koan_ray as koan
from koan_ray.runtime.ray import options
from tests.chaos import other
from tests.chaos.bench import Checker, Effectful
from tests.conftest import eventually
from tests.integration.conftest import end_namespace, is_alive, kill9

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NAMESPACE, DATABASE, TTL = "chaos", "rayfaults", 2.0
ENGINE = {"max_actors": 2, "cancel_grace": 0.5, "namespace": NAMESPACE, "lease_ttl": TTL, "max_crashes": 30}
UNRECORDED = 4  # effects of executions that a killed coordinator began in its last 50 ms and had not written


@pytest.fixture(scope="module")
def url(server):
    return server.url(DATABASE)


@pytest.fixture(scope="module")
def engine(cluster, url):
    with koan.init(engine=ENGINE, sources={"default": {"url": url}}) as engine:
        yield engine
        end_namespace(NAMESPACE)


@pytest.fixture(autouse=True)
def ready(engine):
    """Each test begins with an engine that is active. What earlier ones left stays there, and is checked again."""
    eventually(lambda: state_of(engine) == "active", within=40)


def state_of(engine):
    with contextlib.suppress(koan.KoanRayError, TimeoutError):
        return engine.status().get(10)["sources"]["default"]["state"]


def pid_of(name):
    return ray.get(ray.get_actor(name, namespace=NAMESPACE).pid.remote(), timeout=30)


def contexts(ledger, n, takes=0.1, **more):
    return [{"ledger": str(ledger.path), "takes": takes, "n": i, **more} for i in range(n)]


def many(ledger, n, takes=0.1, **more):
    return Effectful.start_many(contexts(ledger, n, takes, **more)).persist().audit()


def latest_pid(ledger, after):
    """The process of the last effect since ``after``, if it is alive."""
    effects = [effect for effect in ledger.effects() if effect.at > after and is_alive(effect.pid)]
    return effects[-1].pid if effects else None


def test_f01_job_actors_that_are_killed_under_load_lose_an_execution_each(engine, url, ledger, history):
    history.submit(many(ledger, 100))
    killed = []
    for _ in range(5):
        now = time.monotonic()
        killed.append(eventually(lambda now=now: latest_pid(ledger, now), within=30))
        kill9(killed[-1])
    history.wait_for_all(90)
    assert len(set(killed)) == 5
    assert any(len(ledger.of(job_id)) > 1 for job_id in history.acknowledged)
    Checker(url, history, ledger, max_crashes=30).check()


def test_f02_f03_f05_a_coordinator_that_is_killed_5_times_under_load_loses_and_repeats_nothing(engine, url, ledger, history):
    stopping = threading.Event()

    def keep_submitting():
        while not stopping.is_set():
            history.submit(many(ledger, 1, takes=0.05), timeout=90)
            time.sleep(0.2)

    history.submit(many(ledger, 200))
    writers = [threading.Thread(target=keep_submitting) for _ in range(2)]
    for writer in writers:
        writer.start()
    killed = []
    for n in range(5):
        eventually(lambda n=n: len(ledger.effects()) >= 15 * (n + 1), within=40)
        killed.append(pid_of(options.COORDINATOR_NAME))
        kill9(killed[-1])
        eventually(lambda: state_of(engine) == "active", within=40)
    stopping.set()
    for writer in writers:
        writer.join(100)
    history.wait_for_all(90)
    assert len(set(killed)) == 5
    assert len(history.acknowledged) > 200
    Checker(url, history, ledger, unrecorded=5 * UNRECORDED, max_crashes=30).check()


def test_f06_a_coordinator_that_was_paused_finds_itself_replaced_and_stands_down(engine, url, ledger, history):
    history.submit(many(ledger, 60, takes=0.3))
    eventually(lambda: len(ledger.effects()) > 4, within=30)
    term = engine.status().get(10)["sources"]["default"]["term"]
    standby = other.start(runtime="local", engine={**ENGINE, "orphan_timeout": 5}, url=url)
    pid = pid_of(options.COORDINATOR_NAME)
    try:
        other.said(standby)
        os.kill(pid, signal.SIGSTOP)
        with MongoClient(url) as client:
            leases = client.get_default_database().leases
            eventually(lambda: leases.find_one({"_id": f"{NAMESPACE}/0"})["term"] == term + 1, within=10 * TTL)
            time.sleep(TTL)
            os.kill(pid, signal.SIGCONT)
            eventually(lambda: state_of(engine) == "standby", within=20)
            assert pid_of(options.COORDINATOR_NAME) == pid
            history.wait_for_all(60)
            assert leases.find_one({"_id": f"{NAMESPACE}/0"})["term"] == term + 1
    finally:
        os.kill(pid, signal.SIGCONT)
        other.end(standby)
    eventually(lambda: state_of(engine) == "active", within=20)
    Checker(url, history, ledger, unrecorded=UNRECORDED, max_crashes=30).check()


def test_f07_a_broker_that_is_killed_under_reports_costs_no_job(engine, url, ledger, history):
    jobs = history.submit(many(ledger, 2, takes=4.0, reports=400))
    updates, ended = [], []

    def follow():
        updates.extend(jobs[0].progress_stream().blocking())
        ended.append(True)

    follower = threading.Thread(target=follow)
    follower.start()
    eventually(lambda: len(updates) > 10, within=30)
    killed = pid_of(options.BROKER_NAME)
    kill9(killed)
    history.wait_for_all(60)
    follower.join(30)
    assert ended
    assert pid_of(options.BROKER_NAME) != killed
    assert updates[-1].status is koan.JobStatus.COMPLETED
    sequences = [update.sequence for update in updates]
    assert sequences == sorted(set(sequences))
    Checker(url, history, ledger, max_crashes=30).check()


def test_f08_durable_jobs_go_on_when_their_driver_is_killed(engine, url, cluster, ledger, history):
    driver = other.start(
        runtime="ray", address=cluster, engine=ENGINE, url=url, contexts=contexts(ledger, 30, takes=0.2)
    )  # fmt: skip
    submitted = other.said(driver)["jobs"]
    eventually(ledger.effects, within=30)
    n_before = len(ledger.effects())
    other.end(driver)
    assert n_before < 30, "they were done before their driver was killed"
    for job_id in submitted:
        job = koan.Jobs.get(job_id).get(20)
        history.acknowledged[job.id] = job
    history.wait_for_all(60)
    assert len(ledger.effects()) == 30
    Checker(url, history, ledger, max_crashes=30).check()


def test_f29_of_two_engines_on_one_database_one_stands_by_and_finishes_what_the_other_leaves(engine, url, ledger, history):
    end_namespace(NAMESPACE)  # the lease is free
    first = other.start(runtime="local", engine=ENGINE, url=url, contexts=contexts(ledger, 40, takes=0.3))
    submitted = other.said(first)["jobs"]
    eventually(lambda: state_of(engine) == "standby", within=40)
    eventually(lambda: len(ledger.effects()) > 3, within=20)
    n_before = len(ledger.effects())
    other.end(first)
    assert n_before < 40
    eventually(lambda: state_of(engine) == "active", within=30)
    for job_id in submitted:
        job = koan.Jobs.get(job_id).get(20)
        history.acknowledged[job.id] = job
    history.wait_for_all(60)
    Checker(url, history, ledger, unrecorded=UNRECORDED, max_crashes=30).check()
