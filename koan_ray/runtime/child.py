"""``Isolation.PROCESS``: each attempt in a fresh child of the job actor, from a forkserver.

A child takes a few milliseconds, because the forkserver has imported what children need. The body runs in the child's main
thread, where signals and native libraries work as usual. It shares nothing with the actor but a pipe: progress and the
report come up, the request to stop goes down. A child ends with its actor (the pipe closes), and is killed when it has not
stopped within the grace period.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from koan_ray import ambient
from koan_ray.domain.records import ErrorInfo
from koan_ray.engine.attempt import Attempt, describe
from koan_ray.errors import ConfigurationError
from koan_ray.ports import LoopClock, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from koan_ray.domain.records import Terms
    from koan_ray.ports import Clock, Order

_SHIP_EVERY_S = 0.02
_starting = threading.Lock()


class ForkserverChildren:
    """Child processes of one job actor; see `koan_ray.engine.agent.ChildRunner`."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._running: dict[str, _Child] = {}

    def run(self, order: Order, terms: Terms, code: bytes, attempt: Attempt) -> Report:
        """Run an execution in a child and return its report; ``crashed`` when the child vanished."""
        try:
            child = _Child(order, terms, code, attempt, self._grace_s)
        except OSError as error:  # no memory, too many processes: as if it had died at once
            return _report(order, attempt, "crashed", describe(error))
        self._running[order.execution_id] = child
        try:
            return child.follow()
        finally:
            del self._running[order.execution_id]

    def stop(self, execution_id: str, cause: str) -> None:
        """Ask a body to stop, and kill its process after the grace period."""
        if (child := self._running.get(execution_id)) is not None:
            child.stop(cause)

    def close(self) -> None:
        """Kill all children."""
        for child in list(self._running.values()):
            child.kill()


class _Child:
    def __init__(self, order: Order, terms: Terms, code: bytes, attempt: Attempt, grace_s: float) -> None:
        self._order, self._attempt, self._grace_s = order, attempt, grace_s
        self._cause: str | None = None
        self._timer: threading.Timer | None = None
        limits = (grace_s, attempt._host.inline_limit)  # noqa: SLF001 - the child's host stands in for this one
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        with _starting, _hidden_main():
            context.set_forkserver_preload(["koan_ray.runtime.child"])
            self._process: BaseProcess = context.Process(
                target=_main, args=(theirs, order, terms, code, limits), daemon=True
            )
            self._process.start()
        theirs.close()

    def follow(self) -> Report:
        """Take in what the child says, until its report or its end."""
        report: Report | None = None
        try:
            while report is None:
                what, value = self._pipe.recv()
                if what == "progress":
                    self._attempt.progress._take(value)  # noqa: SLF001 - the engine's half of JobProgress
                else:
                    report = value
        except (EOFError, OSError):
            pass
        finally:
            if self._timer is not None:
                self._timer.cancel()
        if report is None:
            self.kill()
        self._process.join()
        self._pipe.close()
        if report is not None:
            return report
        return self._vanished()

    def _vanished(self) -> Report:
        code = self._process.exitcode
        if self._cause is None:
            died = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            error = ErrorInfo("ProcessLost", f"the job's own process ended without a report: {died}")
            return _report(self._order, self._attempt, "crashed", error)
        self._attempt.stopped_by = "kill"
        if self._cause == "timeout":
            took = (
                f"the attempt took longer than {self._attempt.terms.timeout_s:g}s and did not stop; its process was killed"
            )
            return _report(self._order, self._attempt, "timeout", ErrorInfo("TimeoutError", took))
        return _report(self._order, self._attempt, "cancelled", None)

    def stop(self, cause: str) -> None:
        if self._cause is None:
            self._cause = cause
            self._timer = threading.Timer(self._grace_s, self.kill)
            self._timer.daemon = True
            self._timer.start()
            try:
                self._pipe.send(cause)
            except OSError:  # it has just ended
                return

    def kill(self) -> None:
        self._process.kill()


def _report(order: Order, attempt: Attempt, outcome: str, error: ErrorInfo | None) -> Report:
    metrics: tuple[tuple[str, Any], ...] = (("stopped_by", attempt.stopped_by),) if attempt.stopped_by else ()
    return Report(
        order.execution_id, order.job_id, outcome, attempt.began_at, attempt.age_s, error=error,
        progress=attempt.take_progress(), metrics=metrics,
    )  # fmt: skip


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep multiprocessing from importing the actor's main module, which is Ray's, into every child.

    Source: cpython#137996; it takes 580 ms and the child needs nothing of it.
    """
    main = sys.modules.get("__main__")
    saved = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    for name in saved:
        setattr(main, name, None) if name == "__spec__" else delattr(main, name)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(main, name, value)


# --- in the child ------------------------------------------------------------------------------------------------------


class _ChildHost:
    """What an attempt asks of the process it runs in, in a child; there are no places to give away."""

    def __init__(self, pipe: Connection, inline_limit: int) -> None:
        self.clock: Clock = LoopClock()
        self.span: Callable[[Order, str], AbstractContextManager[Any]] | None = None
        self.inline_limit = inline_limit
        self._pipe = pipe
        self._bell = threading.Event()
        self._sending = threading.Lock()
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
                self.send("progress", progress._latest)  # noqa: SLF001
            time.sleep(_SHIP_EVERY_S)

    def send(self, what: str, value: object) -> None:
        with self._sending:
            self._pipe.send((what, value))


class _NoEngine:
    """Stands where the engine would be: a child cannot reach it."""

    def __getattr__(self, name: str) -> Any:
        msg = "jobs with Isolation.PROCESS cannot use the engine or Ray; use Isolation.POOLED or DEDICATED for such a job"
        raise ConfigurationError(msg)


def _main(pipe: Connection, order: Order, terms: Terms, code: bytes, limits: tuple[float, int]) -> None:
    from koan_ray.runtime.code import read  # not at the top: the forkserver must not hold a class loader's state

    grace_s, inline_limit = limits
    host, pid = _ChildHost(pipe, inline_limit), os.getpid()
    ambient.set_engine(_NoEngine())
    try:
        job_type = read(code)
    except BaseException as error:  # noqa: BLE001 - importing user code may raise anything
        info = describe(error)
        text = f"the job class could not be loaded in its child process: {info.type}: {info.message}"
        problem = ErrorInfo("UnknownKindError", text[:2000], info.stack_trace)
        host.send("report", Report(order.execution_id, order.job_id, "unknown_kind", time.time(), 0.0, error=problem))
        os._exit(0)
    attempt = Attempt(order, terms, job_type, host)
    threading.Thread(target=_listen, args=(pipe, attempt, grace_s), daemon=True).start()
    threading.Thread(target=host.ship, daemon=True).start()
    report = attempt.perform_here()
    if os.getpid() != pid:  # a copy of this process, which the body has made, has nothing to say
        os._exit(0)
    host.send("report", report._replace(metrics=(*report.metrics, ("child_pid", os.getpid()))))
    # Not sys.exit: threads and atexit handlers that a body left behind must not hold its process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _listen(pipe: Connection, attempt: Attempt, grace_s: float) -> None:
    try:
        cause = pipe.recv()
    except (EOFError, OSError):  # the actor is gone
        os._exit(1)
    if attempt.stop(cause):
        attempt.interrupt()
    else:
        threading.Timer(grace_s / 2, attempt.interrupt).start()
    try:
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)
