"""The module that Ray's dashboard runs: routes under ``/koan`` and ``/api/koan``, in a process of its own.

Light to import, because Ray imports it on every node; whatever the routes need is imported at the first request.
"""

from __future__ import annotations

import asyncio
import json
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeVar, cast

from aiohttp import web
from ray.dashboard.subprocesses.module import SubprocessModule
from ray.dashboard.subprocesses.routes import SubprocessRouteTable

if TYPE_CHECKING:
    from collections.abc import Callable

_TYPES = {"index.html": "text/html", "koan.js": "text/javascript", "koan.css": "text/css"}
_HEADERS = {
    # Text of jobs is shown by this page: no script but ours may ever run in it.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


Handler = TypeVar("Handler", bound="Callable[..., Any]")


def _get(path: str) -> Callable[[Handler], Handler]:
    """Serve GET at ``path``."""
    return cast("Callable[[Handler], Handler]", SubprocessRouteTable.get(path))


class KoanHead(SubprocessModule):
    """Jobs of all engines of the cluster, for whoever may open its dashboard."""

    _window: Any = None

    @_get("/koan")
    async def page(self, _request: web.Request) -> web.Response:
        """Return the page."""
        return _file("index.html")

    @_get("/koan/koan.js")
    async def script(self, _request: web.Request) -> web.Response:
        """Return what draws the page."""
        return _file("koan.js")

    @_get("/koan/koan.css")
    async def style(self, _request: web.Request) -> web.Response:
        """Return how it looks."""
        return _file("koan.css")

    @_get("/api/koan/engines")
    async def engines(self, _request: web.Request) -> web.Response:
        """Return the namespaces that have an engine."""
        return await self._answer(lambda window: window.engines())

    @_get("/api/koan/jobs")
    async def jobs(self, request: web.Request) -> web.Response:
        """Return a page of jobs."""
        filters = dict(request.query)
        namespace = filters.pop("engine", "koan")
        return await self._answer(lambda window: window.jobs(namespace, filters))

    @_get("/api/koan/jobs/{job_id}")
    async def job(self, request: web.Request) -> web.Response:
        """Return one job."""
        namespace, job_id = request.query.get("engine", "koan"), request.match_info["job_id"]
        return await self._answer(lambda window: window.job(namespace, job_id))

    async def _answer(self, ask: Callable[[Any], dict[str, Any]]) -> web.Response:
        try:
            found = await asyncio.to_thread(self._ask, ask)
        except Exception as error:  # noqa: BLE001 - becomes the answer
            from koan_ray.runtime.ray.dashboard.window import problem

            told = problem(error)
            return _json(told, status=told["status"], content_type="application/problem+json")
        return _json(found)

    def _ask(self, ask: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        from koan_ray.runtime.ray.dashboard.window import Window

        if self._window is None:
            self._window = Window(self.gcs_address)
        return ask(self._window)


def _file(name: str) -> web.Response:
    text = resources.files("koan_ray.runtime.ray.dashboard").joinpath("page", name).read_text(encoding="utf-8")
    return web.Response(text=text, content_type=_TYPES[name], charset="utf-8", headers=_HEADERS)


def _json(value: Any, *, status: int = 200, content_type: str = "application/json") -> web.Response:
    return web.Response(text=json.dumps(value), status=status, content_type=content_type, headers=_HEADERS)
