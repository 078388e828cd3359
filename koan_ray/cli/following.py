"""``koan-ray jobs watch``: live bars on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import contextlib
import queue
import time
from typing import TYPE_CHECKING, Any, cast

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from koan_ray import ambient
from koan_ray.cli import exits, present
from koan_ray.cli.options import Where
from koan_ray.cli.reach import TIMEOUT_S, reach
from koan_ray.cli.safe import safe, safe_lines, shown
from koan_ray.client import Jobs
from koan_ray.domain.status import JobStatus
from koan_ray.errors import JobNotFoundError
from koan_ray.plain import job_object, view_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, RenderableType
    from rich.progress import Task

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
    teller: _Silent
    if silent:
        teller = _Silent()
    elif machine:
        teller = _Objects()
    elif console.is_terminal:
        teller = _Bars(console, jobs)
    else:
        teller = _Lines(console, jobs)
    ended: dict[str, JobStatus] = {}
    try:
        with teller, _updates(jobs) as updates:
            while len(ended) < len(jobs):
                update = _next(updates)
                if isinstance(update, BaseException):
                    raise update
                teller.tell(update)
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


def _next(updates: _Updates) -> JobProgressUpdate | BaseException:
    while True:  # a wait without an end would not be interrupted by Ctrl-C everywhere
        with contextlib.suppress(queue.Empty):
            return updates.get(timeout=0.2)


class _Silent:
    """Tells nobody anything."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...

    def tell(self, update: JobProgressUpdate) -> None:
        """Take note of an update."""


class _Objects(_Silent):
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


class _Lines(_Silent):
    """Tells of each change of status, message or whole percent in a line."""

    def __init__(self, console: Console, jobs: list[Job[Any, Any]]) -> None:
        self._console = console
        self._kinds = {job.id: safe(job.kind) for job in jobs}
        self._told: dict[str, tuple[Any, ...]] = {}

    def tell(self, update: JobProgressUpdate) -> None:
        state = (update.status, update.message, int(update.percentage * 100))
        if self._told.get(update.job_id) != state:
            self._told[update.job_id] = state
            line = f"{self._kinds[update.job_id]} {update.job_id}  {update.status.value}  {update.percentage:.0%}"
            self._console.print(Text(f"{line}  {safe(update.message or '')}".rstrip()), soft_wrap=True)


class _Remaining(ProgressColumn):
    """The engine's own estimate; a bar's would only know of the time since we began to look."""

    def render(self, task: Task) -> Text:
        due = task.fields.get("due")
        left_s = due.timestamp() - time.time() if due is not None else 0.0
        return Text(f"{present.span(left_s)} left" if left_s > 0.5 else "", style="dim")


class _Bars(_Silent):
    """Draws a bar for each job."""

    def __init__(self, console: Console, jobs: list[Job[Any, Any]]) -> None:
        narrow = console.width < 100
        width = min(30, max(8, *(len(safe(job.name or job.kind)) for job in jobs), 8))
        columns: list[ProgressColumn] = [
            TextColumn("{task.fields[status]}", markup=False),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=14 if narrow else 30),
            TaskProgressColumn(),
        ]
        columns += [] if narrow else [TimeElapsedColumn()]
        columns += [_Remaining(), TextColumn("{task.fields[message]}", markup=False)]
        self._progress = Progress(*columns, console=console, refresh_per_second=_REFRESH_PER_SECOND)
        self._bars = {
            job.id: self._progress.add_task(
                safe(job.name or job.kind)[:width].ljust(width), total=1.0, status=present.SIGNS[job.status], message="",
                due=None,
            )
            for job in jobs
        }  # fmt: skip
        self._room = max(10, console.width - width - (45 if narrow else 70))

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, update: JobProgressUpdate) -> None:
        bar = self._bars[update.job_id]
        message = safe(update.message or "")
        self._progress.update(
            bar, completed=update.percentage, status=present.SIGNS[update.status], due=update.estimated_completion,
            message=message if len(message) <= self._room else message[: self._room - 1] + "…",
        )  # fmt: skip
        if update.status.is_final:
            self._progress.stop_task(bar)


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
    with reach(where), contextlib.suppress(KeyboardInterrupt):
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
