"""A coordinator's hold on one shard of a source: the lease, its beat, taking over, and standing down.

::

    opening ──► standby ──► recovering ──► active
       ▲           ▲  beat of another          │  the lease was replaced
       └───────────┴───────────────────────────┘

* *Standby*: another coordinator holds the lease. Its beat is watched by our own monotonic clock; when it stood still for
  1.5 ttl of successful reads, or its process is known to be dead, the lease is taken by compare-and-set.
* *Recovering*: first every running job's document is stamped with our term, which raises its rev, so that any write of the
  earlier holder that is still on its way fails; only then are they read, and the job actors asked what they hold.
* *Active*: we write. Queued jobs are stamped and read in batches, oldest first, and each is dispatched from then on.
  Without an acknowledged beat for 0.8 ttl nothing is started or acknowledged any more, because by 1.5 ttl somebody else may
  write.

What fails as nobody expected is noted and survived: a beat, a sweep or a batch of the queue that raises is made again, and
where serving itself raises, the tenure stands down and obtains the lease anew.

A store that does not answer changes no holder: a failed read starts the observation afresh, and a holder whose beats fail
waits, with everything it knows, until the store is back or the lease is seen to be replaced.

*Several shards.* The first shard of a source leads. Only its lease is observed and only it beats; whoever holds it may take
those of the others at once, and acts on them only while it may act on the first. So a source belongs to one coordinator
as a whole, whatever number of shards either was configured with: a job whose id falls into any of them can be accepted.
The leader's term is above that of every shard's lease, and a follower's at least the leader's, so that a stamp reaches every
document, also one that was written when there were more shards, or fewer. What remains to each shard: its own lease and
term, its own takeover, and a writer whose flushes do not wait for those of others.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from koan_ray.domain.lease import BEATS_PER_TTL, MAX_SHARDS, STANDS_DOWN_AFTER, Observation, shard_name
from koan_ray.domain.status import JobStatus
from koan_ray.engine.meters import Meters
from koan_ray.engine.tasks import Failures
from koan_ray.engine.writer import Writer, pause
from koan_ray.errors import (
    ConfigurationError,
    RecordRefusedError,
    StaleLeaseError,
    StoreError,
    StoreUnavailableError,
)
from koan_ray.killpoints import killpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from koan_ray.domain.lease import Lease
    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.ports import Change, Clock, DocumentStore, Log

_RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_REFUSED_RETRY_S = 15.0
_READY_TIMEOUT_S = 30.0
_HANDED_OVER_S = 0.01  # between two looks at whether an earlier beat has ended


class TenureState(StrEnum):
    """Where a coordinator stands with a source."""

    OPENING = "opening"
    STANDBY = "standby"
    RECOVERING = "recovering"
    ACTIVE = "active"
    CLOSED = "closed"


class Source(NamedTuple):
    """What a coordinator is given of a source.

    Shape: ``audit`` is the store of executions when that is another one; ``heart`` is a client of its own for the beat, so
    that a busy loop or a full pool cannot cost the lease.
    """

    name: str
    store: DocumentStore
    audit: DocumentStore | None = None
    heart: DocumentStore | None = None
    holder: str = ""  # unique for each start of a coordinator
    aside: Callable[[Coroutine[object, object, None]], Callable[[], None]] | None = None  # starts the beat elsewhere
    is_dead: Callable[[str], bool] = lambda _holder: False  # tells of a holder whether its process is known to be gone


class Host(Protocol):
    """What a tenure asks of its coordinator."""

    def took_in(self, tenure: Tenure, jobs: Sequence[JobRecord]) -> None:
        """These unfinished jobs are ours; they are not dispatched before `opened`."""

    async def opened(self, tenure: Tenure) -> None:
        """All are taken in: adopt what runs, count as lost what nobody runs, and dispatch."""

    async def found(self, tenure: Tenure, jobs: Sequence[JobRecord], *, is_late: bool = False) -> None:
        """These unfinished jobs carry our term; those that are not ours yet are left by an earlier holder.

        ``is_late``: they were read while we served, so those of them that were ours may have ended since.
        """

    def stood_down(self, tenure: Tenure) -> None:
        """Another coordinator has the source: let go of everything that lives there."""

    def written(self, jobs: Sequence[JobRecord]) -> None:
        """A flush has written these."""

    def refused(self, job: JobRecord) -> None:
        """The insert of a job found its id taken."""

    def unstorable(self, job: JobRecord, size: int, limit: int) -> None:
        """The store cannot keep a record of this size, in bytes; what it held before is unchanged."""

    def unwritable(self, job: JobRecord, problem: str) -> None:
        """No document can hold this record; what the store held before is unchanged."""

    def resumed(self, job_ids: Sequence[str]) -> None:
        """The lease is certain again: these were held back."""


class Tenure:
    """One shard of a source as one coordinator has it.

    Args:
        source: Its name and its stores.
        shard: Its name, as in ``koan/0``.
        slots: The shard's slots.
        holder: Unique for each start of a coordinator.
        ttl_s: Of the lease.
        clock: Time and timers.
        host: The coordinator.
        log: Where changes of state are told.
        lead: The tenure of the source's first shard; None for that itself.
        meters: Where takeovers and flushes are counted.
        failures: Where what nobody expected is noted.
    """

    def __init__(
        self, source: Source, *, shard: str, slots: Sequence[int], holder: str, ttl_s: float, clock: Clock, host: Host,
        log: Log, lead: Tenure | None = None, meters: Meters | None = None, failures: Failures | None = None,
    ) -> None:  # fmt: skip
        self._failures = failures or Failures(log)
        self.meters = meters or Meters()
        self.source, self.store, self.slots = source.name, source.store, slots
        self.audit = source.audit or source.store
        self.state = TenureState.OPENING
        self.lease: Lease | None = None
        self.replaced = asyncio.Event()  # the lease is somebody else's, or we behave as if it were
        self.read = asyncio.Event()  # what runs was taken in
        self.shard = shard
        self._problem: BaseException | None = None
        self._lead, self._leads = lead, asyncio.Event()
        self._followers: list[Tenure] = []
        if lead is not None:
            lead._followers.append(self)  # noqa: SLF001 - of the same class
        self._holder, self._ttl_s, self._clock, self._host = holder, ttl_s, clock, host
        self._log = log.bind(source=source.name, shard=shard)
        self._heart, self._aside, self._is_dead = source.heart or source.store, source.aside, source.is_dead
        self._held: list[str] = []  # jobs that were not started because the lease was not certain
        self._beat_at = float("-inf")  # monotonic, when the last acknowledged beat was sent; written by the beating thread
        self._woken = asyncio.Event()
        self._has_all = asyncio.Event()
        self._is_sweeping = False  # the last sweep has not come to its end, if this is so at the beginning of one
        self._settled = asyncio.Event()  # the first attempt has come to an end, whatever that is
        self._loop = asyncio.get_running_loop()
        self._is_closing = False
        self._stop_beating: Callable[[], None] = lambda: None
        self._heart_is_free = threading.Event()
        self._heart_is_free.set()
        self.writer = self._new_writer(0)

    @property
    def term(self) -> int:
        """The term that we write under."""
        return self.lease.term if self.lease is not None else 0

    @property
    def problem(self) -> BaseException | None:
        """Why it is not active, as last seen."""
        return self._problem if self._problem is not None or self._lead is None else self._lead.problem

    @property
    def beat_age_s(self) -> float | None:
        """How long ago the last acknowledged beat was sent; None without a lease."""
        return self._clock.monotonic() - self._beat_at if self.lease is not None else None

    @property
    def may_act(self) -> bool:
        """We hold the lease, and the last beat was acknowledged recently enough to rely on that."""
        if self.lease is None or self.replaced.is_set():
            return False
        if self._lead is not None:
            return self._lead.may_act
        return self._clock.monotonic() - self._beat_at < STANDS_DOWN_AFTER * self._ttl_s

    @property
    def is_ready(self) -> bool:
        """This shard takes jobs now."""
        return self.state is TenureState.ACTIVE and self.may_act

    async def ready(self) -> None:
        """Return when this shard takes jobs.

        Raises:
            ConfigurationError: The source cannot be used as configured.
            StoreUnavailableError: It has not become ready within 30 s; the message says what it waits for.
        """
        deadline = self._clock.monotonic() + _READY_TIMEOUT_S
        while not self.is_ready:
            if isinstance(self.problem, ConfigurationError):
                raise self.problem
            if self._clock.monotonic() > deadline or self._is_closing:
                msg = f"source {self.source!r}: {self.explain()}; nothing was accepted. Repeat the request later."
                raise StoreUnavailableError(msg)
            await pause(self._clock, 0.1)

    def hold(self, job_id: str) -> None:
        """Remember a job that must not start now; it is dispatched when the lease is certain again."""
        if not self._held:
            self._clock.call_later(self._ttl_s / BEATS_PER_TTL, self._resume)
        self._held.append(job_id)

    def _resume(self) -> None:
        if self.may_act:
            held, self._held = self._held, []
            for job_id in held:
                self._failures.survive(f"resuming {self.source}", self._host.resumed, [job_id])
        elif self._held:
            self._clock.call_later(self._ttl_s / BEATS_PER_TTL, self._resume)

    def explain(self) -> str:
        """Say in words why jobs of this source are not taken at present."""
        leader = self._lead or self
        if leader.state is TenureState.STANDBY and self.problem is None:
            return f"another coordinator holds the lease of shard {leader.shard} and is alive"
        return str(self.problem) if self.problem is not None else f"is {self.state}"

    async def settled(self) -> None:
        """Return when it is known whether the source is ours: active, standing by, or not to be had."""
        await self._settled.wait()

    # --- life --------------------------------------------------------------------------------------------------------

    def is_over(self) -> bool:
        """Tell whether it was closed."""
        return self._is_closing

    async def run(self) -> None:
        """Obtain the lease, serve while we hold it, and begin again; survives every outage."""
        turn = 0
        while not self._is_closing:
            try:
                if self._lead is None:
                    await self.store.open()
                    if self.audit is not self.store:
                        await self.audit.open()
                self.lease = await self._obtain()
                turn = 0
                await self._serve(self.lease)
                await pause(self._clock, self._ttl_s / BEATS_PER_TTL)  # whatever fenced us is not going to be over at once
            except ConfigurationError as error:
                self.note_problem(error, "source_refused")
                await pause(self._clock, _REFUSED_RETRY_S)
            except StoreError as error:
                self.note_problem(error, "source_unavailable")
                await pause(self._clock, _RETRY_S[min(turn, len(_RETRY_S) - 1)])
                turn += 1
            except Exception as error:
                self.note_problem(error, "source_failed")
                raise  # whoever keeps this running takes note, and begins it again

    def note_problem(self, error: BaseException, event: str) -> None:
        """Keep why nothing is written, for whoever asks, and tell the log of what is new."""
        if str(error) != str(self.problem):
            self._log.error(event, problem=str(error))
        self._problem = error
        self._settled.set()

    def note_health(self) -> None:
        """The store answers."""
        self._problem = None

    def vanish(self, why: BaseException) -> None:
        """Stop as a killed process does; the lease stays where it is."""
        self._is_closing = True
        self._stop_beating()
        self.writer.abandon(why)

    async def close(self) -> None:
        """Stop, and give the lease back."""
        self._is_closing = True
        lease, self.lease = self.lease, None
        self._note_replaced()
        self.state = TenureState.CLOSED
        self._stop_beating()
        if lease is not None:
            killpoint("lease.before_release")
            with contextlib.suppress(StoreError):  # the lease lapses by itself
                await self.store.release(lease)
            killpoint("lease.after_release")

    async def _obtain(self) -> Lease:
        return await (self._obtain_lead() if self._lead is None else self._follow(self._lead))

    async def _follow(self, lead: Tenure) -> Lease:
        """Take the lease of a shard whose source is ours: nobody else may act on it."""
        while True:
            self.state = TenureState.OPENING if self.state is TenureState.OPENING else TenureState.STANDBY
            await lead._leads.wait()
            term = lead.term
            taken = await self._take(await self.store.read_lease(self.shard), at_least=term)
            if taken is not None and lead._leads.is_set() and lead.term == term:
                self._problem = None
                return taken
            await pause(self._clock, self._ttl_s / BEATS_PER_TTL)

    async def _obtain_lead(self) -> Lease:
        seen = Observation(self._ttl_s)
        turn = 0
        while True:
            self.state = TenureState.OPENING if self.state is TenureState.OPENING else TenureState.STANDBY
            try:
                lease = await self.store.read_lease(self.shard)
                self._problem = None
                if self._is_free(lease, seen):
                    taken = await self._take(lease, at_least=1 + await self.store.latest_term(self._all_shards()))
                    if taken is not None:
                        return taken
                if lease is not None and self.state is TenureState.OPENING:
                    self.state = TenureState.STANDBY
                    self._log.info("standing_by", holder=lease.holder, term=lease.term)
                self._settled.set()
                await pause(self._clock, self._ttl_s / BEATS_PER_TTL)
            except StoreUnavailableError as error:
                seen.failed()
                self.note_problem(error, "source_unavailable")
                await pause(self._clock, _RETRY_S[min(turn, len(_RETRY_S) - 1)])
                turn += 1

    def _is_free(self, lease: Lease | None, seen: Observation) -> bool:
        if lease is None or lease.holder in ("", self._holder) or self._is_dead(lease.holder):
            return True  # nobody's, ours from an attempt to take over that was interrupted, or a dead process's
        return seen.read(lease, self._clock.monotonic())

    def _all_shards(self) -> list[str]:
        """Return the names of all shards that this source can ever have had."""
        return [shard_name(number) for number in range(MAX_SHARDS)]

    async def _take(self, lease: Lease | None, *, at_least: int) -> Lease | None:
        sent_at = self._clock.monotonic()
        killpoint("lease.before_take")
        try:
            taken = await self.store.take_lease(self.shard, holder=self._holder, seen=lease, at_least=at_least)
        except StoreUnavailableError:
            # Unknown: it may be ours. Only what a read says counts.
            found = await self.store.read_lease(self.shard)
            taken = found if found is not None and found.holder == self._holder else None
            self.meters.count("outcome_unknown", "take_lease", "was_written" if taken is not None else "refused")
        if taken is not None:
            killpoint("lease.after_take")
            self._beat_at = sent_at
            self.meters.count("takeovers", self._why_free(lease))
            self._log.info("lease_taken", term=taken.term, after=lease.holder if lease is not None else None)
        return taken

    def _why_free(self, lease: Lease | None) -> str:
        if lease is None:
            return "first"
        if lease.holder in ("", self._holder):
            return "released" if lease.holder == "" else "own"
        return "dead" if self._is_dead(lease.holder) else "lapsed"

    async def _serve(self, lease: Lease) -> None:
        self.replaced.clear()
        self._has_all.clear()
        self.state = TenureState.RECOVERING
        self.writer = self._new_writer(lease.term)
        if self._lead is None:
            self._stop_beating = self._start_beating(lease)
            self._leads.set()
        try:
            await self._take_over(lease.term)
            self.read.set()
            await self._host.opened(self)
            self.activate()
            self._settled.set()
            self._log.info("source_opened", term=lease.term)
            taking_over = self._loop.create_task(self._take_over_queue(lease.term))
            try:
                await self._serve_until_replaced(lease.term)
            finally:
                taking_over.cancel()
        finally:
            self._stop_beating()
            self._leads.clear()
            for follower in self._followers:
                follower._note_replaced()  # noqa: SLF001 - of the same class
            self.read.clear()
            self.state = TenureState.CLOSED if self._is_closing else TenureState.STANDBY
            self.lease = None
            self._held.clear()
            self.writer.abandon(StaleLeaseError(self.shard, lease.term, lease.term + 1))
            if not self._is_closing:
                self._log.warning("stood_down", term=lease.term)
                self._host.stood_down(self)

    @property
    def is_to_be_opened(self) -> bool:
        """What runs was taken in, and nothing was done about it so far."""
        return self.state is TenureState.RECOVERING and self.read.is_set() and not self.replaced.is_set()

    def activate(self) -> None:
        """All is taken in and adopted: from here on jobs are accepted."""
        if self.state is TenureState.RECOVERING and not self.replaced.is_set():
            self.state = TenureState.ACTIVE

    async def _take_over(self, term: int) -> None:
        """Take in what runs; what is queued follows while we serve, so that a long queue does not hold up its own head.

        Stamp, then read: a document that we read before stamping could still be changed by the earlier holder.
        """
        async for jobs in self.store.take_over(self.slots, term, (JobStatus.RUNNING, JobStatus.CREATED)):
            self._host.took_in(self, jobs)

    async def _take_over_queue(self, term: int) -> None:
        turn = 0
        while not self.replaced.is_set():
            try:
                async for jobs in self.store.take_over(self.slots, term, (JobStatus.QUEUED,)):
                    await self._host.found(self, jobs)
                if turn:  # what was stamped when we were interrupted carries our term, and was not read
                    await self._look(term)
            except StoreError as error:
                self._log.warning("take_over_interrupted", problem=str(error))
                await pause(self._clock, _RETRY_S[min(turn, len(_RETRY_S) - 1)])
                turn += 1
            except Exception as error:  # noqa: BLE001 - noted, and what is not taken in yet is tried again
                self._failures.note(f"take-over of {self.source}", error)
                await pause(self._clock, _RETRY_S[min(turn, len(_RETRY_S) - 1)])
                turn += 1
            else:
                self._log.info("queue_taken_over", term=term)
                self._has_all.set()
                return

    async def _look(self, term: int) -> None:
        """Hand over what carries our term and is not known to our host."""
        async for jobs in self.store.unfinished(self.slots, term):
            await self._host.found(self, jobs, is_late=True)

    async def has_all(self) -> bool:
        """Wait until every unfinished job of the source was taken in; false if the source is not ours."""
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._has_all, self.replaced)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()
        return self.may_act and self._has_all.is_set()

    async def _serve_until_replaced(self, term: int) -> None:
        """Sweep for late inserts of an earlier holder, which no stamp can fence, until the lease is lost."""
        while not self.replaced.is_set():
            timer = self._clock.call_later(self._ttl_s, self._woken.set)
            await self._woken.wait()
            timer.cancel()
            self._woken.clear()
            # Not before the queue is taken over: of what is read there, nothing can have ended meanwhile.
            if self.replaced.is_set() or not self.may_act or not self._has_all.is_set():
                continue
            try:
                await self._sweep(term)
            except StoreUnavailableError:  # the next one looks at what this one has claimed
                continue
            except Exception as error:  # noqa: BLE001 - no reason to let go of the source
                self._failures.note(f"sweep of {self.source}", error)

    async def _sweep(self, term: int) -> None:
        was_interrupted, self._is_sweeping = self._is_sweeping, True
        n_claimed = await self.store.claim(self.slots, term)
        if n_claimed:
            self._log.warning("late_inserts_claimed", term=term, n=n_claimed)
        if n_claimed or was_interrupted:  # then it may have claimed, too, and nobody has looked
            await self._look(term)
        self._is_sweeping = False

    def fenced(self, job: JobRecord) -> None:
        """A write was refused: a record too large, an id that was taken, or a document that somebody else has written.

        Only the last says that the shard is not ours.
        """
        if (excess := self.store.excess(job)) is not None:
            self._log.warning("job_too_large", job_id=job.id, rev=job.rev, size=excess[0], limit=excess[1])
            self._host.unstorable(job, *excess)
            return
        if job.rev == 1:
            self._host.refused(job)
            return
        self.meters.count("fenced_writes", job.status.value)
        self._log.warning(
            "write_fenced", job_id=job.id, execution_id=job.execution_id, status=job.status.value, rev=job.rev,
            term=job.term, guard="refused",
        )  # fmt: skip
        self._note_replaced()

    def _note_replaced(self) -> None:
        self.replaced.set()
        self._woken.set()

    def _new_writer(self, term: int) -> Writer:
        return Writer(
            _Guarded(self), self._clock, self._host.written, self.fenced, self._host.unwritable, term=term,
            meters=self.meters, source=self.source, log=self._log,
        )  # fmt: skip

    # --- the beat ------------------------------------------------------------------------------------------------------

    def _start_beating(self, lease: Lease) -> Callable[[], None]:
        if self._aside is not None:
            earlier, self._heart_is_free = self._heart_is_free, threading.Event()
            return self._aside(self._beat_aside(lease, earlier, self._heart_is_free))
        task = self._loop.create_task(self._beat_forever(lease))
        return lambda: None if task.done() or task.cancelling() else (task.cancel(), None)[1]

    async def _beat_aside(self, lease: Lease, earlier: threading.Event, over: threading.Event) -> None:
        """Beat in a thread of its own, once the beat of an earlier term has let go of the client in its thread."""
        try:
            while not earlier.is_set():  # noqa: ASYNC110 - it is set in another thread
                await asyncio.sleep(_HANDED_OVER_S)
            await self._beat_forever(lease)
        finally:
            over.set()

    async def _beat_forever(self, lease: Lease) -> None:
        """Beat three times a ttl, until the lease is seen to be somebody else's. May run in another thread."""
        try:
            await self._keep_beating(lease)
        except Exception as error:  # noqa: BLE001 - nothing beats any more: let go, and obtain the lease anew
            self._failures.note(f"beat of {self.source}", error)
            self._loop.call_soon_threadsafe(self._note_replaced)
        finally:
            if self._heart is not self.store:
                with contextlib.suppress(StoreError):
                    await self._heart.close()

    async def _keep_beating(self, lease: Lease) -> None:
        while True:
            sent_at = self._clock.monotonic()
            try:
                if self._heart is not self.store:
                    await self._heart.open()
                killpoint("lease.before_beat")
                after = await self._heart.beat(lease)
                killpoint("lease.after_beat")
            except (StoreError, ConfigurationError):  # refused for a moment, too: the login may be put right
                after = lease  # unknown; what may_act allows shrinks meanwhile
            except Exception as error:  # noqa: BLE001 - the next beat may be sent; without one, nothing here may act
                self._failures.note(f"beat of {self.source}", error)
                after = lease
            else:
                if after is None:
                    self._loop.call_soon_threadsafe(self._note_replaced)
                    return
                lease = after
                self._beat_at = sent_at
            wait_s = self._ttl_s / BEATS_PER_TTL
            if self._aside is not None:
                await asyncio.sleep(wait_s)
            else:
                await pause(self._clock, wait_s)


class _Guarded:
    """The store of a tenure as its writer sees it: no write begins that a replaced lease would make void."""

    def __init__(self, tenure: Tenure) -> None:
        self._tenure = tenure

    async def apply(self, changes: Sequence[Change]) -> list[Change]:
        tenure = self._tenure
        if not tenure.may_act:
            msg = f"source {tenure.source!r}: the lease's beat is not acknowledged at present"
            raise StoreUnavailableError(msg)
        try:
            refused = await tenure.store.apply(changes)
            if tenure.audit is not tenure.store:
                killpoint("flush.between")
                gone = {id(change) for change in refused}
                await tenure.audit.file_executions([change for change in changes if id(change) not in gone])
        except RecordRefusedError:  # the store is well
            raise
        except (StoreError, ConfigurationError) as error:
            tenure.note_problem(error, "flush_failed")
            raise
        tenure.note_health()
        return refused

    async def file_executions(self, changes: Sequence[Change]) -> None:
        await self._tenure.audit.file_executions(changes)

    async def get(self, job_id: str) -> JobRecord | None:
        return await self._tenure.store.get(job_id)

    def objection(self, record: JobRecord | ExecutionRecord) -> str | None:
        return self._tenure.store.objection(record)
