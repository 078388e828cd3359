"""Jobs and executions as commands print them: Rich's tables and texts for people, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from koan_ray.cli.safe import as_json, counted, safe, safe_lines, shown
from koan_ray.domain.durations import instant
from koan_ray.domain.status import JobStatus
from koan_ray.exact import masked
from koan_ray.plain import view_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from koan_ray.domain.records import JobView
    from koan_ray.finite import DeadItem
    from koan_ray.jobs import Job, JobExecution

STYLES = {
    JobStatus.CREATED: "dim",
    JobStatus.QUEUED: "blue",
    JobStatus.RUNNING: "cyan",
    JobStatus.COMPLETED: "green",
    JobStatus.FAILED: "bold red",
    JobStatus.CANCELLED: "magenta",
}
SIGNS = {
    JobStatus.CREATED: "·",
    JobStatus.QUEUED: "○",
    JobStatus.RUNNING: "●",
    JobStatus.COMPLETED: "✓",
    JobStatus.FAILED: "✗",
    JobStatus.CANCELLED: "–",
}
_PIPED_WIDTH = 200  # where nobody looks, nothing is shortened to fit
_WIDE = 100  # columns from which on a table has room for a word on each job
_FIXED_WIDTH = 36 + 11 + 4 + 6 + 4  # of a table's columns but kind and word, with the spaces between
_TOOK_WIDTH = 7
_MOST_JSON_LINES = 30
_EXECUTION_STYLES = {"running": "cyan", "succeeded": "green", "failed": "bold red", "cancelled": "magenta"}


def console(*, stderr: bool = False) -> Console:
    """Return a console that fits the terminal; its texts are not searched for markup, numbers or emoji."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


# --- for programs ----------------------------------------------------------------------------------------------------


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Print a value; at once, for whoever reads the other end of a pipe."""
    print(as_json(value, indent=indent), flush=True)


# --- for people ------------------------------------------------------------------------------------------------------


def span(seconds: float | None) -> str:
    """Return a duration in at most six characters, such as ``12ms``, ``3.4s``, ``5m12s``, ``2h05m``, ``12d``."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d"


def ago(at: float | None) -> str:
    """Return how long ago an instant was."""
    if at is None:
        return ""
    past = time.time() - at
    return "now" if abs(past) < 1 else f"{span(past)} ago" if past > 0 else f"in {span(-past)}"


def took(view: JobView) -> str:
    """Return how long a job has run, to its end or until now."""
    if view.started_at is None:
        return ""
    return span(max(0.0, (view.completed_at or time.time()) - view.started_at))


def status_text(view: JobView) -> Text:
    """Return a status with its sign; a queued job that waits for something says for what."""
    status = JobStatus(view.status)
    return Text(f"{SIGNS[status]} {status.value}", style=STYLES[status])


def note(view: JobView) -> Text:
    """Return a few words on where a job stands: its error, its message, why it waits, or its name."""
    if view.error is not None and view.status != JobStatus.COMPLETED:
        return shown(next((line for line in str(view.error).splitlines() if line.strip()), ""), "red")
    if view.status == JobStatus.RUNNING and view.progress is not None and view.progress.message:
        return shown(view.progress.message)
    if view.status in (JobStatus.QUEUED, JobStatus.CANCELLED) and view.reason:
        return shown(view.reason, "dim")
    return shown(view.name or "")


def obstacles(status: dict[str, Any]) -> list[str]:
    """Return a line for everything in an engine's status that is not as it should be.

    What its jobs wait for that is not there, and what of the engine itself has failed.
    """
    stuck = [
        f"{each['queued']:,} queued with {each['spec']} cannot run: {each['reason']}"
        for each in status.get("cannot_run", ())
    ]
    stuck += [
        f"{n:,} stored of the kind {kind!r} cannot run: no process of this engine has introduced the class"
        for kind, n in status.get("unroutable", {}).items()
    ]
    stuck += [f"the engine's {where} has failed, and begins again" for where in status.get("interrupted", ())]
    stuck += [
        f"the engine has survived {counted(each['n'], 'error')} in {where!r}; the last: {each['last']}"
        for where, each in status.get("failures", {}).items()
    ]
    return [safe(text) for text in stuck]


def share(view: JobView) -> str:
    """Return progress in percent, where there is any."""
    if view.status == JobStatus.COMPLETED:
        return "100%"
    return f"{view.progress.percentage:.0%}" if view.progress is not None else ""


def jobs_table(jobs: Sequence[Job[Any, Any]], width: int) -> Table:
    """Return a table of jobs; an id is never shortened, so that it can be copied."""
    views = [view_of(job) for job in jobs]
    is_wide = width >= _WIDE
    room = width - _FIXED_WIDTH - (_TOOK_WIDTH if is_wide else 0)
    kinds = max([4, *(len(safe(view.kind)) for view in views)])
    kind_width = min(kinds, max(8, room // 2 if is_wide else room))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("id", no_wrap=True, width=36)
    table.add_column("kind", no_wrap=True, overflow="ellipsis", width=kind_width)
    table.add_column("status", no_wrap=True, width=11)
    table.add_column("", justify="right", no_wrap=True, width=4)
    table.add_column("age", justify="right", no_wrap=True, width=6)
    if is_wide:
        table.add_column("took", justify="right", no_wrap=True, width=6)
        table.add_column("", no_wrap=True, overflow="ellipsis", width=max(1, room - kind_width - 1))
    now = time.time()
    for view in views:
        age = span(max(0.0, now - view.created_at))
        cells: list[str | Text] = [view.id, shown(view.kind), status_text(view), share(view), age]
        if is_wide:
            cells += [took(view), note(view)]
        table.add_row(*cells)
    return table


def executions_table(executions: Sequence[JobExecution], width: int) -> Table:
    """Return a table of the tries of one job."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("reason", no_wrap=True)
    table.add_column("began", justify="right", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    if width >= _WIDE:
        table.add_column("process", justify="right", no_wrap=True)
    table.add_column("error", no_wrap=True, overflow="ellipsis")
    for one in executions:
        status = Text(one.status.value, style=_EXECUTION_STYLES.get(one.status.value, ""))
        lasted = span(one.duration.total_seconds()) if one.duration is not None else ""
        cells: list[str | Text] = [str(one.attempt_number), status, shown(one.reason or "")]
        cells += [ago(one.started_at.timestamp()), lasted]
        if width >= _WIDE:
            cells.append(shown(one.metrics.get("pid", "")))
        error = f"{one.error_type}: {one.error_message}" if one.error_message else one.error_type or ""
        table.add_row(*cells, shown(error, "red"))
    return table


def items_table(items: Sequence[DeadItem]) -> Table:
    """Return a table of items that have failed for good."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("index", justify="right", no_wrap=True)
    table.add_column("item", no_wrap=True, overflow="ellipsis", max_width=40)
    table.add_column("tries", justify="right", no_wrap=True)
    table.add_column("error", no_wrap=True, overflow="ellipsis")
    for one in items:
        item = one.item if isinstance(one.item, str) else as_json(one.item)
        table.add_row(str(one.index), shown(item), str(one.attempts), shown(one.error, "red"))
    return table


def job_page(
    job: Job[Any, Any], executions: Sequence[JobExecution] | None, width: int, *, full: bool = False
) -> RenderableType:
    """Return everything about one job."""
    view = view_of(job)
    head = Text.assemble((safe(view.kind), "bold"), "  ", status_text(view), "  ", (view.id, "dim"))
    parts: list[RenderableType] = [head]
    if view.name or view.description:
        parts.append(Text.assemble(shown(view.name or "", "italic"), "  ", shown(view.description or "", "dim")))
    if (bar := _bar(view, width)) is not None:
        parts.append(bar)
    parts.append(_facts(job))
    if view.error is not None:
        parts += [Text("\nlast error", style="bold"), Text(safe_lines(view.error), style="red")]
        if view.error.stack_trace:
            parts.append(Text(safe_lines(view.error.stack_trace.rstrip()), style="dim"))
    for title, encoded in (("context", view.context), ("result", view.result)):
        if encoded is not None and encoded != b"null":
            parts += [Text(f"\n{title}", style="bold"), Padding(json_text(encoded, full=full), (0, 0, 0, 2))]
    if executions is not None:
        parts += [Text("\nexecutions", style="bold"), executions_table(executions, width)]
    return Group(*parts)


def _bar(view: JobView, width: int) -> RenderableType | None:
    if view.progress is None:
        return None
    row = Table.grid(padding=(0, 1))
    done = 1.0 if view.status == JobStatus.COMPLETED else view.progress.percentage
    steps = f"{view.progress.current_step}/{view.progress.total_steps}" if view.progress.total_steps else ""
    row.add_row(
        ProgressBar(total=1.0, completed=done, width=max(10, min(40, width // 3))), f"{done:.0%}", steps,
        shown(view.progress.message or ""),
    )  # fmt: skip
    return row


def _facts(job: Job[Any, Any]) -> Table:
    view = view_of(job)
    due = job.estimated_completion
    facts: list[tuple[str, str | Text]] = [
        ("why", shown(view.reason or "")),
        ("attempts", str(view.attempts) if view.attempts else ""),
        ("created", _moment(view.created_at)),
        ("started", _moment(view.started_at)),
        ("ended", _moment(view.completed_at)),
        ("took", took(view)),
        ("expected", _moment(due.timestamp()) if due is not None and view.status == JobStatus.RUNNING else ""),
        ("cancel", "requested" if view.cancel_requested and view.status == JobStatus.RUNNING else ""),
        ("parent", view.parent_job_id or ""),
        ("correlation", shown(view.correlation_id or "")),
        ("metadata", shown(", ".join(f"{key}={_scalar(value)}" for key, value in (view.metadata or {}).items()))),
    ]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value:
            table.add_row(name, value)
    return table


def _moment(at: float | None) -> str:
    found = instant(at)
    return "" if found is None else f"{found.astimezone():%Y-%m-%d %H:%M:%S}  ({ago(at)})"


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)


def json_text(encoded: bytes, *, full: bool) -> RenderableType:
    """Return JSON for people; shortened, unless ``full``."""
    lines = as_json(masked(json.loads(encoded)), indent=2).split("\n")
    if not full and len(lines) > _MOST_JSON_LINES:
        lines = [*lines[:_MOST_JSON_LINES], f"… {len(lines) - _MOST_JSON_LINES} more lines; --full shows them"]
    return Syntax("\n".join(lines), "json", theme="ansi_dark", background_color="default", word_wrap=True)
