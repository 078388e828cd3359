"""``koan-ray demo``: real work on real input, watched live."""

from __future__ import annotations

import contextlib
import http.server
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import koan_ray as koan
from koan_ray.cli.census import Announce, Census, CensusContext, Counts, default_roots, total
from koan_ray.cli.documents import Documents, address_of_dev, documents, no_interrupts, why_not_open
from koan_ray.cli.reach import begin_logging
from koan_ray.cli.safe import safe
from koan_ray.config import load_settings
from koan_ray.domain.ids import new_id

if TYPE_CHECKING:
    from koan_ray.config import Settings
    from koan_ray.jobs import Job

_COLLECTOR_IS_LATE_S = 6.0
_LOOK_EVERY_S = 0.25
_ROWS = 12
_EARLIER = 5


def run(runtime: str, paths: list[str] | None, limit: int | None, *, memory: bool = False) -> int:
    """Run the demo and return the exit code."""
    console = Console(highlight=False)
    stack = contextlib.ExitStack()
    try:
        return _run(console, stack, runtime, CensusContext(paths or default_roots(), limit), memory=memory)
    except KeyboardInterrupt:
        return 130
    finally:
        with no_interrupts():
            stack.close()


def _run(console: Console, stack: contextlib.ExitStack, runtime: str, context: CensusContext, *, memory: bool) -> int:
    began = time.monotonic()
    source = _start(console, stack, runtime, memory=memory)
    context.collector = stack.enter_context(_Collector()).url
    console.print(f"Engine is up after {time.monotonic() - began:.1f} s.")
    census = Census.start(context).named("census").with_correlation(new_id())
    if source is not None:
        _show_earlier(console, source)
        census = census.persist(source).audit()  # and with it everything below it
    console.print("Counting the Python files on this machine.")
    job = census.run().get()
    try:
        _Screen(console, job).follow()
        counted = job.wait().get()
    except KeyboardInterrupt:
        return _cancel(console, job)
    except koan.JobFailedError as error:
        console.print(Text(f"The census failed: {error}", style="red"))
        return 1
    _report(console, job, counted, time.monotonic() - began)
    _show_retries(console, job)
    _show_dashboard(console, runtime)
    if source is not None:
        console.print(
            Text("The jobs are kept as documents: the next demo tells of this one, and `koan-ray doctor` reads them.")
        )
    return 0


def _start(console: Console, stack: contextlib.ExitStack, runtime: str, *, memory: bool) -> str | None:
    """Start or join an engine; return the source that keeps documents there, or None after telling why there is none."""
    settings = load_settings()
    begin_logging(settings, "koan-ray demo")
    if runtime == "ray":
        logging.getLogger("ray").setLevel(logging.WARNING)  # its notices would be drawn into our bars
        if (address := os.environ.get("RAY_ADDRESS") or address_of_dev()) is not None:
            return _join(console, stack, address, memory=memory)
    where = None if memory else _documents(console, stack, settings)
    console.print("Starting the engine" + (" on a local Ray (a few seconds)" if runtime == "ray" else "") + " …")
    overrides = where.overrides if where is not None else {}
    engine = stack.enter_context(koan.init(runtime="local" if runtime == "local" else "ray", **overrides))
    if where is None:
        return None
    if (problem := why_not_open(engine)) is not None:
        msg = f"{problem}; end that one, or keep the jobs in memory: koan-ray demo --memory"
        raise koan.StoreUnavailableError(msg)
    return "default"


def _join(console: Console, stack: contextlib.ExitStack, address: str, *, memory: bool) -> str | None:
    """Join the engine of a cluster as it is: a document server of ours could not be reached from all its nodes."""
    console.print(Text(f"Joining the engine on the Ray at {address} …"))
    engine = stack.enter_context(koan.init(address))
    if memory:
        return None
    if (problem := why_not_open(engine)) is not None:
        console.print(Text(f"Jobs are kept in memory only: {problem}."))
        return None
    return "default"


def _documents(console: Console, stack: contextlib.ExitStack, settings: Settings) -> Documents | None:
    try:
        return stack.enter_context(documents(settings))
    except (koan.ConfigurationError, koan.StoreUnavailableError, OSError) as error:
        console.print(Text(f"Jobs are kept in memory only: {error}."))
        return None


def _show_earlier(console: Console, source: str) -> None:
    """Show the censuses that earlier demos have left in the documents."""
    earlier = Census.query(source=source, limit=_EARLIER).get()
    if not earlier:
        return
    table = Table(title="Earlier censuses, read from the documents", title_justify="left")
    table.add_column("when", no_wrap=True)
    for name in ("files", "failures", "took"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ended as", no_wrap=True)
    for job in earlier:
        counted = job.result or []
        known = job.status is koan.JobStatus.COMPLETED
        files = f"{sum(counts.files for counts in counted):,}" if known else ""
        failures = f"{job.items_failed:,}" if known else ""
        took = f"{job.duration.total_seconds():.1f} s" if job.duration is not None else ""
        table.add_row(f"{job.created_at.astimezone():%Y-%m-%d %H:%M:%S}", files, failures, took, job.status.value)
    console.print(table)


def _cancel(console: Console, job: Job[Any, Any]) -> int:
    console.print("\nCancelling the census and everything below it …")
    job.cancel("Ctrl-C").get()
    with contextlib.suppress(koan.JobCancelledError, TimeoutError):
        job.wait(timeout=30).get()
    console.print(f"Census {job.refresh().get().status.value}.")
    return 130


class _Collector:
    """A server that the first job wants to reach; its port is closed for the first seconds."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/census"
        self._timer = threading.Timer(_COLLECTOR_IS_LATE_S, self._serve)
        self._timer.daemon = True
        self._server: http.server.HTTPServer | None = None

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _serve(self) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), _Answer)
        self._server.serve_forever(poll_interval=0.2)


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"noted")

    def log_message(self, *_: object) -> None:
        """Stay quiet: the terminal belongs to the demo."""


class _Screen:
    """The census as it runs: its bar with what it says of itself, and how the collector's job is."""

    def __init__(self, console: Console, job: Job[Any, Any]) -> None:
        self._console, self._job = console, job
        self._mine = {"correlation_id": job.correlation_id}  # of the census and of everything below it
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, expand=True)
        self._whole = self._progress.add_task("census", total=1.0)

    def follow(self) -> None:
        """Show the census until it has ended."""
        if not self._console.is_terminal:
            self._follow_in_lines()
            return
        with Live(self._view(), console=self._console, refresh_per_second=8, transient=True) as live:
            while not self._job.refresh().get().status.is_final:
                self._progress.update(self._whole, completed=self._job.progress)
                live.update(self._view())
                time.sleep(_LOOK_EVERY_S)

    def _follow_in_lines(self) -> None:
        told = -1
        while not self._job.refresh().get().status.is_final:
            if self._job.current_step is not None and int(self._job.progress * 10) != told:
                told = int(self._job.progress * 10)
                self._console.print(f"{self._job.progress:4.0%}  {self._job.progress_message}")
            time.sleep(_LOOK_EVERY_S)

    def _view(self) -> Group:
        counts = {status: koan.Jobs.count(status=status.value, **self._mine).get() for status in koan.JobStatus}
        line = Text("jobs: ")
        for status, style in _STYLES.items():
            line.append(f"{counts[status]} {status.value}  ", style=style)
        waiting = koan.Jobs.query(**self._mine, kind="Announce").get()
        if waiting and not waiting[0].status.is_final and waiting[0].last_error:
            line.append(f"Announce waits to be tried again ({safe(waiting[0].last_error)[:60]})", style="yellow")
        return Group(self._progress, Text(safe(self._job.progress_message or "finding the files …")), line)


_STYLES = {
    koan.JobStatus.QUEUED: "dim",
    koan.JobStatus.RUNNING: "cyan",
    koan.JobStatus.COMPLETED: "green",
    koan.JobStatus.FAILED: "red",
    koan.JobStatus.CANCELLED: "magenta",
}


def _report(console: Console, job: koan.FiniteJob[Any, Any, Any], counted: list[Counts], took_s: float) -> None:
    table = Table(title="Largest packages", title_justify="left", expand=False)
    table.add_column("package", overflow="ellipsis", max_width=32)
    for name in ("files", "lines", "functions", "classes", "complexity"):
        table.add_column(name, justify="right")
    for counts in sorted(counted, key=lambda counts: -counts.lines)[:_ROWS]:
        mean = counts.complexity / max(1, counts.functions)
        values = (counts.files, counts.lines, counts.functions, counts.classes)
        table.add_row(Text(safe(counts.name)), *(f"{value:,}" for value in values), f"{mean:.1f}")
    console.print(table)
    sums = total(counted)
    worst = max((counts.most_complex for counts in counted), default=(0, "none", ""))
    console.print(
        f"{sums['files']:,} files, {sums['lines']:,} lines, {sums['functions']:,} functions, {sums['classes']:,} classes "
        f"in {job.duration.total_seconds() if job.duration else took_s:.1f} s of work; {took_s:.1f} s in all."
    )
    console.print(Text(f"Most complex function: {safe(worst[1])} ({worst[0]}) in {safe(_short(worst[2]))}"))
    _show_dead(console, job)


def _show_dead(console: Console, job: koan.FiniteJob[Any, Any, Any]) -> None:
    dead = job.failed_items().get()
    if not dead:
        return
    table = Table(title=f"{len(dead)} files are not Python; each is a dead item of the census", title_justify="left")
    table.add_column("file", overflow="ellipsis", no_wrap=True, min_width=30, max_width=44)
    table.add_column("why", overflow="ellipsis", no_wrap=True, max_width=60)
    for item in dead[:_ROWS]:
        table.add_row(Text(safe(_short(str(item.item[1])))), Text(safe(item.error)))
    if len(dead) > _ROWS:
        table.add_row("…", f"and {len(dead) - _ROWS} more: job.failed_items(), job.retry_failed_items()")
    console.print(table)


def _show_retries(console: Console, job: Job[Any, Any]) -> None:
    announced = job.get_children(Announce).get()
    if not announced:
        return
    table = Table(title="Executions of Announce, whose collector was not up yet", title_justify="left")
    for name in ("attempt", "status", "reason"):
        table.add_column(name, no_wrap=True)
    # What the other columns take is kept for them: Rich would take from all alike.
    table.add_column("error", overflow="ellipsis", no_wrap=True, max_width=min(60, max(10, console.width - 62)))
    table.add_column("took", no_wrap=True, justify="right")
    table.add_column("process", no_wrap=True)
    for execution in announced[0].executions().get():
        took = f"{execution.duration.total_seconds() * 1000:.0f} ms" if execution.duration else ""
        error = Text(safe(f"{execution.error_type}: {execution.error_message}" if execution.error_type else ""))
        values = (str(execution.attempt_number), execution.status.value, execution.reason or "")
        table.add_row(*values, error, took, str(execution.metrics.get("pid", "")))
    console.print(table)


def _show_dashboard(console: Console, runtime: str) -> None:
    if runtime == "local":
        console.print("This ran inside this process. With Ray, the jobs are also in the Ray dashboard.")
        return
    from koan_ray.runtime.ray.admin import dashboard_url

    url = dashboard_url()
    where = f"open {url} while jobs run" if url else "start Ray with its dashboard"
    console.print(Text(f"In the Ray dashboard: {where}; Actors shows KoanJobs[…], Tasks shows calls named by kind."))


def _short(path: str) -> str:
    return "/".join(path.split("/")[-2:])
