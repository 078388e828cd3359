"""Ray's launcher keeps the promises of every launcher; what only Ray can do to an actor comes after them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
from dataclasses import replace

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
        self._knows = True

    async def note(self, request: bytes) -> bytes:
        self._pushes.put_nowait(request)
        return pickle.dumps(self._knows)

    async def forget(self) -> None:
        self._knows = False

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
        with contextlib.suppress(ray.exceptions.ActorDiedError):  # some tests end it
            while True:
                yard.pushed(*pickle.loads(await ear.heard.remote()))

    listening = asyncio.create_task(listen())
    yard.ear = ear
    yard.launcher = RayLauncher(namespace, replace(YARD_SETTINGS, orphan_timeout_s=3.0), Here())
    yield yard
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await listening
    for found in await yard.launcher.survey():
        yard.launcher.adopt(found.name, yard)
        yard.launcher.kill(found.name)
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

    async def test_the_next_coordinator_learns_what_the_actors_of_a_lost_one_run(self, yard):
        idle, busy = [await yard.ready() for _ in range(2)]
        _, (order,) = yard.order(busy, (Lingers, 3600.0))
        await yard.begun(order)
        successor = RayLauncher(yard.launcher._namespace, YARD_SETTINGS, Here())
        found = {each.name: each for each in await successor.survey()}
        assert found[idle].running == []
        assert [running.execution_id for running in found[busy].running] == [order.execution_id]
        assert found[busy].info == yard.of(busy)[0].value
        for name in (idle, busy):
            successor.adopt(name, yard)
            successor.kill(name)
            await yard.dead(name)
        assert await successor.survey() == []

    async def test_an_actor_that_does_not_answer_a_survey_is_ended(self, yard, monkeypatch):
        monkeypatch.setattr("koan_ray.runtime.ray.launcher._SURVEY_S", 0.5)
        name = await yard.ready()
        os.kill(yard.of(name)[0].value.pid, signal.SIGSTOP)
        assert await RayLauncher(yard.launcher._namespace, YARD_SETTINGS, Here()).survey() == []
        await yard.dead(name)

    async def test_classes_are_kept_for_the_next_coordinator(self, yard):
        terms = Lingers.definition.terms("code-1")
        yard.launcher.keep_code(terms, b"class")
        successor = RayLauncher(yard.launcher._namespace, YARD_SETTINGS, Here())
        eventually(lambda: successor._kept_code() == [(terms, b"class")])  # by another thread, which tells nobody

    async def test_actors_end_themselves_when_their_coordinator_is_gone_for_good(self, yard):
        untried = yard.start()
        await yard.until(lambda: yard.of(untried, "actor_ready"), "an actor that never had a batch is ready")
        busy = await yard.ready()
        _, (order,) = yard.order(busy, (Lingers, 3600.0))
        await yard.begun(order)
        ray.kill(yard.ear, no_restart=True)
        for name in (untried, busy):
            await yard.dead(name)
            eventually(lambda name=name: not is_alive(yard.of(name)[0].value.pid))

    async def test_an_actor_that_its_coordinator_does_not_know_ends_itself(self, yard):
        name = await yard.ready()
        await yard.ear.forget.remote()
        await yard.dead(name)
