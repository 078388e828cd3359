"""What the engine needs from the outside, as protocols, and the messages that cross them.

The engine is handed a `Clock`, a random source, a `JobStore` and a `Launcher`; it reaches for none of them itself.
Implementations: `koan_ray.stores`, `koan_ray.runtime`, and for tests `koan_ray.testing`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from koan_ray.domain.records import (
    ActorSpec,
    Checkpoint,
    ErrorInfo,
    ExecutionRecord,
    JobRecord,
    Part,
    Particulars,
    Progress,
    Terms,
)
from koan_ray.domain.retry import Advice

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Sequence

    from koan_ray.domain.feasibility import Node
    from koan_ray.domain.lease import Lease
    from koan_ray.domain.query import Page, Query
    from koan_ray.domain.status import JobStatus


# --- time ------------------------------------------------------------------------------------------------------------


class TimerHandle(Protocol):
    """A call that is going to happen."""

    def cancel(self) -> None:
        """Make it not happen, if it has not yet."""


class Clock(Protocol):
    """Time as the engine knows it."""

    def now(self) -> float:
        """Return the wall clock in epoch seconds; only for time stamps and due times."""

    def monotonic(self) -> float:
        """Return seconds that never go back; for durations and timeouts."""

    def call_later(self, delay_s: float, action: Callable[[], None]) -> TimerHandle:
        """Call ``action`` on the engine's loop after ``delay_s`` seconds."""


class LoopClock:
    """The real time, with timers on an asyncio loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)

    def call_later(self, delay_s: float, action: Callable[[], None]) -> TimerHandle:
        """Call ``action`` on the loop after ``delay_s`` seconds."""
        if self._loop is None:
            msg = "this clock was made without a loop and has no timers"
            raise RuntimeError(msg)
        return self._loop.call_later(delay_s, action)


# --- log --------------------------------------------------------------------------------------------------------------


class Log(Protocol):
    """Where the engine tells what happened: constant events in the past tense, with fields. structlog's loggers fit."""

    def bind(self, **fields: Any) -> Log:
        """Return a log that adds these fields to each event."""

    def debug(self, event: str, **fields: Any) -> Any:
        """For who looks closely."""

    def info(self, event: str, **fields: Any) -> Any:
        """A state has changed."""

    def warning(self, event: str, **fields: Any) -> Any:
        """Something went wrong and the engine coped."""

    def error(self, event: str, **fields: Any) -> Any:
        """A person is needed."""


class Silence:
    """A `Log` that nobody reads."""

    def bind(self, **fields: Any) -> Silence:
        """Stay silent."""
        return self

    def debug(self, event: str, **fields: Any) -> None:
        """Say nothing."""

    def info(self, event: str, **fields: Any) -> None:
        """Say nothing."""

    def warning(self, event: str, **fields: Any) -> None:
        """Say nothing."""

    def error(self, event: str, **fields: Any) -> None:
        """Say nothing."""


# --- store -----------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """One guarded write: ``job`` replaces the stored record only while that has ``rev == expect``.

    Shape: ``expect`` 0 inserts and is refused where the id exists. ``executions`` are upserted with the job; an execution
    that is already closed in the store is never rewritten.
    """

    job: JobRecord
    expect: int
    executions: tuple[ExecutionRecord, ...] = ()


class JobStore(Protocol):
    """One opened source: where job and execution records are kept. Passed by `koan_ray.testing.contracts.StoreContract`.

    A source has partitions, named sets of records; ``""`` is the one without a name. ``job.particulars.residence`` says in
    which partition a record belongs and whether its executions are kept (``audit``).
    """

    async def apply(self, changes: Sequence[Change]) -> list[Change]:
        """Write all changes whose guard holds and return the others, which changed nothing.

        When this returns, what it wrote is durable to the degree the store promises. Changes are independent: one that
        is refused does not hold up its neighbours. The store keeps each record as given, with its ``rev``. A job is
        written before its executions: a crash between leaves an execution open, which `open_executions` finds.

        Raises:
            StoreUnavailableError: It is unknown which changes were written; repeat the call, then read back what is refused.
            RecordRefusedError: No document can hold the records that it names, whatever their guards; the others may be
                written or not. Repeat the call without these.
        """

    def objection(self, record: JobRecord | ExecutionRecord) -> str | None:
        """Return why this record can never be written, found without asking anybody; None where nothing is in the way.

        Asked after ``apply`` has raised something that is no `StoreError`, to find the record that was its cause.
        """

    async def file_executions(self, changes: Sequence[Change]) -> None:
        """Write the executions of changes whose jobs are written; those that are closed already stay as they are."""

    async def get(self, job_id: str) -> JobRecord | None:
        """Return the record of a job as last written, whatever its partition."""

    async def executions(self, job_id: str) -> list[ExecutionRecord]:
        """Return a job's executions, oldest first."""

    async def query(self, query: Query) -> Page:
        """Return one page of records; see `koan_ray.domain.query`."""

    async def count(self, query: Query) -> int:
        """Return how many records match, ignoring limit and cursor."""

    async def remove(self, job_id: str) -> bool:
        """Delete a job with its executions and parts; false if there was none."""

    async def expire(self, now: float) -> int:
        """Delete what has outlived its retention and return how many jobs that were."""

    async def write_parts(self, partition: str, parts: Sequence[Part]) -> None:
        """Keep parts of jobs of a partition, durably. One with the same job, stream and number is replaced.

        Only one with a ``fence`` that is not higher: what a superseded execution still writes changes nothing where its
        successor has written, and that is no error. May be repeated.

        Raises:
            LimitExceededError: The store has a limit for parts; nothing was written.
            StoreUnavailableError: It is unknown which parts were written; repeat the call.
        """

    async def read_parts(self, partition: str, job_id: str, stream: str, after: int = -1, limit: int = 50) -> list[Part]:
        """Return the parts of a job's stream that follow number ``after``, in order.

        At most ``limit``, and fewer where they are large: a page of the answer has about 8 MiB. Empty only at the end.
        """

    async def drop_parts(self, partition: str, job_id: str, stream: str, from_seq: int, *, below: int) -> None:
        """Delete the parts of a job's stream from number ``from_seq`` on that have a ``fence`` below ``below``."""


class DocumentStore(JobStore, Protocol):
    """A store that outlives its users, and that several coordinators may reach. Passed by ``DocumentStoreContract``.

    ``apply`` may be repeated as it is after a `StoreUnavailableError`: a change that is stored exactly as given counts as
    written, and its executions are made up for.

    Instants are kept to the millisecond, and of ``terms`` everything but the shipped class; see `koan_ray.stores.codec`.
    """

    async def open(self) -> None:
        """Connect, create what is missing and check what is there. Idempotent; concurrent callers do not disturb.

        Raises:
            ConfigurationError: The store cannot keep its promises as configured: weak write concern, a unique index that
                is missing and cannot be made, wrong credentials. The message names the source and what to do.
            StoreUnavailableError: Nobody answers at the address.
        """

    async def close(self) -> None:
        """Let go of connections."""

    def excess(self, job: JobRecord) -> tuple[int, int] | None:
        """Return size and limit, in bytes, of a record that is too large to be kept; None for any other.

        ``apply`` refuses such a change, whatever its guard.
        """

    async def write_documents(self, collection: str, job_id: str, first: int, bodies: Sequence[bytes]) -> None:
        """Keep values of a job, given as JSON, as one document each in a collection that is its user's.

        Number ``first`` has the ``_id`` ``<job id>/<number, 12 digits>``, and so on. One that is there is replaced, so the
        call may be repeated. An object becomes the document, anything else its member ``value``.

        Raises:
            ConfigurationError: The name is not 1 to 64 of a-z, 0-9, ``_`` and ``-``, or is one of ours; or a value cannot be
                a document: too large, a whole number beyond 64 bits, a member named ``_id`` or with ``$`` in front.
            StoreUnavailableError: It is unknown which were written; repeat the call.
        """

    async def drop_documents(self, collection: str, job_id: str, from_number: int) -> None:
        """Delete the documents that `write_documents` has made of a job's values from a number on."""

    async def read_lease(self, shard: str) -> Lease | None:
        """Return the lease of a shard, by a majority read; None if nobody ever held it."""

    async def take_lease(self, shard: str, *, holder: str, seen: Lease | None, at_least: int = 1) -> Lease | None:
        """Become the one writer of a shard, or learn that another is.

        Atomic: among concurrent callers at most one gets a given term. ``None`` means somebody else was faster.

        Args:
            shard: Its name, as in ``koan/0``.
            holder: Unique for each process start.
            seen: The lease as last read, whose beat stood still; None for a shard without a lease.
            at_least: The new term is this, or one higher than the last if that is more.

        Raises:
            StoreUnavailableError: It is unknown whether the lease was taken; read it before anything else.
        """

    async def latest_term(self, shards: Sequence[str]) -> int:
        """Return the highest term among the leases of these shards, by a majority read; 0 if there is none."""

    async def beat(self, lease: Lease) -> Lease | None:
        """Say that the holder lives; return the lease with its new beat, None if it is held by somebody else by now.

        Raises:
            StoreUnavailableError: It is unknown whether the beat was counted.
        """

    async def release(self, lease: Lease) -> None:
        """Give the lease back: its holder becomes the empty text, and the next one need not wait for it to lapse."""

    async def claim(self, slots: Sequence[int], term: int) -> int:
        """Stamp every unfinished job of these slots that has an older term with ``term``, raising its ``rev``.

        Returns how many there were. Any update that an earlier holder still has on its way fails its guard from then on.
        Only older terms are stamped: a holder that was paused in the middle must not set its successor's documents back.
        An insert cannot be fenced this way, so the holder repeats this now and then.
        """

    def take_over(self, slots: Sequence[int], term: int, statuses: Sequence[JobStatus]) -> AsyncIterator[list[JobRecord]]:
        """Stamp the jobs of these slots and statuses that have an older term as `claim` does, oldest first, in batches.

        Yields each batch as it was read after its stamp, so that work can begin before the last one is stamped.
        """

    def unfinished(self, slots: Sequence[int], term: int) -> AsyncIterator[list[JobRecord]]:
        """Iterate over the unfinished jobs of these slots that carry ``term``, oldest first, in batches.

        Others are still the earlier holder's to write: a late insert, which the next `claim` stamps.
        """

    def last_settled(self, slots: Sequence[int], limit: int) -> AsyncIterator[list[JobRecord]]:
        """Iterate over the finished jobs of these slots that ended last, newest first, at most ``limit``, in batches."""

    def open_executions(self, slots: Sequence[int]) -> AsyncIterator[list[ExecutionRecord]]:
        """Iterate over the executions of these slots that are not closed, in batches."""

    async def close_executions(self, closed: Sequence[tuple[ExecutionRecord, str]]) -> int:
        """Write executions, each with its partition; those that are closed already stay as they are.

        Returns how many changed.
        """

    async def partitions(self) -> list[str]:
        """Return the names of all partitions that hold jobs or ever did."""

    async def settled_before(
        self, partition: str, statuses: Sequence[JobStatus], before: float, limit: int, kinds: Sequence[str] | None = None,
        *, after: tuple[float, str] | None = None,
    ) -> list[JobRecord]:  # fmt: skip
        """Return finished jobs of a partition that ended before an instant, oldest end first.

        ``after``: end and id of a job; only those that follow it. Documents that cannot be read are left out; the answer
        is empty only when no more follow.
        """

    def scan(self, partition: str) -> AsyncIterator[list[JobRecord]]:
        """Iterate over all jobs of a partition in the order of their ids, in batches of bounded size.

        Documents that cannot be read are skipped and told like those of any scan, so a batch may be empty. What changes
        meanwhile is seen or not.
        """

    async def statuses(self, job_ids: Sequence[str], partition: str) -> dict[str, JobStatus]:
        """Return the statuses of those of these jobs that a partition holds; a status that is not known is left out."""

    async def executions_in(self, job_ids: Sequence[str], partition: str) -> list[ExecutionRecord]:
        """Return the executions of these jobs that a partition holds, oldest first."""

    async def put_copy(self, job: JobRecord, executions: Sequence[ExecutionRecord], partition: str) -> None:
        """Write a copy of a finished job and its executions into a partition, replacing an earlier copy with the same id.

        Its parts are written before, with `write_parts`; those that are there stay as they are.
        """

    async def get_copy(self, job_id: str, partition: str) -> tuple[JobRecord, list[ExecutionRecord]] | None:
        """Return a job and its executions as one partition holds them, by majority reads."""

    async def note_moves(self, partition: str, job_ids: Sequence[str]) -> None:
        """Remember, in place of what was remembered before, that these jobs are about to be deleted from a partition."""

    async def finish_moves(self) -> int:
        """Forget what `note_moves` remembers, after deleting the executions and parts that interrupted deletions have left.

        Only of jobs that the partition does not hold any more. Returns how many executions there were.
        """

    async def delete_if(self, job: JobRecord, partition: str) -> bool:
        """Delete a finished job from a partition, then its executions and parts there, only while it has ``job.rev``."""

    def jobs_with_parts(self, partition: str) -> AsyncIterator[list[str]]:
        """Iterate over the ids of the jobs that have parts in a partition, in order, in batches."""


# --- orders and reports: the messages between coordinator and job actors ---------------------------------------------


class Order(NamedTuple):
    """Begin one execution."""

    execution_id: str
    job_id: str
    terms_id: str
    context: bytes
    attempt: int
    ordinal: int  # executions begun before this one
    created_at: float
    queued_at: float
    particulars: Particulars
    error: ErrorInfo | None = None  # how the previous attempt failed
    checkpoint: Checkpoint | None = None  # of a job over items: where this execution goes on from


class OrderBatch(NamedTuple):
    """Orders for one actor, with the terms and classes that it has not been sent before."""

    orders: list[Order]
    terms: list[Terms]
    code: list[tuple[str, bytes]]
    is_brief: bool = False  # every body is known to take under a millisecond
    settled: tuple[int, ...] = ()  # earlier batches whose ends are stored: the actor need not hold them any more


class Report(NamedTuple):
    """How one execution ended, as seen by its job actor.

    ``outcome``: ``succeeded``, ``failed``, ``timeout``, ``cancelled``, ``rescheduled``, ``non_retryable``,
    ``result_rejected``, ``context_rejected``, ``crashed`` (a child process vanished), ``returned`` (a chunk whose turn did
    not come).
    """

    execution_id: str
    job_id: str
    outcome: str
    began_at: float
    duration_s: float
    result: bytes | None = None
    error: ErrorInfo | None = None
    delay_s: float = 0.0  # of a reschedule
    advice: Advice | None = None
    progress: Progress | None = None
    metrics: tuple[tuple[str, Any], ...] = ()


class Running(NamedTuple):
    """An execution that goes on after its batch was answered."""

    execution_id: str
    job_id: str
    age_s: float  # how long it has run; a duration, because clocks of two nodes differ
    parked: bool = False
    source: str | None = None  # where its job is kept


class Survey(NamedTuple):
    """What a job actor says to a coordinator that has not started it."""

    name: str
    spec: ActorSpec
    info: ActorInfo
    running: list[Running]
    held: list[Report]  # ended, and not acknowledged by any coordinator
    unbegun: list[tuple[str, str]]  # execution and job ids of what it was sent and had not begun; dropped there


class BatchReply(NamedTuple):
    """What became of a batch: each order is in exactly one of the lists."""

    ended: list[Report]
    running: list[Running]
    returned: list[str]  # execution ids that were not begun
    recycle: str | None = None  # why this actor should take no more work


class Push(NamedTuple):
    """News from a job actor outside of a batch reply."""

    actor: str
    ended: list[Report]
    parked: list[str]
    resumed: list[str]
    progress: list[tuple[str, Progress]]  # by execution id, at most once a second for each
    recycle: str | None = None


# --- launcher --------------------------------------------------------------------------------------------------------


class ActorInfo(NamedTuple):
    """Where a job actor lives."""

    node_id: str
    actor_id: str
    pid: int


class ActorEvents(Protocol):
    """What a launcher tells the coordinator; every call happens on the coordinator's loop.

    Of one actor: ready at most once, each batch at most once, and nothing after its death.
    """

    def actor_ready(self, name: str, info: ActorInfo) -> None:
        """The actor can take batches."""

    def actor_dead(self, name: str, cause: str) -> None:
        """The actor is gone for good, whatever the reason; said once.

        It can say nothing more. What it was doing may go on for moments: Ray takes up to 5 s to end a process that is
        stopped, and a thread of this process ends with its body.
        """

    def batch_answered(self, name: str, batch: int, reply: BatchReply) -> None:
        """The actor has answered a batch."""


class Launcher(Protocol):
    """Starts, talks to and ends job actors. Passed by `koan_ray.testing.contracts.LauncherContract`.

    No method blocks or raises for the actor's sake: what goes wrong with an actor is told as `ActorEvents.actor_dead`.
    """

    def capacity(self) -> int:
        """Return how many actors of one CPU the cluster can hold; at least 1."""

    def is_crowded(self) -> bool:
        """Tell whether others wait for resources of the cluster, which idle actors could make free."""

    def nodes(self) -> Sequence[Node] | None:
        """Return what the nodes of the cluster have, as of a moment ago; None if that is not known, or nothing is reserved.

        Not what is free: an actor that fits none of them waits for a node that joins.
        """

    def start(self, name: str, spec: ActorSpec, events: ActorEvents, *, lent: bool = False) -> None:
        """Begin to start an actor; ``actor_ready`` or ``actor_dead`` follows.

        Args:
            name: Unique for all time.
            spec: What it must be like.
            events: Who is told.
            lent: It runs on the CPU of a parent that waits for its children, and so holds none itself.
        """

    def send(self, name: str, batch: int, orders: OrderBatch, *, label: str) -> None:
        """Hand over a batch; ``batch_answered`` follows within moments, also while the bodies go on.

        ``label``: what a dashboard shows; empty for jobs that take no time.
        """

    def hurry(self, name: str, batch: int) -> None:
        """Have a batch answered now; it was expected to be brief and is not. Changes nothing if it was answered."""

    def cancel(self, name: str, execution_id: str, cause: str) -> None:
        """Ask a body to stop: set its token, and raise `CancelledError` in an async one. ``cause``: cancelled, timeout."""

    def attend(self, name: str, execution_id: str, label: str) -> None:
        """Show a long execution under its label where the runtime has a dashboard; changes nothing."""

    def retire(self, name: str) -> None:
        """End an idle actor; ``actor_dead`` follows."""

    def kill(self, name: str) -> None:
        """End an actor now, whatever it does; ``actor_dead`` follows once nothing can prevent that any more."""

    def settled(self, name: str, batches: tuple[int, ...]) -> None:
        """Tell an actor that the ends it told in these batches are stored; for when no batch carries the news."""

    async def survey(self) -> list[Survey]:
        """Ask the job actors that an earlier coordinator left what they run and hold. Those that do not answer are ended."""

    def adopt(self, name: str, events: ActorEvents) -> None:
        """Make an actor that was surveyed ours, as if we had started it."""

    async def kept_code(self) -> list[tuple[Terms, bytes]]:
        """Return the job classes that an earlier coordinator has kept with `keep_code`."""

    def keep_code(self, terms: Terms, code: bytes) -> None:
        """Keep a job class for a coordinator that restarts, where the runtime has a place for it."""


class Random(Protocol):
    """The part of `random.Random` that the engine uses."""

    def random(self) -> float:
        """Return a number in [0, 1)."""


# --- between a process that uses jobs and the engine -------------------------------------------------------------------


class Transport(Protocol):
    """How a session reaches coordinator and broker, wherever they are.

    Calls never block and are idempotent, so a transport repeats those whose fate is unknown. ``done`` is called exactly
    once, from any thread, with ``(answer, None)`` or ``(None, error)``; errors of the runtime are already ours:
    `RuntimeUnavailableError` when nobody will answer any more.
    """

    def coordinator(self, method: str, args: tuple[Any, ...], done: Callable[[Any, BaseException | None], None]) -> None:
        """Call a method of the coordinator."""

    def broker(self, method: str, args: tuple[Any, ...], done: Callable[[Any, BaseException | None], None]) -> None:
        """Call a method of the progress broker."""
