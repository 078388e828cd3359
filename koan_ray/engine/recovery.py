"""What a coordinator does with the past of a source that it takes over: jobs in documents, and job actors that still run.

The order is what makes it safe, and is the model's (`tests/model`): the lease, the stamp on every unfinished document, the
documents, then the job actors. An actor's word about an execution counts only if the document names that execution.

* An actor that runs a current execution is adopted: its body is not disturbed.
* An end that an actor holds for a current execution is settled, and the body is not repeated.
* A document that is Running, and whose execution nobody runs or holds, was lost: a crash is counted, and it runs again.
* An execution that is open although its job has moved on is closed as the job's state says.
* An actor that runs nothing current is ended: whatever it does changes nothing.

Actors wait in limbo until every source that they run something of was taken over, or is known to be somebody else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from koan_ray.domain import transitions
from koan_ray.domain.records import ExecutionRecord
from koan_ray.domain.status import JobStatus
from koan_ray.killpoints import killpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from koan_ray.domain.records import JobRecord
    from koan_ray.engine.dispatcher import Dispatcher
    from koan_ray.engine.shards import Shards
    from koan_ray.ports import Clock, Launcher, Log, Running, Survey


_LAST_FLUSH = 2000


class Jobs(Protocol):
    """What recovery asks of the coordinator."""

    def current(self, job_id: str, execution_id: str) -> JobRecord | None:
        """Return the live job if this is its current execution."""

    def unheld(self, job: JobRecord, execution: ExecutionRecord) -> None:
        """Nobody runs or holds this execution: count a crash."""

    def given_back(self, job: JobRecord, execution: ExecutionRecord) -> None:
        """It was sent and never begun."""


class Recovery:
    """Actors of an earlier coordinator, until it is decided what becomes of them."""

    def __init__(self, jobs: Jobs, launcher: Launcher, dispatcher: Dispatcher, clock: Clock, log: Log) -> None:
        self._jobs, self._launcher, self._dispatcher = jobs, launcher, dispatcher
        self._clock, self._log = clock, log
        self._limbo: dict[str, Survey] = {}

    @property
    def limbo(self) -> Mapping[str, Survey]:
        """Actors that nobody has decided on."""
        return self._limbo

    async def survey(self) -> None:
        """Ask around; actors that run nothing of any source lived for an earlier coordinator's memory and are ended."""
        for found in await self._launcher.survey():
            if any(running.source is not None for running in found.running) or found.held or found.unbegun:
                self._limbo[found.name] = found
            else:
                self._launcher.adopt(found.name, self._dispatcher)
                self._launcher.kill(found.name)

    async def adopt(self, shards: Shards, slots: Sequence[int], jobs: Iterable[JobRecord]) -> None:
        """Match a source's jobs in these slots, which are live by now, with what actors run and hold."""
        executions = {
            execution.id: execution
            async for batch in shards.audit.open_executions(slots)
            for execution in batch
        }  # fmt: skip
        killpoint("takeover.before_adopt")
        for found in list(self._limbo.values()):
            sources = {running.source for running in found.running}
            if shards.source in sources or not sources - {None}:
                self._adopt_actor(found, executions)
        killpoint("takeover.after_adopt")
        await self._close_left_open(shards, executions)
        await self._file_missing(shards, slots)
        for job in jobs:
            if job.status is JobStatus.RUNNING and not self._dispatcher.has(job.execution_id or ""):
                execution = executions.get(job.execution_id or "") or self._rebuilt(job, age_s=0.0)
                if self._jobs.current(job.id, execution.id) is not None:
                    self._jobs.unheld(job, execution)

    def _adopt_actor(self, found: Survey, executions: Mapping[str, ExecutionRecord]) -> None:
        del self._limbo[found.name]
        self._launcher.adopt(found.name, self._dispatcher)
        known: list[tuple[Running, ExecutionRecord, JobRecord]] = []
        strangers: list[str] = []
        for running in found.running:
            job = self._jobs.current(running.job_id, running.execution_id)
            if job is None:
                strangers.append(running.execution_id)
            else:
                execution = executions.get(running.execution_id) or self._rebuilt(job, age_s=running.age_s)
                known.append((running, execution, job))
        for execution_id, job_id in found.unbegun:
            job = self._jobs.current(job_id, execution_id)
            if job is not None:
                self._jobs.given_back(job, executions.get(execution_id) or self._rebuilt(job, age_s=0.0))
        held = []
        for report in found.held:
            job = self._jobs.current(report.job_id, report.execution_id)
            if job is not None:
                rebuilt = ExecutionRecord(report.execution_id, job.id, job.attempts, report.began_at)
                execution = executions.get(report.execution_id) or rebuilt
                held.append((report, execution, job))
        self._log.info("actor_adopted", actor=found.name, n_running=len(known), n_held=len(held), n_refused=len(strangers))
        self._dispatcher.adopt(found, known, held)
        if strangers and not known:
            self._dispatcher.end(found.name)
        else:
            for execution_id in strangers:
                self._launcher.cancel(found.name, execution_id, "cancelled")

    async def _close_left_open(self, shards: Shards, executions: Mapping[str, ExecutionRecord]) -> None:
        closed = []
        for execution in executions.values():
            if self._jobs.current(execution.job_id, execution.id) is not None:
                continue
            job = await shards.store.get(execution.job_id)
            if job is not None and job.execution_id != execution.id:
                ended = transitions.closure(execution, job, at=self._clock.now())
                closed.append((ended, job.particulars.residence.partition))
        if closed:
            killpoint("takeover.before_close")
            await shards.audit.close_executions(closed)
            killpoint("takeover.after_close")
            self._log.info("executions_closed", n=len(closed))

    async def _file_missing(self, shards: Shards, slots: Sequence[int]) -> None:
        """Write the executions of jobs that ended in the last flush of an earlier holder, if it died in the middle of it.

        A flush writes jobs before executions, at most a thousand at a time, so only the newest can lack theirs.
        """
        filed = []
        async for jobs in shards.store.last_settled(slots, _LAST_FLUSH):
            for job in jobs:
                if not job.particulars.residence.audit or job.last_execution_id is None:
                    continue
                if not any(e.id == job.last_execution_id for e in await shards.audit.executions(job.id)):
                    began_at = job.started_at or job.created_at
                    execution = ExecutionRecord(job.last_execution_id, job.id, job.attempts, began_at)
                    ended = transitions.closure(execution, job, at=self._clock.now())
                    filed.append((ended, job.particulars.residence.partition))
        if filed:
            await shards.audit.close_executions(filed)
            self._log.info("executions_filed", n=len(filed))

    def _rebuilt(self, job: JobRecord, *, age_s: float) -> ExecutionRecord:
        """Return the record of a running execution whose own was never written."""
        began_at = self._clock.now() - age_s if age_s else job.last_modified
        return ExecutionRecord(job.execution_id or "", job.id, job.attempts, began_at)

    def release(self) -> None:
        """End what is still in limbo: no source that it runs something of is ours."""
        for name in list(self._limbo):
            del self._limbo[name]
            self._launcher.adopt(name, self._dispatcher)
            self._launcher.kill(name)
