"""``koan-ray jobs``: what each command takes. What they do is in `looking`, `following` and `acting`, imported then."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from koan_ray.cli.exits import HELP
from koan_ray.cli.options import Where, complete_kind, for_jobs

jobs = typer.Typer(
    help=(
        "Find, start, watch and control jobs.\n\n--json prints a job as one object whose members are the attributes of "
        "koan_ray.Job (instants in ISO 8601, durations in seconds as duration_s); lists are one object a line.\n\n" + HELP
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
JobId = Annotated[str, typer.Argument(help="Id of the job.", metavar="ID", show_default=False)]
JobIds = Annotated[list[str] | None, typer.Argument(help="Ids of jobs.", metavar="ID", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AsLines = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print ids only.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Most = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many of those that match.", show_default=False)]
_MODULE_HELP = (
    "Import this module first: it defines job classes. Repeat it for more; jobs.modules of the settings come, too."
)
Modules = Annotated[list[str] | None, typer.Option("--module", "-M", help=_MODULE_HELP, show_default=False)]
_KIND = typer.Argument(help="Kind of the job, or 'module:Class'.", autocompletion=complete_kind, metavar="KIND")
_CONTEXT = typer.Option("--context", "-c", help="Context as JSON, @file, or - for standard input.", metavar="JSON|@FILE|-")
_METADATA = typer.Option(
    "--metadata", "-m", help="Metadata; the value is JSON, or text as it is. Repeat it for more.", metavar="KEY=VALUE"
)
_DELAY = typer.Option(help="Begin no sooner than this from now, such as 30s, 10m, 2h.", metavar="DURATION")
_WAIT = typer.Option("--wait", "-w", help="Wait for its end; exit code 1 if it fails or is cancelled.")
_RESUME_HELP = "Go on where it stopped, with what its items have produced; only for jobs over items that have a checkpoint."
_AUDIT = typer.Option("--audit", help="Keep a document of each execution; implies --persist.")
Filters = dict[str, Any]


@jobs.command("list")
@for_jobs(filters=True, reads=True)
def list_(
    filters: Filters,
    where: Where,
    order_by: Annotated[
        str, typer.Option(help="created_at, queued_at, started_at or completed_at; '-' in front for newest first.")
    ] = "-created_at",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="Jobs of one page.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the page begins, as the page before has told.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All pages; needs --json or --quiet.")] = False,
    count: Annotated[bool, typer.Option("--count", help="Print only how many match.")] = False,
    as_json: AsLines = False,
    quiet: Quiet = False,
) -> None:
    """List jobs, newest first.

    Where no engine runs, the stored documents are read.

    Example: koan-ray jobs list --status failed --completed-after 2h

    Example: koan-ray jobs list -k EmailJob -m tenant_id=acme --json | jq -r .id

    Example: koan-ray jobs list --items --status running

    Example: koan-ray jobs list --status failed --all --quiet | xargs koan-ray jobs retry
    """
    from koan_ray.cli.looking import show_list

    paging = {"order_by": order_by, "limit": limit, "cursor": cursor}
    show_list(where, {**filters, **paging}, everything=everything, count=count, machine=as_json, quiet=quiet)


@jobs.command()
@for_jobs(reads=True)
def show(
    job_id: JobId,
    where: Where,
    full: Annotated[bool, typer.Option("--full", help="Do not shorten context and result.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show all of one job: progress, times, error with stack trace, context, result, executions.

    Exit code 0, however the job has ended.

    Example: koan-ray jobs show 0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10
    """
    from koan_ray.cli.looking import show_job

    show_job(where, job_id, full=full, machine=as_json)


@jobs.command()
@for_jobs(reads=True)
def tree(
    job_id: JobId,
    where: Where,
    up: Annotated[bool, typer.Option("--up", help="Begin at the topmost parent instead.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="Children shown of each job.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show a job and everything below it.

    Example: koan-ray jobs tree --up 0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10
    """
    from koan_ray.cli.looking import show_tree

    show_tree(where, job_id, up=up, limit=limit, machine=as_json)


@jobs.command()
@for_jobs(reads=True)
def executions(
    job_id: JobId,
    where: Where,
    trace: Annotated[bool, typer.Option("--trace", help="Print stack traces as well.")] = False,
    as_json: AsLines = False,
) -> None:
    """List the tries of one job, oldest first.

    Example: koan-ray jobs executions --trace 0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10
    """
    from koan_ray.cli.looking import show_executions

    show_executions(where, job_id, trace=trace, machine=as_json)


@jobs.command("failed-items")
@for_jobs()
def failed_items(
    job_id: JobId,
    where: Where,
    trace: Annotated[bool, typer.Option("--trace", help="Print stack traces as well.")] = False,
    as_json: AsLines = False,
) -> None:
    """List the items of a job over items that have failed for good.

    Example: koan-ray jobs failed-items --json 0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10 > dead.jsonl
    """
    from koan_ray.cli.looking import show_failed_items

    show_failed_items(where, job_id, trace=trace, machine=as_json)


@jobs.command()
@for_jobs()
def watch(
    where: Where,
    job_ids: JobIds = None,
    as_json: AsLines = False,
) -> None:
    """Watch jobs until they end; without ids, what runs and waits, until Ctrl-C.

    Ctrl-C ends the watching only. Exit code 0 if all completed, 1 if one failed or was cancelled.

    Example: koan-ray jobs watch 0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10
    """
    from koan_ray.cli.following import watch_jobs, watch_queue

    raise typer.Exit(watch_jobs(where, job_ids, machine=as_json) if job_ids else watch_queue(where, machine=as_json))


@jobs.command()
@for_jobs()
def submit(
    kind: Annotated[str, _KIND],
    where: Where,
    context: Annotated[str | None, _CONTEXT] = None,
    module: Modules = None,
    persist: Annotated[bool, typer.Option("--persist", help="Keep the job as a document.")] = False,
    source: Annotated[str | None, typer.Option(help="In this source; implies --persist.")] = None,
    partition: Annotated[str | None, typer.Option(help="In this partition; implies --persist.")] = None,
    audit: Annotated[bool, _AUDIT] = False,
    metadata: Annotated[list[str] | None, _METADATA] = None,
    correlation: Annotated[str | None, typer.Option(help="Correlation id.", metavar="ID")] = None,
    name: Annotated[str | None, typer.Option(help="Name for people.")] = None,
    delay: Annotated[str | None, _DELAY] = None,
    wait: Annotated[bool, _WAIT] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Start a job.

    The context is checked against the class before anything is sent; fields that do not fit are named, with exit code 2.

    Example: koan-ray jobs submit EmailJob -M my.jobs -c '{"to": "user@example.com", "body": "hi"}' --wait

    Example: koan-ray jobs submit my.jobs:EmailJob -c @context.json --persist --audit -m tenant_id=acme
    """
    from koan_ray.cli.acting import submit_job

    settings = {
        "persist": persist or audit or source is not None or partition is not None, "source": source,
        "partition": partition, "audit": audit, "metadata": metadata, "correlation": correlation, "name": name,
        "delay": delay,
    }  # fmt: skip
    raise typer.Exit(submit_job(where, kind, context, module or [], settings, wait=wait, machine=as_json, quiet=quiet))


@jobs.command()
@for_jobs(filters=True)
def cancel(
    filters: Filters,
    where: Where,
    job_ids: JobIds = None,
    reason: Annotated[str | None, typer.Option(help="Why, for whoever looks later.")] = None,
    limit: Most = None,
    yes: Yes = False,
    as_json: AsLines = False,
) -> None:
    """Cancel jobs and everything below them: by id, or all unfinished ones that match filters, after a question.

    Example: koan-ray jobs cancel 0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10 --reason "wrong tenant"

    Example: koan-ray jobs cancel --kind EmailJob --created-before 1d --yes
    """
    from koan_ray.cli.acting import act, cancelling

    raise typer.Exit(act(where, cancelling(reason), job_ids, filters, limit=limit, sure=yes, machine=as_json))


@jobs.command()
@for_jobs(filters=True)
def retry(
    filters: Filters,
    where: Where,
    job_ids: JobIds = None,
    resume: Annotated[bool, typer.Option("--resume", help=_RESUME_HELP)] = False,
    limit: Most = None,
    yes: Yes = False,
    as_json: AsLines = False,
) -> None:
    """Run failed or cancelled jobs anew, each as a new job: by id, or all failed ones that match filters.

    Example: koan-ray jobs retry 0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10

    Example: koan-ray jobs retry --resume --kind Thumbnails --status failed,cancelled

    Example: koan-ray jobs retry --text "Connection refused" --completed-after 2h
    """
    from koan_ray.cli.acting import act, retrying

    raise typer.Exit(act(where, retrying(resume=resume), job_ids, filters, limit=limit, sure=yes, machine=as_json))


@jobs.command("retry-failed-items")
@for_jobs()
def retry_failed_items(
    job_ids: Annotated[list[str], typer.Argument(help="Ids of jobs over items.", metavar="ID", show_default=False)],
    where: Where,
    as_json: AsLines = False,
) -> None:
    """Run the items that have failed for good, and only those, as a new job for each job; it must have ended.

    Exit code 1 where a job has no failed items or has not ended.

    Example: koan-ray jobs retry-failed-items 0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10

    Example: koan-ray jobs retry-failed-items --json 0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10 | jq -r .retried_as
    """
    from koan_ray.cli.acting import act, retrying_failed_items

    raise typer.Exit(act(where, retrying_failed_items(), job_ids, {}, limit=None, sure=True, machine=as_json))


@jobs.command()
@for_jobs(filters=True)
def remove(
    filters: Filters, where: Where, job_ids: JobIds = None, limit: Most = None, yes: Yes = False, as_json: AsLines = False
) -> None:
    """Delete jobs that have ended, and their executions: by id, or all that match filters. There is no way back.

    Example: koan-ray jobs remove --status cancelled --completed-before 30d
    """
    from koan_ray.cli.acting import act, removing

    raise typer.Exit(act(where, removing(), job_ids, filters, limit=limit, sure=yes, machine=as_json))
