"""Errors as HTTP: the one place that knows which error is which status. RFC 9457, ``application/problem+json``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import Response

from koan_ray import errors
from koan_ray.telemetry import logs
from koan_ray.web.redaction import clean_text
from koan_ray.web.schemas import FieldProblem, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.types import Scope

MEDIA_TYPE: Final = "application/problem+json"
_TITLES: Final = {
    304: "Not modified",
    400: "The request cannot be read",
    401: "Who are you?",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "The request took too long",
    409: "Conflict",
    413: "Too large",
    415: "Unsupported media type",
    421: "Wrong host",
    422: "The request was refused",
    429: "Too much at once",
    500: "Our fault",
    503: "Unavailable at present",
}
_RETRY_AFTER_S: Final = 2
_OF_A_JOB: Final = re.compile("/?api/jobs/([^/]+)")
_log = logs.get_logger()
_MAX_ERRORS: Final = 50


class ProblemError(Exception):
    """A request that is answered with a problem document.

    Args:
        status: The HTTP status.
        detail: What is wrong, and what to do about it.
        slug: Names the kind of problem, for programs.
        errors: What is wrong in which field.
        headers: Of the response.
    """

    def __init__(
        self, status: int, detail: str, *, slug: str | None = None, errors: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, detail)
        self.status, self.detail = status, detail
        self.slug = slug or _TITLES.get(status, "error").lower().replace(" ", "-").replace("?", "")
        self.errors, self.headers = list(errors), dict(headers or {})

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}"


def no_such_route(path: str) -> ProblemError:
    """Return what is wrong with an address that is none; one that ought to name a job says what an id looks like."""
    if (found := _OF_A_JOB.match(path)) is not None:
        return from_error(errors.JobNotFoundError(found[1], looked_in=()))
    return ProblemError(404, "there is no such route or file; /openapi.json lists the routes", slug="no-such-route")


def noted(error: Exception, path: str | None = None) -> ProblemError:
    """Return the problem that an error is to a caller, and tell the log of what is not the caller's own doing.

    The request's id is part of each record, and of the answer.
    """
    problem = from_error(error)
    if problem.status >= 500 and not isinstance(error, ProblemError):
        about = {} if path is None else {"path": path}
        if problem.status == 503:
            _log.warning("request_unanswered", problem=str(error), **about)
        else:
            _log.error("request_failed", exc_info=error, **about)
    return problem


def document(problem: ProblemError, instance: str, request_id: str = "") -> Problem:
    """Return what is wrong as a document."""
    return Problem(
        type=f"urn:koan-ray:problem:{problem.slug}",
        title=_TITLES.get(problem.status, "Error"),
        status=problem.status,
        detail=clean_text(problem.detail)[:4000],
        instance=instance[:500],
        request_id=request_id,
        errors=[
            FieldProblem(field=clean_text(field)[:300], message=clean_text(message)[:500])
            for field, message in problem.errors[:_MAX_ERRORS]
        ],
    )


def respond(problem: ProblemError, scope: Scope) -> Response:
    """Return the response that says what is wrong."""
    told = document(problem, str(scope.get("path", "")), str(scope.get("state", {}).get("request_id", "")))
    headers = {"Cache-Control": "no-store", **problem.headers}
    return Response(told.model_dump_json(), problem.status, headers, MEDIA_TYPE)


def from_error(error: Exception) -> ProblemError:  # noqa: PLR0911 - a table of cases
    """Return the problem that an error of ours, or anything else, is to a caller of the API."""
    text = str(error)
    retry = {"Retry-After": str(_RETRY_AFTER_S)}
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, errors.InvalidContextError):
        found = [(_under("body.context", path), message) for path, message in error.problems]
        return ProblemError(422, text, slug="invalid-context", errors=found)
    if isinstance(error, errors.PayloadTooLargeError):
        return ProblemError(413, text, slug="payload-too-large")
    if isinstance(error, errors.JobNotFoundError):
        return ProblemError(404, text, slug="job-not-found")
    if isinstance(error, errors.UnknownKindError):
        return ProblemError(404, text, slug="unknown-kind")
    if isinstance(error, (errors.ConfigurationError, errors.JobDefinitionError)):
        return ProblemError(422, text, slug="unusable-argument")
    if isinstance(error, errors.ConflictError):
        return ProblemError(409, text, slug="conflict")
    if isinstance(error, errors.LimitExceededError):
        return ProblemError(429, text, slug="limit-exceeded", headers=retry)
    if isinstance(error, errors.RecordCorruptError):
        return ProblemError(500, text, slug="record-corrupt")
    if isinstance(error, (errors.StoreError, errors.RuntimeUnavailableError, TimeoutError)):
        what = text or "the engine did not answer in time"
        return ProblemError(503, f"{what}. Nothing is known to have changed; repeat the request.", headers=retry)
    return ProblemError(
        500, "Something failed that should not have; the log of the API has the details under this request id."
    )


def _under(prefix: str, path: str) -> str:
    return prefix if path.startswith("(") else f"{prefix}.{path}"


def field_path(location: Sequence[Any]) -> str:
    """Return where pydantic found something wrong, as in ``body.filters.kind.0``."""
    return ".".join(str(part) for part in location)
