"""The engine in this process, without Ray: the same coordinator, broker and agents, on threads.

For tests, quickstarts and small deployments. What differs from Ray: bodies share this process, so one that does not stop
can be given up but not killed, and its thread lives on until it returns; ``resources`` are not reserved, and job actors
are counted against the machine's CPUs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

from koan_ray import threads, wiring
from koan_ray.domain.measures import Measures
from koan_ray.engine.agent import Agent
from koan_ray.engine.session import Session
from koan_ray.errors import RuntimeUnavailableError
from koan_ray.ports import ActorInfo, BatchReply, LoopClock
from koan_ray.runtime import lineage
from koan_ray.runtime.child import ForkserverChildren
from koan_ray.runtime.code import LocalCode
from koan_ray.runtime.loop import LoopThread
from koan_ray.runtime.nursery import Nursery
from koan_ray.telemetry import logs, metrics, traces

if TYPE_CHECKING:
    from collections.abc import Callable

    from koan_ray.config import Settings
    from koan_ray.domain.records import ActorSpec, Progress, Terms
    from koan_ray.engine.broker import Broker
    from koan_ray.engine.coordinator import Coordinator
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.ports import ActorEvents, OrderBatch, Push, Survey


_MEASURE_S = 5.0
_CLOSE_S = 10.0  # for the last flush, when the engine is shut down


async def _made(make: Callable[..., Any], *args: Any) -> Any:
    """Make something on the loop that it will live on."""
    return make(*args)


class LocalRuntime:
    """Coordinator and broker on a loop thread, job actors as agents; also the transport to them."""

    def __init__(self, settings: EngineSettings) -> None:
        lineage.follow()
        self._is_stopped = False
        self._asked: dict[object, Callable[[Any, BaseException | None], None]] = {}  # calls that are not answered yet
        self._thread = LoopThread("koan-engine")
        try:
            clock = LoopClock(self._thread.loop)
            self.code = LocalCode()
            self._launcher = LocalLauncher(self, settings, clock)
            self.core: Coordinator = self._thread.run(_made(wiring.coordinator, settings, self._launcher, clock))
            self._thread.on_failure = self.core.failures.note
            self.broker_core: Broker = wiring.broker(settings, clock)
            self.session = Session(self, inline_limit=settings.inline_limit, ship=self.code.ship, trace=traces.current)
            self._thread.run(self.core.start())
        except BaseException:  # an interrupt, for instance: nobody has this engine in hand
            self._thread.stop()
            raise
        self._stop_measuring = metrics.offer(self._measure)
        if settings.keeps_documents:
            self.session.introduce_kinds()

    @classmethod
    def start(cls, settings: Settings) -> LocalRuntime:
        """Start an engine in this process; an interrupt of the caller leaves none behind."""
        made: LocalRuntime = threads.apart("koan-start", lambda: cls(wiring.engine_settings(settings)), undo=cls.stop)
        return made

    def coordinator(self, method: str, args: tuple[Any, ...], done: Callable[[Any, BaseException | None], None]) -> None:
        """Call a method of the coordinator; see `Transport`."""
        self._call(self.core, method, args, done)

    def broker(self, method: str, args: tuple[Any, ...], done: Callable[[Any, BaseException | None], None]) -> None:
        """Call a method of the broker; see `Transport`."""
        self._call(self.broker_core, method, args, done)

    def _call(
        self, core: Any, method: str, args: tuple[Any, ...], done: Callable[[Any, BaseException | None], None]
    ) -> None:
        number = object()
        self._asked[number] = done

        def answered(answer: Any, error: BaseException | None) -> None:
            if self._asked.pop(number, None) is not None:
                done(None, _over()) if isinstance(error, asyncio.CancelledError) else done(answer, error)

        if self._is_stopped:
            answered(None, _over())
            return
        work = getattr(core, method)(*args)
        try:
            self._thread.begin(work, answered)
        except RuntimeError:  # its loop was closed meanwhile
            work.close()
            answered(None, _over())

    def on_loop(self, action: Callable[..., Any], *args: Any) -> None:
        """Call something where coordinator and broker live."""
        if not self._is_stopped:
            self._thread.call(action, *args)

    def push(self, push: Push, done: Callable[[bool | None], None]) -> None:
        """Bring an agent's news to the coordinator; see `Uplink`."""

        def take() -> None:
            known: bool | None = None  # ask again, if it could not be taken
            try:
                known = self.core.pushed(push)
            except Exception as error:  # noqa: BLE001 - the agent waits for an answer, whatever it is
                self.core.failures.note("news of a job actor", error)
            done(known)

        self.on_loop(take)

    def progress(self, states: list[tuple[str, Progress]]) -> None:
        """Bring states to the broker; see `Uplink`."""
        self.broker("push", (states,), lambda _answer, _error: None)

    def _measure(self) -> Measures:
        """Read coordinator and broker; nothing while the engine is too busy to answer or has ended."""
        if self._is_stopped:
            return Measures({}, {}, {})
        try:
            both = [self._thread.run(core.measure(), timeout=_MEASURE_S) for core in (self.core, self.broker_core)]
        except (TimeoutError, asyncio.CancelledError):
            return Measures({}, {}, {})
        return metrics.merged(both)

    def stop(self) -> None:
        """End coordinator, broker and agents, interrupted or not. Bodies that run are asked to stop and given up."""
        threads.check_may_block()
        threads.apart("koan-stop", self._stop)

    def _stop(self) -> None:
        if not self._is_stopped:
            self._stop_measuring()
            with contextlib.suppress(TimeoutError):
                self._thread.run(self.core.close(), timeout=_CLOSE_S)
            self._launcher.stop()
            self._is_stopped = True
            self._thread.stop()
            while self._asked:  # what came too late for the loop
                threads.guarded("answer_not_delivered", self._asked.popitem()[1], None, _over())


def _over() -> RuntimeUnavailableError:
    return RuntimeUnavailableError("the engine was shut down; call koan.init() to start another")


class LocalLauncher:
    """Job actors as agents in this process; see `Launcher`."""

    def __init__(self, runtime: LocalRuntime, settings: EngineSettings, clock: LoopClock) -> None:
        self._runtime, self._settings, self._clock = runtime, settings, clock
        self._agents: dict[str, tuple[Agent, threads.Handlers, ActorEvents]] = {}
        self._children: dict[str, ForkserverChildren] = {}
        self._lock = threading.Lock()
        self._nursery = Nursery()

    def capacity(self) -> int:
        """As many actors as this process may use CPUs."""
        return len(os.sched_getaffinity(0))

    def is_crowded(self) -> bool:
        """Nobody else shares this process's actors."""
        return False

    def nodes(self) -> None:
        """Nothing is reserved here, so that nothing can be missing."""

    def start(self, name: str, spec: ActorSpec, events: ActorEvents, *, lent: bool = False) -> None:
        """Make an agent; it is ready at once."""
        children = ForkserverChildren(self._settings.cancel_grace_s, self._nursery)
        agent = Agent(
            name, spec.concurrency, self._settings, clock=self._clock, uplink=self._runtime, load=self._runtime.code.load,
            children=children, span=wiring.attempt_span, watch_process=False, log=logs.get_logger(),
        )  # fmt: skip
        # Kept as long as the agent, as bodies may hold things by thread; and daemons, so that a body which was given up does
        # not keep the interpreter from its end.
        callers = threads.Handlers(2, 2, name="koan-batch", idle_s=threads.LONGEST_WAIT_S)
        with self._lock:
            self._agents[name] = (agent, callers, events)
            self._children[name] = children
        self._tell(name, events.actor_ready, ActorInfo("local", name, os.getpid()))

    def send(self, name: str, batch: int, orders: OrderBatch, *, label: str) -> None:
        """Have the agent run a batch on one of its two threads."""
        found = self._agents.get(name)
        if found is None:
            return
        agent, callers, events = found

        def run() -> None:
            try:
                reply = agent.run_batch(batch, orders)
            except BaseException as error:  # noqa: BLE001 - nobody else learns of it; what was in it is lost
                self._runtime.core.failures.note("job actor", error)
                self._end(name, f"it could not take a batch: {type(error).__name__}")
            else:
                self._tell_answer(events, name, batch, reply)

        callers.call("batch_failed", run)

    def hurry(self, name: str, batch: int) -> None:
        """Have a batch answered now."""
        if (found := self._agents.get(name)) is not None:
            agent, _, events = found
            self._tell_answer(events, name, batch, agent.answer_now(batch))

    def _tell_answer(self, events: ActorEvents, name: str, batch: int, reply: BatchReply | None) -> None:
        if reply is not None:
            self._tell(name, events.batch_answered, batch, reply)

    def _tell(self, name: str, what: Callable[..., None], *details: Any) -> None:
        """Tell the coordinator something of an actor, unless it has been ended by then."""
        self._runtime.on_loop(lambda: what(name, *details) if name in self._agents else None)

    def cancel(self, name: str, execution_id: str, cause: str) -> None:
        """Ask a body to stop."""
        if (found := self._agents.get(name)) is not None:
            found[0].cancel(execution_id, cause)

    def attend(self, name: str, execution_id: str, label: str) -> None:
        """There is no dashboard here."""

    def retire(self, name: str) -> None:
        """Let an idle agent go."""
        self._end(name, "retired")

    def kill(self, name: str) -> None:
        """Give an agent up: whatever its bodies do from now on changes nothing.

        Their threads cannot be ended; processes of bodies are.
        """
        self._end(name, "killed")

    def _end(self, name: str, cause: str) -> None:
        with self._lock:
            found = self._agents.pop(name, None)
        if found is not None:
            agent, callers, events = found
            agent.stop()
            callers.close()
            self._children.pop(name).close()
            self._runtime.on_loop(events.actor_dead, name, cause)

    def settled(self, name: str, batches: tuple[int, ...]) -> None:
        """Tell an agent that the ends of these batches are stored."""
        if (found := self._agents.get(name)) is not None:
            found[0].settled(batches)

    async def survey(self) -> list[Survey]:
        """A new process has no job actors."""
        return []

    def adopt(self, name: str, events: ActorEvents) -> None:
        """There is nothing to adopt."""

    def keep_code(self, terms: Terms, code: bytes) -> None:
        """Classes go with the process."""

    async def kept_code(self) -> list[tuple[Terms, bytes]]:
        """A new process has no classes."""
        return []

    def stop(self) -> None:
        """End all agents."""
        for name in list(self._agents):
            self._end(name, "the engine was shut down")
        self._nursery.close()
