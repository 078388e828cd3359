"""The inside of a job actor: takes batches, runs bodies, reports ends and progress.

Plain Python with threads; `koan_ray.runtime` puts it into a Ray actor or into this process. Threads:

* the caller of `run_batch`: waits until the batch has ended, at most `overrun_s`, then says how it stands. Plain bodies
  that are known to be brief it calls itself, which spares two thread switches; when one turns out to be long after all,
  the coordinator asks with `answer_now`;
* user loops: async bodies run there, one after the other in a *runner* task, so that a batch of short ones needs neither
  a task nor a thread switch for each;
* body threads: plain bodies, likewise;
* the ticker: ships progress and news, watches soft timeouts, notices that there is no coordinator any more.

*Users' doing.* Bodies may raise anything anywhere, break the loop and the interpreter around them, and leave threads. None
of our threads ends of it: the ticker goes on with its next section, a loop is turned again, a thread takes its next body;
and one that did end is replaced by whoever comes next (`_keep_in_touch`). Each of these is logged. Whatever happens to a
body, its order is filed once and its place is given back, which `_Live` keeps account of.

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
import contextlib
import contextvars
import os
import sys
import threading
from collections import Counter, deque
from queue import SimpleQueue
from types import coroutine
from typing import TYPE_CHECKING, Any, Protocol

from koan_ray.domain.records import ErrorInfo
from koan_ray.domain.status import Isolation
from koan_ray.domain.texts import said
from koan_ray.engine.attempt import Attempt, describe
from koan_ray.engine.bodyloop import BodyLoop
from koan_ray.engine.early import Early
from koan_ray.engine.raised import name_of
from koan_ray.errors import LimitExceededError
from koan_ray.ports import BatchReply, OrderBatch, Push, Report, Running, Silence

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from contextlib import AbstractContextManager

    from koan_ray.domain.records import Progress, Terms
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.jobs import Job
    from koan_ray.ports import Clock, Log, Order

_SHIP_EVERY_S = 0.05  # of the progress of all bodies together
_RESHIP_EVERY_S = 2.0  # of the latest progress of running bodies, for a broker that has restarted
_TELL_COORDINATOR_EVERY_S = 1.0  # of a body's progress
_IDLE_TICK_S = 1.0
_YIELD_EVERY_S = 0.005  # a runner lets its loop do other things
_NEXT_WAITS_S = 0.5  # a chunk of items waits for its turn; another actor may have nothing to do
_MAX_IDLE_THREADS = 4
_MAX_LEAKED_THREADS = 16
_MOST_NOTES = 100
_CLEAN = contextvars.Context()  # as a runner's is when no body has left anything in it


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


class _Inbox:
    """Where a body thread that has nothing to do gets its next order."""

    __slots__ = ("bell", "live")

    def __init__(self) -> None:
        self.bell: SimpleQueue[None] = SimpleQueue()
        self.live: _Live | None = None  # beside the queue, so that it is not lost with a thread that is hit in `get`


class _Live:
    """An order that this actor has, from its arrival to its end."""

    __slots__ = ("attempt", "box", "has_place", "interrupt_at", "is_parked", "order", "progress", "starts_on", "stop_cause",
                 "told", "told_at", "waits_for", "waits_since", "was_seen")  # fmt: skip

    def __init__(self, order: Order, box: _Box) -> None:
        self.order, self.box = order, box
        self.attempt: Attempt | None = None  # None: not begun
        self.has_place = False  # it is one of the `_n_active`
        self.is_parked = False  # it is one of the `_n_parked`
        self.starts_on: BodyLoop | None = None  # the loop that has yet to begin it
        self.was_seen = False  # waiting for that, at the last tick
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
        log: Where what bodies do to our threads is written.
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
        log: Log | None = None,
    ) -> None:
        self.name, self.clock, self.inline_limit, self.span = name, clock, settings.inline_limit, span
        self._concurrency, self._settings, self._uplink = concurrency, settings, uplink
        self._load, self._children, self._on_orphaned = load, children, on_orphaned
        self._log = (log or Silence()).bind(actor=name)
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
        self._idle_threads: list[_Inbox] = []
        self._n_threads = 0
        self._user_loop: BodyLoop | None = None
        self._idle_loops: list[BodyLoop] = []
        self._stuck_loops: dict[asyncio.AbstractEventLoop, BodyLoop] = {}
        self._loading: dict[str, threading.Lock] = {}  # by code: what imports a class, so that all have the same one
        self.troubles: Counter[str] = Counter()  # what bodies did to our threads and loops, by event
        self._notes: deque[tuple[str, dict[str, Any]]] = deque(maxlen=_MOST_NOTES)  # that are not logged yet
        self._stopped = False
        self._leftovers = _Leftovers(settings) if watch_process else None
        self._recycle: str | None = None
        # the ticker's
        self._bell = threading.Event()
        self._ticker: threading.Thread | None = None
        self._news: deque[Attempt] = deque()
        self._outbox: list[Report] = []
        self._turned: dict[str, None] = {}  # executions that have parked or resumed since the coordinator was told
        self._in_flight: Push | None = None
        self._pushed_at = 0.0
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
                self._give_place(mine)
                self._lends_thread = True
            self._fill_places()
        if mine is not None:
            try:
                self._run_plain_bodies(mine, only=box)
            finally:
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
        if self._ticker is None or not self._ticker.is_alive():
            if self._ticker is not None and not self._stopped:
                self._note("ticker_replaced")
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
            self._keep_in_touch()
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
            for live in list(self._resuming):  # nobody hands out places any more
                self._take_place(live)
            idle, self._idle_threads = self._idle_threads, []
            loops = [*self._idle_loops, *self._stuck_loops.values(), *([self._user_loop] if self._user_loop else [])]
        for inbox in idle:
            inbox.bell.put(None)
        for loop in loops:
            loop.stop()
        self._bell.set()

    def stand_in(self) -> Attempt | None:
        """Return a body that has a place: the one that began first. For threads that wait and cannot say for which body."""
        with self._lock:
            having = (live.attempt for live in self._live.values() if live.has_place)
            return next((attempt for attempt in having if attempt is not None), None)

    def _note(self, event: str, **fields: Any) -> None:
        """Count that a body did something to a thread or loop of ours; the ticker logs it later, without the lock.

        It is not woken for it: what it notes itself, again and again, would keep it awake.
        """
        self.troubles[event] += 1
        self._notes.append((event, fields))

    def _log_notes(self) -> None:
        while self._notes:
            event, fields = self._notes.popleft()
            self._log.warning(event, **fields)

    # --- places ----------------------------------------------------------------------------------------------------

    def _give_place(self, live: _Live) -> None:
        """Count a body among the active ones. Needs the lock."""
        live.has_place = True
        self._n_active += 1

    def _take_place(self, live: _Live) -> None:
        """Take from a body what it holds: its place, or its standing among those that wait for others. Needs the lock."""
        if live.has_place:
            live.has_place = False
            self._n_active -= 1
        if live.is_parked:
            live.is_parked = False
            self._n_parked -= 1
        if live.waits_for is not None:  # a thread of it may stand in line: it goes on, also where the body has ended
            self._resuming.remove(live)
            self._let_go_on(live)

    def _fill_places(self) -> None:
        """Give free places away: first to bodies that go on, then to new orders. Needs the lock."""
        while self._n_active < self._concurrency:
            if self._resuming:
                live = self._resuming.popleft()
                self._give_place(live)
                self._let_go_on(live)
            elif self._todo and not self._recycle:
                live = self._take_next()
                self._give_place(live)
                self._begin(live)
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
            self._grant(live, granted)

    def _grant(self, live: _Live, granted: Callable[[], None]) -> None:
        try:
            granted()
        except RuntimeError:  # it waited on a loop of its own that is closed: nobody goes on there
            self._note("waiter_gone", execution_id=live.order.execution_id)

    def _begin(self, live: _Live) -> None:
        """Have a body that has a place begin on a loop or in a thread. Needs the lock."""
        try:
            if self._runs_on_loop(live):
                self._begin_on_loop(live)
            elif self._idle_threads:
                inbox = self._idle_threads.pop()
                inbox.live = live
                inbox.bell.put(None)
            else:
                threading.Thread(target=self._body_thread, args=(live,), name="koan-body", daemon=True).start()
                self._n_threads += 1
        except Exception as error:  # noqa: BLE001 - no thread or file is left: bodies have taken them all
            self._note("body_not_begun", problem=said(error, 500))
            self._recycle = self._recycle or f"it cannot begin bodies any more: {said(error, 500)}"
            self._take_place(live)
            self._file(live, self._returned(live.order))  # to be begun by another actor

    def _begin_on_loop(self, live: _Live, context: contextvars.Context | None = None) -> None:
        if self._user_loop is None or self._user_loop.is_lost:
            self._user_loop = self._idle_loops.pop() if self._idle_loops else self._new_loop()
        loop = self._user_loop
        live.starts_on, live.was_seen = loop, False
        loop.loop.call_soon_threadsafe(self._start_runner, loop, live, context, context=contextvars.Context())

    def _move(self, live: _Live) -> None:
        """Begin on another loop a body that its own will not begin. Needs the lock."""
        attempt = live.attempt
        try:
            self._begin_on_loop(live, attempt.context if attempt is not None else None)
        except Exception as error:  # noqa: BLE001 - as in `_begin`
            self._note("body_not_begun", problem=said(error, 500))
            self._take_place(live)
            self._file(live, attempt.unreportable(error) if attempt is not None else self._returned(live.order))

    def _new_loop(self) -> BodyLoop:
        def trouble(why: str) -> None:
            self._note("body_loop_interrupted", reason=why)

        return BodyLoop("koan-bodies", on_trouble=trouble, on_lost=self._lose_loop)

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
            if live.has_place and not self._resuming and self._todo and not self._recycle:
                nxt = self._todo[0]
                fits = only is None or (nxt.box is only and not only.is_answered)
                if fits and self._n_active <= self._concurrency and self._runs_on_loop(nxt) == on_loop:
                    live.has_place, nxt.has_place = False, True
                    return self._take_next()
            self._take_place(live)
            self._fill_places()
            return None

    def _give_up(self, live: _Live, problem: BaseException) -> None:
        """End a body whose runner was hit by something that is not the body's: file what is known, free its place."""
        self._note("runner_failed", execution_id=live.order.execution_id, problem=said(problem, 500))
        order = live.order
        if live.attempt is not None:
            report = live.attempt.unreportable(problem)
        else:
            info = describe(problem)
            report = Report(order.execution_id, order.job_id, "failed", self.clock.now(), 0.0, error=info)
        with self._lock:
            self._take_place(live)
            self._file(live, report)
            self._fill_places()

    def _file(self, live: _Live, report: Report) -> None:
        """Put a report where it is asked for: into its batch's answer, or into the outbox; once. Needs the lock."""
        execution_id = live.order.execution_id
        if self._live.get(execution_id) is not live:  # it was given up, and ends after all
            return
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
        inbox = _Inbox()
        live: _Live | None = first
        while True:
            if live is not None:
                self._run_plain_bodies(live)
                with self._lock:
                    if self._stopped or len(self._idle_threads) >= _MAX_IDLE_THREADS:
                        self._n_threads -= 1
                        return
                    self._idle_threads.append(inbox)
            try:
                inbox.bell.get()
            except BaseException as problem:  # noqa: BLE001 - raised into this thread from another, for a body that has ended
                self._note("body_thread_hit", problem=name_of(problem))
            with self._lock:
                live, inbox.live = inbox.live, None
                if live is None and self._stopped:
                    self._n_threads -= 1
                    return

    def _run_plain_bodies(self, first: _Live, only: _Box | None = None) -> None:
        live: _Live | None = first
        while live is not None:
            try:
                report = self._run_plain_body(live)
                if report is None:
                    return  # it goes on on a loop, with the place that this thread had
                ended, live = live, None
                live = self._next(ended, report, on_loop=False, only=only)
            except BaseException as problem:  # noqa: BLE001 - no user's code is called here; it may still raise into our threads
                self._give_up(live or ended, problem)
                return

    def _run_plain_body(self, live: _Live) -> Report | None:
        """Run a body in this thread; None when it has to go on on a loop, which it then does."""
        terms = self._terms[live.order.terms_id]
        job_type = self._types.get(terms.code_id)
        if job_type is None:
            try:
                job_type = self._loaded(terms.code_id)
            except BaseException as error:  # noqa: BLE001 - importing user code may raise anything
                return self._unloadable(live.order, error)
            if self._runs_on_loop(live):
                with self._lock:
                    self._begin(live)
                return None
        attempt = live.attempt = Attempt(live.order, terms, job_type, self)
        if live.stop_cause:
            return self._never_begun(live.order)
        if terms.isolation is Isolation.PROCESS and self._children is not None:
            return self._children.run(live.order, terms, self._code[terms.code_id], attempt)
        report = attempt.perform_blocking()
        if report is None:  # nobody had to know that it is async: another thread may have loaded its class a moment ago
            with self._lock:
                self._begin_on_loop(live, attempt.context)
        return report

    def _loaded(self, code_id: str) -> type[Job[Any, Any]]:
        """Load a class, unless another thread has meanwhile: all bodies of an actor are of one class, not of its copies."""
        with self._lock:
            loading = self._loading.setdefault(code_id, threading.Lock())
        with loading:
            job_type = self._types.get(code_id)
            if job_type is None:
                job_type = self._types[code_id] = self._load(code_id, self._code[code_id])
        return job_type

    def _start_runner(self, loop: BodyLoop, live: _Live, context: contextvars.Context | None = None) -> None:
        runner = self._run_async_bodies(loop, live)
        try:
            loop.start(runner, context=context or contextvars.Context())
        except BaseException as problem:  # noqa: BLE001 - of the interpreter; the place must not be lost with it
            runner.close()
            self._give_up(live, problem)

    def _begins_here(self, live: _Live, loop: BodyLoop) -> bool:
        """Tell whether a body is to begin on this loop; it may have begun on another, because this one was blocked."""
        with self._lock:
            if live.starts_on is not loop:
                return False
            live.starts_on = None
            return True

    async def _run_async_bodies(self, loop: BodyLoop, first: _Live) -> None:
        live = first
        if not self._begins_here(live, loop):
            return
        try:
            runner, yielded_at = asyncio.current_task(), self.clock.monotonic()
            while True:
                terms = self._terms[live.order.terms_id]
                attempt = live.attempt  # it is there when a thread has called the body, which turned out to be async
                if attempt is None:
                    attempt = live.attempt = Attempt(live.order, terms, self._types[terms.code_id], self)
                if live.stop_cause:
                    attempt.forget()
                    report = self._never_begun(live.order)
                else:
                    report = await attempt.perform()
                nxt = self._next(live, report, on_loop=True)
                if nxt is None:
                    self._sweep_tasks(loop)
                    return
                live = nxt
                # What is left in the context, or a cancellation that nobody has taken, would be the next body's.
                if not _same_context(_CLEAN) or (runner is not None and runner.cancelling()):
                    live.starts_on = loop
                    self._start_runner(loop, live)
                    return
                if (now := self.clock.monotonic()) - yielded_at > _YIELD_EVERY_S:
                    live.starts_on, live.was_seen = loop, False  # somebody may block or break the loop meanwhile
                    await _let_others()
                    if not self._begins_here(live, loop):
                        return
                    yielded_at = now
        except BaseException as problem:  # noqa: BLE001 - as in `_run_plain_bodies`
            self._give_up(live, problem)

    def _sweep_tasks(self, loop: BodyLoop) -> None:
        """Cancel what bodies left running on this loop, once no body is there that could want it."""
        with self._lock:
            if self._live:
                return
        for task in asyncio.all_tasks(loop.loop):
            task.cancel()

    def _lose_loop(self, loop: BodyLoop) -> None:
        """A body has closed its loop, or the files under it: end those that were on it, and begin the others elsewhere."""
        self._note("body_loop_lost")
        with self._lock:
            if self._user_loop is loop:
                self._user_loop = None
            self._stuck_loops.pop(loop.loop, None)
            self._idle_loops = [each for each in self._idle_loops if each is not loop]
            for live in list(self._live.values()):
                attempt = live.attempt
                if live.starts_on is loop:
                    self._move(live)
                elif attempt is not None and attempt.runs_on is loop.loop:
                    problem = RuntimeError("the event loop of this job was closed or broken by a body that ran on it")
                    self._take_place(live)
                    self._file(live, attempt.unreportable(problem))
            self._fill_places()

    def _never_begun(self, order: Order) -> Report:
        return Report(order.execution_id, order.job_id, "cancelled", self.clock.now(), 0.0)

    def _returned(self, order: Order) -> Report:
        return Report(order.execution_id, order.job_id, "returned", self.clock.now(), 0.0)

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
            self._take_place(live)  # another wait of it that has ended and stood in line goes on while this one lasts
            live.is_parked = True
            self._n_parked += 1
            self._turned[attempt.order.execution_id] = None
            self._fill_places()
            if self._n_active == 0:
                live.box.settled.set()  # the coordinator may send the jobs that this one waits for
        self._bell.set()

    def acquire(self, attempt: Attempt, granted: Callable[[], None]) -> bool:
        """Give a place to a body that goes on, now or when there is one."""
        with self._lock:
            live = self._live.get(attempt.order.execution_id)
            if live is None or not live.is_parked or self._stopped:
                return True
            self._take_place(live)
            self._turned[attempt.order.execution_id] = None
            self._bell.set()
            self._take_back_loop(attempt)
            if self._n_active < self._concurrency:
                self._give_place(live)
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

    def _step_aside(self, now_blocked: BodyLoop) -> None:
        """Leave a loop that does not turn, until it does. Needs the lock."""
        if self._user_loop is now_blocked:
            self._user_loop = None
        if now_blocked.loop not in self._stuck_loops and not now_blocked.is_lost:
            self._stuck_loops[now_blocked.loop] = now_blocked
            self._note("body_loop_blocked")
            with contextlib.suppress(RuntimeError):
                now_blocked.loop.call_soon_threadsafe(self._turns_again, now_blocked)

    def _turns_again(self, loop: BodyLoop) -> None:
        with self._lock:
            if self._stuck_loops.pop(loop.loop, None) is not None:
                self._idle_loops.append(loop)

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
            wait_s = _IDLE_TICK_S
            try:
                wait_s = self.tick()
            except BaseException as problem:  # noqa: BLE001 - no body may end the ticker, which looks after all of them
                self._trouble("tick", problem)
            self._bell.wait(wait_s)

    def tick(self) -> float:
        """Do what is due and return how long nothing will be, in seconds; also called when something has happened."""
        self._bell.clear()
        now = self.clock.monotonic()
        next_at = now + min(_IDLE_TICK_S, self._quiet_s)
        try:
            next_at = min(next_at, self._watch_bodies(now))
        except BaseException as problem:  # noqa: BLE001 - each section on its own: one that fails must not keep the others
            self._trouble("watch", problem)
        try:
            if self._news and now - self._shipped_at < _SHIP_EVERY_S:
                next_at = min(next_at, self._shipped_at + _SHIP_EVERY_S)
            elif self._news or now - self._reshipped_at >= _RESHIP_EVERY_S:
                self._ship_progress(now)
                next_at = min(next_at, now + _SHIP_EVERY_S)
        except BaseException as problem:  # noqa: BLE001 - as above
            self._trouble("progress", problem)
        try:
            self._push_news(now)
        except BaseException as problem:  # noqa: BLE001 - as above
            self._trouble("push", problem)
        with contextlib.suppress(BaseException):  # where logs go is the application's, and may be a body's doing, too
            self._log_notes()
        return max(0.0, next_at - now)

    def _trouble(self, section: str, problem: BaseException) -> None:
        self._note("ticker_failed", section=section, problem=f"{name_of(problem)}: {said(problem, 500)}")

    def _watch_bodies(self, now: float) -> float:
        """Enforce timeouts; return when the next one is due."""
        with self._lock:
            next_at = self._give_up_waiting(now)
            self._watch_beginnings()
            going = [live for live in self._live.values() if live.attempt is not None]
        for live in going:
            try:
                next_at = min(next_at, self._watch(live, now))
            except BaseException as problem:  # noqa: BLE001 - as in `tick`: the others are watched all the same
                self._trouble("watch", problem)
        if self._leftovers is not None and self._recycle is None and (why := self._leftovers.grown(now)):
            self._recycle = why  # set, never unset: another thread may have found something meanwhile
        return next_at

    def _watch(self, live: _Live, now: float) -> float:
        """Interrupt or stop a body whose time has come; return when it comes."""
        attempt = live.attempt
        next_at = float("inf")
        if attempt is None:
            return next_at
        if live.interrupt_at is not None:
            if now >= live.interrupt_at:
                live.interrupt_at = None
                attempt.interrupt()
            else:
                next_at = live.interrupt_at
        if attempt.terms.timeout_s is not None and attempt.token.cause is None:
            left = attempt.terms.timeout_s - attempt.age_s
            if left <= 0:
                self._stop(live, "timeout")
            else:
                next_at = min(next_at, now + left)
        return next_at

    def _watch_beginnings(self) -> None:
        """Begin elsewhere what has waited from one tick to the next for a loop that a body blocks. Needs the lock."""
        for live in list(self._live.values()):
            loop = live.starts_on
            if loop is None:
                continue
            if not live.was_seen:
                live.was_seen = True
                continue
            self._step_aside(loop)
            self._move(live)

    def _give_up_waiting(self, now: float) -> float:
        """Give back a chunk whose turn has not come in time; return when that is. Needs the lock."""
        for live in list(self._todo):
            if live.waits_since is None:
                continue
            if now < live.waits_since + _NEXT_WAITS_S:
                return live.waits_since + _NEXT_WAITS_S
            self._todo.remove(live)
            self._file(live, self._returned(live.order))
        return float("inf")

    def _ship_progress(self, now: float) -> None:
        reship = now - self._reshipped_at >= _RESHIP_EVERY_S
        states: dict[str, Progress] = {}
        for _ in range(len(self._news)):
            attempt = self._news.popleft()
            try:
                progress = attempt.take_progress()
            except BaseException as problem:  # noqa: BLE001 - a report is a user's value; the other bodies' go out all the same
                self._trouble("progress", problem)
                continue
            if progress is not None:
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
        if self._in_flight is not None:
            if now - self._pushed_at > self._settings.orphan_timeout_s:  # its answer was lost on the way
                self._pushed(self._in_flight, None)
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
            self._in_flight, self._pushed_at = push, now
        try:
            self._uplink.push(push, lambda known: self._pushed(push, known))
        except BaseException as problem:  # noqa: BLE001 - what is not on its way is said again
            self._trouble("push", problem)
            self._pushed(push, None)

    def _pushed(self, push: Push, known: bool | None) -> None:  # noqa: FBT001 - the callback of `Uplink.push`
        now = self.clock.monotonic()
        with self._lock:
            if self._in_flight is not push:  # it was taken for lost, and its news are on their way once more
                return
            self._in_flight = None
            if known is None:  # told again at the next tick, not at once: there may be nobody for a while
                self._turned.update(dict.fromkeys([*push.parked, *push.resumed]))
                for execution_id, _ in push.progress:
                    if (live := self._live.get(execution_id)) is not None:
                        live.told, live.told_at = None, float("-inf")
            else:
                self._heard_at = now
                del self._outbox[: len(push.ended)]
        if known is False:
            self._leave("the coordinator does not know this actor")
        elif known is None and now - self._heard_at > self._settings.orphan_timeout_s:
            self._leave(f"no coordinator for {now - self._heard_at:.0f} s")
        elif known and (self._outbox or self._turned):
            self._bell.set()

    def _leave(self, why: str) -> None:
        try:
            self._on_orphaned(why)
        except BaseException as problem:  # noqa: BLE001 - in the thread of whoever brought the answer
            self._trouble("orphaned", problem)


class _Leftovers:
    """What bodies have left behind in the process that the next one should not find."""

    def __init__(self, settings: EngineSettings) -> None:
        self._max_rss = settings.recycle_rss
        self._cwd = os.getcwd()  # noqa: PTH109 - compared as text after every body
        self._environment = dict(os.environ._data)  # type: ignore[attr-defined]  # noqa: SLF001 - bytes: compared in C
        self._n_threads = _foreign_threads()
        self._depth = sys.getrecursionlimit()
        self._looked_at = 0.0

    def found(self) -> str | None:
        """Return why the process is not as it was, if so. Cheap: asked after every body."""
        if sys.getrecursionlimit() < self._depth:  # of all threads, ours among them
            sys.setrecursionlimit(self._depth)
            return "a job lowered the recursion limit"
        try:
            if os.environ._data != self._environment:  # type: ignore[attr-defined]  # noqa: SLF001 - see above
                return "a job changed the environment"
            if os.getcwd() != self._cwd:  # noqa: PTH109 - as above
                return "a job changed the working directory"
        except OSError:
            return "a job removed the working directory"
        except Exception as problem:  # noqa: BLE001 - `os.environ` or `os.getcwd` is not what it was
            return f"a job replaced parts of the os module ({type(problem).__name__})"
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
    except BaseException:  # noqa: BLE001 - a value's __eq__ is user code
        return False


def _turns(loop: asyncio.AbstractEventLoop) -> bool:
    """Tell whether this thread is the one that turns ``loop``: then whoever blocks here blocks it."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


@coroutine
def _let_others() -> Generator[None, None, None]:
    """Let the loop do other things once; as ``asyncio.sleep(0)``, which a body may have replaced."""
    yield
