"""Faults whose order in time matters, in simulated time: the ids are those of the fault table."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from itertools import pairwise
from random import Random

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.invariants import check_job
from koan_ray.domain.lease import slots_of
from koan_ray.domain.records import ErrorInfo, Progress
from koan_ray.engine.tenure import Source, Tenure
from koan_ray.errors import StoreUnavailableError
from koan_ray.ports import Push, Report, Silence
from koan_ray.stores.codec import decode_execution, decode_job
from koan_ray.testing.loop import VirtualClock

TTL = 15.0


class Spans(koan.Job[float, str]):
    """Says when it runs."""

    retry = koan.RetryPolicy(max_attempts=3, initial_delay=1)
    spans: list[tuple[str, float, float]] = []

    async def execute(self, context, progress, cancellation) -> str:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await asyncio.sleep(context)
        finally:
            self.spans.append((self.id, began, loop.time()))
        return self.id


@pytest.fixture
def database():
    Spans.spans.clear()
    return testing.MemoryDatabase()


@pytest.fixture(params=[1, 3], ids=["1 shard", "3 shards"], autouse=True)
def shards(request, database):
    database.n_shards = request.param


def engine_on(database, **settings):
    sources = {"default": lambda: testing.MemoryDocumentStore(database, source="default")}
    return testing.engine(sources=sources, shards=database.n_shards, **settings)


def hold_of(engine):
    return engine.coordinator._catalog.sources["default"].tenures[0]


def check(database, acknowledged=()):
    """Every acknowledged job has ended, once, and its documents keep the rules."""
    jobs, executions = {}, {}
    for partition, documents in database.jobs.items():
        for document in documents.values():
            jobs[document["_id"]] = decode_job(document, source="default", partition=partition)
    for documents in database.executions.values():
        for document in documents.values():
            execution = decode_execution(document)
            executions.setdefault(execution.job_id, []).append(execution)
    assert set(acknowledged) <= jobs.keys()
    for job in jobs.values():
        mine = sorted(executions.get(job.id, []), key=lambda e: (e.started_at, e.id))
        assert job.status.is_final, job
        problems = [str(found) for found in check_job(job, mine)]
        assert not problems, f"{problems} {[(e.attempt, e.reason) for e in mine]}"
    return jobs, executions


# --- F15, F16: what an observer may conclude -------------------------------------------------------------------------


class Hosts:
    """A host that counts."""

    def __init__(self):
        self.opened_terms = []

    def took_in(self, tenure, jobs): ...
    async def opened(self, tenure):
        self.opened_terms.append((tenure._holder, tenure.term))

    async def found(self, tenure, jobs, *, is_late=False): ...
    def stood_down(self, tenure): ...
    def written(self, jobs): ...
    def refused(self, job): ...
    def unstorable(self, job, size, limit): ...
    def unwritable(self, job, problem): ...
    def resumed(self, job_ids): ...


class Far(testing.MemoryDocumentStore):
    """A client whose way to the database takes its time, and who gives up on it after a while."""

    way_s, patience_s = 0.0, 1000.0

    async def _begin(self, *, writes=False):
        try:
            async with asyncio.timeout(self.patience_s):
                await asyncio.sleep(self.way_s)
                await super()._begin(writes=writes)
        except TimeoutError:
            raise StoreUnavailableError("timed out") from None


def tenure_on(database, holder, host, clock=None, way_s=0.0, patience_s=1000.0):
    loop = asyncio.get_running_loop()
    store = Far(database, source="default")
    store.way_s, store.patience_s = way_s, patience_s
    return Tenure(
        Source("default", store), shard="koan/0", slots=slots_of(0, 1), holder=holder, ttl_s=TTL,
        clock=clock or VirtualClock(loop), host=host, log=Silence(),
    )  # fmt: skip


class StandsStill(testing.StoreFaults):
    """A server that is paused: calls wait, and go on in their order when it runs again."""

    runs: asyncio.Event

    async def before(self, *, writes):
        await self.runs.wait()
        await super().before(writes=writes)


@pytest.mark.parametrize("at", [n + 0.5 for n in range(34)])
@pytest.mark.parametrize("stood_still_s", [1.6 * TTL, 5 * TTL])
def test_f15_one_read_that_took_long_does_not_show_that_a_beat_stood_still(database, stood_still_s, at):
    """The server stood still. It answers the observer first; the holder has given up on a beat and sends the next soon."""

    async def scenario():
        database.faults = StandsStill()
        database.faults.runs = asyncio.Event()
        database.faults.runs.set()
        host = Hosts()
        holder, observer = tenure_on(database, "holder", host, way_s=2, patience_s=8), tenure_on(database, "observer", host)
        tasks = [asyncio.ensure_future(holder.run())]
        await asyncio.sleep(9)
        tasks.append(asyncio.ensure_future(observer.run()))
        await asyncio.sleep(TTL + at)
        database.faults.runs.clear()
        await asyncio.sleep(stood_still_s)
        database.faults.runs.set()
        await asyncio.sleep(10 * TTL)
        for tenure in (holder, observer):
            tenure.vanish(RuntimeError("the test has ended"))
        for task in tasks:
            task.cancel()
        assert host.opened_terms == [("holder", 1)]

    testing.run(scenario())


# --- F23: wall clocks that are wrong ---------------------------------------------------------------------------------


class Skewed:
    """A clock whose wall time is off by as much as a test says; its monotonic time is right."""

    def __init__(self):
        self._clock = VirtualClock(asyncio.get_running_loop())
        self.offset_s = 0.0
        self.monotonic, self.call_later = self._clock.monotonic, self._clock.call_later

    def now(self):
        return self._clock.now() + self.offset_s


@pytest.mark.parametrize("offset_s", [-3600.0, 3600.0, -86400.0])
def test_f23_wall_clocks_that_are_wrong_or_jump_change_no_holder_and_run_nothing_twice(database, offset_s):
    async def scenario():
        clocks = [Skewed(), Skewed()]
        clocks[1].offset_s = offset_s
        async with (
            engine_on(database, seed=1, clock=clocks[0]) as first,
            engine_on(database, seed=2, clock=clocks[1]) as second,
        ):
            jobs = [await submitted(first, 2.0) for _ in range(20)]
            for jump in (offset_s, -2 * offset_s, offset_s):
                await asyncio.sleep(2 * TTL)
                clocks[0].offset_s += jump
                jobs += [await submitted(first, 2.0) for _ in range(5)]
            for job in jobs:
                assert await first.session.wait(job, None) == job.id
            assert (hold_of(first).term, hold_of(second).state) == (1, "standby")
        check(database, [job.id for job in jobs])
        assert Counter(job_id for job_id, _, _ in Spans.spans) == Counter(job.id for job in jobs)

    testing.run(scenario())


async def submitted(engine, takes, **more):
    """Submit through one of several engines."""
    from koan_ray import ambient

    ambient.set_engine(engine.session)
    return await Spans.start(takes).persist(**more).audit().run()


# --- F25: many coordinators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_f25_of_8_contending_coordinators_one_writes_and_each_job_runs_once_at_a_time(database, seed):
    """The holder is killed with its job actors, again and again; each term has one holder."""
    random = Random(seed)
    n_jobs = 500

    async def scenario():
        async with AsyncExitStack() as stack:
            engines = [await stack.enter_async_context(engine_on(database, seed=10 * seed + n, max_actors=4, max_crashes=50))
                       for n in range(8)]  # fmt: skip
            holder = holder_of(engines)
            jobs = [await submitted(holder, random.choice([0.5, 2.0, 5.0])) for _ in range(n_jobs)]
            terms_and_code = known(holder)
            for engine in engines:
                engine._types.update(holder._types)
                await engine.coordinator.introduce(*terms_and_code)
            terms = [hold_of(holder).term]
            for _ in range(4):
                await asyncio.sleep(random.uniform(5, 40))
                holder.crash()
                for name in list(holder.launcher._actors):
                    holder.launcher.kill(name)
                await asyncio.sleep(3 * TTL)
                active = [engine for engine in engines if engine is not holder and hold_of(engine).state == "active"]
                assert len(active) == 1
                await holder.restart()
                await holder.coordinator.introduce(*terms_and_code)
                holder = active[0]
                terms.append(hold_of(holder).term)
            for job in jobs:
                assert await holder.session.wait(job, None) == job.id
            assert terms == [1, 2, 3, 4, 5]
            assert sum(hold_of(engine).state == "active" for engine in engines) == 1
        check(database, [job.id for job in jobs])

    testing.run(scenario())
    by_job: dict[str, list[tuple[float, float]]] = {}
    for job_id, began, ended in Spans.spans:
        by_job.setdefault(job_id, []).append((began, ended))
    assert len(by_job) == n_jobs
    assert len(Spans.spans) > n_jobs, "no execution was lost: the kills hit nothing"
    for spans in by_job.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(spans)))


def holder_of(engines):
    (holder,) = [engine for engine in engines if hold_of(engine).state == "active"]
    return holder


def known(engine):
    kinds = engine.coordinator._kinds
    return list(kinds._newest.values()), dict(kinds._code)


# --- F26, F27: cancellation against claim and completion -------------------------------------------------------------


@pytest.mark.parametrize("delay_s", [0.0, 0.04, 0.3])
def test_f26_f27_a_cancellation_at_any_moment_has_one_of_the_allowed_outcomes(database, delay_s):
    """Submit takes two delays, the claim is written behind, the body takes a second: cancel at every point of that."""
    outcomes: Counter[tuple[str, str]] = Counter()

    async def cancelled_after(engine, after_s):
        job = await submitted(engine, 0.5)
        await asyncio.sleep(after_s)
        answer = await job.cancel("changed my mind")
        answered_at = asyncio.get_running_loop().time()
        n_bodies = sum(1 for job_id, _ in engine.launcher.bodies if job_id == job.id)
        final = "completed"
        try:
            await job.wait()
        except koan.JobCancelledError:
            final = "cancelled"
        await asyncio.sleep(30)
        stored = database.jobs[""][job.id]
        assert stored["status"] == final
        outcomes[answer.value, final] += 1
        if answer is koan.JobStatus.CANCELLED:
            assert final == "cancelled"
        if answer is koan.JobStatus.COMPLETED:
            assert final == "completed"
        n_after = sum(1 for job_id, _ in engine.launcher.bodies if job_id == job.id)
        assert n_after <= 1
        if final == "cancelled":
            assert n_after == n_bodies, f"a body began after {answer_and_time(answer, answered_at)}"

    def answer_and_time(answer, at):
        return f"the answer {answer} at {at:g}"

    async def scenario():
        database.faults.delay_s = delay_s
        async with engine_on(database, seed=3, max_actors=1) as engine:
            warm = await submitted(engine, 0.01)
            await warm.wait()
            total = 0.6 + 4 * delay_s
            for n in range(120):
                await cancelled_after(engine, total * n / 100)
                await asyncio.sleep(1)
            # and while it waits behind another
            for n in range(40):
                before = await submitted(engine, 0.5)
                await cancelled_after(engine, total * n / 40)
                await before.wait()
        check(database)

    testing.run(scenario())
    assert {final for _, final in outcomes} == {"cancelled", "completed"}, outcomes
    answers = {answer for answer, _ in outcomes}
    assert answers | {"running"} == {"running", "cancelled", "completed"}, outcomes
    assert "running" in answers or delay_s, outcomes  # slow answers come after the end


# --- F30: a sweep that is late ---------------------------------------------------------------------------------------


def test_f30_a_sweep_of_a_holder_that_was_replaced_changes_nothing(database):
    async def scenario():
        old, new = (testing.MemoryDocumentStore(database, source="default") for _ in range(2))
        await old.open()
        await new.open()
        first = await old.take_lease("koan/0", holder="old", seen=None)
        async with engine_on(database, seed=4) as engine:
            await asyncio.sleep(4 * TTL)  # the old holder's beat stands still
            assert hold_of(engine).term == first.term + 1
            job = await submitted(engine, 5.0)
            await asyncio.sleep(1)
            before = dict(database.jobs[""][job.id])
            assert await old.claim(range(256), first.term) == 0
            assert await old.beat(first) is None
            await old.release(first)
            assert database.jobs[""][job.id] == before
            assert database.leases["koan/0"].term == first.term + 1
            assert await job.wait() == job.id
        check(database)

    testing.run(scenario())


# --- F24: what an execution says that is not current any more --------------------------------------------------------

OUTCOMES = (
    "succeeded", "failed", "timeout", "cancelled", "rescheduled", "non_retryable", "result_rejected", "context_rejected",
    "crashed",
)  # fmt: skip


@pytest.mark.parametrize("now_is", ["running again", "completed"])
def test_f24_no_report_under_an_old_execution_id_changes_a_document(database, now_is):
    async def scenario():
        async with engine_on(database, seed=5, max_actors=1) as engine:
            job = await submitted(engine, 5.0)
            await asyncio.sleep(1)
            core = engine.coordinator
            (old,) = core._dispatcher.running()
            for name in list(engine.launcher._actors):
                engine.launcher.kill(name)
            await asyncio.sleep(1)
            if now_is == "completed":
                assert await job.wait() == job.id
            before = dict(database.jobs[""][job.id])
            executions = {key: dict(value) for key, value in database.executions[""].items()}
            n_fenced = core.counters["fenced"]
            for outcome in OUTCOMES:
                report = Report(
                    old.execution.id, job.id, outcome, 1.0, 1.0, result=b'"from the grave"', error=ErrorInfo("E", "m"),
                    progress=Progress(99, 50.0, "from the grave", None, None, None, 0.0),
                )  # fmt: skip
                core._settling.ended(old, report)
                await core.note(Push("koan_ray.job/nobody/1", [report], [], [], []))
            core._settling.progressed(old, Progress(99, 50.0, "from the grave", None, None, None, 0.0))
            for late in (core._settling.unbegun, core._settling.interrupted):
                late(old)
            for late in (core._settling.vanished, core._settling.killed):
                late(old, "cancelled")
            assert core.counters["fenced"] - n_fenced == len(OUTCOMES) + 5
            await asyncio.sleep(0.5)
            assert dict(database.jobs[""][job.id]) == before
            assert database.executions[""] == executions
            assert await job.wait() == job.id
        check(database, [job.id])

    testing.run(scenario())


# --- F19: a take-over that is interrupted ----------------------------------------------------------------------------


def test_f19_a_take_over_that_was_interrupted_goes_on_at_once(database):
    """The lease that it finds then is its own: nobody has to be watched for 1.5 ttl."""

    class Interrupted(Far):
        n_left = 1

        async def take_over(self, slots, term, statuses):
            if self.n_left:
                self.n_left -= 1
                raise StoreUnavailableError("interrupted")
            async for jobs in super().take_over(slots, term, statuses):
                yield jobs

    async def scenario():
        store = Interrupted(database, source="default")
        async with testing.engine(sources={"default": lambda: store}) as engine:
            job = await submitted(engine, 0.1)
            assert await job.wait() == job.id
            assert store.n_left == 0
            assert asyncio.get_running_loop().time() < TTL / 3
            assert hold_of(engine).term == 2
        check(database, [job.id])

    testing.run(scenario())


# --- F22: a store that refuses to write is told of ---------------------------------------------------------------------


def test_f22_the_engine_says_why_it_acknowledges_nothing(database):
    async def scenario():
        async with engine_on(database) as engine:
            assert await problem_of(engine) is None
            database.faults.lose_requests = 10**6
            job = Spans.start(0.1).persist().audit().run()
            await asyncio.sleep(2)
            assert "the request was lost" in await problem_of(engine)
            database.faults.lose_requests = 0
            await (await job).wait()
            assert await problem_of(engine) is None
        check(database)

    async def problem_of(engine):
        return (await engine.coordinator.status())["sources"]["default"]["problem"]

    testing.run(scenario())


# --- F16: a retry that is due before it is written ---------------------------------------------------------------------


class Fails(koan.Job[float, str]):
    retry = koan.RetryPolicy(max_attempts=3, initial_delay=0.1)

    async def execute(self, context, progress, cancellation) -> str:
        await asyncio.sleep(context)
        if self.last_error is None:
            raise ValueError("the first time")
        return self.id


@pytest.mark.parametrize("delay_s", [0.05, 0.3, 1.0])
def test_f16_a_retry_that_is_due_before_a_slow_store_has_written_it_is_no_foreign_write(database, delay_s):
    """What becomes of a job while its last state is on its way must follow that state's rev, or we fence ourselves."""

    async def scenario():
        database.faults.delay_s = delay_s
        async with engine_on(database, max_actors=1) as engine:
            jobs = await Fails.start_many([0.05] * 30).persist().audit().run()
            for job in jobs:
                assert await job.wait() == job.id
            assert hold_of(engine).term == 1
        check(database, [job.id for job in jobs])

    testing.run(scenario())
