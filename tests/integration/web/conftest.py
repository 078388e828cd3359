"""The HTTP API on a local engine, called in process: no Ray, no network."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest
from pydantic import BaseModel, Field, SecretStr, field_serializer
from starlette.testclient import TestClient

import koan_ray as koan
from koan_ray import web
from koan_ray.web.routing import GuardedRoute, GuardedSocket
from koan_ray.web.security import TOKEN_SUBPROTOCOL
from tests.servers import EXTERNAL, ExternalServer, MongoServer

HOST = "http://localhost"
ROLES = ("viewer", "reader", "submitter", "operator", "admin")
TOKENS = {role: f"{role}-token-0123456789" for role in (*ROLES, "expired")}
ABSENT = "0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10"
CANARY = "canary-5f1d1e6a9b10"


class Parcel(BaseModel):
    to: str
    weight: float = Field(default=1.0, gt=0)
    size: Literal["small", "large"] = "small"


class WebDelivery(koan.Job[Parcel, str]):
    """Brings a parcel; to nowhere it fails."""

    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> str:
        progress.report(1, 2, "on its way")
        if context.to == "nowhere":
            raise LookupError("there is no such place")
        return context.to.upper()


class Login(BaseModel):
    user: str
    pin: SecretStr
    password: str
    nested: dict[str, str] = Field(default_factory=dict)

    @field_serializer("pin")
    def _open(self, pin: SecretStr) -> str:
        return pin.get_secret_value()


class WebLeaky(koan.Job[Login, dict]):
    """Tells everything it knows."""

    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> dict:
        progress.report(0.5, f"password={context.password}")
        if context.user == "bad":
            raise ValueError(f"cannot log in with {context.pin.get_secret_value()} or {context.password}")
        return {"token": context.password, "said": f"hello {context.pin.get_secret_value()}"}


class WebSteps(koan.Job[int, int]):
    """Reports until it is told to go on."""

    async def execute(self, context, progress, cancellation) -> int:
        for step in range(context):
            progress.report(step + 1, context, f"step {step + 1}")
            await asyncio.sleep(0.02)
        return context


class WebIdle(koan.Job[None, None]):
    """Waits to be cancelled."""

    async def execute(self, context, progress, cancellation) -> None:
        progress.report(0.1, "waiting")
        await cancellation.wait()
        cancellation.raise_if_requested()


class WebParent(koan.Job[int, int]):
    """Starts children."""

    async def execute(self, context, progress, cancellation) -> int:
        children = [await self.start_child(WebDelivery, Parcel(to=f"house {n}")).run() for n in range(context)]
        for child in children:
            await child.wait()
        return len(children)


def web_settings(tmp_path, **more):
    limits = {"requests_per_second": 1e6, "burst": 1_000_000, **more.pop("limits", {})}
    tokens = [{"name": role, "roles": [role], "token": TOKENS[role]} for role in ROLES]
    tokens.append(
        {
            "name": "expired",
            "roles": ["admin"],
            "token": TOKENS["expired"],
            "expires_at": datetime.now(UTC) - timedelta(hours=1),
        }
    )
    return {"tokens": tokens, "audit_file": str(tmp_path / "audit.jsonl"), "limits": limits, **more}


@pytest.fixture(scope="module")
def api(tmp_path_factory, request):
    """An engine in this process, its API, and a caller with the role admin."""
    directory = tmp_path_factory.mktemp("web")
    asked = web_settings(directory, **getattr(request.module, "WEB", {}))
    sources = request.getfixturevalue("sources") if getattr(request.module, "HAS_SOURCES", False) else {}
    with koan.init(runtime="local", engine={"max_actors": 2, "cancel_grace": 0.2}, web=asked, sources=sources) as engine:
        app = web.create_app(engine)
        with TestClient(app, base_url=HOST) as plain:
            yield Api(app, plain, engine, directory / "audit.jsonl")


class Api:
    """The app, and callers of it by role."""

    def __init__(self, app, client, engine, audit_file):
        self.app, self.client, self.engine, self.audit_file = app, client, engine, audit_file

    def call(self, method, path, role="admin", **options):
        headers = {**bearer(role), **options.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **options)

    def get(self, path, role="admin", **options):
        return self.call("GET", path, role, **options)

    def post(self, path, body=None, role="admin", **options):
        return self.call("POST", path, role, **({"json": body} if body is not None else {}), **options)

    def submit(self, kind, context=None, **more):
        answer = self.post("/api/jobs", {"kind": kind, "context": context, **more})
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def ended(self, job_id):
        """Wait for the end of a job and return its detail."""
        with contextlib.suppress(koan.KoanRayError):
            koan.Jobs.get(job_id).get(timeout=10).wait().get(timeout=10)
        return self.get(f"/api/jobs/{job_id}").json()

    def done(self, kind, context=None, **more):
        return self.ended(self.submit(kind, context, **more))

    def socket(self, path, **options):
        return self.client.websocket_connect(f"ws://localhost{path}", **options)

    @property
    def routes(self):
        return [route for route in self.app.router.routes if isinstance(route, GuardedRoute)]

    @property
    def sockets(self):
        return [route for route in self.app.router.routes if isinstance(route, GuardedSocket)]

    def audited(self):
        if not self.audit_file.exists():
            return []
        return [json.loads(line) for line in self.audit_file.read_text().splitlines()]

    @contextlib.asynccontextmanager
    async def open(self, path, role="viewer", headers=()):
        """A response that does not end, in the loop of the test: yields an `Opened`."""
        opened = Opened(self.app, path, [*bearer(role).items(), *dict(headers).items()])
        try:
            yield await opened.begin()
        finally:
            await opened.close()

    async def status_of(self, method, path, headers):
        """The status of a request, whether its response ends or not."""
        opened = Opened(self.app, path, list(headers.items()), method)
        try:
            return (await opened.begin()).status
        finally:
            await opened.close()


class Opened:
    """One request on the app itself, whose response is read as it comes."""

    def __init__(self, app, path, headers, method="GET"):
        path, _, query = path.partition("?")
        raw = [(name.lower().encode(), value.encode()) for name, value in [("host", "localhost"), *headers]]
        self._scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": raw, "client": ("127.0.0.1", 1), "server": ("localhost", 80), "state": {},
        }  # fmt: skip
        self._app, self._messages, self._gone = app, asyncio.Queue(), asyncio.Event()
        self._has_body = method not in ("GET", "HEAD")
        self._text, self.status, self.headers, self._task, self.is_over = "", None, {}, None, False

    async def begin(self):
        self._task = asyncio.create_task(self._app(self._scope, self._receive, self._messages.put))
        start = await self._next()
        self.status = start["status"]
        self.headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return self

    async def _next(self):
        async with asyncio.timeout(10):
            return await self._messages.get()

    async def _receive(self):
        if self._has_body:
            self._has_body = False
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def event(self):
        """The next event as ``(name, id, data)``; None at the end."""
        while "\n\n" not in self._text:
            if self.is_over:
                return None
            message = await self._next()
            self._text += message.get("body", b"").decode()
            self.is_over = not message.get("more_body", False)
        block, _, self._text = self._text.partition("\n\n")
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" not in fields:
            return await self.event()
        return (
            fields["event"],
            int(fields["id"].removesuffix("-end")) if "id" in fields else None,
            json.loads(fields["data"]),
        )

    async def events(self):
        found = []
        while (event := await self.event()) is not None:
            found.append(event)
        return found

    async def close(self):
        self._gone.set()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture
def asked(api, monkeypatch):
    """The names of the coordinator's methods that are called from now on; a driver introduces its classes by itself."""
    runtime, calls = api.engine._runtime, []
    real = runtime.coordinator

    def record(method, args, done):
        if method != "introduce":
            calls.append((method, *args[:1]) if method == "look" else (method,))
        real(method, args, done)

    monkeypatch.setattr(runtime, "coordinator", record)
    return calls


@pytest.fixture(scope="session")
def mongo_server(tmp_path_factory):
    server = ExternalServer() if EXTERNAL else MongoServer(tmp_path_factory.mktemp("mongo") / "db").start()
    yield server
    server.end()


def bearer(role):
    return {} if role is None else {"Authorization": f"Bearer {TOKENS.get(role, role)}"}


def subprotocols(role):
    return ["koan-ray", TOKEN_SUBPROTOCOL + TOKENS.get(role, role)]


def assert_problem(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["status"] == status
    assert len(document["detail"]) > 15
    assert document["request_id"] == answer.headers["x-request-id"]
    return document


def until(condition, within=10.0):
    end = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < end, f"still {value!r}"
        time.sleep(0.02)
    return value
