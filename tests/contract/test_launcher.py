"""Every launcher keeps the same promises; Ray's is tried in `tests.integration.test_ray_launcher`."""

from __future__ import annotations

import asyncio
from random import Random
from types import SimpleNamespace

import pytest

from koan_ray.domain.records import ActorSpec
from koan_ray.ports import LoopClock
from koan_ray.runtime.code import LocalCode
from koan_ray.runtime.local import LocalLauncher
from koan_ray.testing import Faults, LauncherContract, SimLauncher, Yard
from koan_ray.testing.contracts import YARD_SETTINGS
from koan_ray.testing.loop import VirtualClock

BROKEN = ActorSpec(num_gpus=1.0)


class _Unreliable(SimLauncher):
    """Cannot start actors with a GPU."""

    def start(self, name, spec, events, *, lent=False):
        self.faults.fail_start = float(spec == BROKEN)
        super().start(name, spec, events, lent=lent)


class TestSimulated(LauncherContract):
    virtual_time = True

    @pytest.fixture(params=[0.0, 0.05], ids=["at-once", "delayed"])
    async def yard(self, request):
        types = {}

        def ship(job_type):
            types[job_type.__qualname__] = job_type
            return job_type.__qualname__, b""

        yard = Yard(ship, fails_to_start=BROKEN)
        launcher = yard.launcher = _Unreliable(
            YARD_SETTINGS, VirtualClock(asyncio.get_running_loop()), types.__getitem__, capacity=2,
            faults=Faults(max_delay_s=request.param), random=Random(1),
        )  # fmt: skip
        launcher.coordinator = launcher.broker = yard
        yield yard
        for name in {told.actor for told in yard.told}:
            launcher.kill(name)
        await asyncio.sleep(0)  # cancelled bodies end


class TestLocal(LauncherContract):
    """An actor in this process always starts."""

    @pytest.fixture
    async def yard(self):
        loop, code = asyncio.get_running_loop(), LocalCode()
        yard = Yard(code.ship)
        runtime = SimpleNamespace(
            code=code,
            on_loop=loop.call_soon_threadsafe,
            push=lambda push, done: loop.call_soon_threadsafe(lambda: done(yard.pushed(push))),
            progress=lambda states: None,
        )
        yard.launcher = LocalLauncher(runtime, YARD_SETTINGS, LoopClock(loop))
        yield yard
        yard.launcher.stop()
