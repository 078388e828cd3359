"""Sessions, probes, metrics and the archive over HTTP."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from fastapi import Request
from starlette.responses import Response

from koan_ray import __version__
from koan_ray.errors import KoanRayError
from koan_ray.web import metrics, presenting
from koan_ray.web.problems import ProblemError
from koan_ray.web.routing import GuardedRoute, GuardedSocket, Table
from koan_ray.web.schemas import ArchiveAsk, ArchiveCounts, Health, LoginAsk, Session
from koan_ray.web.security import COOKIE, Principal, Role
from koan_ray.web.service import Api, Caller

if TYPE_CHECKING:
    from koan_ray.web.service import Service

routes = Table("system")
_READY_FRESH_S: Final = 1.0
_READY_WITHIN_S: Final = 3.0
_ARCHIVE_WITHIN_S: Final = 600.0


@routes.get("/healthz", Role.PUBLIC)
async def healthz() -> Health:
    """Say that this process is up."""
    return Health(status="ok")


@routes.get("/readyz", Role.PUBLIC)
async def readyz(api: Api) -> Health:
    """Say that engine and sources answer; 503 if one does not. Looked at once a second at most."""
    is_ready: bool = await api.cached("ready", _READY_FRESH_S, lambda: _is_ready(api))
    if not is_ready:
        raise ProblemError(
            503, "the engine, or a source, does not answer at present", slug="not-ready", headers={"Retry-After": "2"}
        )
    return Health(status="ready")


async def _is_ready(api: Service) -> bool:
    try:
        async with asyncio.timeout(_READY_WITHIN_S):
            await api.link.coordinator("look", "kinds")
            for source in api.reader.sources:
                await api.reader.partitions(source)
    except (KoanRayError, TimeoutError):
        return False
    return True


@routes.get(
    "/metrics",
    Role.VIEWER,
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text."}},
)
async def get_metrics(api: Api, _who: Caller, request: Request) -> Response:
    """Return counters and gauges of the engine and of this process as Prometheus reads them."""
    routes = [route.path_format for route in request.app.routes if isinstance(route, (GuardedRoute, GuardedSocket))]
    body, media_type = await metrics.exposition(api, routes)
    return Response(body, headers={"Content-Type": media_type})


@routes.post("/api/session", Role.PUBLIC, problems=(401, 415))
async def log_in(ask: LoginAsk, api: Api, request: Request, response: Response) -> Session:
    """Exchange a token for a cookie that browsers send by themselves and scripts cannot read."""
    principal = api.guard.log_in(ask.token)
    request.state.principal = principal
    value, with_cookie = api.credentials.cookie(principal)
    response.set_cookie(
        COOKIE, value, max_age=int(api.web.session_lifetime.total_seconds()), path=api.cookie_path(request),
        secure=api.is_https(request), httponly=True, samesite="strict",
    )  # fmt: skip
    return _session(with_cookie)


@routes.get("/api/session", Role.VIEWER)
async def get_session(_api: Api, who: Caller) -> Session:
    """Say who is asking and what that may do."""
    return _session(who)


@routes.delete("/api/session", Role.VIEWER, status_code=204)
async def log_out(api: Api, _who: Caller, request: Request, response: Response) -> None:
    """Take the cookie away."""
    response.delete_cookie(
        COOKIE, path=api.cookie_path(request), secure=api.is_https(request), httponly=True, samesite="strict"
    )


def _session(who: Principal) -> Session:
    roles = sorted(role.value for role in who.roles if role is not Role.PUBLIC)
    return Session(
        name=who.name, roles=roles, expires_at=presenting.instant(who.expires_at), csrf=who.csrf, version=__version__
    )


@routes.post("/api/archive/run", Role.ADMIN, problems=(409, 413, 415))
async def run_archive(ask: ArchiveAsk, api: Api, _who: Caller) -> ArchiveCounts:
    """Apply the archival policies now; ``dry_run`` only counts what is due."""
    counts: dict[str, dict[str, Any]] = await api.link.coordinator("archive", ask.dry_run, timeout_s=_ARCHIVE_WITHIN_S)
    return ArchiveCounts(dry_run=ask.dry_run, policies=counts)
