"""The inside of a job actor: takes batches, runs bodies, reports ends and progress.

Plain Python with threads; `koan_ray.runtime` puts it into a Ray actor or into this process. Threads:

* the caller of `run_batch`: waits until the batch has ended, at most `overrun_s`, then says how it stands. Plain bodies
  that are known to be brief it calls itself, which spares two thread switches; when one turns out to be long after all,
  the coordinator asks with `answer_now`;
* user loops: async bodies run there, one after the other in a *runner* task, so that a batch of short ones needs neither
  a task nor a thread switch for each;
* body threads: plain bodies, likewise;
* the ticker: ships progress and news, watches soft timeouts, notices that there is no coordinator any more.

*Places.* At most `concurrency` bodies are active. One that waits for other jobs has no place meanwhile and takes one
again before it goes on, ahead of new orders.

*Outbox.* The end of a body whose batch was answered already is kept until the coordinator has acknowledged it, and so are
the ends in a batch's answer when their jobs are documents: the coordinator may die between our answer and its flush, and
the next one asks with `survey`.

*Order of calls.* There is none: `cancel` and `answer_now` have threads of their own and may overtake the batch that they are
about, so what they say of an execution or a batch that is not here is kept for a while (`koan_ray.engine.early`).
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from koan_ray.domain.records import ErrorInfo
from koan_ray.domain.status import Isolation
from koan_ray.engine.attempt import Attempt, describe
from koan_ray.engine.early import Early
from koan_ray.errors import LimitExceededError
from koan_ray.ports import BatchReply, OrderBatch, Push, Report, Running

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from koan_ray.domain.records import Progress, Terms
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.jobs import Job
    from koan_ray.ports import Clock, Order

_SHIP_EVERY_S = 0.05  # of the progress of all bodies together
_RESHIP_EVERY_S = 2.0  # of the latest progress of running bodies, for a broker that has restarted
_TELL_COORDINATOR_EVERY_S = 1.0  # of a body's progress
_IDLE_TICK_S = 1.0
_YIELD_EVERY_S = 0.005  # a runner lets its loop do other things
_NEXT_WAITS_S = 0.5  # a chunk of items waits for its turn; another actor may have nothing to do
_MAX_IDLE_THREADS = 4
_MAX_LEAKED_THREADS = 16


class Uplink(Protocol):
    """How an agent reaches coordinator and broker; neither call blocks."""

    def push(self, push: Push, done: Callable[[bool | None], None]) -> None:
        """Tell the coordinator; ``done(True)`` when it has taken note, False when it does not know this actor.

        ``done(None)``: it could not be reached; tell it again.
        """

    def progress(self, states: list[tuple[str, Progress]]) -> None:
        """Tell the broker the latest progress, by job id; may be lost."""


class ChildRunner(Protocol):
    """Runs one execution in a process of its own (``Isolation.PROCESS``)."""

    def run(self, order: Order, terms: Terms, code: bytes, attempt: Attempt) -> Report:
        """Run it and return its report; outcome ``crashed`` when the process vanished."""

    def stop(self, execution_id: str, cause: str) -> None:
        """Ask the body to stop and kill its process when it has not after the grace period."""


class _Box:
    """A batch on its way to its answer."""

    __slots__ = ("ended", "is_answered", "is_held", "n_left", "settled")

    def __init__(self, n_left: int, *, is_held: bool) -> None:
        self.n_left = n_left
        self.is_held = is_held  # at least one job is a document
        self.ended: list[Report] = []
        self.is_answered = False
        self.settled = threading.Event()


class _Live:
    """An order that this actor has, from its arrival to its end."""

    __slots__ = ("attempt", "box", "interrupt_at", "is_parked", "order", "progress", "stop_cause", "told", "told_at",
                 "waits_for", "waits_since")  # fmt: skip

    def __init__(self, order: Order, box: _Box) -> None:
        self.order, self.box = order, box
        self.attempt: Attempt | None = None  # None: not begun
        self.is_parked = False
        self.interrupt_at: float | None = None  # a body that looks at its token is interrupted only then
        self.stop_cause: str | None = None
        self.progress: Progress | None = None
        self.told: Progress | None = None  # what the coordinator knows of it, and since when
        self.told_at = float("-inf")
        self.waits_for: Callable[[], None] | None = None  # called when it gets its place back
        self.waits_since: float | None = None  # of a chunk that was not begun when its batch was answered

    def as_running(self) -> Running:
        age_s = self.attempt.age_s if self.attempt is not None else 0.0
        source = self.order.particulars.residence.source
        return Running(self.order.execution_id, self.order.job_id, age_s, self.is_away, source)

    @property
    def is_away(self) -> bool:
        """It uses no place: it waits for other jobs, or has not begun."""
        return self.is_parked or self.waits_since is not None


class _UserLoop:
    """An event loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def stop(self) -> None:
        """Cancel what runs on the loop and end its thread."""
        self.loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.call_soon(self.loop.call_soon, self.loop.stop)  # after the cancelled tasks had their turn


class Agent:
    """Runs what a coordinator orders, in this process.

    Args:
        name: Of the job actor.
        concurrency: How many bodies may be active at a time.
        settings: Limits and intervals.
        clock: Time; its timers are not used.
        uplink: To coordinator and broker.
        load: Turns a shipped class into the class; may import user code, may raise anything.
        children: For ``Isolation.PROCESS``.
        span: Opens a span around a body, if tracing is on.
        on_orphaned: Called when no coordinator wants this actor any more.
        watch_process: Look for what bodies leave behind in the process: cwd, environment, threads, memory.
    """

    def __init__(
        self,
        name: str,
        concurrency: int,
        settings: EngineSettings,
        *,
        clock: Clock,
        uplink: Uplink,
        load: Callable[[str, bytes], type[Job[Any, Any]]],
        children: ChildRunner | None = None,
        span: Callable[[Order, str], AbstractContextManager[Any]] | None = None,
        on_orphaned: Callable[[str], None] = lambda _why: None,
        watch_process: bool = True,
    ) -> None:
        self.name, self.clock, self.inline_limit, self.span = name, clock, settings.inline_limit, span
        self._concurrency, self._settings, self._uplink = concurrency, settings, uplink
        self._load, self._children, self._on_orphaned = load, children, on_orphaned
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._terms: dict[str, Terms] = {}
        self._code: dict[str, bytes] = {}
        self._types: dict[str, type[Job[Any, Any]]] = {}
        self._todo: deque[_Live] = deque()
        self._live: dict[str, _Live] = {}
        self._resuming: deque[_Live] = deque()
        self._early = Early(settings.stuck_after_s)  # a batch that is longer on its way has its actor killed
        self._boxes: dict[int, _Box] = {}  # batches whose answer is not on its way
        self._held: dict[int, list[Report]] = {}  # ends told in answers, by batch, that are not known to be stored
        self._n_active = 0
        self._n_parked = 0
        self._lends_thread = False  # a caller of `run_batch` runs bodies; one at a time, so that batches are always taken
        self._idle_threads: list[SimpleQueue[_Live | None]] = []
        self._n_threads = 0
        self._user_loop: _UserLoop | None = None
        self._idle_loops: list[_UserLoop] = []
        self._stuck_loops: dict[asyncio.AbstractEventLoop, _UserLoop] = {}
        self._stopped = False
        self._leftovers = _Leftovers(settings) if watch_process else None
        self._recycle: str | None = None
        # the ticker's
        self._bell = threading.Event()
        self._ticker: threading.Thread | None = None
        self._news: deque[Attempt] = deque()
        self._outbox: list[Report] = []
        self._turned: dict[str, None] = {}  # executions that have parked or resumed since the coordinator was told
        self._in_flight = False
        self._shipped_at = 0.0
        self._reshipped_at = 0.0
        self._heard_at = clock.monotonic()
        # The coordinator must hear of us before it takes us for stuck, and we of it before we take it for gone.
        self._quiet_s = min(settings.orphan_timeout_s, settings.stuck_after_s) / 4
        self._attending: dict[str, list[threading.Event]] = {}

    # --- what the coordinator asks ---------------------------------------------------------------------------------

    def run_batch(self, number: int, batch: OrderBatch) -> BatchReply | None:
        """Begin these orders, and say how they stand when all have ended or `overrun_s` has passed.

        None when `answer_now` has said it meanwhile; that answer is the one that counts, whichever arrives first.
        """
        box = _Box(len(batch.orders), is_held=any(o.particulars.residence.source is not None for o in batch.orders))
        mine: _Live | None = None
        self._heard_at = self.clock.monotonic()
        with self._lock:
            self._keep_in_touch()
            for terms in batch.terms:
                self._terms[terms.id] = terms
            for code_id, blob in batch.code:
                self._code[code_id] = blob
            self._boxes[number] = box
            for settled in batch.settled:
                self._held.pop(settled, None)
            for order in batch.orders:
                self._take_in(order, box)
            is_hurried = self._early.take(number) is not None
            if batch.is_brief and not is_hurried and self._may_lend_thread():
                mine = self._todo.popleft()
                self._n_active += 1
                self._lends_thread = True
            self._fill_places()
        if mine is not None:
            self._run_plain_bodies(mine, only=box)
            self._lends_thread = False
        box.settled.wait(self._settings.overrun_s)
        return self._answer(number)

    def _take_in(self, order: Order, box: _Box) -> None:
        """Put an order behind the others; one that was cancelled before it came has ended. Needs the lock."""
        live = self._live[order.execution_id] = _Live(order, box)
        if self._early.take(order.execution_id) is None:
            self._todo.append(live)
        else:
            self._file(live, self._never_begun(order))

    def keep_in_touch(self) -> None:
        """Look after the coordinator from now on, not only from the first batch on: none may ever come."""
        with self._lock:
            self._keep_in_touch()

    def _keep_in_touch(self) -> None:
        if self._ticker is None:
            self._ticker = threading.Thread(target=self._tick_forever, name="koan-ticker", daemon=True)
            self._ticker.start()

    def answer_now(self, number: int) -> BatchReply | None:
        """Say how a batch stands; None if that was said, or is being said, already.

        None, too, when the batch has yet to come: then no caller of `run_batch` is lent to it, and it is answered in time.
        """
        with self._lock:
            if number not in self._boxes:
                self._early.keep(number, "hurry", now=self.clock.monotonic())
                return None
        return self._answer(number)

    def settled(self, numbers: Sequence[int]) -> None:
        """The ends told in the answers to these batches are stored: let go of them."""
        with self._lock:
            for number in numbers:
                self._held.pop(number, None)

    def survey(self) -> tuple[list[Running], list[Report], list[tuple[str, str]]]:
        """Say what runs here, what ends are held, and what was not begun, to a coordinator that did not send any of it.

        What was not begun is dropped: that coordinator sends it anew.
        """
        unbegun = []
        with self._lock:
            while self._todo:
                live = self._todo.popleft()
                unbegun.append((live.order.execution_id, live.order.job_id))
                del self._live[live.order.execution_id]
                live.box.n_left -= 1
            held = [report for reports in self._held.values() for report in reports]
            self._held.clear()
            self._outbox += held  # pushed again until the coordinator has stored them
            for number, box in list(self._boxes.items()):
                box.is_answered = True  # its answer would go to a coordinator that is dead
                self._outbox += box.ended
                del self._boxes[number]
                box.settled.set()
            self._heard_at = self.clock.monotonic()
            return [live.as_running() for live in self._live.values()], list(self._outbox), unbegun

    def _may_lend_thread(self) -> bool:
        """Tell whether the caller of `run_batch` may run what is first in the queue. Needs the lock."""
        return not (
            self._lends_thread or self._resuming or self._recycle or not self._todo or self._n_active >= self._concurrency
        ) and self._is_loaded_plain(self._todo[0])

    def _is_loaded_plain(self, live: _Live) -> bool:
        terms = self._terms[live.order.terms_id]
        job_type = self._types.get(terms.code_id)
        is_plain = job_type is not None and not job_type.definition.runs_on_loop(terms)
        return is_plain and terms.isolation is not Isolation.PROCESS

    def _answer(self, number: int) -> BatchReply | None:
        with self._lock:
            box = self._boxes.pop(number, None)
            if box is None:
                return None
            box.is_answered = True
            if box.is_held and box.ended:
                self._held[number] = list(box.ended)
            unbegun = [live for live in self._todo if live.box is box]
            returned = [live for live in unbegun if not self._may_wait(live)]
            if returned:
                self._todo = deque(live for live in self._todo if live not in returned)
                for live in returned:
                    del self._live[live.order.execution_id]
            for live in unbegun:
                live.waits_since = self.clock.monotonic()
            left = self._live.values() if box.n_left > len(returned) else ()
            running = [live.as_running() for live in left if live.box is box]
        if running:
            self._bell.set()  # their timeouts are the ticker's now
        return BatchReply(box.ended, running, [live.order.execution_id for live in returned], self._recycle)

    def _may_wait(self, live: _Live) -> bool:
        """Tell whether an order that was not begun stays: a chunk, as the only one, for as long as `_NEXT_WAITS_S`."""
        return self._terms[live.order.terms_id].part and len(self._todo) == 1 and self._recycle is None

    def cancel(self, execution_id: str, cause: str) -> None:
        """Ask a body to stop; one that has not begun never begins, and neither does one whose order has yet to come."""
        with self._lock:
            live = self._live.get(execution_id)
            if live is None:
                self._early.keep(execution_id, cause, now=self.clock.monotonic())
                return
            live.stop_cause = cause  # before the look at `attempt`: whoever begins it looks the other way round
            if live.attempt is None and live in self._todo:
                self._todo.remove(live)
                self._file(live, self._never_begun(live.order))
                return
        self._stop(live, cause)

    def attend(self, execution_id: str) -> None:
        """Return when the execution has ended; for dashboards that show calls in progress."""
        gone = threading.Event()
        with self._lock:
            if execution_id not in self._live:
                return
            self._attending.setdefault(execution_id, []).append(gone)
        gone.wait()

    def stop(self) -> None:
        """Take nothing more, cancel async bodies, and let go of the threads that have nothing to do.

        Plain bodies cannot be stopped from here.
        """
        with self._lock:
            self._stopped = True
            idle, self._idle_threads = self._idle_threads, []
            loops = [*self._idle_loops, *self._stuck_loops.values(), *([self._user_loop] if self._user_loop else [])]
        for inbox in idle:
            inbox.put(None)
        for loop in loops:
            loop.stop()
        self._bell.set()

    # --- places ----------------------------------------------------------------------------------------------------

    def _fill_places(self) -> None:
        """Give free places away: first to bodies that go on, then to new orders. Needs the lock."""
        while self._n_active < self._concurrency:
            if self._resuming:
                self._n_active += 1
                self._let_go_on(self._resuming.popleft())
            elif self._todo and not self._recycle:
                self._n_active += 1
                self._begin(self._take_next())
            else:
                return

    def _take_next(self) -> _Live:
        """Take the next order; one that has waited is told to have begun. Needs the lock."""
        live = self._todo.popleft()
        if live.waits_since is not None:
            live.waits_since = None
            self._turned[live.order.execution_id] = None
            self._bell.set()
        return live

    def _let_go_on(self, live: _Live) -> None:
        granted, live.waits_for = live.waits_for, None
        if granted is not None:
            granted()

    def _begin(self, live: _Live) -> None:
        if self._runs_on_loop(live):
            if self._user_loop is None:
                self._user_loop = self._idle_loops.pop() if self._idle_loops else _UserLoop("koan-bodies")
            loop = self._user_loop.loop
            loop.call_soon_threadsafe(self._start_runner, loop, live, context=contextvars.Context())
        elif self._idle_threads:
            self._idle_threads.pop().put(live)
        else:
            self._n_threads += 1
            threading.Thread(target=self._body_thread, args=(live,), name="koan-body", daemon=True).start()

    def _runs_on_loop(self, live: _Live) -> bool:
        terms = self._terms[live.order.terms_id]
        job_type = self._types.get(terms.code_id)
        # One that is not loaded yet is loaded on a body thread: an import may take seconds.
        return job_type is not None and job_type.definition.runs_on_loop(terms) and terms.isolation is not Isolation.PROCESS

    def _next(self, live: _Live, report: Report, *, on_loop: bool, only: _Box | None = None) -> _Live | None:
        """File a report and return the next order for the same runner, which keeps its place; None: the place is free.

        ``only``: the runner takes orders of this batch, as long as it has not been answered.
        """
        if os.getpid() != self._pid:  # a copy of the process, which the body has made, must not go on as if it were us
            os._exit(0)
        with self._lock:
            self._file(live, report)
            if not self._resuming and self._todo and not self._recycle:
                nxt = self._todo[0]
                fits = only is None or (nxt.box is only and not only.is_answered)
                if fits and self._n_active <= self._concurrency and self._runs_on_loop(nxt) == on_loop:
                    return self._take_next()
            self._n_active -= 1
            self._fill_places()
            return None

    def _file(self, live: _Live, report: Report) -> None:
        """Put a report where it is asked for: into its batch's answer, or into the outbox. Needs the lock."""
        execution_id = live.order.execution_id
        del self._live[execution_id]
        box = live.box
        box.n_left -= 1
        if box.is_answered:
            self._outbox.append(report)
            self._bell.set()
        else:
            box.ended.append(report)
            if box.n_left == 0:
                box.settled.set()
        if self._attending and (events := self._attending.pop(execution_id, None)):
            for event in events:
                event.set()
        if self._leftovers is not None and self._recycle is None and (why := self._leftovers.found()):
            self._recycle = why
            box.settled.set()

    # --- bodies ----------------------------------------------------------------------------------------------------

    def _body_thread(self, first: _Live) -> None:
        inbox: SimpleQueue[_Live | None] = SimpleQueue()
        live: _Live | None = first
        while live is not None:
            self._run_plain_bodies(live)
            with self._lock:
                if self._stopped or len(self._idle_threads) >= _MAX_IDLE_THREADS:
                    self._n_threads -= 1
                    return
                self._idle_threads.append(inbox)
            live = inbox.get()

    def _run_plain_bodies(self, first: _Live, only: _Box | None = None) -> None:
        live: _Live | None = first
        while live is not None:
            terms = self._terms[live.order.terms_id]
            job_type = self._types.get(terms.code_id)
            if job_type is None:
                try:
                    job_type = self._types[terms.code_id] = self._load(terms.code_id, self._code[terms.code_id])
                except BaseException as error:  # noqa: BLE001 - importing user code may raise anything
                    live = self._next(live, self._unloadable(live.order, error), on_loop=False, only=only)
                    continue
                if self._runs_on_loop(live):
                    with self._lock:
                        self._begin(live)  # with the place that this thread had
                    return
            attempt = live.attempt = Attempt(live.order, terms, job_type, self)
            if live.stop_cause:
                report = self._never_begun(live.order)
            elif terms.isolation is Isolation.PROCESS and self._children is not None:
                report = self._children.run(live.order, terms, self._code[terms.code_id], attempt)
            else:
                report = attempt.perform_blocking()
            live = self._next(live, report, on_loop=False, only=only)

    def _start_runner(self, loop: asyncio.AbstractEventLoop, live: _Live) -> None:
        task = loop.create_task(self._run_async_bodies(live), context=contextvars.Context())
        _keep(task)

    async def _run_async_bodies(self, first: _Live) -> None:
        clean = contextvars.copy_context()
        yielded_at = self.clock.monotonic()
        live: _Live | None = first
        while live is not None:
            terms = self._terms[live.order.terms_id]
            attempt = live.attempt = Attempt(live.order, terms, self._types[terms.code_id], self)
            report = self._never_begun(live.order) if live.stop_cause else await attempt.perform()
            live = self._next(live, report, on_loop=True)
            if live is None:
                self._sweep_tasks()
                return
            if not _same_context(clean):
                self._start_runner(asyncio.get_running_loop(), live)
                return
            if (now := self.clock.monotonic()) - yielded_at > _YIELD_EVERY_S:
                await asyncio.sleep(0)
                yielded_at = now

    def _sweep_tasks(self) -> None:
        """Cancel what bodies left running on this loop, once no body is there that could want it."""
        with self._lock:
            if self._live:
                return
        for task in asyncio.all_tasks():
            if task not in _kept:
                task.cancel()

    def _never_begun(self, order: Order) -> Report:
        return Report(order.execution_id, order.job_id, "cancelled", self.clock.now(), 0.0)

    def _unloadable(self, order: Order, error: BaseException) -> Report:
        info = describe(error)
        text = f"the job class could not be loaded where the job was to run: {info.type}: {info.message}"
        problem = ErrorInfo("UnknownKindError", text[:2000], info.stack_trace)
        return Report(order.execution_id, order.job_id, "unknown_kind", self.clock.now(), 0.0, error=problem)

    # --- Host: what attempts ask -----------------------------------------------------------------------------------

    def announce(self, attempt: Attempt) -> None:
        """A body has reported something new."""
        self._news.append(attempt)
        # Soon after a shipment the ticker looks again by itself. Not to wake it spares a busy body half of the switches.
        if self.clock.monotonic() - self._shipped_at >= _SHIP_EVERY_S and not self._bell.is_set():
            self._bell.set()

    def release(self, attempt: Attempt, *, blocking: bool) -> None:
        """A body waits for other jobs: give its place to them."""
        with self._lock:
            if self._n_parked >= self._settings.max_parked:
                raise LimitExceededError(
                    "jobs of one actor that wait for other jobs", self._n_parked + 1, self._settings.max_parked,
                    "engine.max_parked",
                )  # fmt: skip
            live = self._live.get(attempt.order.execution_id)
            if live is None:  # left over from a body that has ended
                return
            if blocking:
                self._step_aside_if_blocked(attempt)
            live.is_parked = True
            self._n_parked += 1
            self._n_active -= 1
            self._turned[attempt.order.execution_id] = None
            self._fill_places()
            if self._n_active == 0:
                live.box.settled.set()  # the coordinator may send the jobs that this one waits for
        self._bell.set()

    def acquire(self, attempt: Attempt, granted: Callable[[], None]) -> bool:
        """Give a place to a body that goes on, now or when there is one."""
        with self._lock:
            live = self._live.get(attempt.order.execution_id)
            if live is None or not live.is_parked:
                return True
            live.is_parked = False
            self._n_parked -= 1
            self._turned[attempt.order.execution_id] = None
            self._bell.set()
            self._take_back_loop(attempt)
            if self._n_active < self._concurrency:
                self._n_active += 1
                return True
            live.waits_for = granted
            self._resuming.append(live)
            return False

    def _step_aside_if_blocked(self, attempt: Attempt) -> None:
        """An async body that blocks its loop with ``.get()``: other async bodies get another loop meanwhile."""
        loop = attempt.runs_on
        if loop is not None and self._user_loop is not None and loop is self._user_loop.loop and _turns(loop):
            self._stuck_loops[loop] = self._user_loop
            self._user_loop = None

    def _take_back_loop(self, attempt: Attempt) -> None:
        loop = attempt.runs_on
        if loop is not None and (stuck := self._stuck_loops.pop(loop, None)) is not None:
            self._idle_loops.append(stuck)

    # --- stop ------------------------------------------------------------------------------------------------------

    def _stop(self, live: _Live, cause: str) -> None:
        attempt = live.attempt
        if attempt is None:
            return
        if self._children is not None and attempt.terms.isolation is Isolation.PROCESS:
            attempt.token._set(cause)  # noqa: SLF001 - set by the engine only
            self._children.stop(live.order.execution_id, cause)
        elif attempt.stop(cause):
            attempt.interrupt()
        else:
            live.interrupt_at = self.clock.monotonic() + self._settings.cancel_grace_s / 2
            self._bell.set()

    # --- the ticker ------------------------------------------------------------------------------------------------

    def _tick_forever(self) -> None:
        while not self._stopped:
            wait_s = self.tick()
            self._bell.wait(wait_s)

    def tick(self) -> float:
        """Do what is due and return how long nothing will be, in seconds; also called when something has happened."""
        self._bell.clear()
        now = self.clock.monotonic()
        next_at = min(now + min(_IDLE_TICK_S, self._quiet_s), self._watch_bodies(now))
        if self._news and now - self._shipped_at < _SHIP_EVERY_S:
            next_at = min(next_at, self._shipped_at + _SHIP_EVERY_S)
        elif self._news or now - self._reshipped_at >= _RESHIP_EVERY_S:
            self._ship_progress(now)
            next_at = min(next_at, now + _SHIP_EVERY_S)
        self._push_news(now)
        return max(0.0, next_at - now)

    def _watch_bodies(self, now: float) -> float:
        """Enforce timeouts; return when the next one is due."""
        with self._lock:
            next_at = self._give_up_waiting(now)
            going = [live for live in self._live.values() if live.attempt is not None]
        for live in going:
            attempt = live.attempt
            if attempt is None:
                continue
            if live.interrupt_at is not None:
                if now >= live.interrupt_at:
                    live.interrupt_at = None
                    attempt.interrupt()
                else:
                    next_at = min(next_at, live.interrupt_at)
            if attempt.terms.timeout_s is not None and attempt.token.cause is None:
                left = attempt.terms.timeout_s - attempt.age_s
                if left <= 0:
                    self._stop(live, "timeout")
                else:
                    next_at = min(next_at, now + left)
        if self._leftovers is not None and self._recycle is None:
            self._recycle = self._leftovers.grown(now)
        return next_at

    def _give_up_waiting(self, now: float) -> float:
        """Give back a chunk whose turn has not come in time; return when that is. Needs the lock."""
        for live in list(self._todo):
            if live.waits_since is None:
                continue
            if now < live.waits_since + _NEXT_WAITS_S:
                return live.waits_since + _NEXT_WAITS_S
            self._todo.remove(live)
            order = live.order
            self._file(live, Report(order.execution_id, order.job_id, "returned", self.clock.now(), 0.0))
        return float("inf")

    def _ship_progress(self, now: float) -> None:
        reship = now - self._reshipped_at >= _RESHIP_EVERY_S
        states: dict[str, Progress] = {}
        for _ in range(len(self._news)):
            attempt = self._news.popleft()
            if (progress := attempt.take_progress()) is not None:
                states[attempt.order.job_id] = progress
                if (live := self._live.get(attempt.order.execution_id)) is not None:
                    live.progress = progress
        if reship:
            self._reshipped_at = now
            with self._lock:
                for live in self._live.values():
                    if live.progress is not None:
                        states.setdefault(live.order.job_id, live.progress)
        self._shipped_at = now
        if states:
            self._uplink.progress(list(states.items()))

    def _push_news(self, now: float) -> None:
        """Tell the coordinator what happened outside of batches; one call at a time, the next takes what has gathered."""
        if self._in_flight:
            return
        with self._lock:
            progress = []
            for live in self._live.values():
                if live.progress is not live.told and now - live.told_at >= _TELL_COORDINATOR_EVERY_S:
                    live.told, live.told_at = live.progress, now
                    if live.progress is not None:
                        progress.append((live.order.execution_id, live.progress))
            news = bool(self._outbox or self._turned or progress or self._recycle)
            if not news and now - self._heard_at < self._quiet_s:
                return
            # As they are now: one that has resumed and parked again since the last news is parked.
            turned = [self._live[execution_id] for execution_id in self._turned if execution_id in self._live]
            parked = [live.order.execution_id for live in turned if live.is_away]
            resumed = [live.order.execution_id for live in turned if not live.is_away]
            push = Push(self.name, self._outbox[:500], parked, resumed, progress, self._recycle)
            self._turned = {}
            self._in_flight = True
        self._uplink.push(push, lambda known: self._pushed(push, known))

    def _pushed(self, push: Push, known: bool | None) -> None:  # noqa: FBT001 - the callback of `Uplink.push`
        now = self.clock.monotonic()
        with self._lock:
            self._in_flight = False
            if known is None:  # told again at the next tick, not at once: there may be nobody for a while
                self._turned.update(dict.fromkeys([*push.parked, *push.resumed]))
                for execution_id, _ in push.progress:
                    if (live := self._live.get(execution_id)) is not None:
                        live.told, live.told_at = None, float("-inf")
            else:
                self._heard_at = now
                del self._outbox[: len(push.ended)]
        if known is False:
            self._on_orphaned("the coordinator does not know this actor")
        elif known is None and now - self._heard_at > self._settings.orphan_timeout_s:
            self._on_orphaned(f"no coordinator for {now - self._heard_at:.0f} s")
        elif known and (self._outbox or self._turned):
            self._bell.set()


class _Leftovers:
    """What bodies have left behind in the process that the next one should not find."""

    def __init__(self, settings: EngineSettings) -> None:
        self._max_rss = settings.recycle_rss
        self._cwd = os.getcwd()  # noqa: PTH109 - compared as text after every body
        self._environment = dict(os.environ._data)  # type: ignore[attr-defined]  # noqa: SLF001 - bytes: compared in C
        self._n_threads = _foreign_threads()
        self._looked_at = 0.0

    def found(self) -> str | None:
        """Return why the process is not as it was, if so. Cheap: asked after every body."""
        if os.environ._data != self._environment:  # type: ignore[attr-defined]  # noqa: SLF001 - see above
            return "a job changed the environment"
        try:
            if os.getcwd() != self._cwd:  # noqa: PTH109 - as above
                return "a job changed the working directory"
        except OSError:
            return "a job removed the working directory"
        return None

    def grown(self, now: float) -> str | None:
        """Return why the process has grown too much, if so. Looks once a second."""
        if now - self._looked_at < 1.0:
            return None
        self._looked_at = now
        leaked = _foreign_threads() - self._n_threads
        if leaked >= _MAX_LEAKED_THREADS:
            return f"jobs left {leaked} threads behind"
        rss = _rss()
        return f"its memory has grown to {rss >> 20} MiB" if rss > self._max_rss else None


def _foreign_threads() -> int:
    return sum(not thread.name.startswith(("koan-", "asyncio_", "Dummy-")) for thread in threading.enumerate())


def _rss() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - once a second
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: not watched
        return 0


def _same_context(clean: contextvars.Context) -> bool:
    try:
        return contextvars.copy_context() == clean
    except Exception:  # noqa: BLE001 - a value's __eq__ is user code
        return False


def _turns(loop: asyncio.AbstractEventLoop) -> bool:
    """Tell whether this thread is the one that turns ``loop``: then whoever blocks here blocks it."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


_kept: set[asyncio.Task[Any]] = set()


def _keep(task: asyncio.Task[Any]) -> None:
    _kept.add(task)
    task.add_done_callback(_kept.discard)
