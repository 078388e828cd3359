"""What fault tests share: a ledger of effects, a history of calls, rivals for the lease, and the checker at the end."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pymongo import MongoClient

import koan_ray as koan
from koan_ray import ambient
from koan_ray.domain.invariants import check_job, check_placement
from koan_ray.domain.lease import slots_of
from koan_ray.domain.status import ExecutionStatus
from koan_ray.engine.tenure import Source, Tenure
from koan_ray.errors import KoanRayError, StoreUnavailableError
from koan_ray.ports import LoopClock, Silence
from koan_ray.stores.codec import blobs_named, decode_execution, decode_job
from koan_ray.stores.mongo import MongoStore

# --- effects ---------------------------------------------------------------------------------------------------------


class Effect(NamedTuple):
    """One time that a body did its work."""

    job: str
    execution: str
    pid: int
    at: float  # monotonic


class EffectLedger:
    """A file with one line per effect, which no crash tears: each line is one append of a few bytes."""

    def __init__(self, path):
        self.path = Path(path)

    def effects(self):
        if not self.path.exists():
            return []
        rows = [line.split() for line in self.path.read_text().splitlines()]
        return [Effect(job, execution, int(pid), float(at)) for job, execution, pid, at in rows]

    def of(self, job_id):
        return [effect for effect in self.effects() if effect.job == job_id]


def have_effect(path, job):
    """Called by a body: write down that it is at work."""
    attempt = ambient.attempt.get()
    line = f"{job.id} {attempt.order.execution_id} {os.getpid()} {time.monotonic()}\n"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


class Effectful(koan.Job[dict, int]):
    """Has one effect, takes its time, and returns its number. May fail the first time."""

    kind = "chaos.Effectful"
    retry = koan.RetryPolicy(max_attempts=3, initial_delay=0.1)

    def execute(self, context, progress, cancellation) -> int:
        have_effect(context["ledger"], self)
        if context.get("reports"):
            for n in range(context["reports"]):
                progress.report(n, context["reports"])
                time.sleep(context["takes"] / context["reports"])
        else:
            time.sleep(context["takes"])
        if context.get("fails") and self.last_error is None:
            raise ValueError("the first time it fails")
        return context["n"]


# --- calls -----------------------------------------------------------------------------------------------------------


class History:
    """What clients were told: by job id ``ok`` for an acknowledged submit, and results; and how other calls ended."""

    def __init__(self):
        self.acknowledged = {}  # job id -> the job
        self.results = {}  # job id -> what its waiter was told
        self.calls = Counter()  # (call, ok | fail | unknown)
        self._lock = threading.Lock()

    def submit(self, builder, timeout=60):
        """Submit, wait for the acknowledgement, and note it; None if it was refused or its fate is unknown."""
        try:
            answer = builder.run().get(timeout)
        except (StoreUnavailableError, TimeoutError):
            self._count("submit", "unknown")
            return None
        except KoanRayError:
            self._count("submit", "fail")
            return None
        jobs = answer if isinstance(answer, list) else [answer]
        with self._lock:
            self.acknowledged.update((job.id, job) for job in jobs)
        self._count("submit", "ok", len(jobs))
        return answer

    def wait(self, job, timeout=60):
        """Wait for a job's end and note what was told."""
        try:
            result = job.wait().get(timeout)
        except (koan.JobFailedError, koan.JobCancelledError) as error:
            with self._lock:
                self.results[job.id] = type(error)
            self._count("wait", "fail")
            return error
        with self._lock:
            self.results[job.id] = result
        self._count("wait", "ok")
        return result

    def wait_for_all(self, timeout=60):
        until = time.monotonic() + timeout
        for job in list(self.acknowledged.values()):
            if job.id not in self.results:
                self.wait(job, max(0.1, until - time.monotonic()))

    def _count(self, call, outcome, n=1):
        with self._lock:
            self.calls[call, outcome] += n


# --- the checker -----------------------------------------------------------------------------------------------------

_ERRORS = {"failed": koan.JobFailedError, "cancelled": koan.JobCancelledError}


class Stored(NamedTuple):
    """Everything that a database holds of jobs."""

    places: dict  # job id -> [(record, partition)]
    executions: dict  # job id -> [record], oldest first
    foreign: list  # ids of documents that this version does not read


def stored_in(database):
    """Read a whole database through a plain client: all partitions, all executions."""
    places, executions, foreign = defaultdict(list), defaultdict(list), []
    for name in database.list_collection_names():
        kind, _, partition = name.partition(".")
        if kind == "jobs":
            for document in database[name].find():
                if document["schema_version"] != 1:
                    foreign.append(document["_id"])
                    continue
                blobs = {blob: _blob(database, partition, blob) for blob in blobs_named(document)}
                record = decode_job(document, source="default", partition=partition, blobs=blobs)
                places[record.id].append((record, partition))
        elif kind == "executions":
            for document in database[name].find():
                record = decode_execution(document)
                executions[record.job_id].append(record)
    for found in executions.values():
        found.sort(key=lambda execution: (execution.started_at, execution.id))
    return Stored(places, executions, foreign)


def _blob(database, partition, name):
    import gridfs

    bucket = gridfs.GridFSBucket(database, f"blobs.{partition}" if partition else "blobs")
    return bucket.open_download_stream(name).read()


class Checker:
    """Evaluates the reliability rules over database, history and ledger.

    Args:
        url: Of the database, without a proxy in between.
        history: What clients were told.
        ledger: What bodies did.
        unrecorded: So many effects may come from executions that nobody knows: Running is written behind, so those that a
            killed coordinator began in its last 50 ms may be begun again. 0 unless a test kills coordinators.
        max_crashes: The engine's limit.
    """

    def __init__(self, url, history, ledger=None, *, unrecorded=0, max_crashes=None):
        self._url, self._history, self._ledger = url, history, ledger
        self._unrecorded, self._max_crashes = unrecorded, max_crashes
        self.n_unrecorded = 0

    def violations(self):
        with MongoClient(self._url, tz_aware=True, serverSelectionTimeoutMS=5000) as client:
            stored = stored_in(client.get_default_database())
        missing = self._history.acknowledged.keys() - stored.places.keys()
        found = [f"I1 job {job_id}: acknowledged and not stored" for job_id in missing]
        for job_id, places in stored.places.items():
            found += [str(violation) for violation in check_placement(places)]
            job, executions = places[0][0], stored.executions.get(job_id, [])
            parents = stored.places.get(job.particulars.parent_job_id or "")
            if not job.status.is_final:
                found.append(f"I7 job {job_id}: is {job.status} ({job.reason}) at the end")
            parent = parents[0][0] if parents else None
            problems = check_job(job, executions, parent=parent, max_crashes=self._max_crashes)
            found += [f"{violation} {[(e.attempt, e.status.value, e.reason) for e in executions]}" for violation in problems]
            found += self._check_told(job)
        orphans = [job_id for job_id in stored.executions if job_id not in stored.places]
        found += [f"I5 job {job_id}: has executions and no document" for job_id in orphans]
        return [*found, *self._check_effects(stored)]

    def check(self):
        found = self.violations()
        assert not found, "\n".join(found[:20])
        return self

    def _check_told(self, job):
        told = self._history.results.get(job.id, self)
        if told is self:
            return
        if isinstance(told, type):
            if told is not _ERRORS.get(job.status.value):
                yield f"I2 job {job.id}: its waiter was told {told.__name__}, and it is {job.status}"
        elif job.result is None or koan_json(job.result) != told:
            yield f"I2 job {job.id}: its waiter was told {told!r:.80}, and it is {job.status} {job.result!r:.80}"

    def _check_effects(self, stored):
        if self._ledger is None:
            return
        effects = self._ledger.effects()
        for execution_id, n in Counter(effect.execution for effect in effects).items():
            if n > 1:
                yield f"I3 execution {execution_id}: its body ran {n} times"
        known = {execution.id for executions in stored.executions.values() for execution in executions}
        per_job = defaultdict(list)
        for effect in effects:
            per_job[effect.job].append(effect.execution)
        self.n_unrecorded = 0
        for job_id, ids in per_job.items():
            places = stored.places.get(job_id)
            if not places or not places[0][0].particulars.residence.audit:
                continue
            otherwise = [e for e in stored.executions.get(job_id, []) if e.status is not ExecutionStatus.SUCCEEDED]
            excess = len(ids) - 1 - len(otherwise)
            if excess > 0:
                strangers = len([execution_id for execution_id in ids if execution_id not in known])
                self.n_unrecorded += strangers
                if excess > strangers:
                    yield f"I6 job {job_id}: {len(ids)} effects, and {len(otherwise)} executions ended otherwise"
        if self.n_unrecorded > self._unrecorded:
            yield f"I6: {self.n_unrecorded} effects of executions that nobody knows, at most {self._unrecorded} may be"


def koan_json(content):
    import json

    return json.loads(content)


# --- engines and rivals ----------------------------------------------------------------------------------------------


@contextmanager
def local_engine(url, **sections):
    """The engine in this process, with documents at ``url``."""
    given = {"max_actors": 2, "cancel_grace": 0.2, "lease_ttl": 3, **sections}
    with koan.init(runtime="local", engine=given, sources={"default": {"url": url}}) as engine:
        yield engine


def tenure_of(engine):
    """The hold of a local engine on its only source."""
    return engine._runtime.core._catalog.sources["default"].tenures[0]


class Idle:
    """A host of a tenure that runs nothing: it only wants the lease."""

    def __init__(self):
        self.opened_terms, self.n_stood_down, self.taken_in = [], 0, []

    def took_in(self, tenure, jobs):
        self.taken_in += [job.id for job in jobs]

    async def opened(self, tenure):
        self.opened_terms.append(tenure.term)

    async def found(self, tenure, jobs, *, is_late=False):
        self.taken_in += [job.id for job in jobs]

    def stood_down(self, tenure):
        self.n_stood_down += 1

    def written(self, jobs): ...
    def refused(self, job): ...
    def unstorable(self, job, size, limit): ...
    def unwritable(self, job, problem): ...
    def resumed(self, job_ids): ...


class Rival:
    """Another coordinator's tenure on a thread of its own, which takes the lease as soon as it may."""

    def __init__(self, url, *, ttl_s, shard="koan/0", holder="rival"):
        self.url, self.host = url, Idle()
        self._ttl_s, self._shard, self._holder = ttl_s, shard, holder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._turn, name="rival", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    @property
    def n_takeovers(self):
        return len(self.host.opened_terms)

    def _turn(self):
        self._loop.run_until_complete(self._live())
        self._loop.close()

    async def _live(self):
        self._stop = asyncio.Event()
        store = MongoStore(self.url, source="default")
        tenure = Tenure(
            Source("default", store), shard=self._shard, slots=slots_of(0, 1),
            holder=self._holder, ttl_s=self._ttl_s, clock=LoopClock(self._loop), host=self.host, log=Silence(),
        )  # fmt: skip
        running = asyncio.ensure_future(tenure.run())
        await self._stop.wait()
        await tenure.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await store.close()
