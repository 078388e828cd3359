"""Progress of jobs for people: a bar for each on a terminal and in a notebook, a line for each change elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from koan_ray import ambient, threads
from koan_ray.cli import present
from koan_ray.cli.safe import safe
from koan_ray.domain.status import JobStatus
from koan_ray.pending import Pending

if TYPE_CHECKING:
    from rich.progress import Task

    from koan_ray.jobs import Job
    from koan_ray.progress import JobProgressUpdate

_REFRESH_PER_SECOND = 8
_NARROW = 110  # columns, below which a bar is short
_MOST_NAME = 30
_BAD, _SKIPPED = r"[\d,]+ failed", r"[\d,]+ skipped"


class Silent:
    """Tells nobody anything."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...

    def tell(self, update: JobProgressUpdate) -> None:
        """Take note of an update."""


class Lines(Silent):
    """Tells of each change of status, message or whole percent in a line."""

    def __init__(self, console: Console, jobs: list[Job[Any, Any]]) -> None:
        self._console = console
        self._kinds = {job.id: safe(job.kind) for job in jobs}
        self._told: dict[str, tuple[Any, ...]] = {}

    def tell(self, update: JobProgressUpdate) -> None:
        """Print an update, if it is news."""
        state = (update.status, update.message, int(update.percentage * 100))
        if self._told.get(update.job_id) != state:
            self._told[update.job_id] = state
            line = f"{self._kinds[update.job_id]} {update.job_id}  {update.status.value}  {update.percentage:.0%}"
            self._console.print(Text(f"{line}  {safe(update.message or '')}".rstrip()), soft_wrap=True)


class _Sign(ProgressColumn):
    """The status, in its colour."""

    def render(self, task: Task) -> Text:
        status: JobStatus = task.fields["status"]
        return Text(present.SIGNS[status], style=present.STYLES[status])


class _Remaining(ProgressColumn):
    """The engine's own estimate; a bar's would only know of the time since we began to look."""

    def render(self, task: Task) -> Text:
        due = task.fields["due"]
        left_s = due.timestamp() - time.time() if due is not None and not task.fields["status"].is_final else 0.0
        return Text(f"{present.span(left_s)} left" if left_s > 0.5 else "", style="dim", no_wrap=True)


class _Message(ProgressColumn):
    """What the job says, as much as fits on the line; counts of failed and skipped items stand out."""

    def render(self, task: Task) -> Text:
        message = Text(task.fields["message"], no_wrap=True, overflow="ellipsis")
        message.highlight_regex(_BAD, "red")
        message.highlight_regex(_SKIPPED, "yellow")
        return message


class Bars(Silent):
    """Draws a bar for each job: status, name, bar, percentage, time, time left, and what the job says.

    A job over items says how many have ended, failed and been skipped, and how many end in a second.
    """

    def __init__(self, console: Console, jobs: list[Job[Any, Any]]) -> None:
        is_narrow = console.width < _NARROW
        width = min(_MOST_NAME, max(8, *(len(safe(job.name or job.kind)) for job in jobs), 8))
        columns: list[ProgressColumn] = [
            _Sign(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=10 if is_narrow else 24),
            TaskProgressColumn(),
        ]
        columns += [] if is_narrow else [TimeElapsedColumn()]
        columns += [_Remaining(), _Message()]
        self._progress = Progress(*columns, console=console, refresh_per_second=_REFRESH_PER_SECOND)
        self._bars = {
            job.id: self._progress.add_task(
                safe(job.name or job.kind)[:width].ljust(width), total=1.0, status=job.status, message="", due=None
            )
            for job in jobs
        }

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, update: JobProgressUpdate) -> None:
        """Draw a bar as far as it is."""
        bar = self._bars[update.job_id]
        completed = 1.0 if update.status is JobStatus.COMPLETED else update.percentage
        self._progress.update(
            bar, completed=completed, status=update.status, due=update.estimated_completion,
            message=safe(update.message or ""),
        )  # fmt: skip
        if update.status.is_final:
            self._progress.stop_task(bar)


def teller(console: Console, jobs: list[Job[Any, Any]]) -> Silent:
    """Return what suits the console."""
    is_seen = console.is_terminal or console.is_jupyter
    return Bars(console, jobs) if is_seen else Lines(console, jobs)


def show(job: Job[Any, Any], console: Console | None = None) -> Pending[JobStatus]:
    """Show a job's progress until it ends; resolves to its final status. See `koan_ray.Job.show_progress`."""
    shown: Pending[JobStatus] = Pending(yields_place=True)
    console = console or present.console()
    if console.is_jupyter:  # which has a width of its own
        console = Console(highlight=False, markup=False, emoji=False)
    telling = teller(console, [job])
    telling.__enter__()  # here, where the cell of a notebook is known

    def deliver(update: Any) -> None:
        is_over = isinstance(update, BaseException) or update.status.is_final
        try:
            if not isinstance(update, BaseException):
                telling.tell(update)
        except Exception as problem:  # noqa: BLE001 - a terminal that is closed, for instance
            is_over, update = True, problem
        if not is_over:
            return
        try:
            telling.__exit__()
        finally:
            if isinstance(update, BaseException):
                shown.fail(update)
            else:
                shown.resolve(update.status)

    drawing = threads.InOrder(
        "progress_not_shown", deliver
    )  # a terminal may block, and the thread that brings this must not
    try:
        ambient.engine().watch(job, drawing.put)
    except BaseException:
        telling.__exit__()
        raise
    return shown
