"""``koan-ray jobs watch``: live bars on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import contextlib
import queue
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from rich.console import Group
from rich.live import Live
from rich.text import Text

from koan_ray import ambient
from koan_ray.cli import bars, exits, present
from koan_ray.cli.options import Where
from koan_ray.cli.reach import TIMEOUT_S, reach
from koan_ray.cli.safe import safe, safe_lines, shown
from koan_ray.cli.signals import interrupting
from koan_ray.client import Jobs
from koan_ray.domain.status import JobStatus
from koan_ray.errors import JobNotFoundError, KoanRayError
from koan_ray.plain import job_object, view_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, RenderableType

    from koan_ray.engine.session import Session
    from koan_ray.jobs import Job
    from koan_ray.progress import JobProgressUpdate

    _Updates = queue.Queue[JobProgressUpdate | BaseException]

_REFRESH_PER_SECOND = 8
_LOOK_EVERY_S = 1.0
_MOST_ROWS = 200
_BUFFER = 10_000


def watch_jobs(where: Where, job_ids: list[str], *, machine: bool) -> int:
    """Watch jobs until all have ended; return the exit code."""
    with reach(where):
        jobs = [Jobs.get(job_id).get(timeout=TIMEOUT_S) for job_id in dict.fromkeys(job_ids)]
        code = follow(jobs, machine=machine)
        if not machine and code != exits.INTERRUPTED:
            for job in jobs:
                how_it_ended(job.refresh().get(timeout=TIMEOUT_S))
        return code


def follow(jobs: list[Job[Any, Any]], *, machine: bool, silent: bool = False) -> int:
    """Show jobs until all have ended; 0 if all completed, 130 after Ctrl-C, which changes nothing for the jobs."""
    console = present.console(stderr=not machine)
    teller = bars.Silent() if silent else _Objects() if machine else bars.teller(console, jobs)
    ended: dict[str, JobStatus] = {}
    waiting: dict[str, JobProgressUpdate] = {}  # jobs that had not begun when we last heard of them
    try:
        with interrupting(), teller, _updates(jobs) as updates:  # not sooner: Ray installs a handler of its own
            while len(ended) < len(jobs):
                update = _next(updates, waiting)
                if isinstance(update, BaseException):
                    raise update
                teller.tell(update)
                waiting.pop(update.job_id, None)
                if update.status is JobStatus.QUEUED:
                    waiting[update.job_id] = update
                if update.status.is_final:
                    ended[update.job_id] = update.status
    except KeyboardInterrupt:
        n = len(jobs) - len(ended)
        present.console(stderr=True).print(f"\nStopped watching; {n} job{' goes' if n == 1 else 's go'} on.")
        return exits.INTERRUPTED
    return 0 if all(status is JobStatus.COMPLETED for status in ended.values()) else exits.FAILED


@contextlib.contextmanager
def _updates(jobs: list[Job[Any, Any]]) -> Iterator[_Updates]:
    """Hand out the progress of jobs as it comes; when a reader is slow, only the newest."""
    updates: _Updates = queue.Queue()

    def deliver(update: Any) -> None:
        is_last = isinstance(update, BaseException) or update.status.is_final
        if is_last or updates.qsize() < _BUFFER:
            updates.put(update)

    with contextlib.ExitStack() as stack:
        for job in jobs:
            stack.callback(ambient.engine().watch(job, deliver))
        yield updates


def _next(updates: _Updates, waiting: dict[str, JobProgressUpdate]) -> JobProgressUpdate | BaseException:
    """Return what is told next; where nothing is for a while, that one of those that waited has begun without a word."""
    look_at = time.monotonic() + _LOOK_EVERY_S
    while True:  # a wait without an end would not be interrupted by Ctrl-C everywhere
        with contextlib.suppress(queue.Empty):
            return updates.get(timeout=0.2)
        if waiting and time.monotonic() >= look_at:
            look_at = time.monotonic() + _LOOK_EVERY_S
            job_id = next(iter(waiting))
            waiting[job_id] = waiting.pop(job_id)  # the others have their turn before it comes again
            with contextlib.suppress(KoanRayError, TimeoutError):  # whoever tells us of the end tells of what is wrong
                if Jobs.get(job_id).get(timeout=TIMEOUT_S).status is JobStatus.RUNNING:
                    return replace(waiting[job_id], status=JobStatus.RUNNING)


class _Objects(bars.Silent):
    """Tells each update as a JSON object."""

    def tell(self, update: JobProgressUpdate) -> None:
        due = update.estimated_completion
        present.print_json(
            {
                "job_id": update.job_id, "sequence": update.sequence, "status": update.status.value,
                "progress": update.percentage, "progress_message": update.message, "current_step": update.current_step,
                "total_steps": update.total_steps, "estimated_completion": due.isoformat() if due is not None else None,
                "updated_at": update.updated_at.isoformat() if update.updated_at is not None else None,
            }
        )  # fmt: skip


def how_it_ended(job: Job[Any, Any]) -> None:
    """Print a job's end: its result, or its error with the stack trace."""
    view = view_of(job)
    console = present.console()
    line = present.status_text(view)
    line.append(f"  {safe(view.kind)} {view.id}", style="default not bold")
    line.append(f"  {present.took(view)}", style="dim not bold")
    console.print(line, soft_wrap=True)
    if view.error is not None and view.status != JobStatus.COMPLETED:
        console.print(Text(safe_lines(view.error), style="red"))
        console.print(Text(safe_lines(view.error.stack_trace.rstrip()), style="dim"))
    elif view.status == JobStatus.CANCELLED and view.reason:
        console.print(shown(view.reason))
    elif view.result is not None and view.result != b"null":
        console.print(present.json_text(view.result, full=False))


# --- without ids: what runs and waits --------------------------------------------------------------------------------


def watch_queue(where: Where, *, machine: bool) -> int:
    """Show what runs and waits until Ctrl-C, which is the way to end it and so no failure."""
    console = present.console()
    with reach(where), interrupting(), contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal and not machine:
            with Live(console=console, screen=True, refresh_per_second=_REFRESH_PER_SECOND) as live:
                while True:
                    live.update(_overview(console))
                    time.sleep(_LOOK_EVERY_S)
        _tell_changes(machine=machine)
    return 0


def _overview(console: Console) -> RenderableType:
    n_rows = max(3, console.height - 4)
    rows = list(Jobs.query(status=["running"], limit=min(n_rows, _MOST_ROWS)).get(timeout=TIMEOUT_S))
    if len(rows) < n_rows:
        rest = min(n_rows - len(rows), _MOST_ROWS)
        rows += Jobs.query(status=["queued", "created"], order_by="created_at", limit=rest).get(timeout=TIMEOUT_S)
    # The engine's own counts: to count the documents of what has ended, again and again, could cost a store much.
    found = cast("Session", ambient.engine()).status().get(timeout=TIMEOUT_S)
    counts = {
        JobStatus.QUEUED: found["queued"] + found["waiting"],
        JobStatus.RUNNING: found["running"],
        **{status: found["jobs"].get(status.value, 0) for status in JobStatus if status.is_final},
    }
    line = Text()
    for status, n in counts.items():
        line.append(f"{present.SIGNS[status]} {n:,} {status.value}   ", style=present.STYLES[status])
    return Group(line, Text(), present.jobs_table(rows, console.width), Text("Ctrl-C ends this.", style="dim"))


def _tell_changes(*, machine: bool) -> None:
    """Print a job whenever it begins to run, reports, or has ended since we saw it run."""
    seen: dict[str, tuple[Any, ...]] = {}
    while True:
        running = {job.id: job for job in Jobs.query(status=["running"], limit=_MOST_ROWS).get(timeout=TIMEOUT_S)}
        for job_id in [job_id for job_id in seen if job_id not in running]:
            del seen[job_id]
            with contextlib.suppress(JobNotFoundError):
                _tell_state(Jobs.get(job_id).get(timeout=TIMEOUT_S), machine=machine)
        for job in running.values():
            state = (job.status, job.progress_message, int(job.progress * 100))
            if seen.get(job.id) != state:
                seen[job.id] = state
                _tell_state(job, machine=machine)
        time.sleep(_LOOK_EVERY_S)


def _tell_state(job: Job[Any, Any], *, machine: bool) -> None:
    if machine:
        present.print_json(job_object(job))
        return
    view = view_of(job)
    print(
        f"{safe(view.kind)} {view.id}  {view.status}  {present.share(view)}  {present.note(view).plain}".rstrip(), flush=True
    )
