"""Routes that say which role they ask for. A route without a role cannot be made, so nothing is open by oversight."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import Match, WebSocketRoute, compile_path

from koan_ray.web.schemas import JOB_ID, Problem
from koan_ray.web.security import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fastapi import FastAPI
    from starlette.types import Receive, Scope, Send

ROLE: Final = "x-koan-role"
_IS_ID: Final = re.compile(JOB_ID)
_PROBLEMS: Final = {
    400: "Not JSON, or not a request that can be read.", 401: "No valid credential.", 403: "The roles do not cover it.",
    404: "There is no such thing.", 409: "The state is not what the request relied on.", 413: "The request is too large.",
    415: "The body is not application/json.", 421: "The Host header names somebody else.",
    422: "A value was refused; `errors` names each.", 429: "Too much at once.",
    503: "Engine or source do not answer.",
}  # fmt: skip


class GuardedRoute(APIRoute):
    """A route whose requests pass the guard before anything of them is read."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        declared = (options.get("openapi_extra") or {}).get(ROLE)
        if declared is None:
            msg = f"route {path}: declares no role; add it with koan_ray.web.routing.Table"
            raise TypeError(msg)
        self.role = Role(declared)
        super().__init__(path, endpoint, **options)
        self.query_names = frozenset(_query_names(self.dependant.query_params))
        # A kind may hold slashes. Said here and not in the path, which stands in the description of the API.
        self.path_regex, _, self.param_convertors = compile_path(path.replace("{kind}", "{kind:path}"))

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match as usual, but what is no id is none: ``/api/jobs/cancel`` is a route of its own, whatever the method."""
        match, child = super().matches(scope)
        job_id = child.get("path_params", {}).get("job_id")
        return (match, child) if job_id is None or _IS_ID.fullmatch(job_id) else (Match.NONE, {})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the guard decide, then the endpoint."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)  # 405
            return
        await scope["app"].state.koan.guard.http(self, scope, receive, send, super().handle)


class GuardedSocket(WebSocketRoute):
    """A WebSocket whose callers pass the guard before they are told anything."""

    def __init__(self, path: str, endpoint: Callable[..., Any], role: Role) -> None:
        super().__init__(path, endpoint)
        self.role, self.talk = role, endpoint

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the guard decide, then the endpoint."""
        await scope["app"].state.koan.guard.socket(self, scope, receive, send)


class Table:
    """The routes of one module, as data: made with decorators, installed into an app later."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._routes: list[tuple[str, str, Role, Callable[..., Any], dict[str, Any]]] = []
        self._sockets: list[tuple[str, Role, Callable[..., Any]]] = []

    def get(self, path: str, role: Role, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add a route that reads."""
        return self._add("GET", path, role, options)

    def post(self, path: str, role: Role, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add a route that changes something."""
        return self._add("POST", path, role, options)

    def delete(self, path: str, role: Role, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add a route that deletes something."""
        return self._add("DELETE", path, role, options)

    def socket(self, path: str, role: Role) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add a WebSocket."""

        def add(endpoint: Callable[..., Any]) -> Callable[..., Any]:
            self._sockets.append((path, role, endpoint))
            return endpoint

        return add

    def _add(
        self, method: str, path: str, role: Role, options: dict[str, Any]
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def add(endpoint: Callable[..., Any]) -> Callable[..., Any]:
            self._routes.append((method, path, role, endpoint, options))
            return endpoint

        return add

    def install(self, app: FastAPI) -> None:
        """Add these routes to an app."""
        for method, path, role, endpoint, options in self._routes:
            problems: Sequence[int] = options.get("problems", ())
            rest = {name: value for name, value in options.items() if name != "problems"}
            extra: dict[str, Any] = {ROLE: role.value, **({"security": []} if role is Role.PUBLIC else {})}
            app.router.add_api_route(
                path, endpoint, methods=[method], tags=[self._tag], route_class_override=GuardedRoute, openapi_extra=extra,
                operation_id=endpoint.__name__, responses={**responses(role, problems), **rest.pop("responses", {})}, **rest,
            )  # fmt: skip
        for path, role, endpoint in self._sockets:
            app.router.routes.append(GuardedSocket(path, endpoint, role))


def responses(role: Role, more: Sequence[int]) -> Mapping[int | str, dict[str, Any]]:
    """Return the problems that a route may answer with, for OpenAPI."""
    usual = [400, 421, 422, 429, 503] if role is Role.PUBLIC else [400, 401, 403, 421, 422, 429, 503]
    return {
        status: {
            "description": _PROBLEMS[status],
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in sorted({*usual, *more})
    }


def _query_names(parameters: Sequence[Any]) -> list[str]:
    names: list[str] = []
    for parameter in parameters:
        annotation = parameter.field_info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            names += [field.alias or name for name, field in annotation.model_fields.items()]
        else:
            names.append(parameter.alias)
    return names


__all__ = ["ROLE", "GuardedRoute", "GuardedSocket", "Problem", "Table", "responses"]
