"""Claims that are written ahead: the order of a job waits until its Running state and its execution are stored.

::

    queued ──► claimed, Running is staged ──► stored, first in its lane ──► sent to an actor
                             └──── cancelled, or the lease lost ────┴──► withdrawn: its body never begins

A claim takes no place in an actor, so that a store that does not answer holds up none but its own jobs. There are no more
claims at a time than bodies could begin; jobs beyond that are set aside, and come back when one was sent or withdrawn.

What a crash leaves behind: a Running document with an open execution that no actor holds. Nobody can tell that from a body
whose process died, so the next coordinator counts a crash and runs the job again. That is what the class asked for:
accounted for although it may not have happened, and never the other way round.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

from koan_ray.engine.pool import Active, Actor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from koan_ray.domain.records import ActorSpec, ExecutionRecord, JobRecord
    from koan_ray.ports import Order


class Group(NamedTuple):
    """Claims that wait for the same actors and the same store."""

    spec: ActorSpec
    source: str | None


class Claimed:
    """A job that is Running, and whose order is not sent."""

    __slots__ = ("active", "depth", "group", "is_stored", "order")

    def __init__(self, job: JobRecord, execution: ExecutionRecord, order: Order, at: float) -> None:
        self.group, self.depth = group_of(job), job.particulars.depth
        self.order, self.is_stored = order, False
        # The actor that it has until it has one: it is nowhere, and nothing is known of it.
        self.active = Active(Actor("", job.terms.spec, at=at, lent=False), execution, job.terms.id, at)


class Claims:
    """What is claimed and not sent, by job and by execution; and what waits for its turn to be claimed."""

    def __init__(self) -> None:
        self._by_job: dict[str, Claimed] = {}
        self._by_execution: dict[str, Claimed] = {}
        self._aside: dict[Group, list[tuple[int, str]]] = {}  # heaps of negated depths and ids, which are in order of time
        self._n_of: dict[Group, int] = {}
        self._limits: dict[Group, int] = {}

    def __len__(self) -> int:
        return len(self._by_job)

    def __iter__(self) -> Iterator[Claimed]:
        return iter(list(self._by_job.values()))

    def __contains__(self, execution_id: str) -> bool:
        return execution_id in self._by_execution

    def of(self, job_id: str) -> Claimed | None:
        """Return the claim of a job."""
        return self._by_job.get(job_id)

    def n_of(self, group: Group) -> int:
        """Claims of a group."""
        return self._n_of.get(group, 0)

    def add(self, claim: Claimed) -> None:
        """A job is claimed."""
        self._by_job[claim.order.job_id] = self._by_execution[claim.order.execution_id] = claim
        self._n_of[claim.group] = self.n_of(claim.group) + 1

    def allow(self, group: Group, limit: int) -> None:
        """There may be so many claims of a group until this is called again."""
        self._limits[group] = limit

    def n_free(self, group: Group) -> int:
        """Return how many more claims of a group there may be."""
        return self._limits.get(group, 1) - self.n_of(group)

    def idle_groups(self) -> list[Group]:
        """Return the groups of which jobs are set aside and none is claimed."""
        return [group for group in self._aside if not self.n_of(group)]

    def set_aside(self, job: JobRecord) -> None:
        """Let a job wait until another of its group was sent or withdrawn."""
        heapq.heappush(self._aside.setdefault(group_of(job), []), (-job.particulars.depth, job.id))

    def pop(self, execution_id: str) -> Claimed | None:
        """A claim was sent or withdrawn; returns it if there was one."""
        claim = self._by_execution.pop(execution_id, None)
        if claim is not None:
            del self._by_job[claim.order.job_id]
            left = self._n_of.pop(claim.group) - 1
            if left:
                self._n_of[claim.group] = left
            elif claim.group not in self._aside:
                self._limits.pop(claim.group, None)
        return claim

    def is_behind(self, job: JobRecord) -> bool:
        """Tell whether a job of the same group that is set aside goes before this one."""
        waiting = self._aside.get(group_of(job))
        return waiting is not None and waiting[0] < (-job.particulars.depth, job.id)

    def take_aside(self, group: Group) -> tuple[str, int] | None:
        """Return, and forget, the id and the depth of that job of a group whose turn it is: the deepest, then the oldest."""
        waiting = self._aside.get(group)
        if waiting is None:
            return None
        depth, job_id = heapq.heappop(waiting)
        if not waiting:
            del self._aside[group]
        return job_id, -depth


def group_of(job: JobRecord) -> Group:
    """Return where a job's claim belongs."""
    return Group(job.terms.spec, job.particulars.residence.source)
