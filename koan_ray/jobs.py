"""`Job`: what users subclass, and what they hold of a submitted job."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import types
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar, cast, overload

from koan_ray import ambient
from koan_ray.declared import evaluated
from koan_ray.definition import Definition, Resources
from koan_ray.domain import words
from koan_ray.domain.durations import Duration, instant, patience
from koan_ray.domain.retry import RetryPolicy
from koan_ray.domain.status import Claim, ExecutionStatus, Isolation, JobStatus, ParentPolicy
from koan_ray.errors import ConfigurationError, JobDefinitionError
from koan_ray.exact import revived
from koan_ray.listing import JobPage, JobStream
from koan_ray.progress import ProgressStream, Subscription, subscribe
from koan_ray.registry import register
from koan_ray.run import JobManyBuilder, JobRunBuilder, RunSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from koan_ray.cancellation import CancellationToken
    from koan_ray.domain.records import JobView
    from koan_ray.pending import Pending
    from koan_ray.progress import JobProgress, JobProgressUpdate

C = TypeVar("C")
R = TypeVar("R")
J = TypeVar("J", bound="Job[Any, Any]")


@dataclass(frozen=True, slots=True)
class JobExecution:
    """One try of a job.

    Shape: ``error_message`` holds at most 2000 characters, ``stack_trace`` 4000. ``exception`` is the live exception and
    only there in `CustomRetryPolicy` methods; it is never stored. ``metrics`` has ``node_id, actor_id, pid, cpu_seconds,
    peak_rss, queue_wait`` and, for a stopped one, ``stopped_by``: token, cancelled_error or kill.
    Units: seconds and bytes in ``metrics``.
    """

    id: str
    job_id: str
    attempt_number: int
    started_at: datetime
    completed_at: datetime | None
    status: ExecutionStatus
    reason: str | None
    error_type: str | None
    error_message: str | None
    stack_trace: str | None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    exception: BaseException | None = field(default=None, compare=False)

    @property
    def duration(self) -> timedelta | None:
        """How long it took; None while it runs."""
        return None if self.completed_at is None else self.completed_at - self.started_at


@dataclass(frozen=True, slots=True)
class JobDetails:
    """What the engine keeps of a job besides what its attributes say.

    ``reason`` says why it waits, has failed or was cancelled; of one that cannot run at present, what it waits for.
    ``crashes`` are attempts whose process vanished. ``due_at`` is when a waiting job is due. ``source`` is None for a job
    in the engine's memory. ``actor`` and ``node`` are where it runs, or ran last as far as that is kept.
    """

    attempts: int
    crashes: int
    reason: str | None
    due_at: datetime | None
    retry_of: str | None
    retried_by: str | None
    source: str | None
    partition: str
    actor: str | None
    node: str | None


class Job(Generic[C, R]):
    """A unit of work with a typed context ``C`` and result ``R``.

    Subclass it and define ``execute``; see the package docstring of `koan_ray` for an example. An instance stands for one
    submitted job: in a driver what `run` returns, inside ``execute`` the job that runs. Its attributes are as of the last
    `refresh` or `wait`. Instances are made by the engine, ``__init__`` is not called.

    ``claim = "write_ahead"`` has the body wait until it is stored that it runs, with an execution if the job is audited: for
    effects that must be accounted for before they happen. It costs a write before each attempt, and says something of
    persisted jobs only: those in memory ignore it. Otherwise that a job runs is written within a moment of its beginning,
    and a body that a crash of the coordinator hits in that moment may run again with no trace of the first time.
    """

    kind: ClassVar[str] = "Job"
    retry: ClassVar[RetryPolicy] = RetryPolicy()
    timeout: ClassVar[Duration | None] = None
    resources: ClassVar[Resources] = Resources()
    isolation: ClassVar[Isolation] = Isolation.POOLED
    concurrency: ClassVar[int] = 1
    when_parent_ends: ClassVar[ParentPolicy] = ParentPolicy.CANCEL
    claim: ClassVar[Claim | Literal["write_behind", "write_ahead"]] = Claim.WRITE_BEHIND

    definition: ClassVar[Definition]
    _koan_root: ClassVar[bool] = True
    _view: JobView
    _is_removed = False
    _chunk: Any = None  # jobs that were accepted with this one

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.definition = Definition(cls)
        cls.kind = cls.definition.kind
        if cls.definition.has_body:
            register(cls.kind, cls)

    def execute(self, context: C, progress: JobProgress, cancellation: CancellationToken) -> Any:
        """Do the work and return the result; ``async def`` or plain ``def``.

        Raise `NonRetryable` to fail for good, `Reschedule` to run later; anything else fails the attempt.
        """
        raise NotImplementedError

    execute._koan_missing = True  # type: ignore[attr-defined]  # noqa: SLF001 - read by Definition

    # --- start -----------------------------------------------------------------------------------------------------

    @classmethod
    def start(cls, context: Any = None, correlation_id: str | None = None) -> JobRunBuilder[Self]:
        """Return a builder for one job; ``.run()`` submits it.

        Raises:
            InvalidContextError: The context does not fit the declared type; the error names the fields.
            JobDefinitionError: The class has no ``execute``.
        """
        cls._require_body()
        encoded = cls.definition.encode_context(context)
        return JobRunBuilder(cls, RunSettings(correlation_id=words.correlation_id(correlation_id, "start")), encoded)

    @classmethod
    def start_many(cls, contexts: Iterable[Any], correlation_id: str | None = None) -> JobManyBuilder[Self]:
        """Return a builder for many jobs, one for each context; the fast way in.

        ``contexts`` is read while earlier ones are already submitted, so it may be a generator of any length. One that
        is refused fails the whole call, and the jobs accepted before it are cancelled.
        """
        cls._require_body()
        return JobManyBuilder(cls, RunSettings(correlation_id=words.correlation_id(correlation_id, "start_many")), contexts)

    @classmethod
    def _require_body(cls) -> None:
        if "definition" not in vars(cls) or not cls.definition.has_body:
            needs = "execute(self, context, progress, cancellation)"
            if "definition" in vars(cls) and cls.definition.is_finite:
                needs = "get_items(self, context), process_item(self, item, index, progress), build_result(self, summary)"
            msg = f"job class {cls.__qualname__} has no body; define {needs}"
            raise JobDefinitionError(msg)

    # --- find ------------------------------------------------------------------------------------------------------

    @classmethod
    def get(cls, job_id: str) -> Pending[Self]:
        """Return the job with this id; `JobNotFoundError` if there is none of this kind."""
        return cast("Pending[Self]", ambient.engine().get(job_id, cls._as_filter()))

    @classmethod
    def query(cls, **filters: Any) -> Pending[JobPage[Self]]:
        """Return a page of this kind's jobs; filters as in `Jobs.query`."""
        return cast("Pending[JobPage[Self]]", ambient.engine().query(filters, cls._as_filter()))

    @classmethod
    def stream(cls, **filters: Any) -> JobStream[Self]:
        """Iterate over all jobs of this kind that match, page by page; ``async for``, or ``.blocking()``."""
        return JobStream(cls._as_filter(), filters)

    @classmethod
    def count(cls, **filters: Any) -> Pending[int]:
        """Return how many jobs of this kind match."""
        kind = {} if cls is Job else {"kind": cls.kind}
        return ambient.engine().count(filters | kind)

    @classmethod
    def _as_filter(cls) -> type[Self] | None:
        return None if cast("Any", cls) is Job else cls

    # --- a job in hand ---------------------------------------------------------------------------------------------

    @classmethod
    def _in_hand(cls, view: JobView) -> Self:
        try:
            job = object.__new__(cls)
        except TypeError:
            job = cls.__new__(cls)  # a builtin among its bases makes its instances itself; one that is abstract raises again
        object.__setattr__(job, "_view", view)  # a frozen dataclass, or a `__setattr__` of its own, has no say in this
        if cls is Job:  # its class is not defined in this process
            job.kind = view.kind  # type: ignore[misc]
        return job

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.kind!r} {self.id} {self.status}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self._view)

    @property
    def id(self) -> str:
        """UUIDv7; sorts by creation."""
        return self._view.id

    @property
    def status(self) -> JobStatus:
        """Where the job is in its life."""
        return JobStatus(self._view.status)

    @property
    def context(self) -> C:
        """What the job was started with, as the declared type."""
        if "definition" not in vars(type(self)):
            return cast("C", revived(json.loads(self._view.context)))
        return cast("C", self.definition.context_codec.read(self._view.context))

    @property
    def result(self) -> R | None:
        """What the body returned; None before."""
        encoded = self._view.result
        if encoded is None:
            return None
        if "definition" not in vars(type(self)):
            return cast("R", revived(json.loads(encoded)))
        return cast("R", self.definition.decode_result(encoded))

    @property
    def name(self) -> str | None:
        """A name for people."""
        return self._view.name

    @property
    def description(self) -> str | None:
        """What it is for, for people."""
        return self._view.description

    @property
    def last_error(self) -> str | None:
        """The last attempt's error as ``Type: message``."""
        return None if self._view.error is None else str(self._view.error)

    @property
    def progress(self) -> float:
        """0 to 1, as last reported; 1 when completed."""
        if self._view.status == JobStatus.COMPLETED:
            return 1.0
        return self._view.progress.percentage if self._view.progress else 0.0

    @property
    def progress_message(self) -> str | None:
        """What was going on, as last reported."""
        return self._view.progress.message if self._view.progress else None

    @property
    def current_step(self) -> int | None:
        """The step reached, where the job counts steps."""
        return self._view.progress.current_step if self._view.progress else None

    @property
    def total_steps(self) -> int | None:
        """How many steps there are, where the job counts steps."""
        return self._view.progress.total_steps if self._view.progress else None

    @property
    def estimated_completion(self) -> datetime | None:
        """When it may be done, by its average speed; None when unknown or ended."""
        return None if self.status.is_final or not self._view.progress else instant(self._view.progress.estimated_at)

    @property
    def correlation_id(self) -> str | None:
        """The trace id that was current at `run`, or what `with_correlation` said."""
        return self._view.correlation_id

    @property
    def parent_job_id(self) -> str | None:
        """The job that started this one as its child."""
        return self._view.parent_job_id

    @property
    def metadata(self) -> dict[str, Any]:
        """What `with_metadata` said; plain JSON values."""
        return dict(self._view.metadata or {})

    @property
    def created_at(self) -> datetime:
        """When `run` was called."""
        return cast("datetime", instant(self._view.created_at))

    @property
    def queued_at(self) -> datetime | None:
        """When the engine accepted it."""
        return instant(self._view.queued_at)

    @property
    def started_at(self) -> datetime | None:
        """When its first attempt began."""
        return instant(self._view.started_at)

    @property
    def completed_at(self) -> datetime | None:
        """When it reached its final status."""
        return instant(self._view.completed_at)

    @property
    def duration(self) -> timedelta | None:
        """From the first attempt's begin to the end; None before."""
        if self._view.started_at is None or self._view.completed_at is None:
            return None
        return timedelta(seconds=max(0.0, self._view.completed_at - self._view.started_at))

    @property
    def last_modified(self) -> datetime:
        """When the engine last changed it."""
        return cast("datetime", instant(self._view.last_modified or self._view.created_at))

    # --- act -------------------------------------------------------------------------------------------------------

    def wait(self, timeout: Duration | None = None) -> Pending[R]:
        """Return the result when the job has completed.

        Args:
            timeout: `timedelta` or seconds; the job goes on when it has passed.

        Raises:
            JobFailedError: It ended as failed.
            JobCancelledError: It ended as cancelled.
            JobLostError: It lived in the memory of a coordinator that has died.
            JobNotFoundError: It was removed or has expired.
            TimeoutError: It has not ended in time.
        """
        return cast("Pending[R]", ambient.engine().wait(self, patience(timeout, name="timeout")))

    def refresh(self) -> Pending[Self]:
        """Update this object to what the engine knows now, and return it."""
        return cast("Pending[Self]", ambient.engine().refresh(self))

    def cancel(self, reason: str | None = None) -> Pending[JobStatus]:
        """Ask for the end of the job and its children; the status now. ``CANCELLED`` is final, ``RUNNING`` ends soon."""
        return ambient.engine().cancel(self.id, reason)

    def remove(self) -> Pending[None]:
        """Delete the job and its executions; it must have ended. Waiting for it afterwards is an error."""
        removal = ambient.engine().remove(self.id)

        def removed() -> None:
            object.__setattr__(self, "_is_removed", removal.succeeded)

        if not removal._on_done(removed):  # noqa: SLF001 - at once: `wait` looks at it
            removed()
        return removal

    def details(self) -> Pending[JobDetails]:
        """Return what the engine keeps of this job besides its attributes: attempts, why it waits, where it is."""
        return ambient.engine().details(self.id)

    def executions(self) -> Pending[list[JobExecution]]:
        """Return the tries of this job, oldest first."""
        return ambient.engine().executions(self.id)

    def on_progress(self, handler: Callable[[JobProgressUpdate], Any]) -> Subscription:
        """Call ``handler`` with the latest state now, with each newer one, and last with the final status.

        A coroutine function is called on the running loop, or on a loop of its own in a thread when none runs.
        """
        return subscribe(handler, self._watch)

    def progress_stream(self) -> ProgressStream:
        """Iterate over the progress: ``async for``, or ``.blocking()``; ends with the job."""
        return ProgressStream(self._watch)

    def show_progress(self) -> Pending[JobStatus]:
        """Show a bar until the job ends; resolves to its final status, whatever that is.

        The bar has status, name, percentage, time, time left and the job's message; a job over items tells how many have
        ended, failed and been skipped. It is drawn in a terminal and in Jupyter (which needs ipywidgets); elsewhere each
        change is a line. Whoever looks away changes nothing for the job.

        ::

            job.show_progress().get()  # in a script; in a notebook also: await job.show_progress()

        Raises:
            ConfigurationError: Rich is not installed.
        """
        try:  # by name: what draws stands above, with the command line
            bars = importlib.import_module("koan_ray.cli.bars")
        except ImportError as error:
            msg = f"show_progress needs Rich ({error}): install koan-ray[cli], or use progress_stream()"
            raise ConfigurationError(msg) from error
        return cast("Pending[JobStatus]", bars.show(self))

    def _watch(self, deliver: Callable[[Any], None]) -> Callable[[], None]:
        return ambient.engine().watch(self, deliver)

    # --- tree ------------------------------------------------------------------------------------------------------

    def start_child(self, job_type: type[J], context: Any = None, *, key: str | None = None) -> JobRunBuilder[J]:
        """Return a builder for a job below this one.

        Args:
            job_type: The child's class.
            context: The child's context.
            key: Names the child under this parent: started again with the same key (by a parent that runs again), the
                same job is joined instead of a second one started.
        """
        return job_type.start(context).child_of(self, key=key)

    @overload
    def get_children(self) -> Pending[list[Job[Any, Any]]]: ...
    @overload
    def get_children(self, job_type: type[J]) -> Pending[list[J]]: ...
    def get_children(self, job_type: type[Any] | None = None) -> Pending[list[Any]]:
        """Return the jobs started as children of this one, oldest first; of one class if given."""
        return ambient.engine().children(self.id, job_type)

    @overload
    def get_parent(self) -> Pending[Job[Any, Any] | None]: ...
    @overload
    def get_parent(self, job_type: type[J]) -> Pending[J | None]: ...
    def get_parent(self, job_type: type[Any] | None = None) -> Pending[Any]:
        """Return the parent; None for a job without one."""
        return ambient.engine().parent(self, job_type)


def _rebuild(job_type: type[J], view: JobView) -> J:
    return job_type._in_hand(view)  # noqa: SLF001 - the other half of Job.__reduce__


F = TypeVar("F", bound="Callable[..., Any]")


@overload
def job(function: Callable[..., Any], /) -> type[Job[Any, Any]]: ...
@overload
def job(**attributes: Any) -> Callable[[Callable[..., Any]], type[Job[Any, Any]]]: ...
def job(function: Callable[..., Any] | None = None, /, **attributes: Any) -> Any:
    """Make a job class of a function: ``@koan.job`` or ``@koan.job(kind="send", timeout=60)``.

    The function's first parameter is the context, its annotation the context type; the return annotation is the result
    type. Parameters named ``progress`` and ``cancellation`` are optional.

    Raises:
        JobDefinitionError: The signature does not fit, or an attribute is none that a job class may set.
    """
    around = sys._getframe(1).f_locals  # noqa: SLF001 - where the names in the annotations of a local function are
    if function is None:
        return lambda later: _job_class(later, attributes, around)
    return _job_class(function, attributes, around)


_ATTRIBUTES = ("kind", "retry", "timeout", "resources", "isolation", "concurrency", "when_parent_ends", "claim")
_BY_NAME = ("progress", "cancellation")


def _job_class(function: Callable[..., Any], attributes: dict[str, Any], around: Mapping[str, Any]) -> type[Job[Any, Any]]:
    name = getattr(function, "__name__", repr(function))
    unknown = [attribute for attribute in attributes if attribute not in _ATTRIBUTES]
    if unknown or not inspect.isfunction(function):
        msg = f"@koan.job {name}: " + (
            f"{unknown[0]!r} is no job attribute; allowed: {', '.join(_ATTRIBUTES)}" if unknown
            else f"expected a function, got {function!r}"
        )  # fmt: skip
        raise JobDefinitionError(msg)
    parameters = list(inspect.signature(function).parameters.values())
    by_name = [p.name for p in parameters if p.name in _BY_NAME]
    others = [p for p in parameters if p.name not in _BY_NAME and p.default is p.empty]
    contexts = [p for p in parameters if p.name not in _BY_NAME and p.kind is not p.VAR_KEYWORD]
    if len(others) > 1 or (
        contexts and contexts[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
    ):
        signature = inspect.signature(function)
        msg = f"@koan.job {name}{signature}: expected {name}(context, progress, cancellation), the last two optional"
        raise JobDefinitionError(msg)
    context_type = _annotation(function, contexts[0].name, around) if contexts else None
    body = dict(attributes)
    body.update(
        execute=_as_method(function, takes_context=bool(contexts), by_name=tuple(by_name)),
        __module__=function.__module__,
        __qualname__=function.__qualname__,
        __doc__=function.__doc__,
        function=staticmethod(function),
    )
    base = Job[context_type, _annotation(function, "return", around)]  # type: ignore[valid-type,misc]
    return cast("type[Job[Any, Any]]", types.new_class(name, (base,), {}, lambda namespace: namespace.update(body)))


def _annotation(function: Callable[..., Any], name: str, around: Mapping[str, Any]) -> Any:
    """Return the type that a function declares for a parameter, or for ``return``; as written, if it is not defined yet.

    Only this one annotation is looked at: what others name may be there for type checkers alone.
    """
    inner: Any = inspect.unwrap(function)
    written = inner.__annotations__.get(name, Any)
    try:
        return evaluated(written, inner.__globals__, around)
    except NameError:
        return written


def _as_method(function: Callable[..., Any], *, takes_context: bool, by_name: tuple[str, ...]) -> Callable[..., Any]:
    def call(context: Any, progress: JobProgress, cancellation: CancellationToken) -> Any:
        given = {"progress": progress, "cancellation": cancellation}
        named = {name: given[name] for name in by_name}
        return function(context, **named) if takes_context else function(**named)

    if inspect.iscoroutinefunction(function):

        async def execute_async(_job: Any, context: Any, progress: JobProgress, cancellation: CancellationToken) -> Any:
            return await call(context, progress, cancellation)

        return execute_async

    def execute(_job: Any, context: Any, progress: JobProgress, cancellation: CancellationToken) -> Any:
        return call(context, progress, cancellation)

    return execute
