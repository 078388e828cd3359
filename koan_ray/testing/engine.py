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
from koan_ray.engine.tenure import Source
from koan_ray.stores.memory import MemoryStore
from koan_ray.testing.clock import ManualClock
from koan_ray.testing.loop import VirtualClock, VirtualLoop
from koan_ray.testing.simulation import Faults, SimLauncher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping

    from koan_ray.jobs import Job
    from koan_ray.ports import Clock, DocumentStore, JobStore

_MAX_STEPS = 1_000_000
_REPEAT_S = 0.2  # until a call that met no coordinator is made again


class TestEngine:
    """Coordinator, broker, simulated job actors and a session, all on one loop. Made by `engine`."""

    __test__ = False  # not a test class, whatever its name begins with

    def __init__(
        self, settings: EngineSettings, clock: Clock, store: JobStore, faults: Faults, seed: int,
        sources: Mapping[str, Callable[[], DocumentStore]],
    ) -> None:  # fmt: skip
        self.clock = clock
        self._settings, self._sources, self._seed = settings, sources, seed
        self._random = Random(seed)
        self._n_starts = 0
        self.faults = faults
        self.store = store
        self._dead: set[str] = set()  # epochs of crashed coordinators
        self._types: dict[str, type[Job[Any, Any]]] = {}
        capacity = settings.max_actors or 2
        self.launcher = SimLauncher(
            settings, clock, self._types.__getitem__, capacity=capacity, faults=faults, random=self._random
        )
        self.coordinator = self._new_coordinator(store)
        self.broker = Broker(settings, clock, f"sim{seed}")
        self.launcher.broker = self.broker
        self.session = Session(
            _Inline(self),
            inline_limit=settings.inline_limit,
            ship=self._ship,
            trace=lambda: (None, None),
            reads_inline=True,
        )

    def _new_coordinator(self, memory: JobStore) -> Coordinator:
        self._n_starts += 1
        epoch = f"sim{self._seed}.{self._n_starts}"
        sources = [
            Source(name, connect(), holder=epoch, is_dead=lambda holder: holder in self._dead)
            for name, connect in self._sources.items()
        ]
        coordinator = Coordinator(
            self._settings, store=memory, launcher=self.launcher, clock=self.clock, random=self._random, epoch=epoch,
            sources=sources,
        )  # fmt: skip
        self.launcher.coordinator = coordinator
        return coordinator

    def crash(self) -> None:
        """The coordinator's process is gone, between any two steps. What lived in its memory is lost; actors go on."""
        crashed = self.coordinator
        self._dead.add(crashed.epoch)
        self.launcher.lose_coordinator()
        crashed.vanish()

    async def restart(self) -> None:
        """Another coordinator starts, with the same sources and job actors."""
        self.store = MemoryStore(monotonic=self.clock.monotonic)
        self.coordinator = self._new_coordinator(self.store)
        await self.coordinator.start()

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
        async def call() -> Any:
            """Ask, and ask the next coordinator when this one crashes; calls are idempotent."""
            launcher = self._engine.launcher
            while True:
                asked = launcher.coordinator
                if asked is not None and asked.is_started:
                    outcome: list[Any] = []

                    async def ask(core: Any, outcome: list[Any]) -> bool:
                        try:
                            outcome.append((await getattr(core, method)(*args), None))
                        except Exception as error:  # noqa: BLE001 - brought to the caller
                            outcome.append((None, error))
                        return True

                    if await launcher.ask(ask(asked, outcome)):
                        return outcome[0]
                over = asyncio.Event()
                self._engine.clock.call_later(_REPEAT_S, over.set)
                await over.wait()

        self._begin(call, done)

    def broker(self, method: str, args: tuple[Any, ...], done: Callable[[Any, BaseException | None], None]) -> None:
        async def call() -> Any:
            return await getattr(self._engine.broker, method)(*args), None

        self._begin(call, done)

    def _begin(self, ask: Callable[[], Coroutine[Any, Any, Any]], done: Callable[[Any, BaseException | None], None]) -> None:
        async def call() -> None:
            try:
                answer, error = await ask()
            except Exception as problem:  # noqa: BLE001 - brought to the caller
                done(None, problem)
            else:
                done(answer, error)

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
    sources: Mapping[str, Callable[[], DocumentStore]] | None = None,
    **settings: Any,
) -> AsyncIterator[TestEngine]:
    """Start an engine on the running loop, and make it the one that jobs use.

    Args:
        clock: Time; left out, the loop's own virtual time (`testing.run`), or a new `ManualClock` on any other loop.
        store: Where records are kept; in memory if left out.
        faults: What goes wrong.
        seed: Of everything that is random.
        sources: What connects to each source of documents, by name.
        **settings: Fields of `koan_ray.engine.settings.EngineSettings`, such as ``max_actors=2``.
    """
    loop = asyncio.get_running_loop()
    time: Clock = clock or (VirtualClock(loop) if isinstance(loop, VirtualLoop) else ManualClock())
    numbers = EngineSettings(**settings)
    kept = store or MemoryStore(
        completed_retention_s=numbers.completed_retention_s,
        faulted_retention_s=numbers.faulted_retention_s,
        max_finished=numbers.max_finished,
        max_part_bytes=numbers.max_part_bytes,
        monotonic=time.monotonic,
    )
    made = TestEngine(numbers, time, kept, faults or Faults(), seed, sources or {})
    before = ambient.current_engine()
    ambient.set_engine(made.session)
    await made.coordinator.start()
    try:
        yield made
    finally:
        ambient.set_engine(before)
        await made.coordinator.close()
        made.session.close("the test's engine has ended")
        await _settle()


async def _settle() -> None:
    """Let everything run that is ready."""
    loop: Any = asyncio.get_running_loop()
    for _ in range(100_000):
        await asyncio.sleep(0)
        if not loop._ready:  # noqa: SLF001 - asyncio has no other way to tell
            return
