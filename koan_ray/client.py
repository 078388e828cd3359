"""What an application holds: `init`, `shutdown`, `Engine` and the control plane `Jobs`. Thin."""

from __future__ import annotations

import atexit
import os
import threading
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from koan_ray import ambient
from koan_ray.config import Settings, load_settings
from koan_ray.errors import ConfigurationError
from koan_ray.listing import JobPage, JobStream
from koan_ray.recipe import RecipeBuilder

if TYPE_CHECKING:
    from types import TracebackType

    from koan_ray.domain.status import JobStatus
    from koan_ray.engine.session import Session
    from koan_ray.jobs import Job, JobExecution
    from koan_ray.pending import Pending

Runtime = Literal["ray", "local"]


class _Runtime(Protocol):
    """A runtime as `Engine` sees it."""

    session: Session

    def stop(self) -> None: ...


class Engine:
    """The engine of this process: a connection to a coordinator, or the coordinator itself with ``runtime="local"``.

    A context manager: leaving the block calls `shutdown`.
    """

    def __init__(self, runtime: _Runtime, settings: Settings, key: tuple[Runtime, str | None]) -> None:
        self.settings = settings
        self.runtime, self.address = key
        self._runtime = runtime

    @property
    def session(self) -> Session:
        """This process's view of the engine; for parts of koan_ray, such as the HTTP API."""
        return self._runtime.session

    def status(self) -> Pending[dict[str, Any]]:
        """Return what the coordinator says of itself: jobs, actors, limits, counters."""
        return self._runtime.session.status()

    def shutdown(self) -> None:
        """Disconnect; see `koan_ray.shutdown`."""
        shutdown(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"<koan_ray.Engine {self.runtime}>"


_lock = threading.RLock()
_current: Engine | None = None
_inherited: list[Engine] = []  # of the processes that this one is a copy of; kept, so that no destructor disturbs them
_ending: list[_Runtime] = []  # what is to be ended; an interrupt may have cut that short, and then it is gone on with


def init(
    address: str | None = None, *, settings: Settings | None = None, runtime: Runtime = "ray", **overrides: Any
) -> Engine:
    """Start or join an engine, and make it the one that the jobs of this process use.

    Called again with the same arguments it returns the engine that is there. The first ``.run()`` calls it when nobody has.
    A forked copy of a process with an engine has none until it calls this; ``runtime="local"`` works there, Ray does not.

    Args:
        address: As in `ray.init`: None starts a local Ray or uses the one this process has; ``"auto"`` and
            ``"ray://host:port"`` join a cluster.
        settings: Complete settings; without them they come from ``overrides``, the environment and ``koan.toml``.
        runtime: ``"ray"``, or ``"local"`` for the same engine inside this process without Ray.
        **overrides: Settings by section, such as ``engine={"max_actors": 2}``.

    Raises:
        ConfigurationError: A setting is unusable, or this process has an engine with other settings.
        RuntimeUnavailableError: There is no Ray at ``address``.
    """
    global _current  # noqa: PLW0603 - one engine a process, like ray.init
    if runtime not in ("ray", "local"):
        msg = f"runtime: expected 'ray' or 'local', got {runtime!r}"
        raise ConfigurationError(msg)
    if runtime == "local" and address is not None:
        msg = f"address: runtime='local' runs in this process and joins no Ray, got {address!r}; leave out one of the two"
        raise ConfigurationError(msg)
    with _lock:
        if (
            _current is not None
            and address is None
            and settings is None
            and not overrides
            and runtime in ("ray", _current.runtime)
        ):
            return _current
        wanted = load_settings(settings, overrides)
        _finish()
        if _current is not None:
            _check_same(_current, wanted, runtime, address)
            return _current
        started: _Runtime | None = None
        try:
            if runtime == "local":
                from koan_ray.runtime.local import LocalRuntime

                started = LocalRuntime.start(wanted)
            else:
                from koan_ray.runtime.ray.driver import RayRuntime

                started = RayRuntime.start(address, wanted, is_explicit=settings is not None or bool(overrides))
            _current = Engine(started, wanted, (runtime, address))
            ambient.set_engine(started.session)
            return _current
        except BaseException:
            if started is not None:  # an interrupt: nobody has it in hand
                _ending.append(started)
                _current = None
                ambient.set_engine(None)
            raise


def _check_same(engine: Engine, wanted: Settings, runtime: Runtime, address: str | None) -> None:
    differences = engine.settings.differences(wanted)
    has_runtime, has_address = engine.runtime, engine.address
    if runtime != has_runtime:
        differences.append(f"runtime: {has_runtime!r} != {runtime!r}")
    if address not in (None, has_address):
        differences.append(f"address: {has_address!r} != {address!r}")
    if differences:
        listed = "; ".join(differences)
        msg = f"koan.init(): this process has an engine with other settings ({listed}); call koan.shutdown() first"
        raise ConfigurationError(msg)


def shutdown(engine: Engine | None = None) -> None:
    """Disconnect this process from its engine; nothing happens if it has none, as a forked copy of a process with one.

    Jobs of a cluster go on. With ``runtime="local"``, or where `init` started the local Ray, the engine ends and the jobs
    in its memory are gone.
    """
    global _current  # noqa: PLW0603 - as above
    with _lock:
        if _current is not None and engine in (None, _current):
            _ending.append(_current._runtime)  # noqa: SLF001 - one module
            _current = None
            ambient.set_engine(None)
        _finish()


def _finish() -> None:
    """End what is to be ended."""
    while _ending:
        ended = _ending[-1]
        try:
            ended.session.close("the engine was shut down; call koan.init() to start or join one")
            ended.stop()
        except Exception:
            _ending.remove(ended)
            raise
        _ending.remove(ended)


atexit.register(shutdown)


def _after_fork() -> None:
    """Have no engine in a forked copy of a process with one: neither to use nor to shut down, at its exit or before."""
    global _current, _lock  # noqa: PLW0603 - as above
    _lock = threading.RLock()  # the other one may be held by a thread that is not here
    if _current is not None:
        _inherited.append(_current)
        _current = None


os.register_at_fork(after_in_child=_after_fork)


class Jobs:
    """The control plane: finds and controls jobs of any kind. Not instantiated."""

    @staticmethod
    def get(job_id: str) -> Pending[Job[Any, Any]]:
        """Return the job with this id, as its class if that is defined here; `JobNotFoundError` if there is none."""
        return ambient.engine().get(job_id)

    @staticmethod
    def query(**filters: Any) -> Pending[JobPage[Job[Any, Any]]]:
        """Return a page of jobs, newest first.

        Filters: ``kind``, ``status`` (one or several), ``correlation_id``, ``parent_job_id``, ``name``, ``text``,
        ``metadata={…}``, ``created_after``, ``created_before``, ``completed_after``, ``completed_before``,
        ``has_items`` (True: only jobs over items), ``order_by="-created_at"``, ``limit=100``, ``cursor=None``. The page's
        ``cursor`` leads to the next.

        Raises:
            ConfigurationError: A filter is unknown or has an unusable value.
        """
        return ambient.engine().query(filters)

    @staticmethod
    def stream(**filters: Any) -> JobStream[Job[Any, Any]]:
        """Iterate over all jobs that match: ``async for``, or ``.blocking()``."""
        return JobStream(None, filters)

    @staticmethod
    def count(**filters: Any) -> Pending[int]:
        """Return how many jobs match."""
        return ambient.engine().count(filters)

    @staticmethod
    def cancel(job_id: str, reason: str | None = None) -> Pending[JobStatus]:
        """Cancel a job and its children; returns its status now."""
        return ambient.engine().cancel(job_id, reason)

    @staticmethod
    def retry(job_id: str, *, resume: bool = False) -> Pending[Job[Any, Any]]:
        """Run a failed or cancelled job anew, as a new job.

        ``resume``: a job over items goes on where the old one stopped, with what its items have produced so far;
        `ConflictError` if it has no checkpoint.
        """
        return ambient.engine().retry(job_id, resume=resume)

    @staticmethod
    def remove(job_id: str) -> Pending[None]:
        """Delete a job that has ended, and its executions."""
        return ambient.engine().remove(job_id)

    @staticmethod
    def archive(*, dry_run: bool = False) -> Pending[dict[str, dict[str, int]]]:
        """Apply the archival policies now instead of at the next interval; returns counts by policy.

        ``due`` were to move; ``moved``, ``gone``, ``changed``, ``mismatched`` say what became of them, and ``interrupted``
        counts the sources whose rest waits for the next pass. ``dry_run``: only count.
        """
        return ambient.engine().archive(dry_run=dry_run)

    @staticmethod
    def restore(job_id: str) -> Pending[Job[Any, Any]]:
        """Bring a job back from an archive to where it was; one that is in none stays where it is.

        It stays there for as long as if it had ended now.
        """
        return ambient.engine().restore(job_id)

    @staticmethod
    def executions(job_id: str) -> Pending[list[JobExecution]]:
        """Return a job's executions, oldest first."""
        return ambient.engine().executions(job_id)

    @staticmethod
    def recipe() -> RecipeBuilder:
        """Begin a recipe: run defaults for a job class."""
        return RecipeBuilder()
