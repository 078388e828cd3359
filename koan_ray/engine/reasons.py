"""Why jobs do not run, in words, for everybody who shows jobs. Worked out when it is asked for, and stored nowhere.

A queued job that is due and cannot run says what it waits for in place of its `Reason`: the class that no process has
introduced, the node that the cluster does not have, the actor that does not start. A job over items runs in an actor that
needs nothing, while its chunks may wait; so it says what they wait for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from koan_ray.domain.status import JobStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from koan_ray.domain.records import JobRecord, Terms
    from koan_ray.engine.dispatcher import Dispatcher
    from koan_ray.engine.kinds import Kinds
    from koan_ray.engine.live import LiveJobs


class Reasons:
    """Reasons of the jobs of one coordinator.

    Args:
        live: The jobs that have not ended.
        kinds: The job classes.
        dispatcher: Knows what is in the way of which actors.
    """

    def __init__(self, live: LiveJobs, kinds: Kinds, dispatcher: Dispatcher) -> None:
        self._live, self._kinds, self._dispatcher = live, kinds, dispatcher

    def why(self, job: JobRecord) -> str | None:
        """Return why a job does not run though it could; None if it runs, has ended, or only waits for its turn."""
        if job.status is JobStatus.RUNNING:
            return self._why_chunks(job) if job.has_items else None
        if job.status is not JobStatus.QUEUED:
            return None
        if self._kinds.is_unroutable(job):
            return (
                f"no process of this engine has introduced the class {job.terms.kind!r}; waits until one that imports its "
                f"module uses the engine ([jobs] modules in the settings, or --module, names it)"
            )
        if job.due_at is not None:
            return None
        if job.has_items and (problem := self._of_parts(job.terms)) is not None:
            return problem
        return self._dispatcher.why_waits(job.terms.spec)

    def shown(self, job: JobRecord) -> JobRecord:
        """Return a job with its reason in words, where there is one."""
        why = self.why(job)
        return job if why is None else job.evolve(reason=why)

    def of(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return the reasons of those of these jobs that have one, by id."""
        found = ((job_id, self.why(job)) for job_id in job_ids if (job := self._live.by_id.get(job_id)) is not None)
        return {job_id: why for job_id, why in found if why is not None}

    def of_terms(self, terms: Sequence[Terms]) -> tuple[tuple[str, str], ...]:
        """Return what is in the way of jobs with these terms, as pairs of their id and the reason."""
        obstacles = self._dispatcher.obstacles
        if not obstacles:
            return ()
        found = ((each.id, obstacles.of(each.spec) or self._of_parts(each)) for each in terms)
        return tuple((terms_id, why) for terms_id, why in found if why is not None)

    def _of_parts(self, terms: Terms) -> str | None:
        part = self._kinds.part_of(terms) if terms.spec.lead else None
        return self._dispatcher.obstacles.of(part.spec) if part is not None else None

    def _why_chunks(self, job: JobRecord) -> str | None:
        """Return why no chunk of a job's items runs; None if one does, or if there is none now."""
        why: str | None = None
        for chunk_id in self._live.children.get(job.id, ()):
            chunk = self._live.by_id.get(chunk_id)
            if chunk is None or not chunk.terms.part:
                continue
            if chunk.status is not JobStatus.QUEUED:
                return None
            why = why or self._dispatcher.why_waits(chunk.terms.spec)
            if why is None:
                return None
        return None if why is None else f"its items wait: {why}"
