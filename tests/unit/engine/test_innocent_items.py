"""Whatever poison items are among them, and whatever is killed by chance: no other item is given up for a lost process."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, defaultdict
from random import Random
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

import koan_ray as koan
from koan_ray import ambient, testing
from koan_ray.domain.items import Batch

if TYPE_CHECKING:
    from collections.abc import Callable

N = 60
HITS = 2  # with nothing else in the process, once in a new one; below that no innocent item is given up
BY_CHANCE, LEFT_BEHIND = "killed by chance", "ended by what an item has left behind"
_lost = Batch.lost


class World:
    """What items do in one run, and what happened."""

    def __init__(self) -> None:
        self.poison: dict[int, str] = {}  # when it ends its process
        self.takes: dict[int, float] = {}
        self.raises: set[int] = set()
        self.parents: set[int] = set()  # these wait for another job
        self.begun: Counter[int] = Counter()
        self.ran_in: defaultdict[int, list[str]] = defaultdict(list)
        self.deaths: Counter[int] = Counter()  # of processes, by the item that did it
        self.hits: Counter[int] = Counter()  # by chance and by what others have left behind
        self.chances: Counter[int] = Counter()  # of these by chance
        self.on_death: Callable[[], object] = lambda: None
        self.resets = 0  # of leads and coordinators, which may forget the deaths that are not in a checkpoint

    def lost(self, batch, number, error, shown):
        """Stand in for `Batch.lost`."""
        chunk = batch.out.get(number)
        if chunk is not None and chunk.losses and error.message in {BY_CHANCE, LEFT_BEHIND}:
            self.hits.update(chunk.indexes)
            self.chances.update(chunk.indexes if error.message == BY_CHANCE else ())
        return _lost(batch, number, error, shown)

    def end_process(self, item) -> None:
        """End the process as `os._exit` does."""
        self.deaths[item] += 1
        self.on_death()
        ambient.attempt.get()._host.die("poison")
        raise asyncio.CancelledError

    def leave_behind(self, item) -> None:
        """Have the process end a while after the item has."""
        host = ambient.attempt.get()._host
        actor = getattr(host, "_actor", host)

        def die():
            if not actor.is_dead:
                self.deaths[item] += 1
                host.die(LEFT_BEHIND)

        actor.clock.call_later(0.03, die)

    def begin(self, item) -> str | None:
        """Do what an item does first."""
        self.begun[item] += 1
        self.ran_in[item].append(ambient.attempt.get()._host.name)
        how = self.poison.get(item)
        if how == "raises first" and self.begun[item] == 1:
            raise ConnectionError("again")
        if how in {"now", "raises first"}:
            self.end_process(item)
        if how == "after":
            self.leave_behind(item)
        return how


world = World()


@pytest.fixture(autouse=True)
def new_world():
    global world
    world = World()


class Child(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        await asyncio.sleep(0.02)
        return context


class Neighbour(koan.Job[float, float]):
    """Another job in the same actors."""

    async def execute(self, context, progress, cancellation) -> float:
        await asyncio.sleep(context)
        return context


class _Items(koan.FiniteJob[int, dict, int]):
    retry = koan.RetryPolicy(max_attempts=100, initial_delay=0.1, max_delay=0.2)

    def get_items(self, context):
        yield from range(context)

    def build_result(self, summary) -> dict:
        counts = [summary.processed_items, summary.failed_items, summary.total_items]
        return {"counts": counts, "values": sorted(summary.values)}


class Plain(_Items):
    def process_item(self, item, index, progress):
        how = world.begin(item)
        asyncio.get_running_loop().pass_time(min(world.takes.get(item, 0.0), 0.02))
        if how == "late":
            world.end_process(item)
        if item in world.raises:
            raise ValueError(item)
        return koan.ItemResult.success(item)


class Async(_Items):
    async def process_item(self, item, index, progress):
        how = world.begin(item)
        if item in world.parents:
            await (await Child.start(item).run()).wait()
        await asyncio.sleep(world.takes.get(item, 0.0))
        if how == "late":
            world.end_process(item)
        if item in world.raises:
            raise ValueError(item)
        return koan.ItemResult.success(item)


def items(base, *, n_bodies=1, isolation="pooled", kind="innocent.Items", **options):
    """Return a class of jobs over items; with ``n_bodies``, in actors that have as many at a time."""
    policy = koan.RetryPolicy(max_attempts=3, initial_delay=0.05, max_delay=0.1)
    options = {"max_failed_items": 1.0, "checkpoint_every": 0.05, "retry": policy, "concurrency": 1, **options}
    namespace = {"items": koan.ItemOptions(**options), "isolation": isolation, "concurrency": n_bodies, "kind": kind}
    return type(base.__name__, (base,), namespace)


def neighbours(n_bodies):
    """Return a class of jobs that run in the same actors."""
    return type("Neighbour", (Neighbour,), {"concurrency": n_bodies, "kind": "innocent.Neighbour"})


def most_deaths(chunk_size):
    """How many processes a poison item may end: as many as it takes to find it in its chunk, and two when it is alone."""
    return 2 + max(1, math.ceil(math.log(chunk_size or N, 8)))


async def lost_items(job):
    """Return the indexes of the items that were given up for a lost process."""
    return {dead.index for dead in await job.failed_items() if dead.error_type == "ProcessLost"}


# --- anything, by seed ---------------------------------------------------------------------------------------------------


async def _kill_by_chance(engine, dice, n_kills, every_s, *, leads):
    for _ in range(n_kills):
        await asyncio.sleep(dice.uniform(0, every_s))
        actors = [actor for actor in engine.launcher._actors.values() if leads or not actor.spec.lead]
        if actors:
            victim = dice.choice(actors)
            world.resets += victim.spec.lead
            victim.die(BY_CHANCE)


async def _restart(engine, dice, n_restarts):
    for _ in range(n_restarts):
        await asyncio.sleep(dice.uniform(0.05, 1.0))
        world.resets += 1
        engine.crash()
        await asyncio.sleep(dice.uniform(0, 0.1))
        await engine.restart()


def _draw_items(dice, n, *, may_wait):
    length = dice.choice([0.0, 0.001, 0.01, 0.05, 0.3, 2.0, None])
    hows = dice.choice([["now"], ["late"], ["now", "late", "raises first"], ["now", "late", "after", "raises first"]])
    share = dice.choice([0, 1 / n, 3 / n, 0.2, 0.5])
    for item in range(n):
        world.takes[item] = dice.choice([0.0, 0.001, 0.05, 1.0]) if length is None else length
        if dice.random() < share:
            world.poison[item] = dice.choice(hows)
        elif dice.random() < 0.05:
            world.raises.add(item)
        elif dice.random() < 0.05 and may_wait:
            world.parents.add(item)


def run_seed(seed):
    """Run items, poison, neighbours, kills and restarts as drawn from a seed, and check every end."""
    dice = Random(seed)
    random.seed(seed)  # leads use it for the jitter of waits
    base, n = dice.choice([Plain, Async, Async]), dice.choice([1, 7, N])
    chunk_size = dice.choice([None, 1, 1, 2, 3, 5, 8, 11, 16])
    isolation = dice.choice(["pooled", "pooled", "pooled", "process"])
    n_bodies = dice.choice([1, 1, 1, 3])
    job_type = items(base, n_bodies=n_bodies, isolation=isolation, chunk_size=chunk_size, concurrency=dice.choice([1, 3]))
    _draw_items(dice, n, may_wait=base is Async and isolation == "pooled")
    n_kills, every_s, leads = dice.choice([(0, 1, False), (0, 1, False), (5, 0.5, False), (5, 1.0, True), (15, 0.3, True)])
    n_restarts = dice.choice([0, 0, 3])
    n_others = dice.choice([0, 10]) if isolation == "pooled" and not (n_restarts or n_kills) else 0
    settings: dict[str, Any] = {"max_actors": dice.randint(1, 4), "lease_ttl_s": 3.0, "max_crashes": 1000 if leads else 3}
    if n_restarts:
        database = testing.MemoryDatabase()
        settings["sources"] = {"default": lambda: testing.MemoryDocumentStore(database, source="default")}
    faults = testing.Faults(max_delay_s=dice.choice([0.0, 0.001, 0.004, 0.05]))

    async def scenario():
        async with testing.engine(faults=faults, seed=seed, **settings) as engine:
            start = job_type.start(n)
            job = await (start.persist() if n_restarts else start).run()
            others = [await neighbours(n_bodies).start(dice.choice([0.0, 0.01, 0.5])).run() for _ in range(n_others)]
            helpers = [
                asyncio.ensure_future(_kill_by_chance(engine, dice, n_kills, every_s, leads=leads)),
                asyncio.ensure_future(_restart(engine, dice, n_restarts)),
            ]
            async with asyncio.timeout(3600):
                result = await job.wait()
                await asyncio.gather(*[other.wait() for other in others])
            for helper in helpers:
                helper.cancel()
            return result, await job.failed_items(), await lost_items(job)

    with mock.patch.object(Batch, "lost", lambda *args: world.lost(*args)):  # noqa: PLW0108 - bound to the batch
        result, dead, lost = testing.run(scenario())
    places = [each.index for each in dead]
    assert sorted([*places, *result["values"]]) == list(range(n)), "each item ends once"
    assert result["counts"] == [n - len(dead), len(dead), n]
    assert set(places) - lost == world.raises - lost
    for item in lost - set(world.poison):
        hits, chances = world.hits[item], world.chances[item]
        assert hits >= HITS, f"item {item} is innocent, and was hit {hits} times"
        assert chances, f"item {item} is innocent, and was never hit by chance"
    for item, how in world.poison.items():
        assert item in lost or how == "after", f"item {item} ends its process and did not end as dead"
        if how != "after":
            assert world.deaths[item] <= most_deaths(chunk_size) + 2 * world.resets, (item, how, world.deaths[item])


@pytest.mark.parametrize("seed", range(60))
def test_only_items_that_end_their_process_are_given_up_for_it(seed):
    run_seed(seed)


# --- one chain after the other -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("takes", "how"),
    [(0.001, "now"), (0.05, "now"), (0.05, "late")],
    ids=["short items share a batch", "the poison item is the one that waits", "it ends its process late"],
)
def test_neighbours_of_a_poison_item_in_chunks_of_one_item_end_well(takes, how, workers):
    async def scenario(seed):
        faults = testing.Faults(max_delay_s=0.004)
        async with testing.engine(max_actors=workers, max_crashes=1000, faults=faults, seed=seed) as engine:
            job = await items(Async, chunk_size=1).start(N).run()
            assert (await job.wait())["counts"] == [N - 1, 1, N]
            assert await lost_items(job) == {41}
            started = engine.coordinator._dispatcher.counters["actors_started"]
            assert started <= 1 + workers + 3 + 1  # the lead's, those that were lost, and one that had run something

    for seed in range(5):
        world.takes, world.poison = dict.fromkeys(range(N), takes), {41: how}
        world.deaths.clear()
        testing.run(scenario(seed))
        assert world.deaths[41] == 3


def test_a_suspect_has_no_chunk_behind_it():
    """The end of item 1, which is suspect, would be lost with the first item of the other job that begins after it."""

    async def scenario(seed):
        async with testing.engine(max_actors=1, faults=testing.Faults(max_delay_s=0.01), seed=seed):
            job = await items(Async, chunk_size=2).start(2).run()
            await asyncio.sleep(0.05)
            other = await items(Async, chunk_size=1, kind="innocent.Others").start(12).run()
            await other.wait()
            await job.wait()
            assert await lost_items(job) == {0}
            assert await lost_items(other) == {0, *range(2, 12)}

    for seed in range(5):
        world.poison, world.takes = {0: "now"} | dict.fromkeys(range(2, 12), "now"), {1: 0.2}
        testing.run(scenario(seed))


def test_an_item_is_given_up_only_for_a_process_in_which_nothing_else_has_run():
    """What others leave behind may end a process, too."""
    world.poison, world.takes = {3: "late"}, {3: 0.5}

    async def scenario():
        async with testing.engine(max_actors=2):
            job = await items(Async, chunk_size=1).start(8).run()
            assert (await job.wait())["counts"] == [7, 1, 8]

    testing.run(scenario())
    *_, last = world.ran_in[3]
    others = [actor for item, actors in world.ran_in.items() if item != 3 for actor in actors]
    assert last not in others
    assert world.ran_in[3].count(last) == 1


def test_a_suspect_does_not_wait_for_an_actor_that_always_has_other_jobs():
    world.poison, n_bodies = {3: "now"}, 3

    async def keep_busy():
        while True:
            await (await neighbours(n_bodies).start(0.3).run()).wait()

    async def scenario():
        async with testing.engine(max_actors=1):
            busy = []
            for _ in range(n_bodies + 1):
                busy.append(asyncio.ensure_future(keep_busy()))
                await asyncio.sleep(0.07)
            job = await items(Async, n_bodies=n_bodies, chunk_size=4).start(8).run()
            async with asyncio.timeout(20):
                assert (await job.wait())["counts"] == [7, 1, 8]
            assert await lost_items(job) == {3}
            for each in busy:
                each.cancel()

    testing.run(scenario())


class Waits(koan.Job[str, str]):
    """Waits for a job that somebody else has started."""

    async def execute(self, context, progress, cancellation) -> str:
        await (await koan.Jobs.get(context)).wait()
        return context


def test_a_suspect_gets_a_process_where_the_only_actor_waits_for_it():
    world.poison = {3: "now"}

    async def scenario():
        async with testing.engine(max_actors=1):
            job = await items(Async, chunk_size=4).start(8).run()
            waits = await Waits.start(job.id).run()
            async with asyncio.timeout(60):
                await waits.wait()
                assert (await job.wait())["counts"] == [7, 1, 8]

    testing.run(scenario())


def test_a_lead_that_dies_takes_no_losses_with_it():
    world.poison, world.takes = {2: "late"}, {2: 0.5}

    async def scenario():
        async with testing.engine(max_actors=1, max_crashes=1000, faults=testing.Faults(max_delay_s=0.002)) as engine:

            def kill_lead():
                next(actor for actor in engine.launcher._actors.values() if actor.spec.lead).die(BY_CHANCE)

            world.on_death = lambda: engine.clock.call_later(0.02, kill_lead) if world.deaths[2] < 3 else None
            job = await items(Async, chunk_size=8, checkpoint_every=60).start(8).run()
            assert (await job.wait())["counts"] == [7, 1, 8]
        assert world.deaths[2] == 3

    testing.run(scenario())


def test_a_dedicated_job_shares_its_process_with_none_before_or_after_it():
    """Brief ones, of which an actor would be sent the next before the last is answered."""

    class Dedicated(koan.Job[int, int]):
        kind = "innocent.Dedicated"
        isolation = koan.Isolation.DEDICATED

        async def execute(self, context, progress, cancellation) -> int:
            world.ran_in[context].append(ambient.attempt.get()._host.name)
            return context

    async def scenario():
        async with testing.engine(max_actors=2, faults=testing.Faults(max_delay_s=0.004)):
            jobs = [await Dedicated.start(n).run() for n in range(20)]
            assert [await job.wait() for job in jobs] == list(range(20))

    testing.run(scenario())
    assert len({name for names in world.ran_in.values() for name in names}) == 20


@pytest.mark.parametrize("n_bodies", [1, 3])
def test_a_job_is_given_up_only_for_a_process_that_it_had_to_itself(n_bodies):
    """Jobs that are no items: all of them were in processes that poison jobs have ended, and only those are given up."""

    class Shared(koan.Job[int, int]):
        concurrency = n_bodies
        kind = "innocent.Shared"

        async def execute(self, context, progress, cancellation) -> int:
            await asyncio.sleep(0.05)
            if context % 4 == 0:
                world.end_process(context)
            await asyncio.sleep(0.05)
            return context

    async def scenario(seed):
        async with testing.engine(max_actors=2, faults=testing.Faults(max_delay_s=0.004), seed=seed):
            jobs = [await Shared.start(n).run() for n in range(20)]
            ends = await asyncio.gather(*[job.wait() for job in jobs], return_exceptions=True)
            assert [n for n, end in enumerate(ends) if end != n] == [0, 4, 8, 12, 16]

    for seed in range(5):
        testing.run(scenario(seed))
    assert max(world.deaths.values()) <= 5 * 3
