"""Puts the app together: routes, guard, problem documents, OpenAPI, dashboard."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount

from koan_ray import __version__
from koan_ray.config import load_settings
from koan_ray.errors import KoanRayError
from koan_ray.web import jobs, kinds, overview, problems, streams, system
from koan_ray.web.dashboard import Dashboard
from koan_ray.web.ending import is_server_ending
from koan_ray.web.guard import Shell
from koan_ray.web.head import Head
from koan_ray.web.problems import ProblemError, field_path
from koan_ray.web.routing import Table
from koan_ray.web.schemas import Problem
from koan_ray.web.security import COOKIE, Role
from koan_ray.web.service import Api, Caller, Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from koan_ray.client import Engine
    from koan_ray.config import Settings
    from koan_ray.web.guard import Plugin
    from koan_ray.web.security import Token

TABLES = (system.routes, jobs.routes, kinds.routes, overview.routes, streams.routes)
_description = Table("system")
_WORTH_PACKING = 1_000  # bytes of a response; streams of events are never packed, since each has to arrive at once


@_description.get("/openapi.json", Role.VIEWER, include_in_schema=False)
async def get_openapi_document(request: Request, _api: Api, _who: Caller) -> JSONResponse:
    """Return the description of this API, OpenAPI 3.1."""
    return JSONResponse(request.app.openapi())


def create_app(
    engine: Engine | None = None,
    *,
    settings: Settings | None = None,
    tokens: Sequence[Token] = (),
    authenticate: Plugin | None = None,
    dashboard: bool = True,
) -> FastAPI:
    """Return the HTTP API of an engine: to be served by uvicorn or Ray Serve, or mounted into an app of your own.

    ``app.mount("/koan", koan_ray.web.create_app())`` is all it takes: routes, guard, headers and problem documents come
    with it. It joins the engine when it is started, or at its first request where it is mounted.

    Args:
        engine: The engine to show; the one of this process by default, which is started as `koan_ray.init` would.
        settings: Of API and sources; the engine's own by default.
        tokens: Who may do what, besides the tokens of the settings; see `koan_ray.web.token`. Without any, one is made
            and printed.
        authenticate: An authentication of your own: called with each `starlette.requests.HTTPConnection`, returns a
            `koan_ray.web.Principal`, or None to leave it to tokens and cookies. Plain or async. What it accepts must not
            be something that browsers send by themselves, such as another app's cookie: those would need protection
            against forgery of their own.
        dashboard: Serve the dashboard at ``/``.

    Raises:
        ConfigurationError: A setting is unusable, or a module of ``[web]`` or ``[jobs] modules`` cannot be imported.
    """
    found = settings if settings is not None else engine.settings if engine is not None else load_settings()
    service = Service(found, engine, tokens, authenticate)
    app = FastAPI(
        title="koan_ray",
        version=__version__,
        summary="Durable, observable jobs on Ray.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(Head),
            Middleware(GZipMiddleware, minimum_size=_WORTH_PACKING),
            Middleware(Shell, hosts=service.hosts, is_ending=lambda: service.hub.is_closed or is_server_ending()),
        ],
        lifespan=_lifespan,
    )
    app.state.koan = service
    for table in (*TABLES, _description):
        table.install(app)
    if dashboard:
        app.router.routes.append(Mount("", Dashboard(), name="dashboard"))
    _answer_with_problems(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.koan
    service.start()
    try:
        yield
    finally:
        await service.close()


def _answer_with_problems(app: FastAPI) -> None:
    async def known(request: Request, error: Exception) -> Response:
        return problems.respond(problems.noted(error, request.url.path), request.scope)

    async def invalid(request: Request, error: Exception) -> Response:
        found: list[Any] = list(error.errors()) if isinstance(error, RequestValidationError) else []
        errors = [(field_path(item["loc"]), item["msg"]) for item in found]
        is_json = all(item["type"] != "json_invalid" for item in found)
        listed = "; ".join(f"{field}: {message}" for field, message in errors[:5])
        problem = ProblemError(
            422 if is_json else 400,
            f"{listed}. Nothing was done; correct the request",
            slug="invalid-request",
            errors=errors,
        )
        return problems.respond(problem, request.scope)

    async def http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        if status == 404:
            return problems.respond(problems.no_such_route(request.url.path), request.scope)
        return problems.respond(ProblemError(status, _about(status, headers), headers=headers), request.scope)

    for kind in (ProblemError, KoanRayError, TimeoutError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _about(status: int, headers: dict[str, str]) -> str:
    if status == 405:
        return f"this route does not take this method; it takes {headers.get('Allow', 'others')}"
    return "the request could not be read; see /openapi.json for what this route takes"


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the description, made once: with problem documents in place of FastAPI's errors, and with how to log in."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes, openapi_version="3.1.0"
        )
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
        schemas.update(problem.pop("$defs", {}))
        schemas["Problem"] = problem
        components["securitySchemes"] = {
            "token": {"type": "http", "scheme": "bearer"},
            "cookie": {"type": "apiKey", "in": "cookie", "name": COOKIE},
        }
        for operation in (each for item in document["paths"].values() for each in item.values()):
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "limit":
                    parameter["schema"]["maximum"] = app.state.koan.web.limits.page
        document["security"] = [{"token": []}, {"cookie": []}]
        app.openapi_schema = document
    return app.openapi_schema
