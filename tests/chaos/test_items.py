"""Jobs over items while their processes are killed at random moments, on a real Ray and a real document server (F43)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import time
from collections import Counter

import pytest
import ray
from pymongo import MongoClient

import koan_ray as koan
from koan_ray.runtime.ray import options
from tests.chaos.bench import Checker, History
from tests.conftest import eventually
from tests.integration.conftest import end_namespace, is_alive, kill9

pytestmark = [pytest.mark.ray]

NAMESPACE, DATABASE = "chaos-items", "itemfaults"
N_ACTORS = 4
CHECKPOINT_S, CHUNK_S = 0.5, 0.5
RESUMES_WITHIN_S = 5.0
# Work that may be done again after a kill: what ran since the last checkpoint, and the chunks that were out.
REPEATS_S = {
    "actor": 2 * CHUNK_S,
    "coordinator": N_ACTORS * CHUNK_S,
    "lead": N_ACTORS * (CHECKPOINT_S + CHUNK_S),
    "three": 3 * 2 * CHUNK_S,
}
ENGINE = {"max_actors": N_ACTORS, "cancel_grace": 1.0, "namespace": NAMESPACE, "lease_ttl": 3, "max_crashes": 30}


LEAD = -1  # in the ledger: the items are asked for


def note(ledger, item):
    fd = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{item} {os.getpid()} {time.monotonic()}\n".encode())
    os.close(fd)


class Accounted(koan.FiniteJob[dict, dict, int]):
    """One line for each time that an item was processed; every seventh fails, every eleventh is skipped."""

    kind = "chaos.Accounted"
    retry = koan.RetryPolicy(max_attempts=10, initial_delay=0.1, max_delay=0.5)
    resources = koan.Resources(num_cpus=0.25)
    items = koan.ItemOptions(checkpoint_every=CHECKPOINT_S)

    def get_items(self, context):
        note(context["ledger"], LEAD)
        yield from range(context["n"])

    def process_item(self, item, index, progress):
        note(self.context["ledger"], item)
        time.sleep(self.context["takes"])
        if item % 7 == 3:
            raise ValueError(f"no {item}")
        if item % 11 == 5:
            return koan.ItemResult.skipped("eleven")
        return koan.ItemResult.success(item)

    def build_result(self, summary) -> dict:
        values = Counter(summary.values)
        twice = [value for value, n in values.items() if n > 1]
        return {
            "total": summary.total_items, "processed": summary.processed_items, "failed": summary.failed_items,
            "skipped": summary.skipped_items, "values": sum(values.values()), "twice": twice,
            "sum": sum(values),
        }  # fmt: skip


@pytest.fixture(scope="module")
def url(server):
    return server.url(DATABASE)


@pytest.fixture(scope="module")
def engine(cluster, url):
    with koan.init(engine=ENGINE, sources={"default": {"url": url}}) as engine:
        yield engine
        end_namespace(NAMESPACE)


def expected(n):
    failed = [i for i in range(n) if i % 7 == 3]
    skipped = [i for i in range(n) if i % 7 != 3 and i % 11 == 5]
    processed = [i for i in range(n) if i % 7 != 3 and i % 11 != 5]
    return {
        "total": n, "processed": len(processed), "failed": len(failed), "skipped": len(skipped), "values": len(processed),
        "twice": [], "sum": sum(processed),
    }  # fmt: skip


class Ledger:
    def __init__(self, path):
        self.path = path

    def lines(self):
        if not self.path.exists():
            return []
        return [(int(a), int(b), float(c)) for a, b, c in map(str.split, self.path.read_text().splitlines())]

    def pids_since(self, at):
        return {pid for _, pid, when in self.lines() if when > at and is_alive(pid)}


def actors(engine, spec):
    with contextlib.suppress(koan.KoanRayError, TimeoutError):
        found = engine.status().get(10)["actors"]
        return [a["pid"] for a in found if a["pid"] and (a["spec"] == "lead") == (spec == "lead")]
    return []


def kill_coordinator():
    handle = ray.get_actor(options.COORDINATOR_NAME, namespace=NAMESPACE)
    kill9(ray.get(handle.pid.remote(), timeout=30))


def goes_on(engine, ledger, who):
    """Wait until an item is begun after a kill, once whoever replaces the victim is at work; returns after how long."""
    killed_at = since = time.monotonic()
    if who == "lead":
        since = eventually(lambda: [at for item, _, at in ledger.lines() if item == LEAD and at > killed_at], within=20)[0]
    elif who == "coordinator":
        eventually(lambda: answers(engine), within=20)
        since = time.monotonic()
    return (
        eventually(lambda: [at for item, _, at in ledger.lines() if item != LEAD and at > since], within=20)[0] - killed_at
    )


def answers(engine):
    with contextlib.suppress(koan.KoanRayError, TimeoutError):
        return engine.status().get(1)
    return None


def check(job, url, ledger, history, n, n_kills):
    result = history.wait(job, 120)
    assert result == expected(n)
    dead = job.failed_items().get(30)
    assert sorted(item.index for item in dead) == [i for i in range(n) if i % 7 == 3]  # each once
    runs = Counter(item for item, _, _ in ledger.lines() if item != LEAD)
    assert set(runs) == set(range(n))
    assert n_kills
    Checker(url, history, max_crashes=30).check()
    with MongoClient(url) as client:
        database = client.get_default_database()
        document = database.jobs.find_one({"_id": job.id})
        counts = document["items"]
        assert (counts["processed"], counts["skipped"], counts["failed"]) == (
            result["processed"], result["skipped"], result["failed"]
        )  # fmt: skip
        assert database.jobs.count_documents({"parent_job_id": job.id}) == 0  # chunks are never written
    return sum(runs.values()) - n


def test_f43_every_item_is_recorded_once_whatever_is_killed(engine, url, tmp_path):
    """The quick variant: 2,000 items, five kills, of actors, the lead and the coordinator."""
    n, takes, ledger, history = 2000, 0.01, Ledger(tmp_path / "ledger"), History()
    job = history.submit(Accounted.start({"n": n, "takes": takes, "ledger": str(ledger.path)}).persist().audit())
    eventually(lambda: len(ledger.lines()) > 100, within=30)
    kills = []
    for who in ("actor", "lead", "actor", "coordinator", "lead"):
        if who == "coordinator":
            kill_coordinator()
        else:
            kill9(eventually(lambda who=who: actors(engine, who), within=30)[0])
        kills.append((who, goes_on(engine, ledger, who)))
        time.sleep(0.3)
    assert max(after for _, after in kills) < RESUMES_WITHIN_S, kills
    repeated = check(job, url, ledger, history, n, kills)
    print("kills", kills, "repeated", repeated)
    assert repeated <= sum(REPEATS_S[who] for who, _ in kills) / takes


@pytest.mark.slow
def test_f43_ten_thousand_items_and_three_of_four_actors(engine, url, tmp_path):
    """SIGKILL of three of the four actors, of the coordinator and of the lead, at random moments."""
    seed = random.randrange(1 << 30)
    print(json.dumps({"seed": seed}))
    dice = random.Random(seed)
    n, ledger, history = 10_000, Ledger(tmp_path / "ledger"), History()
    job = history.submit(Accounted.start({"n": n, "takes": 0.005, "ledger": str(ledger.path)}).persist().audit())
    eventually(lambda: len(ledger.lines()) > 500, within=30)
    kills, waits = [], []
    while not job.refresh().get(60).status.is_final and len(kills) < 10:
        time.sleep(dice.uniform(0.2, 1.5))
        who = dice.choice(["three", "coordinator", "lead", "three"])
        if who == "three":
            for pid in dice.sample(found := actors(engine, "items"), min(3, len(found))):
                kill9(pid)
        elif who == "lead":
            for pid in actors(engine, "lead"):
                kill9(pid)
        else:
            kill_coordinator()
        kills.append(who)
        if not job.refresh().get(60).status.is_final:
            waits.append(goes_on(engine, ledger, who))
    repeated = check(job, url, ledger, history, n, kills)
    print("kills", Counter(kills), "repeated", repeated, "resumed after", [round(after, 1) for after in waits])
    assert statistics.median(waits) < RESUMES_WITHIN_S
    assert repeated <= sum(REPEATS_S[who] for who in kills) / 0.005
