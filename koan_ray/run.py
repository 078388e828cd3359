"""The run builder: what a submission says about its job, immutable and fluent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar, cast

from koan_ray import ambient
from koan_ray.definition import encode_metadata
from koan_ray.domain import words
from koan_ray.domain.durations import Duration, seconds
from koan_ray.domain.partitions import check_partition
from koan_ray.domain.texts import quoted
from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from koan_ray.domain.retry import RetryPolicy
    from koan_ray.jobs import Job
    from koan_ray.pending import Pending

J = TypeVar("J", bound="Job[Any, Any]")


class Persistence(NamedTuple):
    """Where a run wants its job kept; None for what the settings say."""

    source: str | None = None
    partition: str | None = None


def persistence(source: object, partition: object) -> Persistence:
    """Return what ``.persist()`` was given; `ConfigurationError` for what is no text, and no name of a partition."""
    for name, value in (("source", source), ("partition", partition)):
        if value is not None and (not isinstance(value, str) or not value.isprintable()):
            msg = f"persist({name}={quoted(value)}): expected the name of a {name} as printable text"
            raise ConfigurationError(msg)
    if isinstance(partition, str):
        check_partition(partition)
    return Persistence(cast("str | None", source), cast("str | None", partition))


class Parent(NamedTuple):
    """The job that a run is started under."""

    id: str
    depth: int
    correlation_id: str | None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything a run says; a recipe's defaults and the run's own calls in one value."""

    persistence: Persistence | None = None  # None: in memory
    audit: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    correlation_id: str | None = None
    name: str | None = None
    description: str | None = None
    delay_s: float = 0.0
    parent: Parent | None = None
    retry: RetryPolicy | None = None
    timeout_s: float | None = None

    def merged(self, metadata: Mapping[str, Any]) -> RunSettings:
        """Return these settings with ``metadata`` merged over what is there."""
        return replace(self, metadata={**self.metadata, **encode_metadata(metadata)})


class _Builder(Generic[J]):
    __slots__ = ("_job_type", "_settings")

    def __init__(self, job_type: type[J], settings: RunSettings) -> None:
        self._job_type, self._settings = job_type, settings

    def _with(self, **changes: Any) -> Self:
        return self._like(replace(self._settings, **changes))

    def _like(self, settings: RunSettings) -> Self:
        raise NotImplementedError

    def persist(self, source: str | None = None, partition: str | None = None) -> Self:
        """Keep the job as documents; None means the default of the settings.

        In a source with the URL ``memory://`` it is kept as without this call: in the engine's memory, while that lives.
        """
        return self._with(persistence=persistence(source, partition))

    def audit(self, enabled: bool = True) -> Self:
        """Keep a document of each execution; ignored while the job is kept in memory."""
        return self._with(audit=bool(enabled))

    def with_metadata(self, mapping: Mapping[str, Any] | None = None, /, **items: Any) -> Self:
        """Merge into the job's metadata.

        Raises:
            InvalidContextError: A key or value cannot be stored.
        """
        given: object = mapping
        if given is not None and not isinstance(given, Mapping):
            msg = f"with_metadata: expected a mapping of names to values, got {quoted(given)}"
            raise ConfigurationError(msg)
        return self._like(self._settings.merged({**(mapping or {}), **items}))

    def with_correlation(self, correlation_id: str) -> Self:
        """Use this instead of the current trace id."""
        return self._with(correlation_id=words.correlation_id(correlation_id, "with_correlation"))

    def named(self, name: str, description: str | None = None) -> Self:
        """Give the job a name, and say what it is for, for people."""
        return self._with(name=words.job_name(name), description=words.description(description))

    def delayed(self, duration: Duration) -> Self:
        """Let it begin no sooner than ``duration`` (`timedelta` or seconds) after it was accepted."""
        return self._with(delay_s=seconds(duration, name="delayed"))

    def child_of(self, job: Job[Any, Any], *, key: str | None = None) -> Self:
        """Put it below ``job`` in the tree; ``key`` as in `Job.start_child`."""
        view = getattr(job, "_view", None)
        if view is None:
            msg = f"child_of: expected a job in hand, got {quoted(job)}; get one with Jobs.get(id)"
            raise ConfigurationError(msg)
        return self._with(parent=Parent(view.id, view.depth, view.correlation_id, words.child_key(key)))


class JobRunBuilder(_Builder[J]):
    """One job about to be submitted. Every call returns a new builder; nothing happens before `run`."""

    __slots__ = ("_context",)

    def __init__(self, job_type: type[J], settings: RunSettings, context: bytes) -> None:
        super().__init__(job_type, settings)
        self._context = context

    def _like(self, settings: RunSettings) -> Self:
        return type(self)(self._job_type, settings, self._context)

    def run(self) -> Pending[J]:
        """Submit; resolves to the job when the engine has accepted it."""
        return cast("Pending[J]", ambient.engine().submit(self._job_type, self._context, self._settings))


class JobManyBuilder(_Builder[J]):
    """Many jobs about to be submitted; one shot when its contexts are a generator."""

    __slots__ = ("_contexts",)

    def __init__(self, job_type: type[J], settings: RunSettings, contexts: Iterable[Any]) -> None:
        super().__init__(job_type, settings)
        self._contexts = contexts

    def _like(self, settings: RunSettings) -> Self:
        return type(self)(self._job_type, settings, self._contexts)

    def run(self) -> Pending[list[J]]:
        """Submit; resolves to the jobs, in the order of the contexts, when the engine has accepted all."""
        pending = ambient.engine().submit_many(self._job_type, self._contexts, self._settings)
        return cast("Pending[list[J]]", pending)
