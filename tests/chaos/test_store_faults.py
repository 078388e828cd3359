"""Faults of the document server and of the way to it, with the engine in this process. Ids as in the fault table."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from pymongo import MongoClient

import koan_ray as koan
from koan_ray.domain.ids import new_id
from koan_ray.domain.lease import slots_of
from koan_ray.domain.records import Particulars, Residence
from koan_ray.domain.status import JobStatus
from koan_ray.engine.messages import Row, Submission
from koan_ray.engine.tenure import Source, Tenure
from koan_ray.errors import ConfigurationError, JobIdConflictError, PayloadTooLargeError, StoreUnavailableError
from koan_ray.ports import Change, LoopClock, Silence
from koan_ray.stores.mongo import MongoStore
from koan_ray.testing.contracts import audited, execution
from tests.chaos.bench import Checker, Effectful, History, Idle, Rival, local_engine, tenure_of
from tests.chaos.fault_proxy import FAULTS, WRITES
from tests.conftest import eventually

SHORT = {"serverSelectionTimeoutMS": 1000, "socketTimeoutMS": 1500, "connectTimeoutMS": 1000}
quick = pytest.mark.quick
# `make test` runs those of the matrix that differ most: the write was made and nobody said so, and it was not made.
EACH_FAULT = [pytest.param(fault, marks=[quick] * (fault in ("drop_after", "not_primary"))) for fault in FAULTS]


def several(ledger, n, takes=0.0, **more):
    return (
        Effectful.start_many({"ledger": str(ledger.path), "takes": takes, "n": i, **more} for i in range(n))
        .persist()
        .audit()
    )


def one(ledger, n=0, takes=0.0, **more):
    return Effectful.start({"ledger": str(ledger.path), "takes": takes, "n": n, **more}).persist().audit()


# --- F14, F15, F16: the server dies, stands still, is slow -----------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("n_kills", [pytest.param(3, marks=quick), pytest.param(10, marks=pytest.mark.slow)])
def test_f14_what_was_acknowledged_outlives_every_kill_of_the_server(own_server, ledger, history, n_kills, shards):
    url = own_server.url("f14") + "&serverSelectionTimeoutMS=2000"
    stopping = threading.Event()
    n_killed = 0

    def write(writer):
        n = 0
        while not stopping.is_set():
            history.submit(one(ledger, n=writer * 10_000 + n, fails=n % 7 == 0))
            n += 1

    with local_engine(url, shards=shards) as engine:
        writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        for writer in writers:
            writer.start()
        for _ in range(n_kills):
            before = len(history.acknowledged)
            eventually(lambda before=before: len(history.acknowledged) > before + 10, within=30)
            own_server.kill9()
            time.sleep(0.3)
            own_server.start()
            n_killed += 1
        stopping.set()
        for writer in writers:
            writer.join(60)
        history.wait_for_all(60)
        assert tenure_of(engine).term == 1, "the store's absence changed the holder"
    assert n_killed == n_kills
    assert history.calls["submit", "ok"] > 10 * n_kills
    Checker(own_server.url("f14"), history, ledger).check()


@quick
def test_f15_a_server_that_stands_still_for_5_ttl_changes_no_holder(own_server, ledger, history):
    ttl = 1.0
    with local_engine(own_server.url("f15"), lease_ttl=ttl) as engine, Rival(own_server.url("f15"), ttl_s=ttl) as rival:
        history.submit(several(ledger, 20, takes=0.3))
        eventually(ledger.effects)
        own_server.stop()
        stopped_at = time.monotonic()
        late = threading.Thread(target=lambda: history.submit(one(ledger, n=77)))
        late.start()
        time.sleep(5 * ttl)
        assert late.is_alive(), "a submit was acknowledged by a server that stood still"
        assert not tenure_of(engine).may_act
        own_server.cont()
        stood_still = time.monotonic() - stopped_at
        late.join(30)
        history.wait_for_all(60)
        assert stood_still >= 5 * ttl
        assert rival.n_takeovers == 0
        assert tenure_of(engine).term == 1
    Checker(own_server.url("f15"), history, ledger).check()


@pytest.mark.parametrize("delay_s", [pytest.param(0.2, marks=quick), pytest.param(1.0, marks=pytest.mark.slow)])
def test_f16_a_slow_server_slows_acknowledgements_and_changes_no_holder(server, proxy, database, ledger, history, delay_s):
    ttl = 3.0
    with local_engine(proxy.url(database), lease_ttl=ttl) as engine, Rival(server.url(database), ttl_s=ttl) as rival:
        history.submit(one(ledger))
        rules = [proxy.rule(WRITES[what], delay_s, times=10**6) for what in WRITES]
        began = time.monotonic()
        for n in range(3):
            history.submit(several(ledger, 20))
            assert time.monotonic() - began >= delay_s * (n + 1)
        history.wait_for_all(60)
        assert rival.n_takeovers == 0
        assert tenure_of(engine).term == 1
        assert sum(rule.n_fired for rule in rules) > 6
        proxy.clear()
    Checker(server.url(database), history, ledger).check()


# --- F17, F18, F19: no primary, no majority, no answer, for each write -----------------------------------------------


@pytest.mark.parametrize("fault", EACH_FAULT)
@pytest.mark.parametrize("write", ["insert of jobs", "update of jobs", "executions", "lease beat"])
def test_f17_f18_f19_a_write_of_unknown_outcome_counts_once(server, proxy, database, ledger, history, write, fault):
    with local_engine(proxy.url(database, **SHORT), lease_ttl=1.5) as engine:
        history.submit(one(ledger))
        rule = proxy.rule(WRITES[write], fault, times=2)
        history.submit(several(ledger, 5, fails=True))
        history.submit(one(ledger, takes=0.3))
        history.wait_for_all(30)
        eventually(lambda: rule.n_fired == 2)
        if fault == "deliver_late":
            time.sleep(proxy.late_s + 0.2)
        history.submit(one(ledger))
        history.wait_for_all(30)
        assert tenure_of(engine).term == 1
    assert history.calls["submit", "ok"] == 8
    assert set(history.results.values()) == {0, 1, 2, 3, 4}
    Checker(server.url(database), history, ledger).check()


@pytest.mark.parametrize("fault", EACH_FAULT)
@pytest.mark.parametrize("write", ["first lease", "lease take", "claim of jobs"])
def test_f17_f18_f19_a_start_survives_unknown_outcomes(server, proxy, database, ledger, history, write, fault):
    expected_term = 1
    if write != "first lease":
        with local_engine(server.url(database)):
            history.submit(one(ledger, n=3).delayed(1))
        expected_term = 2
    rule = proxy.rule(WRITES[write], fault, times=2 if fault != "deliver_late" else 1)
    with local_engine(proxy.url(database, **SHORT), lease_ttl=1.5) as engine:
        history.submit(several(ledger, 5))
        history.wait_for_all(30)
        assert rule.n_fired >= 1
        if fault == "deliver_late":
            time.sleep(proxy.late_s + 0.2)
            history.submit(one(ledger))
            history.wait_for_all(30)
        assert tenure_of(engine).term >= expected_term
    Checker(server.url(database), history, ledger).check()


# --- F21: writes that could be lost ----------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("weak", ["w=1", "w=0", "journal=false"])
def test_f21_weak_acknowledgement_is_refused(server, database, ledger, weak):
    with local_engine(f"{server.url(database)}&{weak}"):
        with pytest.raises(ConfigurationError, match=r"w=|journal"):
            one(ledger).run().get(10)
        assert Effectful.start({"ledger": str(ledger.path), "takes": 0, "n": 5}).run().get(10).wait().get(10) == 5
    with MongoClient(server.url(database)) as client:
        assert client.get_default_database().list_collection_names() == []


# --- F20: one id, several submits ------------------------------------------------------------------------------------


def submission(job_id, ledger, n, *, partition=""):
    """A submit under an id of the test's choice, as a client repeats it."""
    context = json.dumps({"ledger": str(ledger.path), "takes": 0.0, "n": n}).encode()
    terms = Effectful.definition.terms("")
    about = Particulars(residence=Residence("", partition, audit=True))
    return Submission([terms.id], [about], [tuple(Row(job_id, 0, 0, context, time.time()))], [], {})


def ask(engine, method, *args):
    runtime = engine._runtime
    return runtime._thread.run(getattr(runtime.core, method)(*args), timeout=30)


@quick
def test_f20_equal_ids_at_once_are_one_job_and_other_content_is_a_conflict(server, database, ledger, history):
    with local_engine(server.url(database)) as engine:
        history.wait(history.submit(one(ledger)))
        for _ in range(5):
            job_id = new_id()
            given = [submission(job_id, ledger, 1)] * 6 + [submission(job_id, ledger, 2)] * 2
            # ``terms`` of shipped classes carry the id of their code: take them from what the engine knows by now.
            terms_id = next(iter(engine._runtime.core._kinds._newest.values())).id
            given = [submitted._replace(terms=[terms_id]) for submitted in given]
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda submitted: ask(engine, "submit", submitted), given))
            refused = [[type(error) for error in answer.refused.values()] for answer in answers]
            n_accepted = refused.count([])
            assert n_accepted in (2, 6)
            assert refused.count([JobIdConflictError]) == 8 - n_accepted
            job = koan.Jobs.get(job_id).get(10)
            won = history.wait(job)
            again = [ask(engine, "submit", submitted).refused for submitted in given]
            assert [not refusal for refusal in again] == [n == won for n in [1] * 6 + [2] * 2]
            assert len(ledger.of(job_id)) == 1
    Checker(server.url(database), history, ledger).check()


# --- F24, F30: writes of somebody who was replaced -------------------------------------------------------------------


@pytest.fixture
async def two_stores(server, database):
    stores = [MongoStore(server.url(database), source="default") for _ in range(2)]
    for store in stores:
        await store.open()
    yield stores
    for store in stores:
        await store.close()


@quick
async def test_f24_every_write_under_an_old_term_changes_nothing(server, database, two_stores):
    old, new = two_stores
    held = await old.take_lease("koan/0", holder="old", seen=None)
    running = audited(status=JobStatus.RUNNING, execution_id=new_id(), term=1)
    queued = audited(term=1)
    opened = execution(running)
    await old.apply([Change(running, 0, (opened,)), Change(queued, 0)])
    taken = await new.take_lease("koan/0", holder="new", seen=held)
    assert await new.claim(range(256), taken.term) == 2
    with MongoClient(server.url(database)) as client:
        db = client.get_default_database()

        def everything():
            return [list(db[name].find(sort=[("_id", 1)])) for name in ("jobs", "executions", "leases")]

        before = everything()
        late = [
            running.evolve(rev=2, status=JobStatus.COMPLETED, result=b"1", completed_at=2.0, execution_id=None),
            running.evolve(rev=2, status=JobStatus.FAILED, completed_at=2.0, execution_id=None),
            running.evolve(rev=2, status=JobStatus.CANCELLED, completed_at=2.0, execution_id=None),
            running.evolve(rev=2, status=JobStatus.QUEUED, execution_id=None),
            running.evolve(rev=2, cancel_requested_at=2.0),
            queued.evolve(rev=2, status=JobStatus.RUNNING, execution_id=new_id()),
            queued.evolve(rev=2, status=JobStatus.CANCELLED, completed_at=2.0),
        ]
        for record in late:
            change = Change(record, 1, (opened,))
            assert await old.apply([change]) == [change]
        assert await old.claim(range(256), held.term) == 0
        assert await old.beat(held) is None
        await old.release(held)
        assert await old.take_lease("koan/0", holder="old", seen=held) is None
        for record in late:
            assert await old.delete_if(record, "") is False
        assert everything() == before


@quick
def test_f30_a_sweep_that_was_paused_between_read_and_write_leaves_an_ended_job_alone(
    server, proxy, database, ledger, history
):
    with local_engine(server.url(database)):
        history.submit(several(ledger, 5).delayed(0.5))
    with MongoClient(server.url(database)) as client:
        jobs = client.get_default_database().jobs
        ended = jobs.find_one({})["_id"]

        def settles_first(command):
            if not WRITES["claim of jobs"](command):
                return False
            done = {"status": "cancelled", "completed_at": datetime.now(UTC)}
            jobs.update_one({"_id": ended}, {"$set": done, "$unset": {"due_at": ""}, "$inc": {"rev": 1}})
            return True

        rule = proxy.rule(settles_first, 0.1)
        before_term = jobs.find_one({"_id": ended})["term"]
        with local_engine(proxy.url(database)):
            for job_id in set(history.acknowledged) - {ended}:
                history.wait(history.acknowledged[job_id])
        assert rule.n_fired == 1
        assert jobs.find_one({"_id": ended})["term"] == before_term
    Checker(server.url(database), history, ledger).check()


# --- F25: 8 contenders over one real database ------------------------------------------------------------------------


@pytest.mark.slow
async def test_f25_of_8_contenders_one_holds_the_lease_in_each_term(server, database):
    ttl = 0.9
    clock = LoopClock(asyncio.get_running_loop())
    hosts, tenures, running = [], [], []
    for n in range(8):
        hosts.append(Idle())
        store = MongoStore(server.url(database), source="default")
        tenure = Tenure(Source("default", store), shard="koan/0", slots=slots_of(0, 1), holder=f"h{n}", ttl_s=ttl,
                        clock=clock, host=hosts[n], log=Silence())  # fmt: skip
        tenures.append(tenure)
        running.append(asyncio.ensure_future(tenure.run()))
    n_holders = Counter()
    for n_killed in range(5):
        async with asyncio.timeout(20):
            while not any(tenure.state == "active" for tenure in tenures):  # noqa: ASYNC110 - states have no event
                await asyncio.sleep(0.02)
        for _ in range(20):
            n_holders[sum(tenure.may_act for tenure in tenures)] += 1
            await asyncio.sleep(0.02)
        (holder,) = [tenure for tenure in tenures if tenure.state == "active"]
        place = tenures.index(holder)
        holder.vanish(StoreUnavailableError("killed"))
        running[place].cancel()
        await asyncio.gather(running[place], return_exceptions=True)
        await holder.store.close()
        tenures.pop(place)
        running.pop(place)
        assert len([host for host in hosts if host.opened_terms]) == n_killed + 1
    terms = sorted(term for host in hosts for term in host.opened_terms)
    assert terms == [1, 2, 3, 4, 5]
    assert set(n_holders) == {1}
    for tenure, task in zip(tenures, running, strict=True):
        await tenure.close()
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


# --- F36: a loop that is busy ----------------------------------------------------------------------------------------


@quick
def test_f36_beats_go_on_while_the_coordinators_loop_is_blocked(server, database, ledger, history):
    ttl, blocked_s = 1.0, 3.0
    with local_engine(server.url(database), lease_ttl=ttl) as engine, Rival(server.url(database), ttl_s=ttl) as rival:
        history.submit(several(ledger, 20, takes=0.1))
        with MongoClient(server.url(database)) as client:
            leases = client.get_default_database().leases
            before = leases.find_one({})
            began = time.monotonic()
            engine._runtime._thread.call(time.sleep, blocked_s)
            assert engine.status().get(20)["sources"]["default"]["state"] == "active"
            assert time.monotonic() - began > 0.8 * blocked_s, "the loop was not blocked"
            after = leases.find_one({})
        assert after["beat"] - before["beat"] >= 2 * blocked_s / ttl
        assert after["term"] == 1
        history.wait_for_all(30)
        assert rival.n_takeovers == 0
    Checker(server.url(database), history, ledger).check()


# --- F22: no space left ----------------------------------------------------------------------------------------------


def test_f22_a_full_disk_loses_nothing_that_was_acknowledged(own_server, ledger, history):
    """The server's files may not grow; when they may again, and it was restarted, everything acknowledged is there."""
    url = own_server.url("f22") + "&serverSelectionTimeoutMS=1000&socketTimeoutMS=2000"
    with local_engine(url):
        history.submit(several(ledger, 20))
        history.wait_for_all(30)
        largest = max(file.stat().st_size for file in own_server.directory.rglob("*") if file.is_file())
        size = min(largest, 1_000_000)
        resource.prlimit(own_server.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        waiting = []
        for n in range(400):
            pending = one(ledger, n=n, pad="x" * 20_000).run()
            try:
                job = pending.get(2)
            except (TimeoutError, StoreUnavailableError):
                waiting.append(pending)
                break
            history.acknowledged[job.id] = job
        assert waiting, "the disk was never full"
        own_server.restart()  # its limit was the process's
        for pending in waiting:
            job = pending.get(60)
            history.acknowledged[job.id] = job
        history.wait_for_all(60)
    Checker(own_server.url("f22"), history, ledger).check()


# --- F37, F38: what cannot be stored ---------------------------------------------------------------------------------


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("not even this")


def recursive():
    found = []
    found.append(found)
    return found


def nested(depth):
    found = 1
    for _ in range(depth):
        found = [found]
    return found


RESULTS = {
    "an object": object, "a set of objects": lambda: {object()}, "a recursion": recursive, "a lambda": lambda: lambda: 1,
    "not a number": lambda: float("nan"), "a lone surrogate": lambda: "\ud800", "bytes": lambda: b"\xff\xfe",
    "deep": lambda: nested(95), "very deep": lambda: nested(5000), "dots": lambda: {"a.b": {"$set": "\0"}},
    "huge number": lambda: 10**400, "2 MB": lambda: "x" * 2_000_000, "17 MB": lambda: "x" * 17_000_000,
}  # fmt: skip
ERRORS = {
    "unprintable": UnprintableError, "a lone surrogate": lambda: ValueError("\ud800"),
    "17 MB": lambda: ValueError("x" * 17_000_000),
    "a group": lambda: ExceptionGroup("g", [ValueError("a"), TypeError("b")]), "nul": lambda: ValueError("\0$a.b"),
}  # fmt: skip


class Awkward(koan.Job[list, object]):
    kind = "chaos.Awkward"
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation):
        what, name = context
        if what == "progress":
            progress.report(0.5, "x" * 17_000_000)
            return 1
        if what == "error":
            problem = ERRORS[name]()
            raise problem
        return RESULTS[name]()


@quick
def test_f37_f38_results_and_errors_that_cannot_be_stored_end_their_job_and_nobody_elses(server, database, history, ledger):
    cases = [("result", name) for name in RESULTS] + [("error", name) for name in ERRORS] + [("progress", "17 MB")]
    with local_engine(server.url(database), inline_limit=4_000_000) as engine:
        for case in cases:
            job = history.submit(Awkward.start(list(case)).persist().audit())
            history.wait(job, 20)
            assert tenure_of(engine).term == 1, f"{case} cost the lease"
            stored = koan.Jobs.get(job.id).get(10)
            assert stored.status in (koan.JobStatus.COMPLETED, koan.JobStatus.FAILED), case
            if case[0] == "error":
                assert stored.status is koan.JobStatus.FAILED
        assert history.wait(history.submit(one(ledger, n=9))) == 9
    Checker(server.url(database), History(), ledger).check()


SIZES = [255_000, 257_000, 1_048_000, 1_049_000, 15_900_000, 17_000_000]


@pytest.mark.parametrize("size", [pytest.param(size, marks=[quick] * (size < 2_000_000)) for size in SIZES])
def test_f38_a_context_of_any_size_is_stored_or_refused_before_it_is_written(server, database, ledger, history, size):
    limit = 20_000_000 if size > 2_000_000 else 1_048_576
    with local_engine(server.url(database), inline_limit=limit) as engine:
        builder = one(ledger, n=3, pad="x" * size)
        if size > limit:
            with pytest.raises(PayloadTooLargeError):
                builder.run().get(20)
        else:
            assert history.wait(history.submit(builder)) == 3
        assert history.wait(history.submit(one(ledger, n=4))) == 4
        assert tenure_of(engine).term == 1
    Checker(server.url(database), history, ledger).check()


@quick
def test_f38_metadata_that_no_document_can_hold_are_refused_by_name(server, database, ledger, history):
    with local_engine(server.url(database)) as engine:
        with pytest.raises(PayloadTooLargeError):
            one(ledger).with_metadata(x="y" * 17_000_000).run().get(20)
        assert history.wait(history.submit(one(ledger, n=4))) == 4
        assert tenure_of(engine).term == 1
    Checker(server.url(database), history, ledger).check()


# --- F39: a flood of reports -----------------------------------------------------------------------------------------


class Floods(koan.Job[int, float]):
    kind = "chaos.Floods"

    def execute(self, context, progress, cancellation) -> float:
        for n in range(context):
            progress.report(n, context)
        return time.time()


@quick
def test_f39_100_000_reports_are_a_write_a_second_and_delay_no_end(server, proxy, database, history):
    with local_engine(proxy.url(database)) as engine:
        history.wait(history.submit(Floods.start(10).persist().audit()))
        counting = proxy.rule(WRITES["update of jobs"], 0.0, times=10**9)
        began = time.monotonic()
        job = history.submit(Floods.start(100_000).persist().audit())
        ended_at = history.wait(job, 60)
        settled_after, took = time.time() - ended_at, time.monotonic() - began
        assert settled_after < 1.0
        assert 1 <= counting.n_fired <= 2 + 1.5 * took + 1, f"{counting.n_fired} updates in {took:.1f} s"
        assert tenure_of(engine).term == 1
    Checker(server.url(database), history).check()


# --- F46, F48: documents of other versions, indexes of others --------------------------------------------------------


@quick
def test_f46_a_newer_document_is_neither_claimed_nor_overwritten_and_unknown_fields_survive(
    server, database, ledger, history
):
    with MongoClient(server.url(database)) as client:
        db = client.get_default_database()
        with local_engine(server.url(database)):
            kept, newer = (history.submit(one(ledger, n=n).delayed(1.5)) for n in (1, 2))
        db.jobs.update_one({"_id": kept.id}, {"$set": {"from_the_future": {"a": [1]}}})
        del history.acknowledged[newer.id]
        db.jobs.update_one({"_id": newer.id}, {"$set": {"schema_version": 2, "status": "running", "soul": "new"}})
        golden = db.jobs.find_one({"_id": newer.id})
        with local_engine(server.url(database), lease_ttl=0.6) as engine:
            assert tenure_of(engine).term == 2
            assert history.wait(history.acknowledged[kept.id], 30) == 1
            with pytest.raises(koan.KoanRayError, match="schema_version"):
                koan.Jobs.get(newer.id).get(10)
            with pytest.raises(koan.KoanRayError):
                newer.cancel().get(10)
            time.sleep(1.5)  # several sweeps
        assert db.jobs.find_one({"_id": newer.id}) == golden
        assert db.jobs.find_one({"_id": kept.id})["from_the_future"] == {"a": [1]}
        assert ledger.of(newer.id) == []
        db.jobs.delete_one({"_id": newer.id})
    Checker(server.url(database), history, ledger).check()


INDEXES = {
    "one is missing": (lambda jobs: jobs.drop_index("status"), None),
    "all are missing": (lambda jobs: jobs.drop_indexes(), None),
    "other keys under its name": (
        lambda jobs: (jobs.drop_index("status"), jobs.create_index([("kind", 1)], name="status")),
        "status",
    ),
    "its keys under another name": (
        lambda jobs: (jobs.drop_index("completed"), jobs.create_index([("completed_at", 1), ("_id", 1)], name="mine")),
        "completed",
    ),
    "one that deletes by age": (
        lambda jobs: jobs.create_index([("queued_at", 1)], name="ttl", expireAfterSeconds=9),
        "by age",
    ),
    "one that hides": (
        lambda jobs: (
            jobs.drop_index("parent"),
            jobs.create_index([("parent_job_id", 1)], name="parent", unique=True, sparse=True),
        ),
        "parent",
    ),
}  # fmt: skip


@quick
@pytest.mark.parametrize("case", INDEXES)
def test_f48_a_missing_index_is_made_and_one_in_the_way_is_refused(server, database, ledger, history, case):
    change, problem = INDEXES[case]
    with local_engine(server.url(database)):
        history.wait(history.submit(one(ledger, n=1)))
    with MongoClient(server.url(database)) as client:
        jobs = client.get_default_database().jobs
        names = set(jobs.index_information())
        change(jobs)
        with local_engine(server.url(database)):
            if problem is None:
                history.wait(history.submit(one(ledger, n=1)))
                assert set(jobs.index_information()) == names
            else:
                with pytest.raises(ConfigurationError, match=problem):
                    one(ledger).run().get(20)
    Checker(server.url(database), history, ledger).check()


# --- F14 and F15, mixed ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_f14_f15_kills_and_pauses_of_the_server_cost_no_lease(own_server, ledger, history, seed):
    rng = random.Random(seed)
    url = own_server.url("mixed") + "&serverSelectionTimeoutMS=2000"
    stopping = threading.Event()

    def work(writer):
        mine, n = random.Random(f"{seed}.{writer}"), 0
        while not stopping.is_set():
            builder = one(ledger, n=n, takes=mine.choice([0, 0.02, 0.3]), fails=mine.random() < 0.1)
            builder = builder.persist(partition=mine.choice([None, "hot"]))
            job = history.submit(builder.delayed(1) if mine.random() < 0.1 else builder, timeout=90)
            if job is not None and mine.random() < 0.1:
                job.cancel("by chance").get(30)
            n += 1
            time.sleep(0.03)

    with local_engine(url, lease_ttl=3) as engine:
        workers = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for worker in workers:
            worker.start()
        for _ in range(8):
            time.sleep(rng.uniform(0.5, 2))
            if rng.random() < 0.5:
                own_server.kill9()
                time.sleep(rng.uniform(0.1, 1.5))
                own_server.start()
            else:
                own_server.stop()
                time.sleep(rng.uniform(0.5, 3))
                own_server.cont()
        stopping.set()
        for worker in workers:
            worker.join(60)
        history.wait_for_all(60)
        assert tenure_of(engine).term == 1
    Checker(own_server.url("mixed"), history, ledger).check()
