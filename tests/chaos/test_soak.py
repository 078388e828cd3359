"""Everything is killed at random while jobs run, for a minute or for as long as KOAN_RAY_SOAK_S says; then the checker.

The figures go to RESULTS.md. KOAN_RAY_SOAK_SEED repeats a choice of faults, though not their moments.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import ray
from pymongo import MongoClient
from ray.cluster_utils import Cluster

import koan_ray as koan
from koan_ray.runtime.ray import options
from tests.chaos.bench import Checker, Effectful
from tests.conftest import eventually
from tests.integration.conftest import end_namespace, is_alive, kill9

SECONDS = float(os.environ.get("KOAN_RAY_SOAK_S", "0"))  # `make chaos` says 60
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(not SECONDS, reason="only `make chaos` runs it")]
SEED = int(os.environ.get("KOAN_RAY_SOAK_SEED", str(int(time.time()))))
RESULTS = Path(__file__).with_name("RESULTS.md")
NAMESPACE = "chaos-soak"
UNRECORDED = 4  # see test_ray_faults
WRITTEN_BEHIND = """Running is written behind: a body that a killed coordinator began in its last 50 ms may be begun again
under another execution. Those are the effects that no document names; they settle nothing."""
KINDS = (
    "coordinator", "broker", "job actor", "job actor", "document server", "pause of the document server", "raylet",
)  # fmt: skip


class Nodes:
    """A second node of the Ray that this process started, whose raylet is killed and replaced."""

    def __init__(self):
        self._cluster = Cluster()
        self._cluster.head_node = ray._private.worker._global_node
        self._node = None
        self.add()

    def add(self):
        self._node = self._cluster.add_node(num_cpus=1)

    def kill(self):
        """Kill the raylet. Its job actors go with it, in their own time; so does what else it had started."""
        kill9(self._node.all_processes["raylet"][0].process.pid)

    def remove(self):
        self._cluster.remove_node(self._node, allow_graceful=False)


class Trouble:
    """Kills and pauses; counts what really happened."""

    def __init__(self, server, nodes, ledger, rng):
        self._server, self._nodes, self._ledger, self._rng = server, nodes, ledger, rng
        self.fired = Counter()

    def cause(self, kind):
        if kind == "document server":
            self._server.kill9()
            time.sleep(self._rng.uniform(0.1, 1.5))
            self._server.start()
        elif kind == "pause of the document server":
            self._server.stop()
            time.sleep(self._rng.uniform(0.5, 3.0))
            self._server.cont()
        elif kind == "raylet":
            self._nodes.kill()
            time.sleep(self._rng.uniform(0.1, 1.5))
            self._nodes.remove()
            self._nodes.add()
        elif kind == "job actor":
            pids = {effect.pid for effect in self._ledger.effects()[-20:] if is_alive(effect.pid)}
            if not pids:
                return
            kill9(self._rng.choice(sorted(pids)))
        else:
            name = options.COORDINATOR_NAME if kind == "coordinator" else options.BROKER_NAME
            kill9(ray.get(ray.get_actor(name, namespace=NAMESPACE).pid.remote(), timeout=20))
        self.fired[kind] += 1


@pytest.fixture
def nodes(cluster):
    started = Nodes()
    yield started
    started.remove()


@pytest.mark.timeout(SECONDS * 2 + 240)
def test_soak(nodes, own_server, ledger, history):
    rng = random.Random(SEED)
    url = own_server.url("soak")
    engine = {
        "max_actors": 3, "cancel_grace": 0.5, "namespace": NAMESPACE, "lease_ttl": 3, "max_crashes": 1000,
    }  # fmt: skip
    stopping = threading.Event()
    began = time.monotonic()
    with koan.init(engine=engine, sources={"default": {"url": url + "&serverSelectionTimeoutMS=2000"}}):
        trouble = Trouble(own_server, nodes, ledger, rng)

        def submit(seed):
            mine, n = random.Random(f"{SEED}.{seed}"), 0
            while not stopping.is_set():
                context = {"ledger": str(ledger.path), "takes": mine.choice([0.0, 0.02, 0.3]), "n": n,
                           "fails": mine.random() < 0.1}  # fmt: skip
                builder = Effectful.start(context).persist(partition=mine.choice([None, "hot"])).audit()
                job = history.submit(builder.delayed(1) if mine.random() < 0.1 else builder, timeout=90)
                if job is not None and mine.random() < 0.1:
                    with contextlib.suppress(koan.KoanRayError, TimeoutError):
                        job.cancel("by chance").get(30)
                n += 1
                time.sleep(mine.uniform(0.2, 0.4))  # what is submitted faster than it gets done is left for afterwards

        submitters = [threading.Thread(target=submit, args=(n,)) for n in range(3)]
        for submitter in submitters:
            submitter.start()
        eventually(lambda: len(ledger.effects()) > 5, within=60)
        while time.monotonic() - began < SECONDS:
            time.sleep(rng.uniform(0.5, 4.0))
            with contextlib.suppress(ray.exceptions.RayError, ValueError):  # it was not there: not counted
                trouble.cause(rng.choice(KINDS))
        stopping.set()
        took = time.monotonic() - began
        for submitter in submitters:
            submitter.join(100)
        history.wait_for_all(120)
        unsettled(url)
        settled_after = time.monotonic() - began - took
        end_namespace(NAMESPACE)
    n_kills = trouble.fired["coordinator"]
    checker = Checker(url, history, ledger, unrecorded=n_kills * UNRECORDED)
    violations = checker.violations()
    write_results(trouble.fired, history, ledger, checker, violations, took, settled_after)
    assert not violations, "\n".join(violations[:20])
    assert sum(trouble.fired.values()) >= SECONDS / 10


def unsettled(url):
    """Wait for jobs whose submit was never answered and was made all the same."""
    with MongoClient(url) as client:
        db = client.get_default_database()
        open_ones = {"status": {"$in": ["created", "queued", "running"]}}
        eventually(lambda: not any(db[n].count_documents(open_ones) for n in ("jobs", "jobs.hot")), within=60)


def write_results(fired, history, ledger, checker, violations, took, settled_after):
    rows = {
        **{f"kill of the {kind}" if "pause" not in kind else kind: n for kind, n in sorted(fired.items())},
        "faults in all": sum(fired.values()),
        "jobs acknowledged": len(history.acknowledged),
        "submits of unknown fate": history.calls["submit", "unknown"],
        "effects": len(ledger.effects()),
        "effects of executions that no document names": checker.n_unrecorded,
        "violations": len(violations),
        "seconds of trouble": round(took),
        "seconds until everything had ended": round(settled_after),
        "seed": SEED,
    }
    command = f"KOAN_RAY_SOAK_S={SECONDS:g} KOAN_RAY_SOAK_SEED={SEED} make chaos ARGS='-k soak'"
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "pymongo", "secantusdb"))
    text = [
        "# The last soak",
        "",
        f"`{command}`",
        "",
        f"Python {platform.python_version()}, {packages}",
        "",
        "| | |",
        "|---|---|",
    ]
    text += [f"| {name} | {value} |" for name, value in rows.items()]
    text += ["", WRITTEN_BEHIND, ""]
    RESULTS.write_text("\n".join(text))
