"""Checkpoints and parts: nothing counts that is not stored, nothing is counted twice, and a zombie changes nothing."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict

import pytest

import koan_ray as koan
from koan_ray import ambient, testing
from koan_ray.domain.ids import new_id
from koan_ray.domain.records import FAILED, MAX_CHECKPOINT, MAX_PART, VALUES, Checkpoint, ItemCounts, Part, part_fence
from koan_ray.errors import ConflictError, JobNotFoundError, LimitExceededError, NonRetryable, StoreUnavailableError

STEP_S = 0.1
effects: Counter[tuple[str, int]] = Counter()  # by job and item: how often it was processed
refused: list[str] = []  # executions that were told to stop
began_with: dict[str, list[int]] = defaultdict(list)  # by job: the item that each execution began with
fails_at: dict[str, int] = {}  # by kind: the item before which a walk fails


class Walk(koan.Job[int, int]):
    """Processes so many items, one a checkpoint; each third is dead."""

    retry = koan.RetryPolicy(max_attempts=1)

    async def execute(self, context, progress, cancellation) -> int:
        order = ambient.attempt.get().order
        done = order.checkpoint or Checkpoint(0, b'{"next":0}', context, 0, 0, 0, 0.0)
        first = json.loads(done.body)["next"]
        began_with[self.id].append(first)
        n_values, n_failed = done.value_parts, done.failed_parts
        for n in range(first, context):
            if n == fails_at.get(self.kind):
                raise NonRetryable("as asked")
            effects[self.id, n] += 1
            await asyncio.sleep(STEP_S)
            is_dead = n % 3 == 2
            stream, seq = (FAILED, n_failed) if is_dead else (VALUES, n_values)
            n_failed, n_values = n_failed + is_dead, n_values + (not is_dead)
            done = done._replace(
                sequence=done.sequence + 1, body=b'{"next":%d}' % (n + 1), processed=n_values, failed=n_failed,
                updated_at=1_000.0 + n,
            )  # fmt: skip
            part = Part(self.id, stream, seq, b"[%d]" % n, 1)
            if not await ambient.engine().checkpoint(self.id, order.execution_id, done, [part]):
                refused.append(order.execution_id)
                raise asyncio.CancelledError
        return context


class Patient(Walk):
    """Survives more crashes."""


@pytest.fixture(autouse=True)
def clean():
    for kept in (effects, refused, began_with, fails_at):
        kept.clear()


@pytest.fixture
def database():
    return testing.MemoryDatabase()


def documents(database, **settings):
    connect = settings.pop("connect", lambda: testing.MemoryDocumentStore(database, source="default"))
    return testing.engine(sources={"default": connect}, **settings)


def run(scenario):
    return testing.run(scenario())


async def produced(job_id, limit=2):
    """What a job has produced, by stream."""
    found = {}
    for stream in (VALUES, FAILED):
        after, items = -1, []
        while page := await ambient.engine().parts(job_id, stream, after, limit):
            assert [part.seq for part in page] == list(range(after + 1, after + 1 + len(page)))
            after = page[-1].seq
            items += [item for part in page for item in json.loads(part.body)]
        found[stream] = items
    return found


def expected(n):
    return {VALUES: [k for k in range(n) if k % 3 != 2], FAILED: [k for k in range(n) if k % 3 == 2]}


def _parts(database, job_id):
    return [document for document in database.parts.get("", {}).values() if document["job_id"] == job_id]


def kill_actors(engine):
    for actor in list(engine.launcher._actors.values()):
        actor.die("killed by the test")


async def until(condition):
    while not condition():  # noqa: ASYNC110 - the time is virtual
        await asyncio.sleep(0.01)


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persisted", [True, False])
def test_a_job_shows_its_counts_and_what_it_has_produced(database, persisted):
    async def scenario():
        async with documents(database) as engine:
            start = Walk.start(7)
            job = await (start.persist(partition="hot") if persisted else start).run()
            await asyncio.sleep(STEP_S * 3.5)
            await job.refresh()
            assert job._view.items == ItemCounts(7, 2, 0, 1)
            assert await produced(job.id) == expected(3)
            await job.wait()
            assert job._view.items == ItemCounts(7, 5, 0, 2)  # the end brings it
            assert await produced(job.id) == expected(7)
            assert (await engine.coordinator.status())["checkpoints"] == {"kept": 7}
            await job.remove()
            with pytest.raises(JobNotFoundError):
                await ambient.engine().parts(job.id, VALUES)
        if persisted:
            assert not database.parts["hot"]

    run(scenario)


def test_the_checkpoint_is_a_sub_document_of_its_job(database):
    async def scenario():
        async with documents(database):
            job = await Walk.start(4).persist().run()
            await job.wait()
            items = database.jobs[""][job.id]["items"]
            assert items["updated_at"].timestamp() == 1_003.0
            assert {name: items[name] for name in items if name != "updated_at"} == {
                "sequence": 4, "total": 4, "processed": 3, "skipped": 0, "failed": 1, "value_parts": 3, "failed_parts": 1,
                "state": {"next": 4},
            }  # fmt: skip
            assert {document["stream"] for document in database.parts[""].values()} == {VALUES, FAILED}

    run(scenario)


def test_a_job_without_a_checkpoint_has_no_items_and_no_parts(database):
    async def scenario():
        async with documents(database):
            job = await Walk.start(0).persist().run()
            await job.wait()
            assert job._view.items is None
            assert await produced(job.id) == {VALUES: [], FAILED: []}
            assert "items" not in database.jobs[""][job.id]

    run(scenario)


# --- crashes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash_at", [0.0, 0.1, 0.2, 0.25, 0.3001, 0.55])
def test_a_coordinator_that_crashes_stops_no_walk_and_repeats_no_item(database, crash_at):
    """The job actor goes on, and brings its checkpoint to the next coordinator."""

    async def scenario():
        async with documents(database) as engine:
            job = await Walk.start(8).persist().run()
            await asyncio.sleep(0.05 + crash_at)
            engine.crash()
            await asyncio.sleep(0.3)
            await engine.restart()
            assert await job.wait() == 8
            assert await produced(job.id) == expected(8)
        assert set(effects.values()) == {1}
        assert refused == []

    run(scenario)


@pytest.mark.parametrize("persisted", [True, False])
@pytest.mark.parametrize("die_at", [0.05, 0.1, 0.15, 0.2, 0.2001, 0.35, 0.71])
def test_an_actor_that_dies_is_followed_by_one_that_goes_on_from_the_checkpoint(database, die_at, persisted):
    """At most the item that was in flight is processed again, and what was produced adds up."""

    async def scenario():
        async with documents(database) as engine:
            start = Walk.start(8)
            job = await (start.persist() if persisted else start).run()
            await asyncio.sleep(0.02 + die_at)
            kill_actors(engine)
            assert await job.wait() == 8
            assert await produced(job.id) == expected(8)
        assert sum(effects.values()) <= 9
        assert began_with[job.id] == [0, began_with[job.id][1]]
        assert began_with[job.id][1] in (int(die_at / STEP_S), max(0, int(die_at / STEP_S) - 1))

    run(scenario)


@pytest.mark.parametrize("seed", range(12))
def test_everything_dies_now_and_then_and_every_item_counts_once(database, seed):
    async def scenario():
        async with documents(database, seed=seed, max_crashes=1_000) as engine:
            job = await Walk.start(20).persist().run()
            random = engine._random
            waiting = asyncio.ensure_future(_outcome(job))
            while not waiting.done():
                await asyncio.sleep(random.random() * 0.5)
                if random.random() < 0.5:
                    kill_actors(engine)
                elif random.random() < 0.5:
                    engine.crash()
                    await asyncio.sleep(random.random() * 0.2)
                    await engine.restart()
                else:
                    fault = ("lose_replies", "lose_requests", "tear")[int(random.random() * 3)]
                    setattr(database.faults, fault, 1)
                database.faults.unavailable = False
            assert await waiting == 20
            assert await produced(job.id) == expected(20)
            sequence = database.jobs[""][job.id]["items"]["sequence"]
        assert sequence == 20

    run(scenario)


async def _outcome(job):
    return await job.wait()


def test_a_job_ends_with_its_last_checkpoint_whatever_crashes_then(database):
    async def scenario():
        async with documents(database) as engine:
            job = await Walk.start(3).persist().run()
            await until(lambda: database.jobs[""][job.id].get("items", {}).get("sequence") == 3)
            engine.crash()
            await engine.restart()
            assert await job.wait() == 3
            assert database.jobs[""][job.id]["items"]["sequence"] == 3
        assert set(effects.values()) == {1}

    run(scenario)


# --- the fence -------------------------------------------------------------------------------------------------------


class Held(testing.MemoryDocumentStore):
    """A way to the database on which parts of a job may be held up."""

    gate: asyncio.Event | None = None
    n_held = 0

    async def write_parts(self, partition, parts):
        gate, type(self).gate = type(self).gate, None
        if gate is not None:
            type(self).n_held += 1
            await gate.wait()
        await super().write_parts(partition, parts)


def test_a_zombies_checkpoint_is_refused_and_changes_nothing(database):
    async def scenario():
        async with documents(database) as engine:
            job = await Walk.start(6).persist().run()
            await asyncio.sleep(0.25)
            old = database.jobs[""][job.id]["execution_id"]
            kill_actors(engine)
            await asyncio.sleep(0.05)
            before = dict(database.parts[""])
            late = Checkpoint(99, b'{"next":6}', 6, 6, 0, 0, 0.0)
            assert await engine.session.checkpoint(job.id, old, late, [Part(job.id, VALUES, 2, b"[666]", 1)]) is False
            assert database.parts[""] == before
            assert await job.wait() == 6
            assert await produced(job.id) == expected(6)
            assert await engine.session.checkpoint(job.id, old, late, []) is False  # it has ended
            assert await engine.session.checkpoint(new_id(), new_id(), late, []) is False
            assert (await engine.coordinator.status())["checkpoints"]["fenced"] == 3

    run(scenario)


@pytest.mark.parametrize("crashes", [False, True])
def test_parts_that_were_on_their_way_when_their_execution_was_given_up_replace_nothing(database, crashes):
    """They reach the database while, or after, the next execution writes the same numbers."""

    async def scenario():
        Held.n_held = 0
        gate = asyncio.Event()
        async with documents(database, connect=lambda: Held(database, source="default")) as engine:
            job = await Walk.start(4).persist().run()
            await asyncio.sleep(0.05)
            Held.gate = gate
            await until(lambda: Held.n_held)
            kill_actors(engine)
            if crashes:
                engine.crash()
                await engine.restart()
                await until(lambda: len(_parts(database, job.id)) == 2)
                await write_late(database, Part(job.id, VALUES, 0, b"[666]", 1, part_fence(1, 1)))
            else:
                await asyncio.sleep(0.5)
                assert _parts(database, job.id) == []  # the next execution waits for what is on its way
                gate.set()
            assert await job.wait() == 4
            assert await produced(job.id) == expected(4)
            assert len(began_with[job.id]) == 2
            assert database.leases["koan/0"].term == 1 + crashes  # nothing was fenced, which would look like a lost lease

    run(scenario)


async def write_late(database, part):
    store = testing.MemoryDocumentStore(database)
    await store.open()
    await store.write_parts("", [part])


def test_an_older_checkpoint_is_refused_and_the_same_again_is_kept_already(database):
    async def scenario():
        async with documents(database) as engine:
            job = await Idle.start(None).persist().run()
            await asyncio.sleep(0.1)
            ask = engine.session.checkpoint
            execution = database.jobs[""][job.id]["execution_id"]
            first = Checkpoint(5, b"[1]", None, 1, 0, 0, 1.0)
            parts = [Part(job.id, VALUES, 0, b"[1]", 1)]
            assert await ask(job.id, execution, first, parts) is True
            n_writes = database.n_writes
            assert await ask(job.id, execution, first, parts) is True
            assert database.n_writes == n_writes
            assert await ask(job.id, execution, first._replace(sequence=4), []) is False
            assert await ask(job.id, execution, first._replace(body=b"[2]"), []) is False
            assert database.jobs[""][job.id]["items"]["sequence"] == 5
            assert (await engine.coordinator.status())["checkpoints"] == {"kept": 1, "refused": 2}
            assert await engine.session.resume_state(job.id, execution) == first._replace(value_parts=1)
            with pytest.raises(ConflictError, match="not its current one"):
                await engine.session.resume_state(job.id, new_id())
            await job.cancel()

    run(scenario)


class Idle(koan.Job[None, None]):
    async def execute(self, context, progress, cancellation) -> None:
        await asyncio.sleep(1_000)


@pytest.mark.parametrize(
    ("body", "parts", "says"),
    [
        (b"[]", [(VALUES, 1)], "part 1 of 'values' leaves a gap.*number 0 is next"),
        (b"[]", [(VALUES, 0), (FAILED, 0), (VALUES, 2)], "part 2 of 'values'.*number 1 is next"),
        (b"[]", [("other", 0)], "none of values, failed"),
        (b" " * (MAX_CHECKPOINT + 1), [], "its state takes 262,145 bytes, the limit is 262,144"),
        (b"[]", [(VALUES, 0, b" " * (MAX_PART + 1))], "part 0 of 'values' takes 1,048,577 bytes"),
        (b"[]", [(VALUES, n, b" " * MAX_PART) for n in range(17)], "take 17,825,792 bytes, the limit is 16,777,216"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(database, body, parts, says):
    async def scenario():
        async with documents(database) as engine:
            job = await Idle.start(None).persist().run()
            await asyncio.sleep(0.1)
            execution = database.jobs[""][job.id]["execution_id"]
            made = [Part(job.id, stream, seq, *(rest or [b"[]"]), 1) for stream, seq, *rest in parts]
            with pytest.raises(ConflictError, match=says):
                await engine.session.checkpoint(job.id, execution, Checkpoint(1, body, None, 0, 0, 0, 0.0), made)
            assert not database.parts.get("")
            await job.cancel()

    run(scenario)


# --- outages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["lose_replies", "lose_requests", "tear"])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_write_whose_fate_is_unknown_is_made_again(database, fault, n):
    async def scenario():
        async with documents(database):
            job = await Walk.start(6).persist().run()
            await asyncio.sleep(0.15)
            setattr(database.faults, fault, n)
            assert await job.wait() == 6
            assert database.faults.n_fired >= n
            assert await produced(job.id) == expected(6)
        assert set(effects.values()) == {1}

    run(scenario)


def test_a_checkpoint_waits_for_a_store_that_is_away(database):
    async def scenario():
        async with documents(database):
            job = await Walk.start(4).persist().run()
            await asyncio.sleep(0.15)
            database.faults.unavailable = True
            await asyncio.sleep(4)
            assert sum(effects.values()) == 2  # the second waits to be stored
            database.faults.unavailable = False
            assert await job.wait() == 4
            assert await produced(job.id) == expected(4)
        assert set(effects.values()) == {1}

    run(scenario)


def test_a_checkpoint_under_a_lost_lease_is_refused(database):
    """The coordinator does not know yet that another has the source: its guarded write tells."""

    async def scenario():
        async with documents(database) as engine:
            job = await Idle.start(None).persist().run()
            await asyncio.sleep(0.1)
            execution = database.jobs[""][job.id]["execution_id"]
            kept = Checkpoint(1, b"[]", None, 1, 0, 0, 0.0)
            assert await engine.session.checkpoint(job.id, execution, kept, []) is True
            lease = database.leases["koan/0"]
            database.leases["koan/0"] = lease._replace(holder="another", term=lease.term + 1, beat=lease.beat + 1)
            document = database.jobs[""][job.id]
            document.update(term=lease.term + 1, rev=document["rev"] + 1)  # the stamp of whoever takes over
            lost = kept._replace(sequence=2)
            assert await engine.session.checkpoint(job.id, execution, lost, []) is False
            assert document["items"]["sequence"] == 1

    run(scenario)


# --- going on in a new job -------------------------------------------------------------------------------------------


async def _failed_at(n, *, of=6, persisted=True, partition=""):
    fails_at["Walk"] = n
    start = Walk.start(of)
    job = await (start.persist(partition=partition) if persisted else start).run()
    with pytest.raises(koan.JobFailedError):
        await job.wait()
    fails_at.clear()
    return job


@pytest.mark.parametrize("persisted", [True, False])
def test_a_failed_job_goes_on_as_a_new_one(database, persisted):
    async def scenario():
        async with documents(database):
            old = await _failed_at(4, persisted=persisted, partition="hot")
            again = await koan.Jobs.retry(old.id, resume=True)
            assert await again.wait() == 6
            assert began_with[again.id] == [4]
            assert await produced(again.id) == expected(6)
            assert await produced(old.id) == expected(4)  # the old one keeps its own
            assert again._view.items == ItemCounts(6, 4, 0, 2)

    run(scenario)


def test_a_cancelled_job_goes_on_as_a_new_one(database):
    async def scenario():
        async with documents(database):
            old = await Walk.start(6).persist().run()
            await asyncio.sleep(0.35)
            await old.cancel()
            with pytest.raises(koan.JobCancelledError):
                await old.wait()
            again = await koan.Jobs.retry(old.id, resume=True)
            assert await again.wait() == 6
            assert began_with[again.id] == [3]
            assert await produced(again.id) == expected(6)

    run(scenario)


def test_without_resume_a_job_begins_anew(database):
    async def scenario():
        async with documents(database):
            old = await _failed_at(4)
            again = await koan.Jobs.retry(old.id)
            assert await again.wait() == 6
            assert began_with[again.id] == [0]
            assert await produced(again.id) == expected(6)

    run(scenario)


def test_a_job_without_a_checkpoint_cannot_go_on(database):
    async def scenario():
        async with documents(database):
            old = await _failed_at(0)
            with pytest.raises(ConflictError, match=f"job {old.id}: has no checkpoint.*without resume"):
                await koan.Jobs.retry(old.id, resume=True)
            assert not database.parts.get("")

    run(scenario)


def test_going_on_may_be_asked_again(database):
    """A request whose answer was lost is repeated under the same id, also when the new job has begun, or has ended."""

    async def scenario():
        async with documents(database) as engine:
            old, as_id = await _failed_at(4), new_id()
            asked = [engine.coordinator.retry(old.id, as_id, True) for _ in range(3)]
            assert {view.id for view in await asyncio.gather(*asked)} == {as_id}
            again = await koan.Jobs.get(as_id)
            await asyncio.sleep(0.15)
            await engine.coordinator.retry(old.id, as_id, True)
            assert await again.wait() == 6
            await engine.coordinator.retry(old.id, as_id, True)
            assert await produced(as_id) == expected(6)
            assert began_with[as_id] == [4]

    run(scenario)


@pytest.mark.parametrize("fault", ["lose_replies", "lose_requests", "tear"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_copy_is_complete_whatever_happens_on_the_way(database, fault, n):
    async def scenario():
        async with documents(database):
            old = await _failed_at(5)
            setattr(database.faults, fault, n)
            again = await koan.Jobs.retry(old.id, resume=True)
            assert await again.wait() == 6
            assert database.faults.n_fired >= n
            assert await produced(again.id) == expected(6)

    run(scenario)


def test_a_copy_that_cannot_be_made_leaves_nothing_behind(database):
    async def scenario():
        async with documents(database, max_queued=1) as engine:
            old = await _failed_at(4)
            other = await Idle.start(None).persist().run()
            with pytest.raises(LimitExceededError, match=r"engine\.max_queued"):
                await koan.Jobs.retry(old.id, resume=True)
            assert {document["job_id"] for document in database.parts[""].values()} == {old.id}
            await other.cancel()
            database.faults.unavailable = True
            with pytest.raises(StoreUnavailableError):
                await engine.coordinator.retry(old.id, new_id(), True)
            database.faults.unavailable = False
            assert {document["job_id"] for document in database.parts[""].values()} == {old.id}

    run(scenario)


def test_parts_that_do_not_count_are_neither_read_nor_copied(database):
    """A crash came between the parts and the document that counts them."""

    async def scenario():
        async with documents(database):
            old = await _failed_at(3)
            await write_late(database, Part(old.id, VALUES, 2, b"[666]", 1))
            assert await produced(old.id) == expected(3)
            again = await koan.Jobs.retry(old.id, resume=True)
            assert await again.wait() == 6
            assert await produced(again.id) == expected(6)
            assert "[666]" not in {document.get("items_json") for document in _parts(database, again.id)}

    run(scenario)


def test_what_a_lost_execution_wrote_beyond_its_checkpoint_is_deleted_when_the_next_asks_where_to_go_on(database):
    async def scenario():
        async with documents(database) as engine:
            job = await Idle.start(None).persist().run()
            await asyncio.sleep(0.1)
            execution = database.jobs[""][job.id]["execution_id"]
            done = Checkpoint(1, b"[]", None, 1, 0, 0, 0.0)
            assert await engine.session.checkpoint(job.id, execution, done, [Part(job.id, VALUES, 0, b"[0]", 1)])
            await write_late(database, Part(job.id, VALUES, 1, b"[1]", 1, part_fence(1, 1)))
            kill_actors(engine)
            await asyncio.sleep(0.5)
            second = database.jobs[""][job.id]["execution_id"]
            assert second != execution
            assert await engine.session.resume_state(job.id, second) == done._replace(value_parts=1)
            assert [document["seq"] for document in database.parts[""].values()] == [0]
            await job.cancel()

    run(scenario)


def test_in_memory_there_is_a_limit_for_all_parts_together():
    async def scenario():
        async with testing.engine(max_part_bytes=40):
            job = await Walk.start(100).run()
            with pytest.raises(koan.JobFailedError, match=r"memory\.max_part_bytes"):
                await job.wait()
            assert 8 <= job._view.items.processed + job._view.items.failed <= 13

    run(scenario)
