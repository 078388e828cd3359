"""Which job goes to which actor, when another actor is started or ended, and when one must die.

The dispatcher knows queues, actors and deadlines and nothing of what a job's states mean; `Jobs` (the coordinator) decides
those. Everything runs on one loop; no method suspends.

Batches: an actor is handed as many short jobs as fit `batch_target_s` of work by a moving average for each kind, one
until that is known. It answers within `overrun_s`, giving back what it has not begun, so that nobody waits behind a long
job while another actor idles. A job whose process vanished before is always sent alone.

Suspects: whether a job is the cause of its process's end can be seen only where nothing else was in that process. A chunk of
items whose process vanished, and a job that is given up if its process vanishes once more, go to an actor in which nothing
else is and which nothing joins before they have ended; in the end to one in which nothing has run before, because what a
body leaves behind may end a process, too. They wait beside their lane until there is such an actor, and where there are as
many actors as may be, one takes nothing more until it is empty.

Death: one place decides that an actor dies (`_kill_overdue`, `_end_idle`), and every execution in it is settled when the
launcher has said that it is dead, never before:

* the execution that had to be stopped: timed out or cancelled, killed;
* the bodies that were active when the process vanished by itself: lost, a crash counted;
* chunks of items in such a process, also one that waited for its turn: it may have begun without our knowing;
* other bodies that were parked, or that only shared the process with one we killed: interrupted, nothing counted.

Time: a job that waits begins when its due instant has come by the wall clock, or when it has waited for as long as it was
to wait, whichever is first; see `DueTimes`. The wall is looked at once a second, so that a clock that was set forward is
noticed. Of a job that an earlier coordinator has left, the document says since when and until when it was to wait: no wait
takes longer after a restart than it was to take in all. Everything else here is measured by the monotonic clock.

Survival: what raises here although nobody expected it is noted (`Failures`) and costs the pass, the report or the execution
in which it happened, and no other. Timers are set again whatever becomes of what they call. An end that cannot be settled
counts as the loss of its process, so that its job goes on or is given up.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from koan_ray.domain.ids import new_id
from koan_ray.domain.lane import DueTimes, Lane
from koan_ray.domain.status import Isolation
from koan_ray.domain.texts import said
from koan_ray.engine.claims import Claimed, Claims, group_of
from koan_ray.engine.obstacles import Obstacles
from koan_ray.engine.pool import Active, Actor, ActorState, Batch, Pool
from koan_ray.engine.tasks import Failures
from koan_ray.killpoints import killpoint
from koan_ray.ports import OrderBatch, Report, Silence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from koan_ray.domain.measures import Key
    from koan_ray.domain.records import ActorSpec, ExecutionRecord, JobRecord, Progress, Terms
    from koan_ray.engine.claims import Group
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.ports import ActorInfo, BatchReply, Clock, Launcher, Order, Push, Running, Survey, TimerHandle

_START_RETRY_S = (0.5, 1.0, 2.0, 4.0)
_BRIEF_S = 0.001
_HOUSEKEEPING_S = 1.0
_CROWDED_TTL_S = 1.0  # an idle actor makes room after this when others wait for the resources that it holds
_CHILD_PROCESS_SLACK_S = 3.0  # the actor kills its own child; we step in only when it does not
_HURRY_SLACK_S = 0.010  # on its way to the actor and back
_SLOW_START_S = 3.0  # an actor that takes longer to start is a reason to be told
_MAX_CAUSE = 500  # characters
_DELAYED_S = 5.0  # an actor that takes longer to start does not keep others from starting
_MAX_LEADING = 4  # actors that lead jobs over items, where the engine has no more actors than that; each leads several
_STARVING_S = 1.0  # a lane without an actor takes one from a busy spec after this


class Jobs(Protocol):
    """What the dispatcher asks of the coordinator."""

    def queued(self, job_id: str) -> JobRecord | None:
        """Return the job if it waits to be dispatched now."""

    def begin(self, job: JobRecord, execution_id: str, now: float) -> tuple[ExecutionRecord, Order]:
        """Move a queued job to Running; its order waits for `when_claimed` if it is claimed ahead."""

    def ended(self, active: Active, report: Report) -> None:
        """The execution ended by itself."""

    def unbegun(self, active: Active) -> None:
        """The order came back; its body was never called."""

    def vanished(self, active: Active, cause: str) -> None:
        """The process that ran it is gone."""

    def interrupted(self, active: Active) -> None:
        """Its process was ended for another's sake."""

    def killed(self, active: Active, cause: str) -> None:
        """Its process was killed because it did not stop; cause: cancelled, timeout."""

    def progressed(self, active: Active, progress: Progress) -> None:
        """A running body has reported."""

    def when_claimed(self, jobs: Sequence[JobRecord], then: Callable[[], None]) -> None:
        """Call ``then`` when it is stored that these jobs run; never, if their source is lost before."""

    def may_begin(self, job_id: str, execution_id: str) -> JobRecord | None:
        """Return the job if the body of this execution, which is stored, may begin now."""

    def code_for(self, code_id: str) -> bytes:
        """Return a shipped class."""

    def terms_for(self, terms_id: str) -> Terms:
        """Return terms by id."""

    def due_at(self, job_id: str) -> float | None:
        """Return when a waiting job is due."""

    def became_due(self, job_id: str) -> tuple[ActorSpec, int] | None:
        """Return where a job belongs whose time has come, as spec and depth; None if it does not wait any more."""

    def refuse_all(self, spec: ActorSpec, cause: str) -> None:
        """Fail the queued jobs of a spec for which no actor can be started."""

    def when_stored(self, reports: Sequence[Report], then: Callable[[], None]) -> None:
        """Call ``then`` when what became of these reports is stored."""


class Dispatcher:
    """Lanes, actors and deadlines of one coordinator."""

    def __init__(
        self, jobs: Jobs, launcher: Launcher, clock: Clock, settings: EngineSettings, epoch: str,
        obstacles: Obstacles | None = None, failures: Failures | None = None,
    ) -> None:  # fmt: skip
        self._failures = failures or Failures(Silence())
        self.obstacles = obstacles or Obstacles(launcher, Silence())
        self._jobs, self._launcher, self._clock, self._settings = jobs, launcher, clock, settings
        self._epoch = epoch
        self._lanes: dict[ActorSpec, Lane] = {}
        self._due = DueTimes()
        self._due_timer: TimerHandle | None = None
        self._due_timer_at = math.inf
        self._pool = Pool()
        self._active: dict[str, Active] = {}
        self._claims = Claims()
        self._unwritten: list[tuple[JobRecord, Claimed]] = []  # claimed in this turn of the loop
        self._deadlines: list[tuple[float, str, str]] = []  # when (monotonic), execution id, cause
        self._deadline_timer: TimerHandle | None = None
        self._brief: dict[int, tuple[float, str]] = {}  # unanswered batches that should be brief: sent when, to whom
        self._hurry_timer: TimerHandle | None = None
        self._typical_s: dict[str, float] = {}  # by terms id: moving average of a body's duration
        self._pump_is_due = False
        # Numbers that no earlier coordinator has used: an actor that outlives it knows batches by them.
        self._n_batches = int(clock.now() * 1000) << 12
        self._n_started = 0
        self._start_failures: dict[ActorSpec, int] = {}
        self._not_before: dict[ActorSpec, float] = {}
        self._capacity = 1
        self._is_open = False
        self._housekeeping: TimerHandle | None = None
        self._kept_house_at = clock.monotonic()
        self.lag_s = 0.0  # how late the last housekeeping was
        self.counters = {"dispatched": 0, "returned": 0, "actors_started": 0, "actors_lost": 0, "actors_killed": 0,
                         "actors_recycled": 0, "actors_adopted": 0, "reports_refused": 0}  # fmt: skip

    # --- what the coordinator says ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin to dispatch."""
        self._is_open = True
        self._capacity = self._launcher.capacity()
        self._keep_house()
        self.pump_soon()

    def close(self) -> None:
        """Stop dispatching and end all actors, whatever they do."""
        self.vanish()
        for actor in list(self._pool):
            self._launcher.kill(actor.name)

    def vanish(self) -> None:
        """Do nothing any more."""
        self._is_open = False
        for timer in (self._housekeeping, self._due_timer, self._deadline_timer, self._hurry_timer):
            if timer is not None:
                timer.cancel()

    def enqueue(self, job_id: str, spec: ActorSpec, depth: int, *, first: bool = False) -> None:
        """A job is due now."""
        lane = self._lanes.get(spec)
        if lane is None:
            lane = self._lanes[spec] = Lane(spec)
        if first:
            lane.push_front(job_id, depth)
        else:
            lane.push(job_id, depth)
        if not self._pump_is_due:
            self.pump_soon()

    def enqueue_at(self, job_id: str, due_at: float, since: float) -> None:
        """A job will be due at ``due_at``; it has waited since ``since``. Both by the wall clock, as its record says."""
        now, monotonic = self._clock.now(), self._clock.monotonic()
        # By today's clock it may have to wait for longer than it was to wait: then the clock was set back since.
        wait_s = max(0.0, min(due_at - now, due_at - since))
        self._due.push(due_at, job_id, ends_at=monotonic + wait_s)
        if monotonic + wait_s < self._due_timer_at:
            self._arm_due_timer()

    def dequeued(self, spec: ActorSpec, *, was_waiting: bool) -> None:
        """A job left the queue without being dispatched (it was cancelled)."""
        if was_waiting:
            self._due.dropped(self._waits_until)
        elif (lane := self._lanes.get(spec)) is not None:
            lane.dropped(self._is_waiting)

    def stop(self, execution_id: str, cause: str) -> None:
        """Ask a body to stop, and kill its actor when it has not after the grace period."""
        active = self._active.get(execution_id)
        if active is None:
            self._withdraw(execution_id)
            return
        active.stop_cause = active.stop_cause or cause
        self._launcher.cancel(active.actor.name, execution_id, cause)
        slack = _CHILD_PROCESS_SLACK_S if self._terms(active).isolation is Isolation.PROCESS else 0.0
        self._add_deadline(self._clock.monotonic() + self._settings.cancel_grace_s + slack, execution_id, cause)

    def is_brief(self, terms_id: str) -> bool:
        """Tell whether jobs with these terms are known to take less than `_BRIEF_S`."""
        return self._typical_s.get(terms_id, math.inf) < _BRIEF_S

    def snapshot(self) -> dict[str, object]:
        """Return what `koan-ray status` shows of queues and actors."""
        return {
            "queued": sum(map(len, self._lanes.values())),
            "waiting": len(self._due),
            "running": self._n_running(),
            "claimed": len(self._claims),
            "actors": [
                {
                    "name": actor.name, "spec": actor.spec.label, "state": actor.state.name.lower(),
                    "pid": actor.info.pid if actor.info else None, "node_id": actor.info.node_id if actor.info else None,
                    "running": len(actor.running), "parked": sum(a.parked for a in actor.running.values()),
                    "jobs_done": actor.jobs_done,
                }
                for actor in self._pool
            ],
            "cannot_run": [
                {"spec": spec.label, "reason": reason, "queued": len(lane)}
                for spec, lane in self._lanes.items()
                if len(lane) and (reason := self.why_waits(spec)) is not None
            ],
            "counters": dict(self.counters),
        }  # fmt: skip

    def why_waits(self, spec: ActorSpec) -> str | None:
        """Return in words why jobs of this spec that are due do not run; None where they only wait for their turn."""
        if (obstacle := self.obstacles.of(spec)) is not None:
            return obstacle
        actors = list(self._pool.of(spec))
        if any(actor.state is not ActorState.STARTING for actor in actors):
            return None
        starting_s = self._clock.monotonic() - min((actor.started_at for actor in actors), default=math.inf)
        if starting_s < _SLOW_START_S:
            return None
        env = "; its runtime_env may still be set up" if spec.runtime_env is not None else ""
        return f"its job actor has been starting for {starting_s:.0f} s: the cluster has no room for {spec.label} yet{env}"

    def place_of(self, execution_id: str) -> Actor | None:
        """Return the actor that an execution is in."""
        active = self._active.get(execution_id)
        return active.actor if active is not None else None

    def levels(self) -> dict[Key, float]:
        """Return the gauges of queues and actors. Cost: by lanes, actors and running jobs."""
        heads = [self._jobs.queued(job_id) for lane in self._lanes.values() for job_id in lane.heads()]
        since = min((job.queued_at for job in heads if job is not None and job.queued_at is not None), default=None)
        found: dict[Key, float] = {
            ("queue_depth", ("queued",)): sum(map(len, self._lanes.values())),
            ("queue_depth", ("waiting",)): len(self._due),
            ("queue_depth", ("running",)): self._n_running(),
            ("oldest_queued_seconds", ()): 0.0 if since is None else max(0.0, self._clock.now() - since),
            ("loop_lag_seconds", ()): self.lag_s,
        }
        states = Counter(actor.state.name.lower() for actor in self._pool)
        return found | {("actors", (state.name.lower(),)): states[state.name.lower()] for state in ActorState}

    def adopt(
        self,
        found: Survey,
        running: Sequence[tuple[Running, ExecutionRecord, JobRecord]],
        held: Sequence[tuple[Report, ExecutionRecord, JobRecord]],
    ) -> None:
        """Make an actor of an earlier coordinator ours, with the bodies that run in it, and settle the ends it holds."""
        now = self._clock.monotonic()
        actor = Actor(found.name, found.spec, at=now, lent=False)
        actor.state, actor.info, actor.is_used = ActorState.READY, found.info, True
        actor.has_suspect = any(job.crashes and (job.terms.spec.lead or self._is_suspect(job)) for _, _, job in running)
        self._pool.add(actor)
        self.counters["actors_adopted"] += 1
        for state, execution, job in running:
            active = self._active[execution.id] = Active(actor, execution, job.terms.id, now)
            active.began_at, active.parked = now - state.age_s, state.parked
            actor.running[execution.id] = active
            self._watch_long(actor, active)
            if job.cancel_requested_at is not None:
                self.stop(execution.id, "cancelled")
        for report, execution, job in held:
            self._active[execution.id] = Active(actor, execution, job.terms.id, now)
            self._ended(actor, report)
        self._after_news(actor, None)

    def end(self, name: str) -> None:
        """Kill an actor whose work is nobody's."""
        if (actor := self._pool.get(name)) is not None:
            self._kill(actor)

    def forget(self, execution_id: str) -> None:
        """An execution is somebody else's now: end the actor that runs it, whose report would change nothing."""
        if (active := self._active.pop(execution_id, None)) is not None:
            active.actor.running.pop(execution_id, None)
            self._kill(active.actor)
        else:
            self._unclaim(execution_id)

    def running(self) -> list[Active]:
        """Return all executions that actors have, or will have when it is stored that they run."""
        return [*self._active.values(), *(claim.active for claim in self._claims)]

    def width(self) -> int:
        """Return how many actors may run bodies at a time."""
        return self._limit()

    def has(self, execution_id: str) -> bool:
        """Tell whether an actor of ours has this execution, or will have it."""
        return execution_id in self._active or execution_id in self._claims

    def resume(self, job_id: str) -> None:
        """The lease is certain again: let a job that is claimed be sent, if it is one."""
        if (claim := self._claims.of(job_id)) is not None and claim.is_stored:
            self.enqueue(job_id, claim.group.spec, claim.depth, first=True)

    # --- what launchers and actors say -----------------------------------------------------------------------------

    def actor_ready(self, name: str, info: ActorInfo) -> None:
        """An actor can take batches."""
        actor = self._pool.get(name)
        if actor is None:
            self._launcher.kill(name)
            return
        actor.info = info
        if actor.state is ActorState.STARTING:
            actor.state = ActorState.READY
        actor.quiet_since = actor.heard_at = self._clock.monotonic()
        actor.is_delayed = False
        self._start_failures.pop(actor.spec, None)
        self.obstacles.started(actor.spec)
        self.pump_soon()

    def actor_dead(self, name: str, cause: str) -> None:
        """An actor is gone; settle everything that was in it."""
        actor = self._pool.get(name)
        if actor is None:
            return
        self._pool.remove(actor)
        if actor.state is ActorState.STARTING and not actor.is_killed:
            self._count_start_failure(actor.spec, cause)
        inside = [*actor.running, *(e for batch in actor.batches.values() for e in batch.execution_ids)]
        if inside and not actor.is_killed:
            self.counters["actors_lost"] += 1
        for execution_id in inside:
            active = self._active.pop(execution_id, None)
            if active is not None:
                self._failures.survive("death of an actor", self._end_with_actor, active, cause)
        self.pump_soon()

    def _end_with_actor(self, active: Active, cause: str) -> None:
        if active.kill_cause is not None:
            self._jobs.killed(active, active.kill_cause)
        elif active.actor.is_killed or (active.parked and not self._terms(active).part):
            self._jobs.interrupted(active)
        else:
            self._jobs.vanished(active, cause)

    def batch_answered(self, name: str, batch: int, reply: BatchReply) -> None:
        """An actor has answered a batch: take note of what ended, goes on, or came back."""
        actor = self._pool.get(name)
        if actor is None or batch not in actor.batches:
            self.counters["reports_refused"] += len(reply.ended)
            return
        sent = actor.batches.pop(batch)
        actor.known |= sent.introduced
        self._brief.pop(batch, None)
        now = actor.heard_at = self._clock.monotonic()
        for report in reply.ended:
            self._ended(actor, report)
        for running in reply.running:
            if (active := self._active.get(running.execution_id)) is not None:
                active.began_at = now - running.age_s
                active.parked = active.parked if active.has_told else running.parked
                active.is_next = active.is_next and active.parked
                actor.running[running.execution_id] = active
                self._watch_long(actor, active)
        for execution_id in reversed(reply.returned):
            if (active := self._active.pop(execution_id, None)) is not None:
                self.counters["returned"] += 1
                self._failures.survive("return of an order", self._jobs.unbegun, active)
        if sent.is_held:
            self._jobs.when_stored(reply.ended, lambda: actor.stored.append(batch))
        self._after_news(actor, reply.recycle)

    def pushed(self, push: Push) -> bool:
        """An actor tells of bodies that went on after their batch was answered; false if it is none of ours."""
        actor = self._pool.get(push.actor)
        if actor is None:
            self.counters["reports_refused"] += len(push.ended)
            return False
        actor.heard_at = self._clock.monotonic()
        for execution_id in push.parked:
            if (active := self._active.get(execution_id)) is not None:
                active.parked = active.has_told = True
                active.is_next = False
        for execution_id in push.resumed:
            if (active := self._active.get(execution_id)) is not None:
                active.parked, active.has_told, active.is_next = False, True, False
        for execution_id, progress in push.progress:
            if (active := self._active.get(execution_id)) is not None:
                self._failures.survive("progress", self._jobs.progressed, active, progress)
        for report in push.ended:
            self._ended(actor, report)
        self._after_news(actor, push.recycle)
        return True

    # --- dispatch --------------------------------------------------------------------------------------------------

    def pump_soon(self) -> None:
        """Match jobs and actors when the loop is free; many causes share one pass."""
        if not self._pump_is_due and self._is_open:
            self._pump_is_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_is_due = False
        if self._is_open:
            self._failures.survive("dispatch", self._pump_once)

    def _pump_once(self) -> None:
        lanes = [lane for lane in self._lanes.values() if len(lane)]
        for lane in lanes:
            # Actors without parked bodies first: should the new body have to be killed, nobody else is hit.
            actors = sorted(self._pool.of(lane.spec), key=lambda a: (len(a.batches), len(a.running)))
            actors = self._yield_to_starving(lane, actors)
            if lane.n_aside or any(actor.is_spared for actor in actors):
                self._send_suspects(lane, actors)
            for actor in actors:
                if not len(lane):
                    break
                if actor.room() > 0:
                    self._send_batch(lane, actor, share=math.ceil(len(lane) / max(1, len(actors))))
                elif actor.may_have_next() and self._is_grown(lane):
                    self._send_next(lane, actor)
        # Only now, when actors that have work are not idle any more. A place that is free is first for a lane without any.
        if len(lanes) > 1:
            lanes.sort(key=lambda lane: (any(True for _ in self._pool.of(lane.spec)), lane.waiting_since or math.inf))
        for lane in lanes:
            self._start_actors(lane)

    def _is_grown(self, lane: Lane) -> bool:
        """Tell whether all actors are there that may be: before, what waits is what starts them."""
        if any(actor.state is ActorState.STARTING for actor in self._pool.of(lane.spec)):
            return False
        return self._pool.n_counted_for(lane.spec) >= self._limit()

    def _send_next(self, lane: Lane, actor: Actor) -> None:
        """Let a chunk of items wait in a full actor for its turn. It comes back when that does not come soon."""
        for job_id in lane.take(1):
            job, claim = self._jobs.queued(job_id), self._claims.of(job_id)
            if job is not None and job.crashes and self._was_set_aside(lane, job):
                continue
            if job is not None and job.terms.part:
                self._send_alone(actor, job)
            elif job is not None:
                lane.push_front(job_id, job.particulars.depth)
            elif claim is not None:
                lane.push_front(job_id, claim.depth)

    def _send_alone(self, actor: Actor, job: JobRecord) -> None:
        now, sent_at = self._clock.now(), self._clock.monotonic()
        batch, introduced = OrderBatch([], [], []), set[str]()
        execution_id = new_id()
        execution, order = self._jobs.begin(job, execution_id, now)
        active = self._active[execution_id] = Active(actor, execution, job.terms.id, sent_at)
        active.parked = active.is_next = True  # until it says that it has begun
        batch.orders.append(order)
        if job.terms.id not in actor.known:
            self._introduce(actor, job.terms, batch, introduced)
        self._n_batches += 1
        self.counters["dispatched"] += 1
        actor.batches[self._n_batches] = Batch([execution_id], introduced, is_short=False, is_held=False, sent_at=sent_at)
        self._hand_over(actor, batch, label=job.terms.kind)

    # --- what must be alone in its process ---------------------------------------------------------------------------

    def _is_suspect(self, job: JobRecord) -> bool:
        """Tell whether a job whose process has vanished must be alone in the next one. What leads items: `_may_be_with`."""
        if job.terms.part:
            return True
        has_own = job.terms.spec.lead or job.terms.isolation is Isolation.PROCESS
        return not has_own and job.crashes >= self._settings.max_crashes - 1

    def _was_set_aside(self, lane: Lane, job: JobRecord) -> bool:
        """Let a job wait beside its lane if it must be alone."""
        if not self._is_suspect(job):
            return False
        terms = job.terms
        is_new = terms.isolation is not Isolation.PROCESS and (not terms.part or job.crashes > 1)
        lane.set_aside(job.id, is_new=is_new)
        self.pump_soon()
        return True

    def _send_suspects(self, lane: Lane, actors: Sequence[Actor]) -> None:
        """Give each job that must be alone an actor in which nothing is; see to it that there will be one for the others."""
        now = self._clock.now()
        empty = [actor for actor in actors if actor.state is ActorState.READY and actor.is_idle]
        empty.sort(key=lambda actor: actor.is_used)
        for wants_new in (True, False):  # first those that need one that is new, then one that is used is as good
            while empty and lane.n_aside_of(is_new=wants_new) and not (wants_new and empty[0].is_used):
                job = self._sendable(lane.take_aside(is_new=wants_new), now)
                if job is not None:  # otherwise as in `_send_batch`
                    self._send_suspect(empty.pop(0 if wants_new else -1), job)
        if lane.n_aside:
            self._empty_one(lane)
        else:
            for actor in actors:
                actor.is_spared = False

    def _send_suspect(self, actor: Actor, job: JobRecord) -> None:
        sent_at, is_held = self._clock.monotonic(), job.particulars.residence.source is not None
        batch, introduced = OrderBatch([], [], [], settled=tuple(actor.stored)), set[str]()
        execution, order = self._begin(job, self._clock.now())
        self._active[execution.id] = Active(actor, execution, job.terms.id, sent_at)
        batch.orders.append(order)
        if job.terms.id not in actor.known:
            self._introduce(actor, job.terms, batch, introduced)
        self._n_batches += 1
        self.counters["dispatched"] += 1
        actor.batches[self._n_batches] = Batch([execution.id], introduced, is_short=False, is_held=is_held, sent_at=sent_at)
        actor.has_suspect, actor.is_spared, actor.stored = True, False, []
        self._hand_over(actor, batch, label=job.terms.kind)

    def _empty_one(self, lane: Lane) -> None:
        """Keep an actor from taking more, so that it can be given to what must be alone, where none can be started."""
        same = list(self._pool.of(lane.spec))
        is_room = self._pool.n_counted_for(lane.spec) < self._limit() and not any(actor.is_delayed for actor in same)
        if is_room or any(_is_coming(actor) for actor in same):
            return
        spared = next((actor for actor in same if actor.is_spared), None)
        if spared is None:
            open_ones = [actor for actor in same if actor.state is ActorState.READY and not actor.is_closed]
            if not open_ones:
                return
            spared = min(open_ones, key=lambda actor: (actor.n_active + len(actor.batches), len(actor.running)))
            spared.is_spared = True
        if spared.is_idle:  # it has run something, and nothing waits but what must be first
            self._retire(spared)

    def _send_batch(self, lane: Lane, actor: Actor, share: int) -> None:
        settings, now, sent_at = self._settings, self._clock.now(), self._clock.monotonic()
        room = actor.room()
        most = 1 if actor.spec.dedicated else min(settings.batch_limit, max(share, room))
        must_be_short = bool(actor.batches)
        budget_s = settings.batch_target_s
        batch = OrderBatch([], [], [])
        execution_ids: list[str] = []
        introduced: set[str] = set()
        is_short, is_brief, is_held, label = True, True, False, ""
        target_s, typical_s = settings.batch_target_s, self._typical_s
        for job_id in lane.take(most):
            job = self._sendable(job_id, now)
            if job is None or (job.crashes and self._was_set_aside(lane, job)):
                continue  # cancelled or removed meanwhile, or not to be sent before it is stored that it runs
            terms = job.terms
            expected_s = typical_s.get(terms.id, target_s)  # unknown counts as long
            is_long = expected_s >= target_s or job.crashes > 0
            if is_long:
                fits = not must_be_short and len(execution_ids) < room and _may_be_with(job, actor, execution_ids)
            else:
                fits = expected_s <= budget_s or not execution_ids
            if not fits:
                lane.push_front(job_id, job.particulars.depth)
                break
            execution, order = self._begin(job, now)
            self._active[execution.id] = Active(actor, execution, terms.id, sent_at)
            execution_ids.append(execution.id)
            batch.orders.append(order)
            budget_s -= expected_s
            if terms.id not in actor.known and terms.id not in introduced:
                self._introduce(actor, terms, batch, introduced)
            label = label or terms.kind
            is_held = is_held or job.particulars.residence.source is not None
            is_brief = is_brief and expected_s < _BRIEF_S
            if is_long:
                is_short = False
                if len(execution_ids) >= room or job.crashes:
                    break
        if not execution_ids:
            return
        self._n_batches += 1
        self.counters["dispatched"] += len(execution_ids)
        actor.batches[self._n_batches] = Batch(
            execution_ids, introduced, is_short=is_short, is_held=is_held, sent_at=sent_at
        )
        if actor.stored:
            batch, actor.stored = batch._replace(settled=tuple(actor.stored)), []
        if is_brief:
            batch = batch._replace(is_brief=True)
            self._brief[self._n_batches] = (sent_at, actor.name)
            if self._hurry_timer is None:
                self._hurry_timer = self._clock.call_later(settings.overrun_s + _HURRY_SLACK_S, self._hurry)
        self._hand_over(actor, batch, label="" if is_brief else label)

    def _hand_over(self, actor: Actor, batch: OrderBatch, *, label: str) -> None:
        actor.is_used = True
        killpoint("dispatch.decided")
        try:
            self._launcher.send(actor.name, self._n_batches, batch, label=label)
        except Exception as error:  # noqa: BLE001 - what was to be sent goes back, and not to this actor
            self._failures.note("send", error)
            self._take_back(actor, self._n_batches)
        killpoint("dispatch.sent")

    def _take_back(self, actor: Actor, number: int) -> None:
        """Put the jobs of a batch back that could not be sent, and end the actor that it could not be sent to."""
        self._brief.pop(number, None)
        self._kill(actor)
        for execution_id in reversed(actor.batches.pop(number).execution_ids):
            if (active := self._active.pop(execution_id, None)) is not None:
                self._failures.survive("return of an order", self._jobs.unbegun, active)

    # --- claims that are written ahead -------------------------------------------------------------------------------

    def _sendable(self, job_id: str, now: float) -> JobRecord | None:
        """Return a job whose order may go out now; one that is claimed ahead is claimed first."""
        if self._claims and (claim := self._claims.of(job_id)) is not None:
            return self._jobs.may_begin(job_id, claim.order.execution_id) if claim.is_stored else None
        job = self._jobs.queued(job_id)
        if job is not None and job.is_claimed_ahead:
            self._claim(job, now)
            self.pump_soon()  # this pass took its share of the lane, and may have sent nothing
            return None
        return job

    def _begin(self, job: JobRecord, now: float) -> tuple[ExecutionRecord, Order]:
        """Return the execution and the order of a job that is sent now."""
        if self._claims and (claim := self._claims.of(job.id)) is not None:
            self._unclaim(claim.order.execution_id)
            return claim.active.execution, claim.order
        return self._jobs.begin(job, new_id(), now)

    def _claim(self, job: JobRecord, now: float) -> None:
        """Have it written that a job runs, and send it then; or set it aside if as many are claimed as could begin."""
        group, settings = group_of(job), self._settings
        expected_s = self._typical_s.get(job.terms.id, settings.batch_target_s)
        room = sum(actor.room() for actor in self._pool.of(group.spec))
        limit = max(1, room) * max(1, int(settings.batch_target_s / max(expected_s, 1e-6)))
        self._claims.allow(group, min(limit, settings.batch_limit))
        if self._claims.n_free(group) <= 0 or self._claims.is_behind(job):
            self._claims.set_aside(job)
            self._recall(group)
            return
        execution_id = new_id()
        claim = Claimed(job, *self._jobs.begin(job, execution_id, now), self._clock.monotonic())
        self._claims.add(claim)
        self._unwritten.append((job, claim))
        if len(self._unwritten) == 1:  # one wait for all that this pass claims
            asyncio.get_running_loop().call_soon(self._await_claims)

    def _await_claims(self) -> None:
        claimed, self._unwritten = self._unwritten, []
        by_group: dict[Group, list[tuple[JobRecord, Claimed]]] = {}
        for job, claim in claimed:
            by_group.setdefault(claim.group, []).append((job, claim))
        killpoint("claim.before_flush")
        for together in by_group.values():
            jobs, claims = [job for job, _ in together], [claim for _, claim in together]
            self._jobs.when_claimed(jobs, lambda claims=claims: self._claims_stored(claims))  # type: ignore[misc]

    def _claims_stored(self, claims: Sequence[Claimed]) -> None:
        killpoint("claim.after_flush")
        for claim in reversed(claims):
            if claim.order.execution_id in self._claims:  # not withdrawn meanwhile
                claim.is_stored = True
                self.resume(claim.order.job_id)

    def _unclaim(self, execution_id: str) -> Claimed | None:
        """A claim was sent or withdrawn: the jobs behind it may be claimed."""
        if (claim := self._claims.pop(execution_id)) is not None:
            self._recall(claim.group)
        return claim

    def _recall(self, group: Group) -> None:
        """Bring back as many of the jobs that were set aside as may be claimed now."""
        recalled: list[tuple[str, int]] = []
        while len(recalled) < self._claims.n_free(group) and (aside := self._claims.take_aside(group)) is not None:
            if self._jobs.queued(aside[0]) is not None:  # not cancelled meanwhile
                recalled.append(aside)
        for job_id, depth in reversed(recalled):
            self.enqueue(job_id, group.spec, depth, first=True)

    def _withdraw(self, execution_id: str) -> None:
        """A job was cancelled between its claim and its order: its body never begins."""
        if (claim := self._unclaim(execution_id)) is not None:
            self._jobs.ended(claim.active, Report(execution_id, claim.order.job_id, "cancelled", self._clock.now(), 0.0))

    def _is_waiting(self, job_id: str) -> bool:
        return self._claims.of(job_id) is not None or self._jobs.queued(job_id) is not None

    def _hurry(self) -> None:
        """Ask after batches that should have been answered by now: a brief body turned out to be long."""
        limit_s = self._settings.overrun_s + _HURRY_SLACK_S
        self._failures.survive("hurry", self._hurry_once, limit_s)
        self._hurry_timer = self._clock.call_later(limit_s, self._hurry) if self._brief else None

    def _hurry_once(self, limit_s: float) -> None:
        late_before = self._clock.monotonic() - limit_s
        for number, (sent_at, name) in list(self._brief.items()):
            if sent_at > late_before:
                break  # they are in the order of their sending
            del self._brief[number]
            self._launcher.hurry(name, number)

    def _introduce(self, actor: Actor, terms: Terms, batch: OrderBatch, introduced: set[str]) -> None:
        """Send terms along until a batch that had them was answered: the next batch may overtake this one."""
        introduced.add(terms.id)
        batch.terms.append(terms)
        if terms.code_id not in actor.known and terms.code_id not in introduced:
            introduced.add(terms.code_id)
            batch.code.append((terms.code_id, self._jobs.code_for(terms.code_id)))

    def _ended(self, actor: Actor, report: Report) -> None:
        active = self._active.pop(report.execution_id, None)
        actor.running.pop(report.execution_id, None)
        if active is None:
            self.counters["reports_refused"] += 1
            return
        if report.outcome == "returned":
            self.counters["returned"] += 1
            self._failures.survive("return of an order", self._jobs.unbegun, active)
            return
        actor.jobs_done += 1
        actor.quiet_since = self._clock.monotonic()
        typical = self._typical_s.get(active.terms_id)
        taken = report.duration_s
        if typical is None:
            self._typical_s[active.terms_id] = taken
        else:  # quick to believe in long bodies, slow to forget them
            self._typical_s[active.terms_id] = typical + (taken - typical) * (0.5 if taken > typical else 0.1)
        try:
            self._jobs.ended(active, report)
        except Exception as error:  # noqa: BLE001 - of this report, and no reason to lose those behind it
            self._unsettled(active, error)

    def _unsettled(self, active: Active, error: Exception) -> None:
        """Count an end that cannot be settled as the loss of its process."""
        self._failures.note("settling", error)
        cause = f"its end could not be settled: {type(error).__name__}: {said(error, _MAX_CAUSE)}"
        self._failures.survive("settling", self._jobs.vanished, active, cause)

    def _after_news(self, actor: Actor, recycle: str | None) -> None:
        if recycle is not None or actor.spec.dedicated:
            actor.recycle = recycle or "dedicated"
            actor.state = ActorState.RETIRING
        if actor.state is ActorState.RETIRING and actor.is_idle:
            self._retire(actor)
        self.pump_soon()

    def _watch_long(self, actor: Actor, active: Active) -> None:
        terms = self._terms(active)
        self._launcher.attend(actor.name, active.execution.id, terms.kind)
        if terms.timeout_s is not None and active.began_at is not None:
            slack = _CHILD_PROCESS_SLACK_S if terms.isolation is Isolation.PROCESS else 0.0
            kill_at = active.began_at + terms.timeout_s + self._settings.cancel_grace_s + slack
            self._add_deadline(kill_at, active.execution.id, "timeout")

    # --- actors ----------------------------------------------------------------------------------------------------

    def _limit(self) -> int:
        return self._settings.max_actors or self._capacity

    def _start_actors(self, lane: Lane) -> None:
        if not len(lane) or self._clock.monotonic() < self._not_before.get(lane.spec, 0.0):
            return
        same = list(self._pool.of(lane.spec))
        busy = sum(actor.room() == 0 and actor.state is ActorState.READY for actor in same)
        retiring = sum(actor.state is ActorState.RETIRING for actor in same)
        wanted = busy + retiring + math.ceil(len(lane) / lane.spec.concurrency)
        if lane.spec.lead and not any(actor.is_idle and actor.state is not ActorState.RETIRING for actor in same):
            wanted = len(same) + 1  # what is left in the lane wants an actor for itself, or finds the others full
        if lane.n_aside:
            wanted = max(
                wanted,
                lane.n_aside + sum(not _may_be_alone(actor, is_new=lane.n_aside_of(is_new=True) > 0) for actor in same),
            )
        while len(same) < wanted:
            if lane.spec.lead:
                if self._pool.n_leading() >= max(_MAX_LEADING, self._limit()) and not lane.deepest:
                    return
            elif self._pool.n_counted_for(lane.spec) >= self._limit():
                self._make_room(lane.spec)
                return
            lent = not lane.spec.lead and self._pool.n_placed() >= self._limit()
            self._n_started += 1
            name = f"koan_ray.job/{self._epoch}/{self._n_started}"
            actor = Actor(name, lane.spec, at=self._clock.monotonic(), lent=lent)
            self._pool.add(actor)
            same.append(actor)
            self.counters["actors_started"] += 1
            try:
                self._launcher.start(name, lane.spec, self, lent=lent)
            except Exception as error:  # noqa: BLE001 - as if the actor had died while it started
                self._failures.note("start of an actor", error)
                self.actor_dead(name, f"{type(error).__name__}: {said(error, _MAX_CAUSE)}")
                return

    def _make_room(self, spec: ActorSpec) -> None:
        """End an idle actor of another spec; its place is free when it is dead, and the pump runs again then."""
        if (idle := self._pool.idle_of_another_spec(spec)) is not None:
            self._retire(idle)

    def _yield_to_starving(self, lane: Lane, actors: list[Actor]) -> list[Actor]:
        """Give up one actor of a busy lane when another lane has had none for a while and there is no room for it."""
        if len(self._lanes) == 1 or lane.spec.lead or any(actor.state is ActorState.RETIRING for actor in self._pool):
            return actors  # one at a time: the place of the one that is ending comes first
        now = self._clock.monotonic()
        for other in self._lanes.values():
            if other is lane or other.spec.lead:
                continue
            if not len(other) or any(True for _ in self._pool.of(other.spec)):
                other.waiting_since = None
                continue
            other.waiting_since = other.waiting_since or now
            if now - other.waiting_since >= _STARVING_S and self._pool.n_counted_for(other.spec) >= self._limit():
                for actor in actors:
                    if actor.state is ActorState.READY and not actor.has_parked:
                        actor.state = ActorState.RETIRING
                        if actor.is_idle:
                            self._retire(actor)
                        return [a for a in actors if a is not actor]
        return actors

    def _count_start_failure(self, spec: ActorSpec, cause: str) -> None:
        failures = self._start_failures[spec] = self._start_failures.get(spec, 0) + 1
        if failures > len(_START_RETRY_S):
            self._start_failures.pop(spec)
            self.obstacles.given_up(spec)
            for claim in self._claims:
                if claim.group.spec == spec and self._unclaim(claim.order.execution_id) is not None:
                    self._jobs.unbegun(claim.active)
            self._jobs.refuse_all(spec, cause)
            return
        self.obstacles.failed_to_start(spec, cause)
        delay = _START_RETRY_S[failures - 1]
        self._not_before[spec] = self._clock.monotonic() + delay
        self._clock.call_later(delay, self.pump_soon)

    def _retire(self, actor: Actor) -> None:
        actor.state = ActorState.RETIRING
        if not actor.is_killed:
            actor.is_killed = True
            if actor.recycle not in (None, "dedicated"):
                self.counters["actors_recycled"] += 1
            self._launcher.retire(actor.name)

    def _kill(self, actor: Actor) -> None:
        actor.state = ActorState.RETIRING
        if not actor.is_killed:
            actor.is_killed = True
            self.counters["actors_killed"] += 1
            self._launcher.kill(actor.name)

    # --- time ------------------------------------------------------------------------------------------------------

    def _arm_due_timer(self) -> None:
        """Look again when the first wait ends."""
        if self._due_timer is not None:
            self._due_timer.cancel()
        self._due_timer, self._due_timer_at = None, math.inf
        monotonic = self._clock.monotonic()
        wait_s = self._due.next_in(self._clock.now(), monotonic)
        if wait_s is not None:
            self._due_timer_at = monotonic + wait_s
            self._due_timer = self._clock.call_later(wait_s, self._release_due)

    def _release_due(self) -> None:
        self._failures.survive("due times", self._release_due_once)
        self._arm_due_timer()

    def _release_due_once(self) -> None:
        now, monotonic = self._clock.now(), self._clock.monotonic()
        for job_id in self._due.take_due(now, monotonic, self._waits_until):
            if (place := self._jobs.became_due(job_id)) is not None:
                self.enqueue(job_id, *place)

    def _waits_until(self, due_at: float, job_id: str) -> bool:
        return self._jobs.due_at(job_id) == due_at

    def _add_deadline(self, at: float, execution_id: str, cause: str) -> None:
        heapq.heappush(self._deadlines, (at, execution_id, cause))
        if self._deadlines[0][1] == execution_id or self._deadline_timer is None:
            self._arm_deadline_timer()

    def _arm_deadline_timer(self) -> None:
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
        if self._deadlines:
            delay = max(0.0, self._deadlines[0][0] - self._clock.monotonic())
            self._deadline_timer = self._clock.call_later(delay, self._kill_overdue)

    def _kill_overdue(self) -> None:
        self._failures.survive("deadlines", self._kill_overdue_once)
        self._arm_deadline_timer()

    def _kill_overdue_once(self) -> None:
        now = self._clock.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, execution_id, cause = heapq.heappop(self._deadlines)
            if (active := self._active.get(execution_id)) is not None and active.kill_cause is None:
                active.kill_cause = active.stop_cause or cause
                self._kill(active.actor)

    def _keep_house(self) -> None:
        """Once a second: end what idles or is too old, kill what does not answer, notice a cluster that grew."""
        self._housekeeping = self._clock.call_later(_HOUSEKEEPING_S, self._keep_house)
        self._forgive_own_absence(self._clock.monotonic())
        for room, keep in (
            ("actors", self._look_after_actors), ("claims", self._recall_idle), ("lanes", self._drop_idle_lanes),
        ):  # fmt: skip
            self._failures.survive(f"housekeeping of {room}", keep)
        self.look_for_obstacles(spec for spec, lane in self._lanes.items() if len(lane))
        self._release_due()  # timers do not notice when the wall clock is set
        self.pump_soon()

    def _look_after_actors(self) -> None:
        now, settings = self._clock.monotonic(), self._settings
        self._capacity = self._launcher.capacity()
        idle_ttl_s = min(_CROWDED_TTL_S, settings.idle_ttl_s) if self._launcher.is_crowded() else settings.idle_ttl_s
        for actor in list(self._pool):
            if actor.state is ActorState.READY and actor.is_idle and now - actor.quiet_since > idle_ttl_s:
                self._retire(actor)
            elif actor.state is ActorState.READY and now - actor.started_at > settings.recycle_age_s:
                actor.state, actor.recycle = ActorState.RETIRING, "age"
                if actor.is_idle:
                    self._retire(actor)
            elif actor.state is ActorState.STARTING and now - actor.started_at > _DELAYED_S:
                self._delayed(actor)
            if actor.stored and not actor.batches:
                self._launcher.settled(actor.name, tuple(actor.stored))
                actor.stored = []
            waits_since = min([batch.sent_at for batch in actor.batches.values()], default=math.inf)
            if actor.running:  # it says that it is there from time to time
                waits_since = min(waits_since, actor.heard_at)
            if now - waits_since > settings.stuck_after_s and not actor.is_killed:
                self._kill_stuck(actor, now)

    def _recall_idle(self) -> None:
        for group in self._claims.idle_groups():  # what was brought back was cancelled before it could be claimed
            self._recall(group)

    def look_for_obstacles(self, specs: Iterable[ActorSpec]) -> None:
        """Look whether jobs of these specs can run at all."""
        self._failures.survive("obstacles", self.obstacles.look, specs)

    def _delayed(self, actor: Actor) -> None:
        """The cluster has no room, or no node, for an actor: let others start, and end it when nobody wants it any more."""
        actor.is_delayed = True
        lane = self._lanes.get(actor.spec)
        if lane is None or not lane.has_queued(self._is_waiting):
            self._retire(actor)

    def _forgive_own_absence(self, now: float) -> None:
        """Take no actor for stuck because this process was: what they said meanwhile has yet to be read."""
        absent_s = now - self._kept_house_at - _HOUSEKEEPING_S
        self._kept_house_at, self.lag_s = now, max(0.0, absent_s)
        if absent_s > _HOUSEKEEPING_S:
            for actor in self._pool:
                actor.heard_at += absent_s
                for batch in actor.batches.values():
                    batch.sent_at += absent_s

    def _kill_stuck(self, actor: Actor, now: float) -> None:
        """The process has not answered: it is stopped, swapped out, or native code holds its GIL."""
        for batch in actor.batches.values():
            if len(batch.execution_ids) == 1:  # only then is it known to have begun
                self._blame(batch.execution_ids[0], now - batch.sent_at)
            batch.sent_at = now
        actor.heard_at = now  # should it not have died after as long again, it is killed again
        actor.state = ActorState.RETIRING
        self._launcher.kill(actor.name)  # what is in it counts as lost, as it was not our wish

    def _blame(self, execution_id: str, age_s: float) -> None:
        """Have an execution time out when its actor is dead, if it should have long ago."""
        active = self._active.get(execution_id)
        if active is not None and active.kill_cause is None:
            timeout_s = self._terms(active).timeout_s
            if timeout_s is not None and age_s > timeout_s + self._settings.cancel_grace_s:
                active.kill_cause = "timeout"

    def _drop_idle_lanes(self) -> None:
        for spec, lane in list(self._lanes.items()):
            if not len(lane) and not any(True for _ in self._pool.of(spec)):
                del self._lanes[spec]

    def _n_running(self) -> int:
        """Return how many jobs run; chunks belong to one that does."""
        return sum(not self._terms(active).part for active in self._active.values())

    def _terms(self, active: Active) -> Terms:
        return self._jobs.terms_for(active.terms_id)


def _is_coming(actor: Actor) -> bool:
    """Tell whether an actor is about to be there, or its place is about to be free for another."""
    return actor.is_killed or (actor.state is ActorState.STARTING and not actor.is_delayed)


def _may_be_alone(actor: Actor, *, is_new: bool) -> bool:
    """Tell whether an actor can be given, now or when it has started, to what must be alone in it."""
    return actor.state is not ActorState.RETIRING and actor.is_idle and not (is_new and actor.is_used)


def _may_be_with(job: JobRecord, actor: Actor, execution_ids: list[str]) -> bool:
    """Tell whether a long job may join what an actor is about to be sent.

    One whose process has vanished goes alone. What leads items is one of many in its actor, so that then nothing joins it
    there until it has ended.
    """
    if not job.crashes:
        return True
    if actor.spec.lead:
        if not actor.is_idle:
            return False
        actor.has_suspect = not execution_ids
    return not execution_ids
