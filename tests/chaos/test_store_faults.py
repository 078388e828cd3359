"""Faults of the document server and of the way to it, with the engine in this process. The ids are those of the fault table."""

from __future__ import annotations

import threading
import time

import pytest
from pymongo import MongoClient

import koan_ray as koan
from koan_ray.errors import ConfigurationError, StoreUnavailableError
from tests.chaos.bench import Checker, Effectful, Rival, local_engine, tenure_of
from tests.chaos.fault_proxy import FAULTS, WRITES, FaultProxy
from tests.conftest import eventually

SHORT = {"serverSelectionTimeoutMS": 1000, "socketTimeoutMS": 1500, "connectTimeoutMS": 1000}
quick = pytest.mark.quick


def several(ledger, n, takes=0.0, **more):
    return Effectful.start_many({"ledger": str(ledger.path), "takes": takes, "n": i, **more} for i in range(n)).persist().audit()


def one(ledger, n=0, takes=0.0, **more):
    return Effectful.start({"ledger": str(ledger.path), "takes": takes, "n": n, **more}).persist().audit()


# --- F14, F15, F16: the server dies, stands still, is slow -----------------------------------------------------------------


@quick
@pytest.mark.parametrize("n_kills", [pytest.param(3, id="3-kills"), pytest.param(10, id="10-kills", marks=pytest.mark.slow)])
def test_f14_what_was_acknowledged_outlives_every_kill_of_the_server(own_server, ledger, history, n_kills):
    url = own_server.url("f14") + "&serverSelectionTimeoutMS=2000"
    stopping = threading.Event()
    n_killed = 0

    def write(writer):
        n = 0
        while not stopping.is_set():
            history.submit(one(ledger, n=writer * 10_000 + n, fails=n % 7 == 0))
            n += 1

    with local_engine(url) as engine:
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
        eventually(lambda: ledger.effects())
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


@quick
@pytest.mark.parametrize("delay_s", [0.2, 1.0])
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


# --- F17, F18, F19: no primary, no majority, no answer, for each write ------------------------------------------------------


@quick
@pytest.mark.parametrize("fault", FAULTS)
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


@quick
@pytest.mark.parametrize("fault", FAULTS)
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


# --- F21: writes that could be lost ------------------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("weak", ["w=1", "w=0", "journal=false"])
def test_f21_weak_acknowledgement_is_refused(server, database, ledger, weak):
    with local_engine(f"{server.url(database)}&{weak}"):
        with pytest.raises(ConfigurationError, match="w=|journal"):
            one(ledger).run().get(10)
        assert Effectful.start({"ledger": str(ledger.path), "takes": 0, "n": 5}).run().get(10).wait().get(10) == 5
    with MongoClient(server.url(database)) as client:
        assert client.get_default_database().list_collection_names() == []
