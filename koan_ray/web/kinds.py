"""Job classes over HTTP: those that this process has imported, those that the engine can run, and those that are stored.

A schema is shown only of classes that are defined here. What a stored document or the engine names is a name, and nothing
is ever imported because of it.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote

from fastapi import Path, Request

from koan_ray.errors import KoanRayError
from koan_ray.registry import everything, find
from koan_ray.web import presenting
from koan_ray.web.problems import ProblemError
from koan_ray.web.redaction import clean_text
from koan_ray.web.routing import Table
from koan_ray.web.schemas import Kind, Kinds, KindSummary
from koan_ray.web.security import Role
from koan_ray.web.service import Api, Caller, Service

if TYPE_CHECKING:
    from koan_ray.jobs import Job

routes = Table("kinds")
_SAMPLE = 500  # of the newest stored jobs of each place, whose kinds are told
_FRESH_S = 10.0
_MAX_KINDS = 1_000


@routes.get("/api/kinds", Role.VIEWER)
async def list_kinds(api: Api, _who: Caller) -> Kinds:
    """Return all kinds by name: those defined in the API's process with their schemas, and the names of others."""
    runnable, unroutable, stored = await api.cached("kinds", _FRESH_S, lambda: _elsewhere(api))
    names = {job_type.kind for job_type in everything()} | set(runnable) | set(unroutable) | set(stored)
    return Kinds(items=[_summary(name, runnable, unroutable) for name in sorted(names)[:_MAX_KINDS]])


@routes.get("/api/kinds/{kind}", Role.VIEWER, problems=(404,))
async def get_kind(kind: Annotated[Kind, Path()], request: Request, api: Api, _who: Caller) -> KindSummary:
    """Return one kind; what is no plain character of a path stands percent-encoded in it, a slash as ``%2F``."""
    kind = _as_sent(request) or kind
    runnable, unroutable, stored = await api.cached("kinds", _FRESH_S, lambda: _elsewhere(api))
    if find(kind) is None and kind not in runnable and kind not in unroutable and kind not in stored:
        raise ProblemError(
            404, f"kind {kind!r}: is not known here; GET /api/kinds lists those that are", slug="unknown-kind"
        )
    return _summary(kind, runnable, unroutable)


def _as_sent(request: Request) -> str | None:
    """Return the kind as the caller has encoded it: there are servers that decode a path twice."""
    _, is_ours, encoded = request.scope.get("raw_path", b"").partition(b"/api/kinds/")
    return unquote(encoded.decode("ascii", "replace"), errors="replace") if is_ours else None


async def _elsewhere(api: Service) -> tuple[frozenset[str], Counter[str], frozenset[str]]:
    """Return the kinds that the engine can run, the stored jobs that wait for theirs, and the kinds of the newest jobs."""
    runnable = frozenset(await api.link.coordinator("look", "kinds"))
    status = await api.status()
    try:
        page = await api.reader.page({"limit": _SAMPLE, "partition": None})
        stored = frozenset(job.terms.kind for job in page.jobs)
    except KoanRayError:  # a source is away: what the engine knows is told all the same
        stored = frozenset()
    return runnable, Counter(status["unroutable"]), stored


def _summary(kind: str, runnable: frozenset[str], unroutable: Counter[str]) -> KindSummary:
    job_type = find(kind)
    known: dict[str, Any] = {} if job_type is None else _declared(job_type)
    return KindSummary(
        kind=kind,
        description=known.get("description"),
        is_known=job_type is not None,
        is_runnable=job_type is not None or kind in runnable,
        n_unroutable=unroutable[kind],
        context_schema=presenting.schema_of(kind, "context"),
        result_schema=presenting.schema_of(kind, "result"),
        timeout_s=known.get("timeout_s"),
        retry_policy=known.get("retry_policy"),
        isolation=known.get("isolation"),
        resources=known.get("resources"),
    )


def _declared(job_type: type[Job[Any, Any]]) -> dict[str, Any]:
    definition = job_type.definition
    terms = definition.terms("")
    text = inspect.cleandoc(job_type.__doc__) if job_type.__doc__ else None
    return {
        "description": clean_text(text)[:2000] if text else None,
        "timeout_s": terms.timeout_s,
        "retry_policy": presenting.retry_policy(terms.retry),
        "isolation": terms.isolation.value,
        "resources": terms.spec.label,
    }
