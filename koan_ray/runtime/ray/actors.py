"""Ray actors: shells with nothing to decide.

Coordinator and broker are sync actors: Ray's threads hand each call to a private event loop and wait for its answer,
which takes nearly twice as many calls a second as an async actor does. If a call returns, the change is in the store; if
it raises, it may or may not have happened: repeat it, every call is idempotent.

Arguments and answers travel as bytes that we pickle ourselves: Ray would take its cloudpickle, which is made for classes
and functions and costs 0.15 ms more for a small tuple.
"""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import threading
from typing import TYPE_CHECKING, Any

import ray

from koan_ray import ambient, wiring
from koan_ray.engine.agent import Agent
from koan_ray.engine.session import Session
from koan_ray.errors import CoordinatorUnavailableError, KoanRayError
from koan_ray.ports import ActorInfo, LoopClock, Survey
from koan_ray.runtime import lineage, processes
from koan_ray.runtime.child import ForkserverChildren
from koan_ray.runtime.code import Shipping
from koan_ray.runtime.loop import LoopThread
from koan_ray.runtime.ray import (
    forks,  # noqa: F401 - what it does, it does when it is imported
    options,
)
from koan_ray.runtime.ray.launcher import RayLauncher
from koan_ray.runtime.ray.metrics import RayMetrics
from koan_ray.runtime.ray.transport import RayTransport
from koan_ray.telemetry import configure_from_environment, flush, logs, traces

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from koan_ray.domain.measures import Measures
    from koan_ray.domain.records import ActorSpec, Progress
    from koan_ray.engine.coordinator import Coordinator
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.jobs import Job
    from koan_ray.ports import Push


_PROGRAMS_S = 0.4  # for programs of bodies to end
_END_S = 5.0  # for Ray to be told of the end of all job actors


class CoordinatorActor:
    """Owns job state for one namespace."""

    def __init__(self, settings: EngineSettings, namespace: str) -> None:
        # No I/O here: a constructor that fails is restarted for ever. The first call does the rest.
        _tune_collector()
        logs.configure(settings.log_level, settings.log_format, "coordinator")
        self._thread = LoopThread("koan-coordinator")
        clock = LoopClock(self._thread.loop)
        launcher = RayLauncher(namespace, settings, self._thread)
        self._core = wiring.coordinator(settings, launcher, clock)
        launcher.failures = self._core.failures
        self._thread.on_failure = self._core.failures.note
        self._settings, self._launcher = settings, launcher
        self._when_started = _starting_first(self._core)
        _measure(lambda: self._thread.run(self._core.measure()), namespace, "coordinator")

    def _call(self, method: str, request: bytes) -> bytes:
        answer = self._thread.run(self._when_started(method, pickle.loads(request)))  # noqa: S301 - from this cluster
        return pickle.dumps(answer, protocol=5)

    def warm(self) -> EngineSettings:
        """Begin, and return the settings in force."""
        self._thread.run(self._when_started("status", ()))
        return self._settings

    @ray.method(concurrency_group="submit")
    def submit(self, request: bytes) -> bytes:
        """Accept jobs."""
        return self._call("submit", request)

    @ray.method(concurrency_group="wait")
    def wait(self, request: bytes) -> bytes:
        """Return ends of jobs."""
        return self._call("wait", request)

    @ray.method(concurrency_group="wait")
    def news(self, request: bytes) -> bytes:
        """Return the jobs that have changed."""
        return self._call("news", request)

    @ray.method(concurrency_group="report")
    def note(self, request: bytes) -> bytes:
        """Take note of what a job actor says."""
        return self._call("note", request)

    @ray.method(concurrency_group="checkpoint")
    def checkpoint(self, request: bytes) -> bytes:
        """Store a checkpoint; waits while the store does not answer, and must not hold up anything else meanwhile."""
        return self._call("checkpoint", request)

    @ray.method(concurrency_group="checkpoint")
    def write_documents(self, request: bytes) -> bytes:
        """Write values to a collection; as `checkpoint`."""
        return self._call("write_documents", request)

    @ray.method(concurrency_group="control")
    def ask(self, method: str, request: bytes) -> bytes:
        """Call any other method of the coordinator."""
        return self._call(method, request)

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        """Return the process id."""
        return os.getpid()

    @ray.method(concurrency_group="control")
    def end(self) -> int:
        """End all job actors; the coordinator itself is ended by the caller. Returns how many there were."""
        n_actors = len(self._thread.run(self._when_started("status", ()))["actors"])
        self._thread.run(self._when_started("close", ()))
        self._launcher.finish(_END_S)
        return n_actors

    def __repr__(self) -> str:
        return "KoanCoordinator"


def _starting_first(core: Coordinator) -> Callable[[str, tuple[Any, ...]], Coroutine[Any, Any, Any]]:
    """Return a way to call ``core`` that starts it at the first call.

    A function and not a method: with a single coroutine among its methods, Ray would make an async actor of the shell.
    """
    starting: asyncio.Task[None] | None = None

    async def call(method: str, args: tuple[Any, ...]) -> Any:
        nonlocal starting
        if starting is None:
            starting = asyncio.get_running_loop().create_task(core.start())
        if not core.is_started:
            mine = starting
            try:
                await asyncio.shield(mine)
            except KoanRayError:
                starting = None if starting is mine else starting  # the next call tries again
                raise
            except Exception as error:
                if starting is mine:
                    starting = None
                    core.failures.note("start", error)
                msg = f"the coordinator could not start: {type(error).__name__}: {error}; it tries again with the next call"
                raise CoordinatorUnavailableError(msg) from error
        return await getattr(core, method)(*args)

    return call


class BrokerActor:
    """Fans progress out; holds no truth."""

    def __init__(self, settings: EngineSettings) -> None:
        logs.configure(settings.log_level, settings.log_format, "broker")
        self._thread = LoopThread("koan-broker")
        self._core = wiring.broker(settings, LoopClock(self._thread.loop))
        self._thread.on_failure = self._core.failures.note
        _measure(lambda: self._thread.run(self._core.measure()), settings.namespace, "broker")

    def _call(self, method: str, request: bytes) -> bytes:
        answer = self._thread.run(getattr(self._core, method)(*pickle.loads(request)))  # noqa: S301 - from this cluster
        return pickle.dumps(answer, protocol=5)

    @ray.method(concurrency_group="push")
    def push(self, request: bytes) -> bytes:
        """Take note of states."""
        return self._call("push", request)

    @ray.method(concurrency_group="poll")
    def poll(self, request: bytes) -> bytes:
        """Return states that a session has not seen."""
        return self._call("poll", request)

    @ray.method(concurrency_group="poll")
    def news(self, request: bytes) -> bytes:
        """Return the states of all jobs that have changed."""
        return self._call("news", request)

    def ask(self, method: str, request: bytes) -> bytes:
        """Call any other method of the broker."""
        return self._call(method, request)

    def pid(self) -> int:
        """Return the process id."""
        return os.getpid()

    def __repr__(self) -> str:
        return "KoanBroker"


class JobActor:
    """Runs the bodies of jobs."""

    def __init__(self, name: str, spec: ActorSpec, settings: EngineSettings, namespace: str) -> None:
        self._name, self._spec = name, spec
        logs.configure(settings.log_level, settings.log_format, "job actor")
        configure_from_environment("koan_ray.job_actor", measures=False)  # before the agent looks for leftovers of bodies
        self._uplink = _Uplink(namespace)
        self._shipping = Shipping()
        transport = self._uplink.transport
        # What bodies use for their own jobs; it does nothing before it is used.
        session = Session(transport, inline_limit=settings.inline_limit, ship=self._shipping.ship, trace=traces.current)
        ambient.set_engine(session)
        self._agent = Agent(
            name, spec.concurrency, settings, clock=LoopClock(), uplink=self._uplink, load=self._load,
            children=ForkserverChildren(settings.cancel_grace_s), span=wiring.attempt_span, on_orphaned=_leave,
            log=logs.get_logger(),
        )  # fmt: skip
        lineage.follow(stand_in=self._agent.stand_in)
        self._gone = threading.Event()
        self._agent.keep_in_touch()

    def _load(self, code_id: str, blob: bytes) -> type[Job[Any, Any]]:
        try:
            return self._shipping.load(code_id, blob)
        except BaseException:
            logs.get_logger().warning("class_not_loaded", code_id=code_id, actor=self._name, exc_info=True)
            raise

    def info(self) -> ActorInfo:
        """Return where this actor lives."""
        context = ray.get_runtime_context()
        return ActorInfo(context.get_node_id(), str(context.get_actor_id()), os.getpid())

    @ray.method(concurrency_group="run")
    def run_batch(self, number: int, orders: bytes) -> bytes:
        """Begin orders, and say how they stand."""
        reply = self._agent.run_batch(number, pickle.loads(orders))  # noqa: S301 - from this cluster
        return pickle.dumps(reply, protocol=5)

    @ray.method(concurrency_group="control")
    def answer_now(self, number: int) -> bytes:
        """Say how a batch stands whose bodies take longer than expected."""
        return pickle.dumps(self._agent.answer_now(number), protocol=5)

    @ray.method(concurrency_group="control")
    def settled(self, numbers: tuple[int, ...]) -> None:
        """Let go of ends that are stored."""
        self._agent.settled(numbers)

    @ray.method(concurrency_group="control")
    def survey(self) -> bytes:
        """Say what runs and waits here to a coordinator that did not start this actor."""
        return pickle.dumps(Survey(self._name, self._spec, self.info(), *self._agent.survey()), protocol=5)

    @ray.method(concurrency_group="control")
    def cancel(self, execution_id: str, cause: str) -> None:
        """Ask a body to stop."""
        self._agent.cancel(execution_id, cause)

    @ray.method(concurrency_group="control")
    def end_programs(self) -> None:
        """End all processes that descend from this one, which is about to be killed. Ray ends its children only."""
        processes.kill_descendants(_PROGRAMS_S)

    def flush(self) -> None:
        """Send the spans of what has ended: this actor is about to be."""
        flush()

    @ray.method(concurrency_group="watch")
    def watch(self) -> None:
        """Never return: the caller learns of this process's death at once."""
        self._gone.wait()

    @ray.method(concurrency_group="attend")
    def attend(self, execution_id: str) -> None:
        """Return when an execution has ended."""
        self._agent.attend(execution_id)

    def __repr__(self) -> str:
        return f"KoanJobs[{self._spec.label}]"


class _Uplink:
    """From an agent to coordinator and broker."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self.transport = RayTransport(self._find)

    def _find(self, whom: str) -> Any:
        name = options.COORDINATOR_NAME if whom == "coordinator" else options.BROKER_NAME
        return ray.get_actor(name, namespace=self._namespace)

    def push(self, push: Push, done: Callable[[bool | None], None]) -> None:
        def answered(known: Any, error: BaseException | None) -> None:
            done(None if error is not None else known)

        self.transport.coordinator("note", (push,), answered)

    def progress(self, states: list[tuple[str, Progress]]) -> None:
        self.transport.broker("push", (states,), lambda _answer, _error: None)


def _leave(why: str) -> None:
    logs.get_logger().warning("job_actor_orphaned", reason=why)
    flush()
    os._exit(0)


def _measure(read: Callable[[], Measures], namespace: str, who: str) -> None:
    """Publish the readings of this actor for as long as its process lives."""
    configure_from_environment(f"koan_ray.{who}")
    RayMetrics(read, namespace).start()


def _tune_collector() -> None:
    """Let a million queued records not be traversed at every collection of young objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1_000)
