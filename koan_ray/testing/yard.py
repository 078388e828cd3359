"""Where a launcher is tried out: a stand-in for the coordinator that keeps what it is told, and jobs to order."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray.domain.ids import new_id
from koan_ray.domain.records import ActorSpec, Particulars
from koan_ray.jobs import Job
from koan_ray.ports import ActorInfo, BatchReply, Order, OrderBatch, Push, Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from koan_ray.cancellation import CancellationToken
    from koan_ray.ports import Launcher
    from koan_ray.progress import JobProgress

_PATIENCE_S = 30.0


class Echo(Job[int, int]):
    """Ends at once."""

    kind = "koan_ray.testing.Echo"

    async def execute(self, context: int, progress: JobProgress, cancellation: CancellationToken) -> int:
        """Return the context."""
        return context


class Lingers(Job[float, float]):
    """Says that it has begun, and takes its time."""

    kind = "koan_ray.testing.Lingers"

    async def execute(self, context: float, progress: JobProgress, cancellation: CancellationToken) -> float:
        """Sleep for ``context`` seconds."""
        progress.report(0.1)
        await asyncio.sleep(context)
        return context


class Obeys(Job[int, int]):
    """Says that it has begun, and ends well when it is asked to stop: a body that goes on for as long as a test likes."""

    kind = "koan_ray.testing.Obeys"

    async def execute(self, context: int, progress: JobProgress, cancellation: CancellationToken) -> int:
        """Return the context when asked to stop."""
        progress.report(0.1)
        await cancellation.wait()
        return context


class Told(NamedTuple):
    """Something that a launcher told."""

    what: str  # the method of `ActorEvents`
    actor: str
    value: Any  # its last argument
    batch: int = 0


class Yard:
    """Orders work of a launcher, and keeps what comes back; its `ActorEvents`, and its coordinator for pushes.

    Made on the loop that stands for the coordinator's.

    Args:
        ship: Returns ``(code_id, bytes)`` of a job class, in the form that the launcher's actors load.
        fails_to_start: A spec for which no actor can be started; None where there is none.
    """

    launcher: Launcher

    def __init__(self, ship: Callable[[type[Any]], tuple[str, bytes]], *, fails_to_start: ActorSpec | None = None) -> None:
        self.fails_to_start = fails_to_start
        self.told: list[Told] = []
        self.pushes: list[Push] = []
        self._ship, self._loop = ship, asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._mark = new_id()[-12:]
        self._n_actors = 0
        self._n_batches = 0

    # --- what launchers tell -----------------------------------------------------------------------------------------

    def actor_ready(self, name: str, info: ActorInfo) -> None:
        """Keep it."""
        self._keep(Told("actor_ready", name, info))

    def actor_dead(self, name: str, cause: str) -> None:
        """Keep it."""
        self._keep(Told("actor_dead", name, cause))

    def batch_answered(self, name: str, batch: int, reply: BatchReply) -> None:
        """Keep it."""
        self._keep(Told("batch_answered", name, reply, batch))

    def pushed(self, push: Push) -> bool:
        """Keep an actor's news."""
        self.pushes.append(push)
        self._news.set()
        return True

    async def note(self, push: Push) -> bool:
        """Take note of ends, as a coordinator does."""
        return self.pushed(push)

    async def push(self, states: object) -> None:
        """Take progress, as a broker does."""

    def _keep(self, told: Told) -> None:
        assert asyncio.get_running_loop() is self._loop, f"{told.what} was not told on the coordinator's loop"
        self.told.append(told)
        self._news.set()

    # --- what tests do -----------------------------------------------------------------------------------------------

    def start(self, spec: ActorSpec | None = None) -> str:
        """Begin to start an actor and return its name."""
        self._n_actors += 1
        name = f"koan_ray.job/{self._mark}/{self._n_actors}"
        self.launcher.start(name, spec or ActorSpec(num_cpus=0.5), self)
        return name

    async def ready(self, spec: ActorSpec | None = None) -> str:
        """Start an actor that has loaded the classes."""
        name = self.start(spec)
        await self.until(lambda: self.of(name, "actor_ready"), f"{name} is ready")
        for brief in (Echo, 0), (Lingers, 0.0):  # alone: while a class is loaded, what waits behind it would come back
            await self.ends(*self.order(name, brief)[1])
        _, (order,) = self.order(name, (Obeys, 0))
        await self.begun(order)
        self.launcher.cancel(name, order.execution_id, "cancelled")
        await self.ends(order)
        return name

    def order(self, name: str, *jobs: tuple[type[Job[Any, Any]], Any], is_brief: bool = False) -> tuple[int, list[Order]]:
        """Send a batch and return its number and its orders."""
        batch = self.batch(*jobs, is_brief=is_brief)
        return self.send(name, batch), batch.orders

    def batch(self, *jobs: tuple[type[Job[Any, Any]], Any], is_brief: bool = False) -> OrderBatch:
        """Make a batch."""
        batch = OrderBatch([], [], [], is_brief)
        for job_type, context in jobs:
            code_id, code = self._ship(job_type)
            terms = job_type.definition.terms(code_id)
            if terms not in batch.terms:
                batch.terms.append(terms)
                batch.code.append((code_id, code))
            body = json.dumps(context).encode()
            batch.orders.append(Order(new_id(), new_id(), terms.id, body, 1, 0, 0.0, 0.0, Particulars()))
        return batch

    def send(self, name: str, batch: OrderBatch) -> int:
        """Send a batch and return its number."""
        self._n_batches += 1
        self.launcher.send(name, self._n_batches, batch, label="")
        return self._n_batches

    def of(self, name: str, what: str | None = None) -> list[Told]:
        """Return what was told of an actor."""
        return [told for told in self.told if told.actor == name and what in {None, told.what}]

    async def reply(self, batch: int) -> BatchReply:
        """Return the answer to a batch."""
        await self.until(lambda: self._replies(batch), f"batch {batch} is answered")
        (reply,) = self._replies(batch)
        return reply

    def _replies(self, batch: int) -> list[BatchReply]:
        return [told.value for told in self.told if told.what == "batch_answered" and told.batch == batch]

    async def ends(self, *orders: Order) -> list[Report]:
        """Return how these orders ended, whether in an answer or by push."""
        wanted = [order.execution_id for order in orders]
        await self.until(lambda: set(wanted) <= {report.execution_id for report in self.reports()}, "the bodies end")
        return [report for execution_id in wanted for report in self.reports() if report.execution_id == execution_id]

    def reports(self) -> list[Report]:
        """Return every report, those of answers first."""
        answers = [told.value for told in self.told if told.what == "batch_answered"]
        return [report for answer in answers for report in answer.ended] + self.pushed_reports()

    def pushed_reports(self) -> list[Report]:
        """Return the reports that came outside of answers."""
        return [report for push in self.pushes for report in push.ended]

    async def begun(self, order: Order) -> None:
        """Return when a `Lingers` or an `Obeys` has begun."""
        await self.until(
            lambda: any(order.execution_id == told[0] for push in self.pushes for told in push.progress), "a body begins"
        )

    async def dead(self, name: str) -> str:
        """Return the cause of an actor's death."""
        await self.until(lambda: self.of(name, "actor_dead"), f"{name} is dead")
        return str(self.of(name, "actor_dead")[0].value)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Return when ``condition`` holds; looked at whenever there is news."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while not condition():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            msg = f"waited {_PATIENCE_S:g} s for this: {what}; told: {self.told[-3:]}, pushed: {self.pushes[-3:]}"
            raise AssertionError(msg) from None
