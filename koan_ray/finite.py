"""`FiniteJob`: one job over many items, each of which ends as processed, skipped or failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

from koan_ray import ambient
from koan_ray.domain.durations import Duration, bound
from koan_ray.domain.retry import RetryPolicy
from koan_ray.errors import ConfigurationError
from koan_ray.jobs import Job

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from koan_ray.cancellation import CancellationToken
    from koan_ray.pending import Pending
    from koan_ray.progress import JobProgress
    from koan_ray.values import Values

C = TypeVar("C")
R = TypeVar("R")
I = TypeVar("I")  # noqa: E741 - the item, beside context and result


class ItemResult:
    """What became of one item: `success`, `skipped` or `failed`."""

    __slots__ = ("outcome", "reason", "value")

    outcome: str  # success, skipped, failed
    value: Any
    reason: object

    def __init__(self, outcome: str, value: Any = None, reason: object = None) -> None:
        self.outcome, self.value, self.reason = outcome, value, reason

    @staticmethod
    def success(value: Any = None) -> ItemResult:
        """The item is processed. A ``value`` other than None becomes one of `FiniteSummary.values`.

        Values of builtin types come back as they were: numbers, texts, bytes, tuples, sets, dicts, instants, decimals. A
        model or a dataclass comes back as a dict of its fields, anything else as JSON has it: a path as its text.
        """
        return _SUCCESS if value is None else Success(value)

    @staticmethod
    def skipped(reason: str | None = None) -> ItemResult:
        """The item needs no processing."""
        return ItemResult("skipped", None, reason)

    @staticmethod
    def failed(error: object) -> ItemResult:
        """The item could not be processed; as if ``error``, an exception or a text, had been raised.

        It is tried again as `ItemOptions.retry` says. To give an item up at once, raise `NonRetryable`.
        """
        return ItemResult("failed", None, error)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ItemResult) and (self.outcome, self.value, self.reason) == (
            other.outcome, other.value, other.reason
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash(self.outcome)

    def __reduce__(self) -> Any:
        if self.outcome == "success":  # its other members belong to the class
            return ItemResult.success, (self.value,)
        return ItemResult, (self.outcome, self.value, self.reason)

    def __repr__(self) -> str:
        shown = self.value if self.outcome == "success" else self.reason
        return f"ItemResult.{self.outcome}({'' if shown is None else repr(shown)})"


class Success(ItemResult):
    """A success with a value; quick to make, as there may be millions."""

    __slots__ = ()
    outcome = "success"  # of all of them
    reason = None

    def __init__(self, value: Any) -> None:
        self.value = value


_SUCCESS = ItemResult("success")


@dataclass(frozen=True, slots=True)
class ItemOptions:
    """How a `FiniteJob` goes through its items.

    Args:
        max_workers: Job actors that work on the items at a time; None for all that the engine may have.
        chunk_size: Items that go to an actor together; None to choose it by the time that items take.
        retry: When an item that failed is tried again; by default it is not. A waiting item holds no actor.
        max_failed_items: How many items may fail before the job does: a count, or a share of all items (0.0 to 1.0, as a
            float). None: any number. With 0 the first failed item fails the job.
        checkpoint_every: Between two checkpoints; `timedelta` or seconds, at least 0.05. What an actor or an engine that
            dies has done since the last one is done again.
        concurrency: Items that one actor processes at a time, where ``process_item`` is ``async def``.
        ordered: `FiniteSummary.values` come in the order of the items; otherwise in that of their ends.
        keep_values: Keep what `ItemResult.success` was given.
        verify_items: When a job goes on after a loss, check that ``get_items`` still gives the items that were processed.
            Turn it off for items that never look the same twice.

    Raises:
        ConfigurationError: A value is out of its range; the message names it.
    """

    max_workers: int | None = None
    chunk_size: int | None = None
    retry: RetryPolicy = field(default_factory=lambda: RetryPolicy(max_attempts=1))
    max_failed_items: int | float | None = None
    checkpoint_every: Duration = timedelta(seconds=1)
    concurrency: int = 16
    ordered: bool = False
    keep_values: bool = True
    verify_items: bool = True

    def __post_init__(self) -> None:
        for name, most in (("max_workers", 100_000), ("chunk_size", 1_000_000), ("concurrency", 10_000)):
            value = getattr(self, name)
            if value is None and name != "concurrency":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                msg = f"ItemOptions.{name}: expected a whole number from 1 to {most:,}, got {value!r}"
                raise ConfigurationError(msg)
        retry: object = self.retry
        if not isinstance(retry, RetryPolicy):
            msg = f"ItemOptions.retry: expected a RetryPolicy, got {retry!r}"
            raise ConfigurationError(msg)
        self._check_max_failed()
        every_s = bound(self.checkpoint_every, name="ItemOptions.checkpoint_every")
        if every_s < 0.05:
            msg = f"ItemOptions.checkpoint_every: expected at least 0.05 s, got {every_s:g} s"
            raise ConfigurationError(msg)
        object.__setattr__(self, "checkpoint_every", timedelta(seconds=every_s))

    def _check_max_failed(self) -> None:
        most: object = self.max_failed_items
        if most is None or (isinstance(most, int) and not isinstance(most, bool) and most >= 0):
            return
        if not isinstance(most, float) or not 0.0 <= most <= 1.0:
            msg = (
                f"ItemOptions.max_failed_items: expected a count of at least 0, or a share between 0.0 and 1.0, got {most!r}"
            )
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class FiniteSummary:
    """How the items of a job have ended; ``total_items`` is the sum of the three counts.

    Shape: ``values`` iterates over what `ItemResult.success` was given, from the beginning each time, reading page by
    page; empty where the job keeps none. `koan_ray.values.Values` says where they can be written to. ``skip_reasons`` has
    the first hundred different reasons with their counts.
    Units: ``duration`` is the time that the job has run, over all its attempts.
    """

    total_items: int
    processed_items: int
    failed_items: int
    skipped_items: int
    duration: timedelta
    values: Values
    skip_reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeadItem:
    """An item that has failed for good.

    Shape: ``item`` is the item as JSON shows it, or its ``repr`` as text where JSON cannot. ``attempts`` counts how often
    it was tried.
    """

    index: int
    item: Any
    error_type: str
    error_message: str
    attempts: int
    stack_trace: str = ""

    @property
    def error(self) -> str:
        """The error as ``Type: message``."""
        return f"{self.error_type}: {self.error_message}" if self.error_message else self.error_type


class FiniteJob(Job[C, R], Generic[C, R, I]):
    """A job that does the same to each of many items, on many actors, and records how each one ended.

    ::

        class ExportJob(koan.FiniteJob[ExportContext, ExportResult, Media]):
            items = koan.ItemOptions(max_failed_items=0.01)

            def get_items(self, context):
                yield from catalogue(context.shelf)

            def process_item(self, item, index, progress):
                return koan.ItemResult.success(export(item))

            def build_result(self, summary):
                return ExportResult(exported=summary.processed_items)

    Items go to the actors in chunks, pickled; they are read no faster than they are processed. ``self`` is one object for
    all items that an actor processes for a job, so a `functools.cached_property` is made once there, and ``self.context`` is
    the job's. Items are processed at least once: one that was running when its process vanished is processed again.

    A job that goes on after a loss reads its items from the beginning and passes over those that have ended. Where that
    takes long, give it two more methods: ``get_cursor(self, item)`` returns, as JSON, where the source stands after this
    item, and ``resume_from(self, context, cursor)`` returns the items that follow.
    """

    items: ClassVar[ItemOptions] = ItemOptions()
    _koan_items: ClassVar[ItemOptions] = items  # by which `Definition` knows a job over items
    _context_read: Any = None

    @property
    def context(self) -> C:
        """What the job was started with, as the declared type; read once, as every item may ask for it."""
        if self._context_read is None:
            object.__setattr__(self, "_context_read", (super().context,))  # as `Job._in_hand` sets the view
        return cast("C", self._context_read[0])

    def get_items(self, context: C) -> Any:
        """Return the items: an iterable, a generator, an async generator or a Ray Dataset (its rows).

        Called again when the job goes on after a loss or a failure; then it must give the same items in the same order.
        """
        raise NotImplementedError

    def process_item(self, item: I, index: int, progress: JobProgress) -> Any:
        """Process one item and return an `ItemResult`; ``def`` or ``async def``.

        Raise `NonRetryable` to give the item up at once; anything else that is raised fails this attempt of the item.

        Args:
            item: The item.
            index: Its place among all items, from 0.
            progress: What a long item reports here, its message, is shown with the job's own progress;
                ``progress.cancellation_requested`` tells it to stop.
        """
        raise NotImplementedError

    def build_result(self, summary: FiniteSummary) -> Any:
        """Return the job's result; called once all items have ended. ``def`` or ``async def``."""
        raise NotImplementedError

    get_items._koan_missing = True  # type: ignore[attr-defined]  # noqa: SLF001 - read by Definition
    process_item._koan_missing = True  # type: ignore[attr-defined]  # noqa: SLF001
    build_result._koan_missing = True  # type: ignore[attr-defined]  # noqa: SLF001

    async def execute(self, context: C, progress: JobProgress, cancellation: CancellationToken) -> Any:
        """Go through the items; not to be overridden."""
        attempt = ambient.attempt.get()
        if attempt is None:
            msg = f"job class {type(self).__qualname__}: execute is called by the engine; use {type(self).__name__}.start(…)"
            raise ConfigurationError(msg)
        return await attempt.conduct(self, context, progress, cancellation)

    execute._koan_conducts = True  # type: ignore[attr-defined]  # noqa: SLF001 - read by Definition

    @property
    def items_processed(self) -> int:
        """Items that have ended as processed, as of the last checkpoint that `refresh` or `wait` has seen."""
        return self._view.items.processed if self._view.items is not None else 0

    @property
    def items_skipped(self) -> int:
        """Items that have ended as skipped."""
        return self._view.items.skipped if self._view.items is not None else 0

    @property
    def items_failed(self) -> int:
        """Items that have failed for good."""
        return self._view.items.failed if self._view.items is not None else 0

    @property
    def items_total(self) -> int | None:
        """How many items there are; None before that is known."""
        return self._view.items.total if self._view.items is not None else None

    def failed_items(self) -> Pending[list[DeadItem]]:
        """Return the items that have failed for good, in the order of their ends."""
        return ambient.engine().failed_items(self.id)

    def export_failed_items(self, path: str | os.PathLike[str]) -> Pending[int]:
        """Write the items that have failed for good to a file, one JSON object a line; resolves to how many there are.

        Shape: ``index, item, error_type, error_message, stack_trace, attempts``, as in `DeadItem`.
        """
        return ambient.engine().export_failed_items(self.id, path)

    def retry_failed_items(self) -> Pending[Self]:
        """Run the items that have failed for good, and only those, as a new job. This one must have ended."""
        return cast("Pending[Self]", ambient.engine().retry_failed_items(self.id))
