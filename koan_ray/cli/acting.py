"""``koan-ray jobs submit|cancel|retry|remove``: change something, and tell of each job what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from koan_ray import ambient, registry
from koan_ray.cli import exits, present
from koan_ray.cli.options import Where, parse_metadata, read_context
from koan_ray.cli.reach import TIMEOUT_S, import_modules, reach
from koan_ray.cli.safe import safe
from koan_ray.client import Jobs
from koan_ray.domain.durations import seconds
from koan_ray.domain.status import JobStatus
from koan_ray.errors import ConfigurationError, InvalidContextError, KindNotIntroducedError, KoanRayError, UnknownKindError
from koan_ray.jobs import Job
from koan_ray.plain import job_object, view_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PAGE = 200
_SAMPLES, _SAMPLE_KINDS = "koan_ray.cli.samples", "sample."  # what `koan-ray dev` offers, and what its kinds begin with
_FINAL = [status.value for status in JobStatus if status.is_final]
_OPEN = [status.value for status in JobStatus if not status.is_final]


class Action(NamedTuple):
    """Something to be done to jobs, one by one."""

    verb: str  # as in "Cancel 3 jobs?"
    statuses: list[str]  # that it makes sense for; what a filter is limited to
    do: Callable[[str], dict[str, Any]]  # returns what to tell of the job


def cancelling(reason: str | None) -> Action:
    """Return what cancels a job."""

    def do(job_id: str) -> dict[str, Any]:
        return {"id": job_id, "status": Jobs.cancel(job_id, reason).get(timeout=TIMEOUT_S).value}

    return Action("cancel", _OPEN, do)


def retrying(*, resume: bool = False) -> Action:
    """Return what runs a job anew; with ``resume`` from where it stopped."""

    def do(job_id: str) -> dict[str, Any]:
        job = _introducing(lambda: Jobs.retry(job_id, resume=resume).get(timeout=TIMEOUT_S))
        return {"id": job_id, "status": job.status.value, "retried_as": job.id}

    return Action("retry", ["failed"], do)


def retrying_failed_items() -> Action:
    """Return what runs the dead items of a job over items anew, alone."""

    def do(job_id: str) -> dict[str, Any]:
        job = _introducing(lambda: ambient.engine().retry_failed_items(job_id).get(timeout=TIMEOUT_S))
        counts = view_of(job).items
        return {
            "id": job_id, "status": job.status.value, "retried_as": job.id,
            "items_total": counts.total if counts is not None else None,
        }  # fmt: skip

    return Action("retry-failed-items", _FINAL, do)


def _introducing(run_again: Callable[[], Any]) -> Any:
    """Run a stored job again; where no process has introduced its class yet, the modules of the settings may have it."""
    try:
        return run_again()
    except KindNotIntroducedError:
        import_modules([])
        return run_again()


def removing() -> Action:
    """Return what deletes a job."""

    def do(job_id: str) -> dict[str, Any]:
        Jobs.get(job_id).get(timeout=TIMEOUT_S)  # removing what is not there is no error; a wrong id here is one
        Jobs.remove(job_id).get(timeout=TIMEOUT_S)
        return {"id": job_id, "status": "removed"}

    return Action("remove", _FINAL, do)


def act(
    where: Where, action: Action, job_ids: list[str] | None, filters: dict[str, Any], *, limit: int | None, sure: bool,
    machine: bool,
) -> int:  # fmt: skip
    """Do it to the jobs named, or to those that match filters once the user has agreed; return the exit code."""
    if bool(job_ids) == bool(filters):
        msg = f"{action.verb}: give either ids of jobs, or filters such as --kind and --status" + (
            f"; 'koan-ray jobs {action.verb} --help' lists them" if not job_ids else ", not both"
        )
        raise ConfigurationError(msg)
    with reach(where):
        if job_ids:
            if action.verb == "remove" and not sure:
                _ask(action, len(job_ids))
            return _do_all(action, iter(job_ids), machine=machine)
        chosen = {**filters, "status": filters.get("status", action.statuses)}
        n = Jobs.count(**chosen).get(timeout=TIMEOUT_S)
        n = n if limit is None else min(n, limit)
        if n == 0:
            typer.echo(f"No jobs to {action.verb}: none of status {', '.join(chosen['status'])} match.", err=True)
            return 0
        if not sure:
            _ask(action, n)
        return _do_all(action, _matching(chosen, n), machine=machine)


def _ask(action: Action, n: int) -> None:
    typer.confirm(f"{action.verb.capitalize()} {n:,} job{'' if n == 1 else 's'}?", abort=True, err=True)


def _matching(filters: dict[str, Any], n: int) -> Iterator[str]:
    """Yield the ids of at most ``n`` jobs, oldest first: what is created meanwhile comes after what was counted."""
    cursor: str | None = None
    while n > 0:
        asked = {**filters, "order_by": "created_at", "limit": min(n, _PAGE), "cursor": cursor}
        page = Jobs.query(**asked).get(timeout=TIMEOUT_S)
        yield from (job.id for job in page)
        n -= len(page)
        cursor = page.cursor
        if cursor is None:
            return


def _do_all(action: Action, job_ids: Iterator[str], *, machine: bool) -> int:
    code = 0
    for job_id in job_ids:
        try:
            told = action.do(job_id)
        except (KoanRayError, TimeoutError) as error:
            exits.tell(error)
            if (of_this := exits.code_of(error)) == exits.UNAVAILABLE:
                return of_this  # it would be the same for all that follow
            code = max(code, of_this)
            continue
        if machine:
            present.print_json(told)
        else:
            typer.echo(_sentence(told))
    return code


def _sentence(told: dict[str, Any]) -> str:
    if n_items := told.get("items_total"):
        which = f"its {n_items:,} failed items run" if n_items > 1 else "its failed item runs"
        return f"{safe(told['id'])}: {which} again as {told['retried_as']}"
    if "retried_as" in told:
        return f"{safe(told['id'])} runs again as {told['retried_as']}"
    return f"{safe(told['id'])} {told['status']}" + (", it will end soon" if told["status"] == "running" else "")


# --- submit ----------------------------------------------------------------------------------------------------------


def submit_job(
    where: Where, kind: str, context: str | None, modules: list[str], settings: dict[str, Any], *, wait: bool, machine: bool,
    quiet: bool,
) -> int:  # fmt: skip
    """Start a job; return the exit code."""
    job_type = find_class(kind, modules)
    given = _context_of(job_type, context)
    builder = job_type.start(given, settings["correlation"])  # checks the context, before anybody is asked
    if settings["persist"]:
        builder = builder.persist(settings["source"], settings["partition"]).audit(settings["audit"])
    if settings["metadata"]:
        builder = builder.with_metadata(parse_metadata(settings["metadata"]))
    if settings["name"] is not None:
        builder = builder.named(settings["name"])
    if settings["delay"] is not None:
        builder = builder.delayed(seconds(settings["delay"], name="--delay"))
    with reach(where):
        job = builder.run().get(timeout=TIMEOUT_S)
        if not wait:
            _tell_submitted(job, machine=machine, quiet=quiet)
            return 0
        if not machine:
            typer.echo(job.id if quiet else f"{safe(job.kind)} {job.id} submitted", err=not quiet)
        from koan_ray.cli.following import follow, how_it_ended

        code = follow([job], machine=False, silent=machine or quiet)
        job = job.refresh().get(timeout=TIMEOUT_S)
        if machine:
            present.print_json(job_object(job, whole=True), indent=2)
        elif not quiet:
            how_it_ended(job)
        return code


def _context_of(job_type: type[Job[Any, Any]], given: str | None) -> Any:
    """Return the context of a job as its class declares it.

    Raises:
        ConfigurationError: None was given, and the class wants one.
        InvalidContextError: It does not fit.
    """
    if given is not None:
        return job_type.definition.parse_context(read_context(given))
    try:
        return job_type.definition.parse_context(b"null")
    except InvalidContextError:
        msg = (
            f"--context: kind {job_type.kind!r} takes a context, none was given. Give it as JSON, as @file, or as - for "
            "standard input; --context '{}' where all of its fields have defaults"
        )
        raise ConfigurationError(msg) from None


def _tell_submitted(job: Job[Any, Any], *, machine: bool, quiet: bool) -> None:
    if machine:
        present.print_json(job_object(job, whole=True), indent=2)
    else:
        typer.echo(job.id if quiet else f"{safe(job.kind)} {job.id} submitted")


def find_class(kind: str, modules: list[str]) -> type[Job[Any, Any]]:
    """Return the job class of a kind, or the one at ``module:Class``; the samples of ``koan-ray dev`` are always known.

    Raises:
        ConfigurationError: A module cannot be imported, or has no such class.
        UnknownKindError: No module that was imported defines the kind.
    """
    module, is_path, name = kind.partition(":")
    by_path = bool(is_path) and all(part.isidentifier() for part in module.split("."))
    import_modules([*modules, module] if by_path else modules)
    if not by_path:
        if registry.find(kind) is None and kind.startswith(_SAMPLE_KINDS):
            import_modules([_SAMPLES])
        found = registry.find(kind)
        if found is None:
            raise UnknownKindError(kind, sorted(each.kind for each in registry.everything()))
        return found
    import sys

    value: Any = sys.modules[module]
    for part in name.split("."):
        value = getattr(value, part, None)
    if not (isinstance(value, type) and issubclass(value, Job)):
        msg = f"{kind!r}: module {module!r} has no job class {name!r}, got {value!r:.100}"
        raise ConfigurationError(msg)
    return value
