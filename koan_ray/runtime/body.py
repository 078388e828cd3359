"""Inside the process of one attempt (``Isolation.PROCESS``): what runs there, and what it says to its job actor.

The body runs in the main thread, where signals and native libraries work as usual. What it may do to the process it does to
itself alone: close file descriptors, ignore signals, fork, leave threads behind. The attempt ends when its report has been
sent; whatever is left of the process has a moment to go by itself, and its keeper ends it (`koan_ray.runtime.nursery`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray import ambient, telemetry
from koan_ray.domain.records import ErrorInfo
from koan_ray.engine.attempt import Attempt, describe
from koan_ray.errors import ConfigurationError
from koan_ray.ports import LoopClock, Report
from koan_ray.runtime.code import read
from koan_ray.runtime.frames import Frames, GarbledError, frame
from koan_ray.telemetry import logs, traces

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from koan_ray.domain.records import Terms
    from koan_ray.ports import Clock, Order

UNSENT = 97  # the exit code of a process whose report could not be sent
_SHIP_EVERY_S = 0.02
_FLUSH_S = 0.8  # for the last spans; below what a process that has reported is given to leave
_LOOK_S = 1.0  # whether the connection is still there
_HIGH_FD = 800  # bodies that close file descriptors close the first few hundred; `select` takes those below 1024


class Work(NamedTuple):
    """What a process is to do, and what it shall find around it."""

    order: Order
    terms: Terms
    code: bytes
    grace_s: float
    inline_limit: int
    logging: logs.Logging | None
    exporting: telemetry.Export | None
    path: list[str]
    argv: list[str]
    directory: str | None
    environment: Mapping[str, str]


class _Line:
    """To the job actor and back. Never writes into a file that a body has opened under the same number."""

    def __init__(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # a low limit on file descriptors
            low, fd = fd, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
            os.close(low)
        self._socket = socket.socket(fileno=fd)
        self._fd, self._mark = fd, self._identity(fd)
        self._sending = threading.Lock()
        self._frames = Frames()
        self._waiting: list[tuple[str, Any]] = []

    @staticmethod
    def _identity(fd: int) -> tuple[int, int]:
        about = os.fstat(fd)
        return about.st_dev, about.st_ino

    def send(self, what: str, value: object) -> None:
        message = frame(what, value)
        with self._sending:
            self._check()
            self._socket.sendall(message)

    def _check(self) -> None:
        if self._identity(self._fd) != self._mark:
            raise OSError("the connection to the job actor was closed, and its file descriptor used for something else")

    def receive(self) -> tuple[str, Any]:
        """Return the next message.

        Raises:
            OSError: The body has closed the connection.
            EOFError: There will be no message.
        """
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        while not self._waiting:
            # Not `recv` right away: as long as that waits, the kernel keeps open what a body has closed.
            is_ready = poller.poll(_LOOK_S * 1000)
            self._check()
            if not is_ready:
                continue
            try:
                piece = self._socket.recv(1 << 18)
                self._waiting += self._frames.feed(piece)
            except (OSError, GarbledError) as error:
                raise EOFError from error
            if not piece:
                raise EOFError
        return self._waiting.pop(0)


class _Host:
    """What an attempt asks of the process it runs in; there are no places to give away here."""

    def __init__(self, line: _Line, inline_limit: int) -> None:
        self.clock: Clock = LoopClock()
        self.span: Callable[[Order, str], AbstractContextManager[Any]] | None = None
        self.inline_limit = inline_limit
        self._line = line
        self._bell = threading.Event()
        self._latest: Attempt | None = None

    def announce(self, attempt: Attempt) -> None:
        self._latest = attempt
        self._bell.set()

    def release(self, attempt: Attempt, *, blocking: bool) -> None:
        return

    def acquire(self, attempt: Attempt, granted: Callable[[], None]) -> bool:
        return True

    def ship(self) -> None:
        while True:
            self._bell.wait()
            self._bell.clear()
            if self._latest is not None:
                progress = self._latest.progress
                progress._is_new = False  # noqa: SLF001 - the engine's half of JobProgress
                # What cannot be sent is left out: a later one may be sent, and the report does not depend on it.
                with contextlib.suppress(Exception):
                    self._line.send("progress", progress._latest)  # noqa: SLF001
            time.sleep(_SHIP_EVERY_S)


class _NoEngine:
    """Stands where the engine would be: the process of one attempt cannot reach it, and neither can its copies."""

    def disown(self, error: BaseException) -> None:
        """There is nothing to let go of."""

    def __getattr__(self, name: str) -> Any:
        msg = "jobs with Isolation.PROCESS cannot use the engine or Ray; use Isolation.POOLED or DEDICATED for such a job"
        raise ConfigurationError(msg)


def perform(fd: int) -> None:
    """Run the attempt that comes in through ``fd``, report its end, and end this process."""
    me, code = os.getpid(), 1
    try:
        code = _perform(_Line(fd), me)
    except BaseException:  # noqa: BLE001 - the keeper says that there was no report; what it was about goes to the log
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        _leave(code)


def _perform(line: _Line, me: int) -> int:
    what, work = line.receive()
    if what != "work":
        raise EOFError
    _furnish(work)
    if work.logging is not None:
        logs.configure(*work.logging)
    ambient.set_engine(_NoEngine())
    os.register_at_fork(after_in_child=lambda: ambient.set_engine(_NoEngine()))
    try:
        job_type = read(work.code)
    except BaseException as error:  # noqa: BLE001 - importing user code may raise anything
        return _sent(line, _unloadable(work.order, error))
    host = _Host(line, work.inline_limit)
    if telemetry.follow(work.exporting):
        host.span = traces.attempt_span
    attempt = Attempt(work.order, work.terms, job_type, host)
    threading.Thread(target=_listen, args=(line, attempt, work.grace_s), name="koan-listen", daemon=True).start()
    threading.Thread(target=host.ship, name="koan-ship", daemon=True).start()
    report = attempt.perform_here()
    if os.getpid() != me:  # a copy of this process, which the body has made, has nothing to say
        os._exit(0)
    code = _sent(line, report._replace(metrics=(*report.metrics, ("child_pid", me))))
    telemetry.flush(_FLUSH_S)
    return code


def _furnish(work: Work) -> None:
    """Make this process's surroundings those of the job actor as they are now, not as they were when the nursery began."""
    sys.path[:], sys.argv[:] = work.path, work.argv
    for name in os.environ.keys() - work.environment.keys():
        del os.environ[name]
    for name, value in work.environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if work.directory is not None:
        with contextlib.suppress(OSError):
            os.chdir(work.directory)


def _sent(line: _Line, report: Report) -> int:
    """Send the report and return the exit code of this process."""
    try:
        line.send("report", report)
    except OSError as error:
        with contextlib.suppress(BaseException):
            print(f"koan_ray: the report of job {report.job_id} could not be sent: {error}", file=sys.stderr)  # noqa: T201
        return UNSENT
    return 0


def _unloadable(order: Order, error: BaseException) -> Report:
    info = describe(error)
    text = f"the job class could not be loaded in its child process: {info.type}: {info.message}"
    problem = ErrorInfo("UnknownKindError", text[:2000], info.stack_trace)
    return Report(order.execution_id, order.job_id, "unknown_kind", time.time(), 0.0, error=problem)


def _leave(code: int) -> None:
    """End this process. Not sys.exit: threads and atexit handlers that a body left behind must not hold it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):  # closed, None, or whatever a body has put there
            stream.flush()
    os._exit(code)


def _listen(line: _Line, attempt: Attempt, grace_s: float) -> None:
    """Pass on the request to stop. The end of the job actor is the keeper's business."""
    try:
        what, cause = line.receive()
    except EOFError:
        return
    except OSError:  # without it there is no report: the body runs for nothing
        os._exit(UNSENT)
    if what == "stop":
        if not attempt.stop(cause):
            time.sleep(grace_s / 2)
        attempt.interrupt()
