"""Jobs over HTTP: find, show, submit, cancel, run anew, delete; one at a time, or many by filter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body, Query, Request
from pydantic import ValidationError
from pydantic_core import from_json, to_json

from koan_ray.definition import encode_metadata
from koan_ray.domain import words
from koan_ray.domain.metadata import MetadataError, is_metadata_key, plain_metadata
from koan_ray.domain.status import JobStatus
from koan_ray.errors import InvalidContextError, KoanRayError, LimitExceededError, UnknownKindError
from koan_ray.registry import resolve
from koan_ray.run import Persistence, RunSettings
from koan_ray.web import presenting
from koan_ray.web.problems import ProblemError, from_error
from koan_ray.web.redaction import Redactor, is_secret_name
from koan_ray.web.routing import Table
from koan_ray.web.schemas import (
    BulkAnswer,
    BulkAsk,
    BulkFilters,
    CancelAsk,
    Cancelled,
    Executions,
    FailedItems,
    FieldProblem,
    JobDetail,
    JobId,
    JobPage,
    JobSummary,
    ListQuery,
    PageQuery,
    Payload,
    Persist,
    Progress,
    RetryAsk,
    SubmitAsk,
    Tree,
    TreeNode,
)
from koan_ray.web.security import Principal, Role
from koan_ray.web.service import Api, Caller, Service

if TYPE_CHECKING:
    from collections.abc import Mapping

    from koan_ray.domain.records import JobRecord
    from koan_ray.jobs import Job

routes = Table("jobs")
_ITEM_CURSOR = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})")
_MAX_TREE = 1_000  # jobs of one answer
_MAX_CHILDREN = 200  # of one job in it
_MAX_ANCESTORS = 100
_BULK_PAGE = 500
_N_ERRORS, _N_IDS = 20, 100
_FINAL = frozenset(status for status in JobStatus if status.is_final)
_UNFINISHED = frozenset(JobStatus) - _FINAL
_NO_REASON, _FROM_THE_START = CancelAsk(), RetryAsk()  # what a request without a body asks for
_RETRYABLE = frozenset({JobStatus.FAILED, JobStatus.CANCELLED})


# --- find and show ---------------------------------------------------------------------------------------------------


@routes.get("/api/jobs", Role.VIEWER)
async def list_jobs(api: Api, who: Caller, query: Annotated[ListQuery, Query()]) -> JobPage:
    """Return a page of jobs, newest first unless ``order_by`` says otherwise. All filters must hold."""
    filters = query.model_dump(exclude_none=True, mode="python")
    if query.metadata is not None:
        filters["metadata"] = _metadata_filter(query.metadata)
    _check_limit(api, query.limit)
    page = await api.reader.page(_checked_times(filters))
    jobs = page.jobs
    if query.text is not None and not who.may(Role.READER):
        # What an error says is not theirs to read, so it must not be theirs to guess either; pages may be short.
        jobs = [job for job in jobs if _is_named(job, query.text.casefold())]
    return JobPage(items=await api.headlines.summaries(jobs, who), cursor=page.cursor)


def _is_named(job: JobRecord, sought: str) -> bool:
    about = job.particulars
    return any(sought in text.casefold() for text in (about.name, about.description, job.terms.kind) if text)


@routes.get("/api/jobs/{job_id}", Role.VIEWER, problems=(404,))
async def get_job(job_id: JobId, api: Api, who: Caller) -> JobDetail:
    """Return one job, from wherever it is kept, the archive included."""
    return presenting.detail(await api.reader.job(job_id), who)


@routes.get("/api/jobs/{job_id}/progress", Role.VIEWER, problems=(404,))
async def get_progress(job_id: JobId, api: Api, _who: Caller) -> Progress:
    """Return the latest progress of a job."""
    return presenting.progress_of(await api.reader.job(job_id))


@routes.get("/api/jobs/{job_id}/context", Role.READER, problems=(404,))
async def get_context(job_id: JobId, api: Api, _who: Caller) -> Payload:
    """Return what a job was started with."""
    job = await api.reader.job(job_id)
    return Payload(job_id=job_id, value=presenting.payload(job, "context", Redactor()))


@routes.get("/api/jobs/{job_id}/result", Role.READER, problems=(404, 409))
async def get_result(job_id: JobId, api: Api, _who: Caller) -> Payload:
    """Return what a job has returned; 409 while it has not completed."""
    job = await api.reader.job(job_id)
    if job.status is not JobStatus.COMPLETED:
        raise ProblemError(409, f"job {job_id}: is {job.status}, and has a result when it has completed", slug="no-result")
    redactor = Redactor()
    presenting.payload(job, "context", redactor)  # its secrets may be in the result
    return Payload(job_id=job_id, value=presenting.payload(job, "result", redactor))


@routes.get("/api/jobs/{job_id}/executions", Role.VIEWER, problems=(404,))
async def list_executions(job_id: JobId, api: Api, who: Caller) -> Executions:
    """Return the tries of a job, oldest first: of a job in documents, if it was submitted with ``audit``."""
    job = await api.reader.job(job_id)
    redactor = Redactor()
    presenting.payload(job, "context", redactor)
    found = await api.reader.executions(job)
    return Executions(items=[presenting.execution(record, who, redactor) for record in found])


@routes.get("/api/jobs/{job_id}/failed-items", Role.VIEWER, problems=(404,))
async def list_failed_items(job_id: JobId, api: Api, who: Caller, page: Annotated[PageQuery, Query()]) -> FailedItems:
    """Return a page of the items of a batch that are given up; 404 for a job that has told of no items."""
    _check_limit(api, page.limit)
    job = await api.reader.job(job_id)
    if job.checkpoint is None:
        text = f"job {job_id}: has told of no items; only batches over items (FiniteJob) do, at their first checkpoint"
        raise ProblemError(404, text, slug="no-items")
    place = _ITEM_CURSOR.fullmatch(page.cursor or "0.0")
    if place is None:
        raise _unusable("query.cursor", "expected the cursor of a page of failed items, unchanged")
    rows, following = await api.reader.failed_items(job, int(place[1]), int(place[2]), page.limit)
    redactor = Redactor()
    presenting.payload(job, "context", redactor)
    items = [presenting.failed_item(row, who, redactor) for row in rows]
    return FailedItems(items=items, cursor=None if following is None else "{}.{}".format(*following))


@routes.get("/api/jobs/{job_id}/children", Role.VIEWER, problems=(404,))
async def list_children(job_id: JobId, api: Api, who: Caller, page: Annotated[PageQuery, Query()]) -> JobPage:
    """Return a page of the jobs that were started below a job, oldest first."""
    _check_limit(api, page.limit)
    await api.reader.job(job_id)
    found = await api.reader.children(job_id, page.limit, page.cursor)
    return JobPage(items=await api.headlines.summaries(found.jobs, who), cursor=found.cursor)


@routes.get("/api/jobs/{job_id}/tree", Role.VIEWER, problems=(404,))
async def get_tree(job_id: JobId, api: Api, _who: Caller) -> Tree:
    """Return the whole tree that a job belongs to, level by level up to a thousand jobs."""
    root = await _root(api, await api.reader.job(job_id))
    top = TreeNode(job=presenting.summary(root), children=[])
    level, n_jobs, is_cut = [top], 1, False
    while level:
        below: list[TreeNode] = []
        for node in level:
            left = min(_MAX_CHILDREN, _MAX_TREE - n_jobs)
            if left <= 0:
                node.more = is_cut = True
                continue
            page = await api.reader.children(node.job.id, left)
            node.children = [TreeNode(job=shown, children=[]) for shown in presenting.summaries(page.jobs)]
            node.more = page.cursor is not None
            is_cut, n_jobs = is_cut or node.more, n_jobs + len(node.children)
            below += node.children
        level = below
    return Tree(job_id=job_id, root=top, n_jobs=n_jobs, truncated=is_cut)


async def _root(api: Service, job: JobRecord) -> JobRecord:
    for _ in range(_MAX_ANCESTORS):
        parent_id = job.particulars.parent_job_id
        if parent_id is None:
            return job
        try:
            job = await api.reader.job(parent_id)
        except KoanRayError:  # removed, or expired: what is left has this one on top
            return job
    return job


def _check_limit(api: Service, limit: int) -> None:
    if limit > api.web.limits.page:
        text = f"expected at most {api.web.limits.page} ([web.limits] page), got {limit}; follow the cursor for more"
        raise ProblemError(422, f"limit: {text}", slug="unusable-argument", errors=[("query.limit", text)])


def _metadata_filter(text: str) -> dict[str, Any]:
    """Return the metadata that a query asks for: JSON values under plain keys, nothing that could be an operator."""
    try:
        found = BulkFilters.model_validate({"metadata": from_json(text, allow_inf_nan=False)}).metadata
    except ValueError as error:
        what = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise _unusable("query.metadata", f'expected a JSON object, such as {{"tenant": 7}}: {what}') from None
    return _plain_metadata(found or {}, "query.metadata")


def _plain_metadata(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    if len(metadata) > 16:
        raise _unusable(where, f"expected at most 16 keys, got {len(metadata)}")
    try:
        found = plain_metadata(metadata)
    except MetadataError as error:
        raise _unusable(f"{where}.{error.path[:100]}", error.problem) from None
    _check_keys(found, where)
    return found


def _check_keys(value: Any, where: str) -> None:
    """Refuse keys at any depth that could be an operator, or that name a secret."""
    if isinstance(value, list):
        for item in value:
            _check_keys(item, where)
    elif isinstance(value, dict):
        for name, item in value.items():
            if not is_metadata_key(name) or not name.isprintable():
                raise _unusable(f"{where}.{name[:100]}", "expected a key without '.', NUL or a leading '$'")
            if is_secret_name(name):
                raise _unusable(f"{where}.{name[:100]}", "is the name of a secret, which nobody can look for")
            _check_keys(item, f"{where}.{name[:100]}")


def _unusable(field: str, what: str) -> ProblemError:
    return ProblemError(422, f"{field}: {what}", slug="unusable-argument", errors=[(field, what)])


def _checked_times(filters: dict[str, Any], prefix: str = "query") -> dict[str, Any]:
    for name, value in filters.items():
        if name.endswith(("_after", "_before")) and value.tzinfo is None:
            raise _unusable(f"{prefix}.{name}", "expected an instant with a time zone, such as 2026-01-31T12:00:00Z")
    return filters


# --- submit ----------------------------------------------------------------------------------------------------------


@routes.post("/api/jobs", Role.SUBMITTER, status_code=201, problems=(404, 409, 413, 415))
async def submit_job(ask: SubmitAsk, api: Api, _who: Caller, request: Request) -> JobSummary:
    """Start a job of a kind that is defined in this process; its context is checked against the kind's schema first."""
    job_type = _job_type(ask.kind)
    encoded = _encoded(job_type, ask.context)
    settings = _run_settings(ask)
    await _check_room(api)
    submitted = await api.session.submit(job_type, encoded, settings)
    request.state.audit = {"job_id": submitted.id, "kind": ask.kind}
    return presenting.summary(await api.reader.job(submitted.id))


def _job_type(kind: str) -> type[Job[Any, Any]]:
    try:
        return resolve(kind)
    except UnknownKindError as error:
        known = ", ".join(repr(name) for name in error.known[:20]) or "none"
        text = f"{kind!r} is no job kind that this API knows (known: {known}); name its module in [web] modules"
        raise ProblemError(422, f"kind: {text}", slug="unknown-kind", errors=[("body.kind", text)]) from None


def _encoded(job_type: type[Job[Any, Any]], context: Any) -> bytes:
    """Return a context as the kind's declared type, as JSON."""
    definition = job_type.definition
    return definition.encode_context(definition.parse_context(to_json(context)))


def _run_settings(ask: SubmitAsk) -> RunSettings:
    try:
        metadata = encode_metadata(ask.metadata or {})
    except InvalidContextError as error:
        key, what = error.problems[0]
        raise _unusable("body.metadata", f"{key}: {what}") from None
    persistence: Persistence | None = None
    if isinstance(ask.persist, Persist):
        persistence = Persistence(ask.persist.source, ask.persist.partition)
    elif ask.persist:
        persistence = Persistence()
    return RunSettings(
        persistence=persistence, audit=ask.audit, metadata=metadata,
        correlation_id=words.correlation_id(ask.correlation_id, "body"),
        name=None if ask.name is None else words.job_name(ask.name), description=words.description(ask.description),
        delay_s=ask.delay_s,
    )  # fmt: skip


async def _check_room(api: Service) -> None:
    """Refuse new jobs while too many wait; asked of the coordinator at most once a second."""
    status = await api.status()
    limit = min(api.web.limits.queued, status["limits"]["max_queued"])
    if status["live"] >= limit:
        raise LimitExceededError("jobs queued or running", status["live"] + 1, limit, "[web.limits] queued")


# --- cancel, retry, delete -------------------------------------------------------------------------------------------


@routes.post("/api/jobs/cancel", Role.OPERATOR, problems=(409, 413, 415))
async def cancel_jobs(ask: BulkAsk, api: Api, who: Caller, request: Request) -> BulkAnswer:
    """Cancel all jobs that match and have not ended. Without ``expected`` it only counts; with it, the count must hold."""
    return await _in_bulk(api, who, request, ask, _UNFINISHED, "cancel")


@routes.post("/api/jobs/retry", Role.OPERATOR, problems=(409, 413, 415))
async def retry_jobs(ask: BulkAsk, api: Api, who: Caller, request: Request) -> BulkAnswer:
    """Run all failed or cancelled jobs anew that match. Without ``expected`` it only counts; with it, that must hold."""
    return await _in_bulk(api, who, request, ask, _RETRYABLE, "retry")


async def _in_bulk(
    api: Service, who: Principal, request: Request, ask: BulkAsk, eligible: frozenset[JobStatus], what: str
) -> BulkAnswer:
    filters = _checked_times(ask.filters.model_dump(exclude_none=True), "body.filters")
    if ask.filters.metadata is not None:
        filters["metadata"] = _plain_metadata(ask.filters.metadata, "body.filters.metadata")
    if ask.filters.text is not None and not who.may(Role.READER):
        raise ProblemError(403, "the filter text looks into what errors say, which needs the role reader", slug="forbidden")
    wanted = eligible if ask.filters.status is None else eligible & set(ask.filters.status)
    limit = api.web.limits.bulk
    if not wanted:
        names = ", ".join(sorted(eligible))
        raise _unusable("body.filters.status", f"expected one or several of {names}: others cannot be changed this way")
    filters["status"] = sorted(wanted)
    counted = await api.reader.count(filters, limit)
    request.state.audit = {"what": what, "n": counted.n, "expected": ask.expected}
    if counted.more:
        raise ProblemError(
            422, f"more than {limit:,} jobs match, the most of one request ([web.limits] bulk); narrow the filters",
            slug="too-many-jobs",
        )  # fmt: skip
    if ask.expected is None:
        return BulkAnswer(counted=counted.n, dry_run=True)
    if ask.expected != counted.n:
        raise ProblemError(
            409, f"{counted.n:,} jobs match now, and {ask.expected:,} were expected; look again, and confirm the new count",
            slug="count-changed",
        )  # fmt: skip
    answer = BulkAnswer(counted=counted.n, dry_run=False)
    for job_id in await _matching(api, filters, counted.n):
        await _change_one(api, who, ask, job_id, wanted, what, answer)
    request.state.audit = {"what": what, "n": counted.n, "expected": ask.expected, "done": answer.done}
    return answer


async def _matching(api: Service, filters: dict[str, Any], limit: int) -> list[str]:
    """Return the ids of what matches now, oldest first; all before the first is changed, so that paging is stable."""
    found: list[str] = []
    cursor: str | None = None
    while len(found) < limit:
        asked = {**filters, "order_by": "created_at", "limit": min(_BULK_PAGE, limit - len(found))}
        page = await api.reader.page(asked if cursor is None else {**asked, "cursor": cursor})
        found += [job.id for job in page.jobs]
        cursor = page.cursor
        if cursor is None:
            break
    return found


async def _change_one(
    api: Service, who: Principal, ask: BulkAsk, job_id: str, wanted: frozenset[JobStatus], what: str, answer: BulkAnswer
) -> None:
    """Change one job of many, decided anew on the job as it is now."""
    try:
        job = await api.reader.job(job_id)
        if job.status not in wanted or not who.may(Role.OPERATOR):
            answer.skipped += 1
            return
        if what == "cancel":
            await api.link.coordinator("cancel", job_id, ask.reason or f"cancelled by {who.name}")
            told = job_id
        else:
            told = await api.link.run_again("retry", job_id)
    except KoanRayError as error:
        answer.failed += 1
        if len(answer.errors) < _N_ERRORS:
            answer.errors.append(FieldProblem(field=job_id, message=from_error(error).detail[:500]))
        return
    answer.done += 1
    if len(answer.jobs) < _N_IDS:
        answer.jobs.append(told)


@routes.post("/api/jobs/{job_id}/cancel", Role.OPERATOR, problems=(404, 409, 413, 415))
async def cancel_job(job_id: JobId, api: Api, who: Caller, ask: Annotated[CancelAsk, Body()] = _NO_REASON) -> Cancelled:
    """Cancel a job and its children. Of one that has ended, the answer is how it ended."""
    reason = ask.reason or f"cancelled by {who.name}"
    status = await api.link.coordinator("cancel", job_id, reason)
    return Cancelled(job_id=job_id, status=JobStatus(status))


@routes.post("/api/jobs/{job_id}/retry", Role.OPERATOR, status_code=201, problems=(404, 409, 413, 415))
async def retry_job(
    job_id: JobId, api: Api, _who: Caller, request: Request, ask: Annotated[RetryAsk, Body()] = _FROM_THE_START
) -> JobSummary:
    """Run a failed or cancelled job anew, as a new job that names this one as ``retry_of``.

    A batch may go on where it stopped (``resume``); 409 if it has not come to a checkpoint.
    """
    return await _run_again(api, request, "retry", job_id, ask.resume)


@routes.post("/api/jobs/{job_id}/retry-failed-items", Role.OPERATOR, status_code=201, problems=(404, 409))
async def retry_failed_items(job_id: JobId, api: Api, _who: Caller, request: Request) -> JobSummary:
    """Run the items that a batch has given up, as a new job that names it as ``retry_of``.

    409 if it has given up none, or has not ended.
    """
    return await _run_again(api, request, "retry_failed_items", job_id)


async def _run_again(api: Service, request: Request, method: str, job_id: str, *more: Any) -> JobSummary:
    await _check_room(api)
    new = await api.link.run_again(method, job_id, *more)
    request.state.audit = {"job_id": new, **({"resume": True} if True in more else {})}
    return presenting.summary(await api.reader.job(new))


@routes.delete("/api/jobs/{job_id}", Role.ADMIN, status_code=204, problems=(404, 409))
async def delete_job(job_id: JobId, api: Api, _who: Caller) -> None:
    """Delete a job that has ended, with its executions."""
    await api.reader.job(job_id)
    await api.link.coordinator("remove", job_id)


@routes.post("/api/jobs/{job_id}/restore", Role.ADMIN, problems=(404, 409))
async def restore_job(job_id: JobId, api: Api, _who: Caller) -> JobSummary:
    """Bring a job back from an archive to where it was; one that is in none stays where it is."""
    await api.link.coordinator("restore", job_id)
    return presenting.summary(await api.reader.job(job_id))
