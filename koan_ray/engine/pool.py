"""The job actors, and what each can take.

An actor serves one spec. It is *open* for a batch while fewer bodies are active in it than its spec's concurrency; a body
that is parked (waiting for other jobs) is not active, so a parent makes room for its children in its own actor and
waiting never deadlocks, whatever the size of the pool.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from koan_ray.domain.records import ActorSpec, ExecutionRecord
    from koan_ray.ports import ActorInfo

MAX_IN_FLIGHT = 2  # batches; the second waits in the actor while the first runs, which hides the round trip


class ActorState(Enum):
    """Where an actor is in its life."""

    STARTING = auto()
    READY = auto()
    RETIRING = auto()  # takes nothing more; ended when its last execution is


class Active:
    """An execution that an actor has, as the coordinator sees it."""

    __slots__ = (
        "actor",
        "began_at",
        "execution",
        "has_told",
        "is_next",
        "job_id",
        "kill_cause",
        "parked",
        "sent_at",
        "stop_cause",
        "terms_id",
    )

    def __init__(self, actor: Actor, execution: ExecutionRecord, terms_id: str, sent_at: float) -> None:
        self.actor = actor
        self.execution = execution
        self.job_id = execution.job_id
        self.terms_id = terms_id
        self.sent_at = sent_at  # monotonic
        self.began_at: float | None = None  # monotonic; None while it is in a batch that was not answered yet
        self.parked = False
        self.is_next = False  # a chunk that waits in a full actor for its turn; it counts as parked
        self.has_told = False  # by itself, whether it is parked; what a batch's answer says may be older
        self.stop_cause: str | None = None  # why it was asked to stop
        self.kill_cause: str | None = None  # why its actor is being killed


class Batch:
    """Orders that an actor has not answered yet."""

    __slots__ = ("execution_ids", "introduced", "is_held", "is_short", "sent_at")

    def __init__(
        self, execution_ids: list[str], introduced: set[str], *, is_short: bool, is_held: bool, sent_at: float
    ) -> None:
        self.execution_ids, self.is_short, self.sent_at = execution_ids, is_short, sent_at
        self.introduced = introduced  # ids of terms and classes that came with it
        self.is_held = is_held  # the actor holds its ends until they are stored


class Actor:
    """One job actor."""

    __slots__ = (
        "batches", "has_suspect", "heard_at", "info", "is_delayed", "is_killed", "is_spared", "is_used", "jobs_done",
        "known", "lent", "name", "quiet_since", "recycle", "running", "spec", "started_at", "state", "stored",
    )  # fmt: skip

    def __init__(self, name: str, spec: ActorSpec, *, at: float, lent: bool) -> None:
        self.name, self.spec, self.lent = name, spec, lent
        self.state = ActorState.STARTING
        self.started_at = at  # monotonic
        self.quiet_since = at
        self.heard_at = at  # when it said anything
        self.info: ActorInfo | None = None
        self.batches: dict[int, Batch] = {}
        self.running: dict[str, Active] = {}  # goes on after its batch was answered
        self.stored: list[int] = []  # batches whose ends are stored, which the actor has not been told
        self.known: set[str] = set()  # ids of terms and classes that it has for sure
        self.jobs_done = 0
        self.recycle: str | None = None
        self.has_suspect = False  # what is in it was in a process that vanished: nothing joins it until it has ended
        self.is_spared = False  # takes nothing more until it is empty: what must be alone in a process waits for one
        self.is_used = False  # something has been sent to it
        self.is_killed = False
        self.is_delayed = False  # it takes so long to start that the cluster has probably no room for it

    @property
    def n_active(self) -> int:
        """Bodies that use the actor now, apart from those in unanswered batches."""
        if not self.running:
            return 0
        return sum(not active.parked for active in self.running.values())

    @property
    def is_idle(self) -> bool:
        """Nothing in it, not even a parked body."""
        return not self.batches and not self.running

    @property
    def is_closed(self) -> bool:
        """It takes nothing, whatever room it has, because of what must be alone in its process."""
        if self.spec.dedicated and self.is_used:
            return True
        return self.is_spared or (self.has_suspect and not self.is_idle)

    @property
    def is_parked_only(self) -> bool:
        """Everything in it waits for other jobs; its CPU is free to be lent."""
        return not self.batches and bool(self.running) and self.n_active == 0 and not self.has_next

    @property
    def has_parked(self) -> bool:
        """At least one body in it waits for other jobs."""
        return any(active.parked and not active.is_next for active in self.running.values())

    @property
    def has_next(self) -> bool:
        """A chunk of items waits in it for its turn."""
        return any(active.is_next for active in self.running.values())

    def room(self) -> int:
        """How many more bodies it can begin; more than the concurrency only counts for a batch of short jobs."""
        if self.state is not ActorState.READY or self.n_active >= self.spec.concurrency:
            return 0
        if self.is_closed:
            return 0
        self.has_suspect = False
        if self.batches and not (len(self.batches) < MAX_IN_FLIGHT and all(b.is_short for b in self.batches.values())):
            return 0
        return self.spec.concurrency - self.n_active

    def may_have_next(self) -> bool:
        """It is full with bodies, and one chunk of items may wait in it for its turn, which hides the way there and back."""
        return (
            self.state is ActorState.READY
            and not (self.batches or self.has_parked or self.has_next or self.spec.lead or self.spec.dedicated)
            and not self.is_closed
            and self.n_active == self.spec.concurrency
        )


class Pool:
    """All job actors of one coordinator, by name and by spec."""

    def __init__(self) -> None:
        self._actors: dict[str, Actor] = {}
        self._by_spec: dict[ActorSpec, dict[str, Actor]] = {}

    def __len__(self) -> int:
        return len(self._actors)

    def __iter__(self) -> Iterator[Actor]:
        return iter(self._actors.values())

    def get(self, name: str) -> Actor | None:
        """Return the actor of this name."""
        return self._actors.get(name)

    def of(self, spec: ActorSpec) -> Iterable[Actor]:
        """Return the actors of this spec."""
        return self._by_spec.get(spec, {}).values()

    def add(self, actor: Actor) -> None:
        """Count an actor as ours."""
        self._actors[actor.name] = actor
        self._by_spec.setdefault(actor.spec, {})[actor.name] = actor

    def remove(self, actor: Actor) -> None:
        """Forget an actor that is gone."""
        self._actors.pop(actor.name, None)
        same = self._by_spec.get(actor.spec, {})
        same.pop(actor.name, None)
        if not same:
            self._by_spec.pop(actor.spec, None)

    def n_counted_for(self, spec: ActorSpec) -> int:
        """Actors that count against ``max_actors`` when one of ``spec`` is wanted.

        An actor that can take nothing of this spec and in which every body waits for other jobs does not count: its CPU is
        lent to the new one, so that a parent can wait for a child with other needs, or for one that must be alone in its
        process, however small the pool is. Nor does one that waits for the cluster: it holds nothing, and might wait for
        ever. Those that lead jobs over items never do.
        """
        return sum(
            (actor.spec == spec and not (actor.state is ActorState.RETIRING or actor.is_closed))
            or not (actor.is_parked_only or actor.is_delayed)
            for actor in self._actors.values()
            if not actor.spec.lead
        )

    def n_leading(self) -> int:
        """Actors that lead jobs over items."""
        return sum(actor.spec.lead for actor in self._actors.values())

    def n_placed(self) -> int:
        """Actors that hold, or are about to hold, what their spec says."""
        return sum(not (actor.is_delayed or actor.spec.lead) for actor in self._actors.values())

    def idle_of_another_spec(self, spec: ActorSpec) -> Actor | None:
        """Return the actor of another spec that has been idle longest."""
        others = (a for a in self._actors.values() if a.spec != spec and not a.spec.lead)
        idle = [a for a in others if a.is_idle and a.state is ActorState.READY]
        return min(idle, key=lambda actor: actor.quiet_since, default=None)
