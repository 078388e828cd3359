"""Serves the dashboard's files, which hold nothing but the page itself; until there are any, a page that says so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.routing import Match
from starlette.staticfiles import StaticFiles

from koan_ray.web.problems import ProblemError, no_such_route
from koan_ray.web.routing import GuardedRoute

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

STATIC: Final = Path(__file__).with_name("static")
_PLACEHOLDER: Final = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>koan_ray</title></head>
<body><h1>koan_ray</h1><p>The API answers under <code>/api</code>, its description is <code>/openapi.json</code>.</p></body>
</html>
"""


class Dashboard:
    """Everything that is no route of the API: files, the page for its own addresses, and 404 for the rest."""

    def __init__(self, directory: Path = STATIC) -> None:
        self._directory = directory
        self._files = StaticFiles(directory=directory, check_dir=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a file."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "there is no such WebSocket"})
            return
        path = str(scope["path"]).removeprefix(str(scope.get("root_path", ""))).lstrip("/")
        if allowed := _methods_of(scope):
            raise ProblemError(
                405,
                f"this route takes {allowed}, not {scope['method'][:20]}",
                slug="method-not-allowed",
                headers={"Allow": allowed},
            )
        if path == "api" or path.startswith("api/") or scope["method"] not in ("GET", "HEAD") or "\0" in path:
            raise no_such_route(path)
        # Files have a dot in their names.
        is_page = "." not in path.rpartition("/")[2]
        if is_page and path and not _wants_page(scope):
            raise no_such_route(path)
        if is_page and path and (self._directory / "index.html").is_file():
            # The page names its places behind a '#': so it works wherever the app is mounted, without knowing where. For the
            # same reason the way to it is a relative one: a proxy may have taken off the front of the path.
            await RedirectResponse("../" * path.count("/") or "./", 307)(scope, receive, send)
            return
        if not (self._directory / "index.html").is_file() and is_page:
            await HTMLResponse(_PLACEHOLDER, headers={"Cache-Control": "no-cache"})(scope, receive, send)
            return
        wanted = "index.html" if is_page else path
        await self._files({**scope, "path": f"{scope.get('root_path', '')}/{wanted}"}, receive, _revalidated(send))


def _wants_page(scope: Scope) -> bool:
    """Tell whether a page will do: programs that look for a route name what they take, and HTML is not among it."""
    taken = Headers(scope=scope).get("accept", "*/*")
    return "text/html" in taken or "*/*" in taken.partition(",")[0]


def _methods_of(scope: Scope) -> str:
    """Return the methods of the API's routes with this path; none of them is the one that was asked for."""
    routes = [route for route in scope["app"].router.routes if isinstance(route, GuardedRoute)]
    found = [route for route in routes if route.matches(scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in found for method in route.methods or ()}))


def _revalidated(send: Send) -> Send:
    """Have browsers ask each time whether a file is still the same: it has an ETag, and no name of its own a version."""

    async def sending(message: object) -> None:
        if isinstance(message, dict) and message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"cache-control", b"no-cache")]
        await send(message)  # type: ignore[arg-type]

    return sending
