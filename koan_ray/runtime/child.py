"""``Isolation.PROCESS``: each attempt in a process of its own, as its job actor sees it.

A process takes a few milliseconds, because it is forked from one that has imported what it needs. It shares nothing with the
actor but a socket: the work and the request to stop go down, progress and the report come up. Its end is learned from its
keeper (see `koan_ray.runtime.nursery`), which also ends whatever the body has started. So an attempt has ended when its
process has and nothing of it is left, however the body ended and whatever it did to its process.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from koan_ray import telemetry
from koan_ray.domain.records import ErrorInfo
from koan_ray.engine.attempt import describe
from koan_ray.ports import Report
from koan_ray.runtime import nursery, processes
from koan_ray.runtime.body import UNSENT, Work
from koan_ray.runtime.frames import Frames, GarbledError, frame
from koan_ray.runtime.nursery import Nursery
from koan_ray.telemetry import logs

if TYPE_CHECKING:
    from koan_ray.domain.records import Terms
    from koan_ray.engine.attempt import Attempt
    from koan_ray.ports import Order

_BEGIN_S = 60.0  # for the nursery's imports on a busy machine, and a fork
_LEAVE_S = 1.0  # a process that has reported may flush its output
_GONE_S = 5.0  # after a process was to be killed, its keeper has said so
_LOOK_S = 1.0  # for a time limit that another thread has set
_PIECE = 1 << 18
_QUIETLY = getattr(socket, "MSG_NOSIGNAL", 0)  # whatever this program has done with SIGPIPE


class ForkserverChildren:
    """The processes of one job actor's attempts; see `koan_ray.engine.agent.ChildRunner`.

    Args:
        grace_s: A process that was asked to stop is killed after so long.
        shared: The nursery of several actors in one process, which whoever made it closes; without it, one of its own.
    """

    def __init__(self, grace_s: float, shared: Nursery | None = None) -> None:
        self._grace_s = grace_s
        self._owns_nursery = shared is None
        self._nursery = shared or Nursery()
        self._lock = threading.Lock()
        self._running: dict[str, _Child] = {}
        self._is_closed = False

    def run(self, order: Order, terms: Terms, code: bytes, attempt: Attempt) -> Report:
        """Run an execution in a process and return its report; ``crashed`` when the process vanished."""
        try:
            child = _Child(order, terms, code, attempt, self._grace_s, self._nursery)
            with self._lock:
                self._running[order.execution_id] = child
                is_closed = self._is_closed
            # It may have been asked to stop before it was there to be asked.
            if (cause := attempt.token.cause) is not None:
                child.stop(cause)
            if is_closed:
                child.kill()
            return child.follow()
        except Exception as error:  # noqa: BLE001 - no memory, no file descriptors, too many processes: as if it had died at once
            return _report(order, attempt, "crashed", describe(error))
        finally:
            with self._lock:
                self._running.pop(order.execution_id, None)

    def stop(self, execution_id: str, cause: str) -> None:
        """Ask a body to stop, and kill its process after the grace period."""
        if (child := self._running.get(execution_id)) is not None:
            child.stop(cause)

    def close(self) -> None:
        """Kill all processes, and what they have started."""
        with self._lock:
            self._is_closed = True
            running = list(self._running.values())
        for child in running:
            child.kill()
        if self._owns_nursery:
            self._nursery.close()


class _Child:
    """One process, from its start to its end."""

    def __init__(self, order: Order, terms: Terms, code: bytes, attempt: Attempt, grace_s: float, shared: Nursery) -> None:
        self._order, self._attempt, self._grace_s, self._nursery = order, attempt, grace_s, shared
        self._cause: str | None = None
        self._problem: str | None = None  # why there will be no report
        self._report: Report | None = None
        self._has_begun = False
        self._said = b""  # by the keeper, of a line that is not complete
        self._status: int | None = None
        self._was_killed = False  # by its keeper
        self._is_over = False
        self._is_closed = False
        self._lock = threading.Lock()  # what other threads may ask: to stop, to kill
        self._gone_by = time.monotonic() + _BEGIN_S
        self._within_s: float | None = None  # what the keeper was asked last
        self._work = frame("work", self._described(terms, code))
        self._out = bytearray()
        self._line: socket.socket | None = None
        self._keeper: socket.socket | None = None

    def _described(self, terms: Terms, code: bytes) -> Work:
        inline_limit = self._attempt._host.inline_limit  # noqa: SLF001 - the process's host stands in for this one
        directory: str | None = None
        with contextlib.suppress(OSError):  # it was removed
            directory = os.getcwd()  # noqa: PTH109 - goes as text
        return Work(
            self._order, terms, code, self._grace_s, inline_limit, logs.in_force(), telemetry.in_force(),
            list(sys.path), list(sys.argv), directory, dict(os.environ),
        )  # fmt: skip

    def follow(self) -> Report:
        """Start the process, take in what it says, and return its report when nothing of it is left.

        Raises:
            OSError: It cannot be started.
        """
        self._follow_one()
        if not self._has_begun and self._status is None and self._problem is None and self._cause is None:
            # The nursery had died, and took the request with it before we could know: another one is started now.
            self._forget_line()
            self._follow_one()
        if self._report is not None:
            return self._report
        return self._vanished()

    def _forget_line(self) -> None:
        with self._lock:
            self._gone_by = time.monotonic() + _BEGIN_S
            if self._cause is None and not self._is_closed:
                self._within_s = None  # that was about the end of a line at which there had been nobody yet

    def _follow_one(self) -> None:
        line, theirs = socket.socketpair()
        keeper, keepers = socket.socketpair()
        with line, keeper:
            with theirs, keepers:
                self._nursery.begin(theirs, keepers)
            os.set_blocking(line.fileno(), False)
            os.set_blocking(keeper.fileno(), False)
            with self._lock:
                self._is_over, self._said = False, b""
                self._out[:] = self._work + (frame("stop", self._cause) if self._cause is not None else b"")
                self._line, self._keeper = line, keeper
                self._ask_keeper()
            try:
                self._turn(line, keeper)
            finally:
                with self._lock:
                    self._line = self._keeper = None

    def _turn(self, line: socket.socket, keeper: socket.socket) -> None:
        frames = Frames()
        poller = select.poll()
        poller.register(keeper, select.POLLIN)
        poller.register(line, select.POLLIN)
        is_open = True
        while not self._is_over:
            left_s = self._gone_by - time.monotonic()
            if left_s <= 0:
                self._give_up()
                break
            if is_open:
                poller.modify(line, select.POLLIN | (select.POLLOUT if self._out else 0))
            ready = {fd for fd, _ in poller.poll(min(left_s, _LOOK_S) * 1000 + 1)}
            if is_open and line.fileno() in ready:
                is_open = self._talk(line, frames)
                if not is_open:
                    poller.unregister(line)
            if keeper.fileno() in ready:
                self._hear_keeper(keeper)
        if is_open and self._report is None:  # what it had said before it ended
            self._talk(line, frames)

    def _talk(self, line: socket.socket, frames: Frames) -> bool:
        """Send and take what there is; false when nothing comes any more."""
        try:
            with self._lock:
                while self._out:
                    del self._out[: line.send(self._out, _QUIETLY)]
        except BlockingIOError:
            pass
        except OSError:  # it is gone; what it has said may still be read
            self._out.clear()
        try:
            while True:
                piece = _received(line, _PIECE)
                if not piece:
                    break
                for what, value in frames.feed(piece):
                    self._take(what, value)
        except BlockingIOError:
            return True
        except GarbledError:
            self._problem = "the body has written into its connection to the engine, a file descriptor above 2"
            self._end_within(0.0)
            return False
        except OSError:
            pass
        if self._report is None:  # it may have closed its end and still run: without a report, it runs for nothing
            self._end_within(_LEAVE_S)
        return False

    def _take(self, what: str, value: Any) -> None:
        if what == "progress" and isinstance(value, tuple) and self._report is None:
            self._attempt.progress._take(value)  # noqa: SLF001 - the engine's half of JobProgress
        elif what == "report" and isinstance(value, Report) and value.execution_id == self._order.execution_id:
            self._report = value
            self._end_within(_LEAVE_S)
        else:
            raise GarbledError

    def _hear_keeper(self, keeper: socket.socket) -> None:
        try:
            piece = _received(keeper, 4096)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        self._said += piece
        while b"\n" in self._said:
            line, _, self._said = self._said.partition(b"\n")
            self._take_news(*line.decode(errors="replace").split(maxsplit=1))
        if not piece and not self._is_over:
            self._is_over = True
            if self._has_begun:
                self._problem = "the process that watches over it was killed, and it was killed with that"

    def _take_news(self, what: str, more: str = "") -> None:
        """Take in what the keeper says."""
        if what == nursery.BEGUN:
            self._has_begun = True
            with self._lock:
                self._gone_by = float("inf") if self._within_s is None else self._gone_by
            return
        self._is_over = True
        if what == nursery.ENDED:
            status, was_killed = more.split()
            self._status, self._was_killed = int(status), was_killed == "1"
        else:
            self._problem = f"it could not be started: {more}"

    def _give_up(self) -> None:
        """Nobody has said in time that the process has begun, or ended."""
        if not self._has_begun:
            self._problem = self._problem or f"it had not begun after {_BEGIN_S:g} s"
            self._nursery.replace()
        elif self._report is None and self._problem is None:
            self._problem = f"it could not be killed within {_GONE_S:g} s"

    def _vanished(self) -> Report:
        if self._cause is None:
            problem = self._problem
            if problem is None and self._status is not None:
                problem = processes.how_it_ended(self._status)
                is_cut = self._was_killed or os.waitstatus_to_exitcode(self._status) == UNSENT
                if is_cut and not self._is_closed:
                    problem = f"the body has closed its connection to the engine, a file descriptor above 2 ({problem})"
            error = ErrorInfo(
                "ProcessLost", f"the job's own process ended without a report: {problem or 'it could not be started'}"
            )
            return _report(self._order, self._attempt, "crashed", error)
        self._attempt.stopped_by = "kill"
        about = {"job_id": self._order.job_id, "execution_id": self._order.execution_id}
        logs.get_logger().warning("child_killed", cause=self._cause, after_s=self._grace_s, **about)
        if self._cause == "timeout":
            took = (
                f"the attempt took longer than {self._attempt.terms.timeout_s:g}s and did not stop; its process was killed"
            )
            return _report(self._order, self._attempt, "timeout", ErrorInfo("TimeoutError", took))
        return _report(self._order, self._attempt, "cancelled", None)

    # --- asked by other threads --------------------------------------------------------------------------------------

    def stop(self, cause: str) -> None:
        """Ask the body to stop, and have it killed after the grace period."""
        with self._lock:
            if self._cause is not None:
                return
            self._cause = cause
            if self._line is not None:
                self._out += frame("stop", cause)
                with contextlib.suppress(OSError):  # it is full, or has just ended
                    del self._out[: self._line.send(self._out, _QUIETLY)]
        self._end_within(self._grace_s)

    def kill(self) -> None:
        """Have the process killed now: its actor ends."""
        self._is_closed = True
        self._end_within(0.0)

    def _end_within(self, seconds: float) -> None:
        with self._lock:
            if self._within_s is None or seconds < self._within_s:
                self._within_s = seconds
                self._ask_keeper()

    def _ask_keeper(self) -> None:
        """Pass on how long the process has left, to a keeper that may be there by now or not yet. Needs the lock."""
        if self._within_s is None:
            return
        self._gone_by = min(self._gone_by, time.monotonic() + self._within_s + _GONE_S)
        if self._keeper is not None:
            with contextlib.suppress(OSError):  # it has just ended
                self._keeper.send(nursery.within(self._within_s), _QUIETLY)


def _received(line: socket.socket, most: int) -> bytes:
    """Receive; what the other end has said before it ended comes after the news that it has not read our last message."""
    try:
        return line.recv(most)
    except ConnectionResetError:
        return line.recv(most)


def _report(order: Order, attempt: Attempt, outcome: str, error: ErrorInfo | None) -> Report:
    metrics: tuple[tuple[str, Any], ...] = (("stopped_by", attempt.stopped_by),) if attempt.stopped_by else ()
    return Report(
        order.execution_id, order.job_id, outcome, attempt.began_at, attempt.age_s, error=error,
        progress=attempt.take_progress(), metrics=metrics,
    )  # fmt: skip
