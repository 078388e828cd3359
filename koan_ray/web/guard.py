"""What every request passes: who asks, may that be, how much of it, what it weighs; and what every response carries.

`Shell` stands around the whole app (host, request id, headers, the last catch), `Guard` before each route. The order of the
guard: origin, credential, role, rate, query names, and only then the body, which is cut off at its limit and checked before
anything parses it. Nothing of a refused request reaches the engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
import re
import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from koan_ray.errors import KoanRayError
from koan_ray.telemetry import logs
from koan_ray.web import problems
from koan_ray.web.problems import ProblemError
from koan_ray.web.security import (
    CSRF_HEADER,
    SUBPROTOCOL,
    TOKEN_SUBPROTOCOL,
    Principal,
    Rates,
    Role,
    cookies_of,
    is_equal,
    origin_of,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from koan_ray.config import WebLimits
    from koan_ray.web.audit import AuditTrail
    from koan_ray.web.routing import GuardedRoute, GuardedSocket
    from koan_ray.web.security import Credentials, Hosts

    Go = Callable[[Scope, Receive, Send], Awaitable[None]]
    Plugin = Callable[[HTTPConnection], Awaitable[Principal | None] | Principal | None]

PROBES: Final = frozenset({"/healthz", "/readyz"})
CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
_HEADERS: Final = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_FAILURES_PER_S: Final = 20.0  # wrong credentials of everybody together
_FAILURES_BURST: Final = 100
_HELLO_S: Final = 5.0  # for the first message of a WebSocket that came without a credential
_MAX_HELLO: Final = 2000
_SAME_SITE: Final = frozenset({"same-origin", "none"})
_NO_BODY: Final = frozenset({"GET", "HEAD"})
_BRACKETS: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)  # or a string, as a whole
_MAY_OVERFLOW: Final = re.compile(rb"[eE]\+?[0-9]{3}|[0-9]{300}")


class Shell:
    """Around the app: whose name is called, which headers every response carries, and what becomes of a surprise.

    Args:
        app: What is served.
        hosts: Names that it may be called by.
        is_ending: Tells whether app or server go down.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, is_ending: Callable[[], bool]) -> None:
        self._app, self._hosts, self._is_ending = app, hosts, is_ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["request_id"] = secrets.token_hex(8)
        is_http = scope["type"] == "http"
        began = False

        async def sending(message: Message) -> None:
            nonlocal began
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                began = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers["X-Request-ID"] = scope["state"]["request_id"]
                if scope.get("scheme") == "https" or self._hosts.is_behind_tls:
                    headers.setdefault("Strict-Transport-Security", "max-age=31536000")
            await send(message)

        if not self._hosts.has(Headers(scope=scope).get("host", "")) and _path(scope) not in PROBES:
            problem = ProblemError(
                421,
                "the Host header names a server that this is not; call it by its own name, or add the name to [web] "
                "allowed_hosts",
                slug="wrong-host",
            )
            await refuse(problem, scope, receive, sending)
            return
        with logs.bound(request_id=scope["state"]["request_id"]):
            try:
                await self._app(scope, receive, sending)
            except asyncio.CancelledError:
                # A server that ends cancels what takes longer than its patience, and prints a traceback of each task that
                # then ends as cancelled. There is nothing more to be done here: the task ends now, as it was asked to.
                if not self._is_ending():
                    raise
            except Exception as error:
                problem = problems.noted(error, _path(scope))
                if is_http and not began:
                    await problems.respond(problem, scope)(scope, receive, sending)
                elif not isinstance(error, KoanRayError):
                    raise


class Guard:
    """Before each route.

    Args:
        credentials: Whose tokens and cookies are whose.
        hosts: Which pages are our own.
        limits: Sizes, rates and numbers.
        audit: Where mutating requests are recorded.
        plugin: Asked for the caller before tokens and cookies are; None means that it does not know.
        counters: Where what happens is counted.
    """

    def __init__(
        self, credentials: Credentials, hosts: Hosts, limits: WebLimits, audit: AuditTrail, plugin: Plugin | None,
        counters: Counter[tuple[str, str]],
    ) -> None:  # fmt: skip
        self._credentials, self._hosts, self._limits, self._audit = credentials, hosts, limits, audit
        self._plugin, self._counters = plugin, counters
        self._rates = Rates(limits.requests_per_second, limits.burst)
        self._failures = Rates(_FAILURES_PER_S, _FAILURES_BURST)
        self._n_sockets = 0

    # --- requests ----------------------------------------------------------------------------------------------------

    async def http(self, route: GuardedRoute, scope: Scope, receive: Receive, send: Send, go: Go) -> None:
        """Serve a request that may be, and answer any other with what is wrong with it."""
        is_unsafe = scope["method"] not in _NO_BODY
        answer = _Answer(send, Headers(scope=scope).get("if-none-match"), is_tagged=not is_unsafe)
        try:
            await self._admit(route, scope, is_unsafe=is_unsafe)
            if is_unsafe:
                receive = await self._body(route, scope, receive)
                if route.role is not Role.PUBLIC:
                    self._audit.check()
            await go(scope, receive, answer)
        except (ProblemError, KoanRayError, TimeoutError) as error:
            problem = problems.noted(error, _path(scope))
            answer.slug = problem.slug
            await problems.respond(problem, scope)(scope, receive, answer)
        finally:
            self._counters["requests", f"{route.path_format} {answer.status or 0}"] += 1
            if is_unsafe:
                self._record(route, scope, answer)

    async def _admit(self, route: GuardedRoute, scope: Scope, *, is_unsafe: bool) -> None:
        caller = HTTPConnection(scope)
        if is_unsafe:
            self._check_origin(caller)
        principal = await self._identify(caller)
        scope["state"]["principal"] = principal
        if route.role is not Role.PUBLIC:
            self._authorize(principal, route.role, route.path_format)
            if is_unsafe and principal is not None and principal.csrf is not None:
                self._check_csrf(caller, principal)
        who = principal.name if principal is not None else f"public {route.path_format}"
        # A probe that is turned away would have its process restarted; they cost next to nothing.
        if route.path_format not in PROBES and (wait_s := self._rates.wait_s(who)):
            raise _too_fast(wait_s, self._limits.requests_per_second)
        unknown = [name for name in caller.query_params if name not in route.query_names]
        if unknown:
            known = ", ".join(sorted(route.query_names)) or "none"
            raise ProblemError(
                422,
                f"unknown query parameter {unknown[0][:100]!r}; this route takes: {known}",
                slug="unknown-parameter",
                errors=[(f"query.{name[:100]}", "is no parameter of this route") for name in unknown[:20]],
            )

    def _check_origin(self, caller: HTTPConnection) -> None:
        """Let only our own pages, and callers that are no pages, change something."""
        origin = caller.headers.get("origin")
        site = caller.headers.get("sec-fetch-site")
        if origin is not None and not self._hosts.is_own(origin, *_where(caller)):
            raise ProblemError(403, f"the request {self._foreign(origin, caller)}", slug="foreign-origin")
        if site is not None and site not in _SAME_SITE:
            raise ProblemError(403, "the browser says that another site's page asks for this", slug="foreign-origin")

    def _foreign(self, origin: str, caller: HTTPConnection) -> str:
        """Return why an origin is not ours; one of our own names that was called otherwise has a proxy before us."""
        scheme, host = _where(caller)
        netloc = urlsplit(origin).netloc if origin_of(origin) is not None else ""
        if netloc and self._hosts.has(netloc):
            return (
                f"comes from a page of {origin[:100]}, and has reached this server as {scheme}://{host[:100]}; if a proxy "
                f'stands between, set [web] public_url = "{origin[:100]}"'
            )
        return "comes from another site's page; only our own may do this"

    def _check_csrf(self, caller: HTTPConnection, principal: Principal) -> None:
        is_known = "origin" in caller.headers or caller.headers.get("sec-fetch-site") == "same-origin"
        if not is_known or not is_equal(caller.headers.get(CSRF_HEADER, ""), principal.csrf):
            raise ProblemError(
                403,
                f"a request that changes something and comes with the cookie needs the header {CSRF_HEADER} with the value "
                f"that GET /api/session returns, and an Origin; or send the token as Authorization: Bearer",
                slug="csrf",
            )

    async def _identify(self, caller: HTTPConnection) -> Principal | None:
        if self._plugin is not None:
            found = self._plugin(caller)
            principal = await found if inspect.isawaitable(found) else found
            if principal is not None:
                return None if principal.is_expired(time.time()) else principal
        given = caller.headers.get("authorization")
        if given is not None:
            scheme, _, secret = given.partition(" ")
            found_by = self._credentials.by_token(secret.strip()) if scheme.lower() == "bearer" else None
            self._count_failure(found_by)
            return found_by
        cookies = cookies_of(caller.headers)
        for value in cookies:
            if (by_cookie := self._credentials.by_cookie(value)) is not None:
                return by_cookie
        if cookies:
            self._count_failure(None)
        return None

    def _count_failure(self, principal: Principal | None) -> None:
        if principal is None and (wait_s := self._failures.wait_s("")):
            raise ProblemError(
                429, "too many wrong credentials; wait and check yours", slug="too-many-failures",
                headers={"Retry-After": str(int(wait_s) + 1)},
            )  # fmt: skip

    def _authorize(self, principal: Principal | None, role: Role, where: str) -> None:
        if principal is None:
            self._counters["auth_denied", where] += 1
            raise ProblemError(
                401,
                "no valid credential; send a token as Authorization: Bearer …, or log in with POST /api/session",
                slug="unauthenticated",
                headers={"WWW-Authenticate": 'Bearer realm="koan-ray"'},
            )
        if not principal.may(role):
            self._counters["auth_denied", where] += 1
            raise ProblemError(
                403,
                f"{principal.name!r} has not the role {role.value!r} that this needs; ask for a token that has it",
                slug="forbidden",
            )

    async def _body(self, route: GuardedRoute, scope: Scope, receive: Receive) -> Receive:
        """Read the whole body, within size and time, see that it is JSON, and hand it on."""
        headers = Headers(scope=scope)
        limit = self._limits.body
        too_large = ProblemError(
            413,
            f"the body is larger than {limit:,} bytes ([web.limits] body); send less, or a reference to the data",
            slug="body-too-large",
            headers={"Connection": "close"},
        )
        declared = headers.get("content-length")
        if declared is not None and (not declared.isascii() or not declared.isdigit()):
            raise ProblemError(400, "Content-Length is not a number", slug="malformed")
        if declared is not None and int(declared[:20]) > limit:
            raise too_large
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_timeout.total_seconds()):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ProblemError(400, "the connection ended within the body", slug="malformed")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ProblemError(
                408, "the body did not arrive in time ([web.limits] body_timeout); send it faster", slug="too-slow",
                headers={"Connection": "close"},
            ) from None  # fmt: skip
        body = b"".join(chunks)
        if body:
            self._check_json(route, headers, body)
        return _replay(body, receive)

    def _check_json(self, route: GuardedRoute, headers: Headers, body: bytes) -> None:
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if route.body_field is None:
            raise ProblemError(
                422, "this route takes no body; send none", slug="unexpected-body", errors=[("body", "none is expected")]
            )
        if media_type != "application/json" or headers.get("content-encoding", "identity").lower() != "identity":
            raise ProblemError(
                415, f"expected application/json without encoding, got {media_type[:100]!r}; set Content-Type",
                slug="unsupported-media-type",
            )  # fmt: skip
        if is_deeper(body, self._limits.depth):
            raise ProblemError(
                422, f"the JSON is nested deeper than {self._limits.depth} ([web.limits] depth); send flatter data",
                slug="too-deep", errors=[("body", f"is nested deeper than {self._limits.depth}")],
            )  # fmt: skip
        try:
            found = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ProblemError(400, f"the body is not JSON: {error}", slug="not-json") from None
        # What is larger than any float would become infinite without a word.
        if _MAY_OVERFLOW.search(body) is not None and (path := _infinite(found, "body")) is not None:
            what = "is too large for a float (at most 1.8e308); send it as text"
            raise ProblemError(422, f"{path}: {what}", slug="number-too-large", errors=[(path, what)])

    def _record(self, route: GuardedRoute, scope: Scope, answer: _Answer) -> None:
        principal: Principal | None = scope["state"].get("principal")
        record = {
            "at": time.time(),
            "request_id": scope["state"]["request_id"],
            "who": principal.name if principal is not None else None,
            "by": "cookie" if principal is not None and principal.csrf else "token" if principal is not None else None,
            "method": scope["method"],
            "route": route.path_format,
            "params": {name: str(value)[:100] for name, value in scope.get("path_params", {}).items()},
            "status": answer.status or 0,
            "problem": answer.slug,
            **scope["state"].get("audit", {}),
        }
        try:
            self._audit.write(record)
        except KoanRayError:
            return  # it was told to the log; the next request is refused before it changes anything

    def log_in(self, secret: str) -> Principal:
        """Return whose token this is.

        Raises:
            ProblemError: Nobody's.
        """
        principal = self._credentials.by_token(secret)
        self._count_failure(principal)
        self._authorize(principal, Role.VIEWER, "/api/session")
        assert principal is not None  # noqa: S101 - said by _authorize
        return principal

    # --- WebSockets --------------------------------------------------------------------------------------------------

    async def socket(self, route: GuardedSocket, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a caller in who may, and hand it to the endpoint; a credential that expires meanwhile ends it."""
        socket = WebSocket(scope, receive, send)
        try:
            principal = await self._greet(route, socket)
        except ProblemError as refusal:
            await refuse(refusal, scope, receive, send, socket)
            return
        except (WebSocketDisconnect, TimeoutError):
            return
        try:
            async with asyncio.timeout(_left_s(principal)):
                await route.talk(socket, principal)
        except TimeoutError:
            await _close(socket, 4401, "the credential has expired; connect again with a new one")
        except WebSocketDisconnect:
            pass
        except (ProblemError, KoanRayError) as error:
            problem = problems.noted(error, _path(scope))
            await _close(socket, 4000 + problem.status, problem.detail)
        finally:
            self._n_sockets -= 1

    @property
    def n_sockets(self) -> int:
        """WebSockets that are open."""
        return self._n_sockets

    async def _greet(self, route: GuardedSocket, socket: WebSocket) -> Principal:
        origin = socket.headers.get("origin")
        if origin is not None and not self._hosts.is_own(origin, *_where(socket)):
            raise ProblemError(403, f"the WebSocket {self._foreign(origin, socket)}", slug="foreign-origin")
        if "token" in socket.query_params or "access_token" in socket.query_params:
            raise ProblemError(
                400, f"a token does not belong into a URL, which ends up in logs; send it as the subprotocol "
                     f'{TOKEN_SUBPROTOCOL}… or as the first message {{"token": "…"}}', slug="token-in-url",
            )  # fmt: skip
        if self._n_sockets >= self._limits.websockets:
            raise ProblemError(
                429, f"{self._limits.websockets} WebSockets are open, and no more are taken ([web.limits] websockets)",
                slug="too-many-sockets", headers={"Retry-After": "5"},
            )  # fmt: skip
        self._n_sockets += 1
        try:
            return await self._identify_socket(route, socket, origin)
        except BaseException:
            self._n_sockets -= 1
            raise

    async def _identify_socket(self, route: GuardedSocket, socket: WebSocket, origin: str | None) -> Principal:
        offered = [str(name) for name in socket.scope.get("subprotocols", [])]
        chosen = SUBPROTOCOL if SUBPROTOCOL in offered else None
        tokens = [name.removeprefix(TOKEN_SUBPROTOCOL) for name in offered if name.startswith(TOKEN_SUBPROTOCOL)]
        if tokens:
            principal = self._credentials.by_token(tokens[0])
            self._count_failure(principal)
        else:
            principal = await self._identify(socket)
            if principal is not None and principal.csrf is not None and origin is None:
                principal = None  # a cookie counts only from our own pages, and those tell their origin
        if principal is None and not tokens and "authorization" not in socket.headers and not cookies_of(socket.headers):
            await socket.accept(chosen)
            principal = await self._first_message(socket)
        self._authorize(principal, route.role, route.path)
        assert principal is not None  # noqa: S101 - said by _authorize
        wait_s = self._rates.wait_s(principal.name)
        if wait_s:
            raise _too_fast(wait_s, self._limits.requests_per_second)
        if socket.application_state is WebSocketState.CONNECTING:
            await socket.accept(chosen)
        return principal

    async def _first_message(self, socket: WebSocket) -> Principal | None:
        async with asyncio.timeout(_HELLO_S):
            text = await socket.receive_text()
        if len(text) > _MAX_HELLO:
            return None
        try:
            hello: Any = from_json(text)
        except ValueError:
            return None
        secret = hello.get("token") if isinstance(hello, dict) else None
        principal = self._credentials.by_token(secret) if isinstance(secret, str) else None
        self._count_failure(principal)
        return principal


class _Answer:
    """Sends a response on, remembers its status, and gives JSON an ETag that saves sending what is known already."""

    def __init__(self, send: Send, known: str | None, *, is_tagged: bool) -> None:
        self._send, self._known, self._is_tagged = send, known, is_tagged
        self._start: Message | None = None
        self._chunks: list[bytes] = []
        self.status: int | None = None
        self.slug: str | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            is_json = headers.get("content-type", "") == "application/json"
            if self._is_tagged and self.status == 200 and is_json:
                self._start = message
                return
            headers.setdefault("Cache-Control", "no-store")
            await self._send(message)
            return
        if self._start is None or message["type"] != "http.response.body":
            await self._send(message)
            return
        self._chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            await self._finish(self._start, b"".join(self._chunks))

    async def _finish(self, start: Message, body: bytes) -> None:
        self._start = None
        tag = f'W/"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        headers = MutableHeaders(scope=start)
        headers["ETag"] = tag
        headers["Cache-Control"] = "private, no-cache"
        headers["Vary"] = "Authorization, Cookie"
        if self._known is not None and _names(self._known, tag):
            self.status = start["status"] = 304
            del headers["content-length"]
            body = b""
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def _names(header: str, tag: str) -> bool:
    """Tell whether an If-None-Match header names this tag; compared weakly, as the header asks for."""
    return header.strip() == "*" or tag.removeprefix("W/") in [part.strip().removeprefix("W/") for part in header.split(",")]


def is_deeper(body: bytes, limit: int) -> bool:
    """Tell whether a JSON text is nested deeper than ``limit``, by its brackets outside of strings, before it is parsed."""
    depth = 0
    for found in _BRACKETS.finditer(body):
        bracket = found[0]
        if bracket in (b"{", b"["):
            depth += 1
            if depth > limit:
                return True
        elif bracket in (b"}", b"]"):
            depth -= 1
    return False


def _infinite(value: Any, path: str) -> str | None:
    """Return the path of a number that has become infinite by being read; None if there is none."""
    if isinstance(value, float):
        return path if math.isinf(value) else None
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for name, item in inner if (found := _infinite(item, f"{path}.{name}")) is not None), None)


async def refuse(problem: ProblemError, scope: Scope, receive: Receive, send: Send, socket: WebSocket | None = None) -> None:
    """Answer a request or a WebSocket that is not let in."""
    if scope["type"] == "http":
        await problems.respond(problem, scope)(scope, receive, send)
        return
    socket = socket or WebSocket(scope, receive, send)
    if socket.application_state is WebSocketState.CONNECTED:
        await _close(socket, 4000 + problem.status, problem.detail)
    elif "websocket.http.response" in scope.get("extensions", {}):
        await socket.send_denial_response(problems.respond(problem, scope))
    else:
        await socket.close(1008, problem.detail[:120])


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    if socket.application_state is WebSocketState.CONNECTED and socket.client_state is WebSocketState.CONNECTED:
        await socket.close(code, reason[:120])


def _replay(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def again() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _too_fast(wait_s: float, rate: float) -> ProblemError:
    return ProblemError(
        429, f"more than {rate:g} requests a second ([web.limits] requests_per_second); wait and go slower",
        slug="too-fast", headers={"Retry-After": str(int(wait_s) + 1)},
    )  # fmt: skip


def _left_s(principal: Principal) -> float | None:
    return None if principal.expires_at is None else max(0.0, principal.expires_at - time.time())


def _where(caller: HTTPConnection) -> tuple[str, str]:
    """Return the scheme and the host that this was called by; a WebSocket's page has the scheme of HTTP."""
    scheme = {"ws": "http", "wss": "https"}.get(caller.url.scheme, caller.url.scheme)
    return scheme, caller.headers.get("host", "")


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", "")) or "/"
