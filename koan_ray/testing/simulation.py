"""Job actors that live on the caller's event loop, with faults on demand.

`SimLauncher` keeps the contract of `koan_ray.ports.Launcher` with the engine's own `Attempt`: async bodies are tasks, plain
ones run inline. Messages take a random time; actors die, answers are lost with their actor, or come late, as the seeded
`Faults` say.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from koan_ray.domain.feasibility import unmet
from koan_ray.domain.records import ErrorInfo
from koan_ray.domain.status import Isolation
from koan_ray.engine.attempt import Attempt
from koan_ray.engine.early import Early
from koan_ray.ports import ActorInfo, BatchReply, Push, Report, Running, Survey

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from contextlib import AbstractContextManager

    from koan_ray.domain.feasibility import Node
    from koan_ray.domain.records import ActorSpec, Terms
    from koan_ray.engine.broker import Broker
    from koan_ray.engine.coordinator import Coordinator
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.jobs import Job
    from koan_ray.ports import ActorEvents, Clock, Order, OrderBatch


_TELL_AGAIN_S = 0.5
_TICK_S = 1e-6
_NEXT_WAITS_S = 0.5  # as in `koan_ray.engine.agent`
_LEFT_IN_TIME = 0.5  # of what an actor that dies has said and what has not arrived, as much arrives all the same


@dataclass
class Faults:
    """What goes wrong, each with a probability between 0 and 1.

    Args:
        die_at_begin: The actor dies when a body is about to begin.
        die_at_end: The actor dies when a body has ended, before it can say so.
        fail_start: An actor cannot be started.
        max_delay_s: Messages take up to this long, in the clock's time; 0: they arrive at once.
        limit: At most this many faults in all.
    """

    die_at_begin: float = 0.0
    die_at_end: float = 0.0
    fail_start: float = 0.0
    max_delay_s: float = 0.0
    limit: int = 1_000_000
    n_fired: int = 0

    def fires(self, random: Random, probability: float) -> bool:
        """Decide whether a fault happens here."""
        if probability <= 0 or self.n_fired >= self.limit or random.random() >= probability:
            return False
        self.n_fired += 1
        return True


class _Live:
    __slots__ = ("attempt", "batch", "is_parked", "is_waiting", "order", "task", "waits_for")

    def __init__(self, order: Order, batch: int) -> None:
        self.order, self.batch = order, batch
        self.attempt: Attempt | None = None
        self.task: asyncio.Task[None] | None = None
        self.is_parked = False
        self.is_waiting = False  # a chunk that was not begun when its batch was answered
        self.waits_for: Callable[[], None] | None = None


class _SimActor:
    """The inside of one simulated job actor; also the host of its attempts."""

    def __init__(self, launcher: SimLauncher, name: str, spec: ActorSpec, events: ActorEvents) -> None:
        self.name, self.spec, self.events, self._launcher = name, spec, events, launcher
        self.clock: Clock = launcher.clock
        self.inline_limit = launcher.settings.inline_limit
        self.span: Callable[[Order, str], AbstractContextManager[Any]] | None = None
        self.is_dead = False
        self.is_buried = False  # the coordinator knows
        self._terms: dict[str, Terms] = {}
        self._live: dict[str, _Live] = {}
        self._todo: deque[_Live] = deque()
        self._resuming: deque[_Live] = deque()
        self._n_active = 0
        self._early = Early(launcher.settings.stuck_after_s)
        self._ended: dict[int, list[Report]] = {}  # by unanswered batch
        self._held: dict[int, list[Report]] = {}  # told in answers, not known to be stored
        self._outbox: list[Report] = []
        self._is_telling = False
        self._is_beating = False

    def run_batch(self, batch: int, orders: OrderBatch) -> None:
        self._terms.update((terms.id, terms) for terms in orders.terms)
        self.settled(orders.settled)
        self._ended[batch] = []
        for order in orders.orders:
            live = self._live[order.execution_id] = _Live(order, batch)
            self._todo.append(live)
        for order in orders.orders:
            if (cause := self._early.take(order.execution_id)) is not None:
                self.cancel(order.execution_id, cause)
        self._fill()
        self.clock.call_later(self._launcher.settings.overrun_s, lambda: self._answer(batch))
        self._answer_if_settled(batch)
        if not self._is_beating:
            self._is_beating = True
            self.clock.call_later(self._launcher.settings.stuck_after_s / 4, self._beat)

    def _beat(self) -> None:
        """Say that it is there while it has something, as real actors do."""
        if self.is_dead or not self._live:
            self._is_beating = False
            return
        self._push()
        self.clock.call_later(self._launcher.settings.stuck_after_s / 4, self._beat)

    def settled(self, batches: Sequence[int]) -> None:
        for batch in batches:
            self._held.pop(batch, None)

    def survey(self) -> Survey:
        unbegun = [(live.order.execution_id, live.order.job_id) for live in self._todo]
        for execution_id, _ in unbegun:
            del self._live[execution_id]
        self._todo.clear()
        for told in (self._held, self._ended):
            self._outbox += [report for reports in told.values() for report in reports]
            told.clear()
        self._tell_ends()
        running = [
            Running(
                live.order.execution_id, live.order.job_id, live.attempt.age_s if live.attempt else 0.0, live.is_parked,
                live.order.particulars.residence.source,
            )
            for live in self._live.values()
        ]  # fmt: skip
        return Survey(self.name, self.spec, ActorInfo("sim", self.name, 1), running, list(self._outbox), unbegun)

    def cancel(self, execution_id: str, cause: str) -> None:
        live = self._live.get(execution_id)
        if live is None:
            self._early.keep(execution_id, cause, now=self.clock.monotonic())
        elif live.attempt is None:
            self._todo.remove(live)
            self._file(live, Report(execution_id, live.order.job_id, "cancelled", self.clock.now(), 0.0))
        elif live.attempt.stop(cause):
            live.attempt.interrupt()
        else:
            self.clock.call_later(self._launcher.settings.cancel_grace_s / 2, live.attempt.interrupt)

    def die(self, cause: str) -> None:
        if not self.is_dead:
            self.is_dead = True
            for live in self._live.values():
                _end_body(live, cause)
            for live in self._resuming:  # their tasks end now; there is no place to wait for
                if live.waits_for is not None:
                    live.waits_for()
            self._launcher.died(self, cause)

    def lose_child(self, live: _Live, cause: str) -> None:
        """The process of a body of its own (``Isolation.PROCESS``) is gone; this one goes on."""
        if self.is_dead or live.order.execution_id not in self._live or live.attempt is None:
            return
        _end_body(live, cause)
        began_at, took_s = live.attempt.began_at, live.attempt.age_s
        error = ErrorInfo("ProcessLost", f"the job's own process ended without a report: {cause}")
        report = Report(live.order.execution_id, live.order.job_id, "crashed", began_at, took_s, error=error)
        self._n_active -= not live.is_parked
        self._file(live, report)
        self._fill()

    # --- places, as in Agent -----------------------------------------------------------------------------------------

    def _fill(self) -> None:
        while not self.is_dead and self._n_active < self.spec.concurrency:
            if self._resuming:
                self._n_active += 1
                live = self._resuming.popleft()
                if live.waits_for is not None:
                    live.waits_for()
            elif self._todo:
                self._n_active += 1
                live = self._todo.popleft()
                if live.is_waiting:
                    live.is_waiting = False
                    self._push([live.order.execution_id])
                if self._launcher.strikes("die_at_begin"):
                    self.die("simulated: died before a body began")
                    return
                # In a context of its own: the body must not inherit the context of whoever happened to make room.
                live.task = asyncio.get_running_loop().create_task(self._perform(live), context=contextvars.Context())
                terms = self._terms[live.order.terms_id]
                host: Any = _SimChild(self, live) if terms.isolation is Isolation.PROCESS else self
                live.attempt = Attempt(live.order, terms, self._launcher.load(terms.code_id), host)
                if terms.timeout_s is not None:
                    self.clock.call_later(terms.timeout_s, lambda live=live: self._time_out(live))  # type: ignore[misc]
            else:
                return

    async def _perform(self, live: _Live) -> None:
        attempt = live.attempt
        if attempt is None or self.is_dead:
            return
        self._launcher.began(live.order)
        is_async = attempt.job_type.definition.runs_on_loop(attempt.terms)
        report = None if is_async else attempt.perform_blocking()
        if report is None:
            report = await attempt.perform()
        if self._has_died() or live.order.execution_id not in self._live:
            return
        if self._launcher.strikes("die_at_end"):
            self.die("simulated: died after a body had ended")
            return
        self._n_active -= 1
        self._file(live, report)
        self._fill()

    def _has_died(self) -> bool:
        return self.is_dead

    def _time_out(self, live: _Live) -> None:
        if live.order.execution_id in self._live and not self.is_dead:
            self.cancel(live.order.execution_id, "timeout")

    def _file(self, live: _Live, report: Report) -> None:
        del self._live[live.order.execution_id]
        if live.batch in self._ended:
            self._ended[live.batch].append(report)
            self._answer_if_settled(live.batch)
        else:
            self._outbox.append(report)
            self._tell_ends()

    def _tell_ends(self) -> None:
        """Tell what is in the outbox until a coordinator has stored it."""
        if not self._is_telling and self._outbox:
            self._is_telling = True
            _spawn(self._keep_telling())

    async def _keep_telling(self) -> None:
        while self._outbox and not self.is_dead:
            arrived = asyncio.Event()
            self._launcher.later(self, _Said(arrived.set))
            await arrived.wait()
            coordinator, told = self._launcher.coordinator, list(self._outbox)
            known = None
            if coordinator is not None:
                known = await self._launcher.ask(coordinator.note(Push(self.name, told, [], [], [])))
            if known is None:
                over = asyncio.Event()
                self.clock.call_later(_TELL_AGAIN_S, over.set)
                await over.wait()
            else:
                del self._outbox[: len(told)]
        self._is_telling = False

    def _answer_if_settled(self, batch: int) -> None:
        left = [live for live in self._live.values() if live.batch == batch]
        if not left or (self._n_active == 0 and not self._todo):
            self._answer(batch)

    def _answer(self, batch: int) -> None:
        ended = self._ended.pop(batch, None)
        if ended is None or self.is_dead:
            return
        waits = [live for live in self._todo if self._terms[live.order.terms_id].part][:1] if len(self._todo) == 1 else []
        returned = [live.order.execution_id for live in self._todo if live.batch == batch and live not in waits]
        self._todo = deque(live for live in self._todo if live.batch != batch or live in waits)
        for execution_id in returned:
            del self._live[execution_id]
        for live in waits:
            live.is_waiting = True
            self.clock.call_later(_NEXT_WAITS_S, lambda live=live: self._give_up_waiting(live))  # type: ignore[misc]
        running = [
            Running(
                live.order.execution_id,
                live.order.job_id,
                live.attempt.age_s if live.attempt else 0.0,
                live.is_parked or live.is_waiting,
            )
            for live in self._live.values()
            if live.batch == batch
        ]
        reply = BatchReply(ended, running, returned)
        if ended:
            self._held[batch] = ended
        self._launcher.later(self, _Said(lambda: self.events.batch_answered(self.name, batch, reply)))

    def _give_up_waiting(self, live: _Live) -> None:
        """Give back a chunk whose turn has not come in time."""
        if live in self._todo and not self.is_dead:
            self._todo.remove(live)
            self._file(live, Report(live.order.execution_id, live.order.job_id, "returned", self.clock.now(), 0.0))

    def _push(self, turned: Sequence[str] = ()) -> None:
        """Tell which of these bodies wait and which do not; again, if the coordinator has not decided on this actor."""
        live = [self._live[execution_id] for execution_id in turned if execution_id in self._live]
        parked = [each.order.execution_id for each in live if each.is_parked or each.is_waiting]
        resumed = [each.order.execution_id for each in live if not (each.is_parked or each.is_waiting)]
        push = Push(self.name, [], parked, resumed, [])

        def arrive() -> None:
            if not self._launcher.pushed(push) and turned:
                self.clock.call_later(_TELL_AGAIN_S, lambda: None if self.is_dead else self._push(turned))

        self._launcher.later(self, _Said(arrive))

    # --- Host ------------------------------------------------------------------------------------------------------------

    def announce(self, attempt: Attempt) -> None:
        if (progress := attempt.take_progress()) is not None:
            state = [(attempt.order.job_id, progress)]
            self._launcher.later(self, lambda: self._launcher.tell_broker(state))
            push = Push(self.name, [], [], [], [(attempt.order.execution_id, progress)])
            self._launcher.later(self, lambda: self._launcher.pushed(push))

    def release(self, attempt: Attempt, *, blocking: bool) -> None:
        if blocking:
            msg = "a simulated actor has one thread: await instead of .get() when a body waits for other jobs"
            raise RuntimeError(msg)
        live = self._live.get(attempt.order.execution_id)
        if live is not None:
            live.is_parked = True
            self._n_active -= 1
            self._push([attempt.order.execution_id])
            self._fill()
            if live.batch in self._ended:
                self._answer_if_settled(live.batch)

    def acquire(self, attempt: Attempt, granted: Callable[[], None]) -> bool:
        live = self._live.get(attempt.order.execution_id)
        if live is None or not live.is_parked or self.is_dead:
            return True
        live.is_parked = False
        self._push([attempt.order.execution_id])
        if self._n_active < self.spec.concurrency:
            self._n_active += 1
            return True
        live.waits_for = granted
        self._resuming.append(live)
        return False


class _Said:
    """A message from an actor."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action

    def __call__(self) -> None:
        self._action()


class _SimChild:
    """The process that a body has to itself, as the host of its attempt."""

    def __init__(self, actor: _SimActor, live: _Live) -> None:
        self._actor, self._live = actor, live

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)

    def die(self, cause: str) -> None:
        self._actor.lose_child(self._live, cause)


def _end_body(live: _Live, cause: str) -> None:
    """Let nothing of a body go on whose process is gone; a plain one stops when it looks at its token."""
    if live.attempt is not None:
        live.attempt.token._set(cause)  # noqa: SLF001 - set by the engine only
    if live.task is not None:
        live.task.cancel()


class SimLauncher:
    """Simulated job actors; see `koan_ray.ports.Launcher`.

    ``bodies`` lists ``(job id, execution id)`` of every body that was called, in order.
    """

    def __init__(
        self, settings: EngineSettings, clock: Clock, load: Callable[[str], type[Job[Any, Any]]], *, capacity: int,
        faults: Faults, random: Random,
    ) -> None:  # fmt: skip
        self.settings, self.clock, self.load, self.faults = settings, clock, load, faults
        self.bodies: list[tuple[str, str]] = []
        self.cluster: list[Node] | None = None  # None: nobody asks what a node has
        self._unplaced: list[tuple[str, ActorEvents]] = []  # actors that no node has room for
        self.coordinator: Coordinator | None = None  # None: it has crashed
        self.crashed = asyncio.Event()
        self.broker: Broker
        self._capacity, self._random = capacity, random
        self._actors: dict[str, _SimActor] = {}
        self._kept: dict[str, tuple[Terms, bytes]] = {}
        self._arrives_at = 0.0

    def capacity(self) -> int:
        """Return the capacity it was made with."""
        return self._capacity

    def is_crowded(self) -> bool:
        """Nobody else is here."""
        return False

    def nodes(self) -> Sequence[Node] | None:
        """Return `cluster`."""
        return self.cluster

    def join(self, node: Node) -> None:
        """A node joins the cluster: actors that have waited for one like it are placed."""
        self.cluster = [*(self.cluster or ()), node]
        waiting, self._unplaced = self._unplaced, []
        for name, events in waiting:
            if (actor := self._actors.get(name)) is not None:
                self._place(actor, events)

    def start(self, name: str, spec: ActorSpec, events: ActorEvents, *, lent: bool = False) -> None:
        """Start an actor, or fail to."""
        actor = self._actors[name] = _SimActor(self, name, spec, events)
        if self.strikes("fail_start"):
            actor.die("simulated: could not be started")
        else:
            self._place(actor, events)

    def _place(self, actor: _SimActor, events: ActorEvents) -> None:
        """Have an actor become ready where a node has what it needs; leave it waiting, as Ray does, where none has."""
        if self.cluster is not None and unmet(actor.spec, self.cluster) is not None:
            self._unplaced.append((actor.name, events))
        else:
            self.later(actor, lambda: events.actor_ready(actor.name, ActorInfo("sim", actor.name, 1)))

    def send(self, name: str, batch: int, orders: OrderBatch, *, label: str) -> None:
        """Hand over a batch."""
        if (actor := self._actors.get(name)) is not None:
            self.later(actor, lambda: actor.run_batch(batch, orders))

    def hurry(self, name: str, batch: int) -> None:
        """Every batch is answered in time here."""

    def cancel(self, name: str, execution_id: str, cause: str) -> None:
        """Ask a body to stop."""
        if (actor := self._actors.get(name)) is not None:
            self.later(actor, lambda: actor.cancel(execution_id, cause), overtakes=True)

    def attend(self, name: str, execution_id: str, label: str) -> None:
        """There is no dashboard."""

    def retire(self, name: str) -> None:
        """End an idle actor."""
        self.kill(name)

    def kill(self, name: str) -> None:
        """End an actor."""
        if (actor := self._actors.get(name)) is not None:
            actor.die("killed")

    def settled(self, name: str, batches: tuple[int, ...]) -> None:
        """Tell an actor that ends are stored."""
        if (actor := self._actors.get(name)) is not None:
            self.later(actor, lambda: actor.settled(batches))

    async def survey(self) -> list[Survey]:
        """Ask the actors of a coordinator that has crashed."""
        return [actor.survey() for actor in self._actors.values()]

    def adopt(self, name: str, events: ActorEvents) -> None:
        """Make an actor the new coordinator's."""
        if (actor := self._actors.get(name)) is not None:
            actor.events = events
        else:
            asyncio.get_running_loop().call_soon(lambda: events.actor_dead(name, "died while it was surveyed"))

    def keep_code(self, terms: Terms, code: bytes) -> None:
        """Keep a class over crashes of the coordinator."""
        self._kept[terms.kind] = (terms, code)

    async def kept_code(self) -> list[tuple[Terms, bytes]]:
        """Return the classes that were kept."""
        return list(self._kept.values())

    def lose_coordinator(self) -> None:
        """The coordinator has crashed: nobody hears the actors until another is there."""
        self.coordinator = None
        for actor in self._actors.values():
            actor.events = _Nobody()
        crashed, self.crashed = self.crashed, asyncio.Event()
        crashed.set()

    async def ask(self, question: Coroutine[Any, Any, Any]) -> Any:
        """Return a coordinator's answer; None when it crashes before it has given one."""
        crashed = asyncio.ensure_future(self.crashed.wait())
        answer = asyncio.ensure_future(question)
        try:
            await asyncio.wait([crashed, answer], return_when=asyncio.FIRST_COMPLETED)
            is_lost = crashed.done() or answer.cancelled() or answer.exception() is not None
            return None if is_lost else answer.result()
        finally:
            crashed.cancel()
            answer.cancel()

    def pushed(self, push: Push) -> bool:
        """Bring news to the coordinator; false if there is none, or if it does not know this actor (yet)."""
        return self.coordinator is not None and self.coordinator.pushed(push)

    # --- for the actors --------------------------------------------------------------------------------------------------

    def strikes(self, fault: str) -> bool:
        """Decide whether this fault happens here."""
        return self.faults.fires(self._random, getattr(self.faults, fault))

    def began(self, order: Order) -> None:
        """A body is about to be called."""
        self.bodies.append((order.job_id, order.execution_id))

    def later(self, actor: _SimActor, action: Callable[[], Any], *, overtakes: bool = False) -> None:
        """Deliver a message to or from an actor, unless it is dead by then; in order, but for those that overtake.

        What it has said may arrive although it is dead by then; not after the word of its death, though.
        """
        delay = self._random.random() * self.faults.max_delay_s
        coordinator = self.coordinator

        def deliver() -> None:
            was_said = isinstance(action, _Said) and not actor.is_buried and self.coordinator is coordinator
            if not actor.is_dead or (was_said and self._random.random() < _LEFT_IN_TIME):
                action()

        if delay and overtakes:
            self.clock.call_later(delay, deliver)
        elif delay:
            # Messages do not overtake, and timers for the same instant are in no order.
            self._arrives_at = max(self._arrives_at + _TICK_S, self.clock.monotonic() + delay)
            self.clock.call_later(self._arrives_at - self.clock.monotonic(), deliver)
        else:
            asyncio.get_running_loop().call_soon(deliver)

    def died(self, actor: _SimActor, cause: str) -> None:
        """Tell the coordinator, after a moment in which it takes the actor for alive."""
        if self._actors.pop(actor.name, None) is None:
            return
        coordinator = self.coordinator

        def bury() -> None:
            actor.is_buried = True
            if self.coordinator is coordinator:
                actor.events.actor_dead(actor.name, cause)

        delay = self._random.random() * self.faults.max_delay_s
        if delay:
            self.clock.call_later(delay, bury)
        else:
            asyncio.get_running_loop().call_soon(bury)

    def tell_broker(self, state: list[Any]) -> None:
        """Bring progress to the broker."""
        _spawn(self.broker.push(state))


class _Nobody:
    """Hears the actors of a coordinator that has crashed."""

    def actor_ready(self, name: str, info: ActorInfo) -> None: ...
    def actor_dead(self, name: str, cause: str) -> None: ...
    def batch_answered(self, name: str, batch: int, reply: BatchReply) -> None: ...


_kept: set[asyncio.Task[Any]] = set()


def _spawn(work: Coroutine[Any, Any, Any]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    _kept.add(task)
    task.add_done_callback(_kept.discard)
