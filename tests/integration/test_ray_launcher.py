"""Ray's launcher keeps the promises of every launcher; what only Ray can do to an actor comes after them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal

import pytest
import ray

from koan_ray.domain.ids import new_id
from koan_ray.domain.records import ActorSpec
from koan_ray.runtime.code import Shipping
from koan_ray.runtime.ray import options
from koan_ray.runtime.ray.launcher import RayLauncher
from koan_ray.testing import LauncherContract, Yard
from koan_ray.testing.contracts import YARD_SETTINGS
from koan_ray.testing.yard import Lingers
from tests.conftest import eventually
from tests.integration.conftest import end_actor, is_alive, kill9

pytestmark = pytest.mark.ray

# Its runtime environment cannot be downloaded: nobody listens there.
UNREACHABLE = ActorSpec(num_cpus=0.5, runtime_env='{"working_dir": "https://127.0.0.1:9/nothing.zip"}')


@ray.remote(num_cpus=0)
class Ear:
    """Stands where the coordinator would be, and keeps what job actors push."""

    def __init__(self) -> None:
        self._pushes: asyncio.Queue[bytes] = asyncio.Queue()

    async def note(self, request: bytes) -> bytes:
        self._pushes.put_nowait(request)
        return pickle.dumps(True)

    async def heard(self) -> bytes:
        return await self._pushes.get()


class Here:
    """This test's loop, where the launcher expects the coordinator's."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.call = self.loop.call_soon_threadsafe


@pytest.fixture
async def yard(cluster):
    namespace = f"yard-{new_id()[-12:]}"
    yard = Yard(Shipping().ship, fails_to_start=UNREACHABLE)
    ear = Ear.options(name=options.COORDINATOR_NAME, namespace=namespace).remote()

    async def listen() -> None:
        while True:
            yard.pushed(*pickle.loads(await ear.heard.remote()))

    listening = asyncio.create_task(listen())
    yard.launcher = RayLauncher(namespace, YARD_SETTINGS, Here())
    yield yard
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await listening
    await yard.launcher.adopt(yard)  # ends all there are
    await yard.until(lambda: not yard.launcher._actors, "all actors are dead")
    end_actor(options.COORDINATOR_NAME, namespace)


class TestRay(LauncherContract):
    async def test_an_actor_with_options_that_ray_refuses_is_dead(self, yard):
        name = yard.start(ActorSpec(num_cpus=0.5, runtime_env='{"working_dir": "/no/such/directory"}'))
        assert "not a valid path" in await yard.dead(name)
        assert [told.what for told in yard.of(name)] == ["actor_dead"]

    async def test_an_actor_that_waits_for_a_node_is_dead_when_killed(self, yard):
        name = yard.start(ActorSpec(num_cpus=0.5, label_selector=(("region", "nowhere"),)))
        await yard.ready()  # created after it
        assert not yard.of(name)
        yard.launcher.kill(name)
        await yard.dead(name)

    async def test_a_process_that_dies_by_itself_is_told_with_its_cause(self, yard):
        name = await yard.ready()
        pid = yard.of(name)[0].value.pid
        _, (order,) = yard.order(name, (Lingers, 3600.0))
        await yard.begun(order)
        kill9(pid)
        assert await yard.dead(name)
        assert len(yard.of(name, "actor_dead")) == 1

    async def test_a_stopped_process_is_gone_soon_after_its_death_was_told(self, yard):
        name = await yard.ready()
        pid = yard.of(name)[0].value.pid
        os.kill(pid, signal.SIGSTOP)
        yard.launcher.kill(name)
        await yard.dead(name)
        eventually(lambda: not is_alive(pid))

    async def test_the_actors_of_a_lost_coordinator_are_ended_when_the_next_one_adopts(self, yard):
        names = [await yard.ready() for _ in range(2)]
        pids = [yard.of(name)[0].value.pid for name in names]
        successor = RayLauncher(yard.launcher._namespace, YARD_SETTINGS, Here())
        assert await successor.adopt(yard) == 2
        for name, pid in zip(names, pids, strict=True):
            await yard.dead(name)
            eventually(lambda pid=pid: not is_alive(pid))
        assert await successor.adopt(yard) == 0
