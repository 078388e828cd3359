"""What surrounds the code that runs now: the engine of this process, and the job attempt it belongs to.

The lowest layer that both users' calls (`Job.wait`, `JobRunBuilder.run`) and the engine can see, so that neither has to
import the other.
"""

from __future__ import annotations

import importlib
import os
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from koan_ray.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from koan_ray.domain.records import Checkpoint, JobView, Part
    from koan_ray.jobs import Job, JobDetails, JobExecution
    from koan_ray.pending import Pending
    from koan_ray.run import RunSettings


class EnginePort(Protocol):
    """What jobs and builders ask of the engine of this process."""

    def submit(self, job_type: type[Job[Any, Any]], context: object, settings: RunSettings) -> Pending[Any]: ...
    def submit_many(self, job_type: type[Job[Any, Any]], contexts: Any, settings: RunSettings) -> Pending[Any]: ...
    def wait(self, job: Job[Any, Any], timeout: float | None) -> Pending[Any]: ...
    def refresh(self, job: Job[Any, Any]) -> Pending[Any]: ...
    def cancel(self, job_id: str, reason: str | None) -> Pending[Any]: ...
    def archive(self, *, dry_run: bool) -> Pending[dict[str, dict[str, int]]]: ...
    def restore(self, job_id: str) -> Pending[Any]: ...
    def remove(self, job_id: str) -> Pending[None]: ...
    def executions(self, job_id: str) -> Pending[list[JobExecution]]: ...
    def details(self, job_id: str) -> Pending[JobDetails]: ...
    def get(self, job_id: str, job_type: type[Job[Any, Any]] | None = None) -> Pending[Any]: ...
    def query(self, filters: Mapping[str, Any], job_type: type[Job[Any, Any]] | None = None) -> Pending[Any]: ...
    def children(self, job_id: str, job_type: type[Job[Any, Any]] | None) -> Pending[Any]: ...
    def parent(self, job: Job[Any, Any], job_type: type[Job[Any, Any]] | None) -> Pending[Any]: ...
    def count(self, filters: Mapping[str, Any]) -> Pending[int]: ...
    def failed_items(self, job_id: str) -> Pending[Any]: ...
    def export_failed_items(self, job_id: str, path: Any) -> Pending[int]: ...
    def retry_failed_items(self, job_id: str) -> Pending[Any]: ...
    def retry(self, job_id: str, *, resume: bool = False) -> Pending[Any]: ...
    def checkpoint(self, job_id: str, execution_id: str, checkpoint: Checkpoint, parts: Sequence[Part]) -> Pending[bool]: ...
    def resume_state(self, job_id: str, execution_id: str) -> Pending[Checkpoint | None]: ...
    def parts(self, job_id: str, stream: str, after: int = -1, limit: int = 50) -> Pending[list[Part]]: ...
    def watch(self, job: Job[Any, Any], deliver: Callable[[Any], None]) -> Callable[[], None]: ...
    def disown(self, error: BaseException) -> None: ...


class Parking(Protocol):
    """The attempt that the current code belongs to, as something that can give its place to other jobs while it waits."""

    job_view: JobView

    def park(self, *, blocking: bool) -> None:
        """Give the place in the actor to other jobs; ``blocking``: the calling thread is about to block."""

    def resume(self) -> None:
        """Block until the attempt has its place back."""

    def resume_async(self) -> Awaitable[None]:
        """Wait until the attempt has its place back."""

    def conduct(self, job: Any, context: Any, progress: Any, cancellation: Any) -> Awaitable[Any]:
        """Go through the items of a `FiniteJob` and return its result."""


attempt: ContextVar[Parking | None] = ContextVar("koan_ray_attempt", default=None)

_engine: EnginePort | None = None
# How a thread waits for an event; a runtime may replace it, for example to tell Ray that a task is blocked.
block: Callable[[Any, float | None], bool] | None = None
# Whose body a thread belongs to whose context does not say so; a runtime that runs bodies in this process sets it.
whose_thread: Callable[[], Parking | None] | None = None


def waiting() -> Parking | None:
    """Return the attempt that a wait which begins here belongs to, if it is in a body or in a thread of one."""
    found = attempt.get()
    return whose_thread() if found is None and whose_thread is not None else found


@contextmanager
def away() -> Iterator[None]:
    """In a job's body: other jobs may use its place while the calling thread blocks in here, for something of theirs."""
    parking = waiting()
    if parking is None:
        yield
        return
    parking.park(blocking=True)
    try:
        yield
    finally:
        parking.resume()


@asynccontextmanager
async def away_async() -> AsyncIterator[None]:
    """As `away`, for a task that waits."""
    parking = waiting()
    if parking is None:
        yield
        return
    parking.park(blocking=False)
    try:
        yield
    finally:
        await parking.resume_async()


# How many forks lie behind this process since the import of this module: what was made before the last one belongs to the
# process that was copied, whose threads will never bring its outcome here.
forks = 0
_pid = os.getpid()
_original = _pid  # the process that this one is a copy of
_has_left_engine = False  # in a copy of a process with an engine, until it has one of its own
_inherited: list[object] = []  # never used and never destroyed: their destructors would touch what the original uses


def set_engine(engine: EnginePort | None) -> None:
    """Make ``engine`` the one that jobs of this process use."""
    global _engine, _has_left_engine  # noqa: PLW0603 - one engine a process, like ray.init
    _engine = engine
    if engine is not None:
        _has_left_engine = False


def current_engine() -> EnginePort | None:
    """Return the engine of this process, if there is one."""
    return _engine


def engine() -> EnginePort:
    """Return the engine of this process, starting one with default settings if nobody has.

    Raises:
        RuntimeUnavailableError: A job's body asks whose engine has been shut down, or a forked copy of a process that has
            an engine.
    """
    if _engine is None and _has_left_engine:
        raise left_behind()
    if _engine is None and attempt.get() is not None:
        msg = "this job's engine has been shut down; nothing can be started or asked for any more"
        raise RuntimeUnavailableError(msg)
    if _engine is None:
        # By name: the client stands above the modules that call this, and importing it here would close a circle.
        importlib.import_module("koan_ray.client").init()
    if _engine is None:  # pragma: no cover - init sets it or raises
        msg = "koan.init() did not start an engine"
        raise RuntimeError(msg)
    return _engine


def left_behind() -> RuntimeUnavailableError:
    """Return what is said in a forked copy of a process to whoever uses what the original has."""
    return RuntimeUnavailableError(
        f"this process ({os.getpid()}) is a forked copy of process {_original}, whose engine and pending outcomes it cannot "
        f"use: threads and connections stay behind at a fork. Call koan.init(runtime='local') here for an engine of this "
        f"process, fork before koan.init(), or start the process with 'spawn', which can use Ray"
    )


def _after_fork() -> None:
    """Let go of the engine of the original, in its copy. Takes no lock: a thread that is not here may hold it."""
    global _engine, _has_left_engine, _original, _pid, block, forks  # noqa: PLW0603 - as above
    forks += 1
    _original, _pid = (_original if _has_left_engine else _pid), os.getpid()
    block = None
    attempt.set(None)  # its place in its actor is the original's to give away
    if _engine is not None:
        _has_left_engine = True
        _inherited.append(_engine)
        _engine.disown(left_behind())
        _engine = None


os.register_at_fork(after_in_child=_after_fork)
