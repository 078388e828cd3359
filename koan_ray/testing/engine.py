"""The whole engine on the caller's event loop: no Ray, no threads, and time that is the test's.

::

    from koan_ray import testing


    async def scenario():
        async with testing.engine(max_actors=2) as engine:
            job = await Flaky.start(2, ...).run()
            await job.wait()  # retries wait in virtual time
            assert [e.reason for e in await job.executions()] == ["retry", "succeeded"]


    testing.run(scenario())

On another loop than `testing.run`'s, hand in a `ManualClock` and let `drain` move it.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING, Any

from koan_ray import ambient
from koan_ray.engine.broker import Broker
from koan_ray.engine.coordinator import Coordinator
from koan_ray.engine.session import Session
from koan_ray.engine.settings import EngineSettings
from koan_ray.stores.memory import MemoryStore
from koan_ray.testing.clock import ManualClock
from koan_ray.testing.loop import VirtualClock, VirtualLoop
from koan_ray.testing.simulation import Faults, SimLauncher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from koan_ray.jobs import Job
    from koan_ray.ports import Clock, JobStore

_MAX_STEPS = 1_000_000


class TestEngine:
    """Coordinator, broker, simulated job actors and a session, all on one loop. Made by `engine`."""

    __test__ = False  # not a test class, whatever its name begins with

    def __init__(self, settings: EngineSettings, clock: Clock, store: JobStore, faults: Faults, seed: int) -> None:
        self.clock = clock
        self.faults = faults
        self.store = store
        self._types: dict[str, type[Job[Any, Any]]] = {}
        random = Random(seed)
        capacity = settings.max_actors or 2
        self.launcher = SimLauncher(
            settings, clock, self._types.__getitem__, capacity=capacity, faults=faults, random=random
        )
        self.coordinator = Coordinator(
            settings, store=store, launcher=self.launcher, clock=clock, random=random, epoch=f"sim{seed}"
        )
        self.broker = Broker(settings, clock, f"sim{seed}")
        self.launcher.coordinator, self.launcher.broker = self.coordinator, self.broker
        self.session = Session(
            _Inline(self),
            inline_limit=settings.inline_limit,
            ship=self._ship,
            trace=lambda: (None, None),
            reads_inline=True,
        )

    def _ship(self, job_type: type[Any]) -> tuple[str, bytes]:
        code_id = f"{job_type.__qualname__}@{id(job_type):x}"
        self._types[code_id] = job_type
        return code_id, b""

    async def drain(self, advance: ManualClock | None = None) -> None:
        """Run what is ready; with ``advance``, also move the clock from timer to timer until no job is left.

        Raises:
            RuntimeError: Jobs are left that nothing will ever move.
        """
        for _ in range(_MAX_STEPS):
            await _settle()
            if advance is None or not self.coordinator.n_live:
                return
            if not advance.advance_to_next():
                break
        msg = f"{self.coordinator.n_live} jobs are left and nothing moves them: {await self.coordinator.status()}"
        raise RuntimeError(msg)


class _Inline:
    """A `Transport` to objects on the same loop."""

    def __init__(self, engine: TestEngine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def coordinator(self, method: str, args: tuple[Any, ...], done: Callable[[Any, BaseException | None], None]) -> None:
        self._begin(self._engine.coordinator, method, args, done)

    def broker(self, method: str, args: tuple[Any, ...], done: Callable[[Any, BaseException | None], None]) -> None:
        self._begin(self._engine.broker, method, args, done)

    def _begin(
        self, core: Any, method: str, args: tuple[Any, ...], done: Callable[[Any, BaseException | None], None]
    ) -> None:
        async def call() -> None:
            try:
                answer = await getattr(core, method)(*args)
            except Exception as error:  # noqa: BLE001 - brought to the caller
                done(None, error)
            else:
                done(answer, None)

        def start() -> None:
            task = self._loop.create_task(call())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(start)  # start_many reads its contexts on a thread


@asynccontextmanager
async def engine(
    *,
    clock: ManualClock | None = None,
    store: JobStore | None = None,
    faults: Faults | None = None,
    seed: int = 0,
    **settings: Any,
) -> AsyncIterator[TestEngine]:
    """Start an engine on the running loop, and make it the one that jobs use.

    Args:
        clock: Time; left out, the loop's own virtual time (`testing.run`), or a new `ManualClock` on any other loop.
        store: Where records are kept; in memory if left out.
        faults: What goes wrong.
        seed: Of everything that is random.
        **settings: Fields of `koan_ray.engine.settings.EngineSettings`, such as ``max_actors=2``.
    """
    loop = asyncio.get_running_loop()
    time: Clock = clock or (VirtualClock(loop) if isinstance(loop, VirtualLoop) else ManualClock())
    numbers = EngineSettings(**settings)
    kept = store or MemoryStore(
        completed_retention_s=numbers.completed_retention_s,
        faulted_retention_s=numbers.faulted_retention_s,
        max_finished=numbers.max_finished,
    )
    made = TestEngine(numbers, time, kept, faults or Faults(), seed)
    before = ambient.current_engine()
    ambient.set_engine(made.session)
    await made.coordinator.start()
    try:
        yield made
    finally:
        ambient.set_engine(before)
        made.coordinator.stop()
        made.session.close("the test's engine has ended")
        await _settle()


async def _settle() -> None:
    """Let everything run that is ready."""
    loop: Any = asyncio.get_running_loop()
    for _ in range(100_000):
        await asyncio.sleep(0)
        if not loop._ready:  # noqa: SLF001 - asyncio has no other way to tell
            return
