"""What the routes of one app share; and the few things that each of them asks for."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, Request

from koan_ray import client
from koan_ray.domain.measures import Measures
from koan_ray.errors import ConfigurationError
from koan_ray.telemetry.metrics import merged, offer
from koan_ray.web.audit import AuditTrail
from koan_ray.web.guard import Guard
from koan_ray.web.headlines import Headlines
from koan_ray.web.hub import Hub
from koan_ray.web.keys import session_key
from koan_ray.web.reading import Link, Reader
from koan_ray.web.security import Credentials, Hosts, Principal, new_token, token, tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from koan_ray.client import Engine
    from koan_ray.config import Settings
    from koan_ray.engine.session import Session
    from koan_ray.engine.window import Figures
    from koan_ray.web.guard import Plugin
    from koan_ray.web.security import Token

_STATUS_FRESH_S = 1.0
_SAMPLE = 500  # jobs that ended last, for an overview
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Service:
    """One API: its settings, its connection to an engine, and what guards it.

    Args:
        settings: Of the engine and of the API.
        engine: The engine to show; None for the one of this process, which is started if there is none.
        tokens: Who may do what, besides those of the settings.
        authenticate: Asked first for who a caller is.
    """

    def __init__(
        self, settings: Settings, engine: Engine | None = None, tokens: Sequence[Token] = (),
        authenticate: Plugin | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.web = settings, settings.web
        self._engine = engine
        self.counters: Counter[tuple[str, str]] = Counter()
        web = settings.web
        self.hosts = Hosts((*LOOPBACK, *_named(web.host), *web.allowed_hosts), web.public_url)
        known = [*tokens, *tokens_of(web.tokens)]
        if not known and authenticate is None:
            known = [_announced()]
        self.credentials = Credentials(known, web.session_lifetime.total_seconds(), session_key(web))
        self.audit = AuditTrail(web.audit_file or None, web.audit_bytes)
        self.guard = Guard(self.credentials, self.hosts, web.limits, self.audit, authenticate, self.counters)
        import_modules(settings.jobs.modules, "[jobs] modules")
        import_modules(web.modules, "[web] modules")
        self.link = Link(lambda: self.session, web.limits.answer_timeout.total_seconds())
        self.reader = Reader(settings, self.link)
        self.headlines = Headlines(self.reader)
        self.hub = Hub(self.link, web.limits.streams)
        self._stop_measuring: Callable[[], None] = lambda: None
        self._cached: dict[str, tuple[float, asyncio.Task[Any]]] = {}

    @property
    def session(self) -> Session:
        """This process's view of the engine."""
        if self._engine is None:
            self._engine = client.init()
        return self._engine.session

    async def status(self) -> dict[str, Any]:
        """Return what the coordinator says of itself, at most a second old."""
        found: dict[str, Any] = await self.cached("status", _STATUS_FRESH_S, lambda: self.link.coordinator("status"))
        return found

    async def figures(self) -> Figures:
        """Return what the coordinator knows for an overview, at most a second old."""
        found: Figures = await self.cached(
            "figures", _STATUS_FRESH_S, lambda: self.link.coordinator("look", "figures", _SAMPLE)
        )
        return found

    async def measures(self) -> Measures:
        """Return what coordinator and broker have counted, at most a second old; durations are left to others."""
        found: Measures = await self.cached("measures", _STATUS_FRESH_S, self._measures)
        return found

    async def _measures(self) -> Measures:
        durations = False
        asked = self.link.coordinator("measure", durations), self.link.broker("measure")
        return merged(list(await asyncio.gather(*asked)))

    def _own_measures(self) -> Measures:
        """Return what this process counts itself, for its OpenTelemetry SDK; called from threads of that."""
        denied = [(where, n) for (name, where), n in list(self.counters.items()) if name == "auth_denied"]
        return Measures({("auth_denied", (where,)): n for where, n in denied}, {}, {})

    async def cached(self, name: str, fresh_s: float, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Return what ``make`` returned within the last ``fresh_s``; many who ask at once wait for the same answer."""
        now = asyncio.get_running_loop().time()
        at, task = self._cached.get(name, (0.0, None))
        if task is None or now - at > fresh_s or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(make())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # told to those who wait
            self._cached[name] = (now, task)
        return await asyncio.shield(task)

    def is_https(self, request: Request) -> bool:
        """Tell whether browsers reach this API over TLS."""
        return request.url.scheme == "https" or self.hosts.is_behind_tls

    def cookie_path(self, request: Request) -> str:
        """Return the path under which browsers see this API: where a proxy shows it, or where an app has mounted it."""
        return urlsplit(self.web.public_url).path.rstrip("/") or request.scope.get("root_path") or "/"

    def start(self) -> None:
        """Join the engine now rather than at the first request, and be measured from now on."""
        _ = self.session
        self.hub.open()
        self._stop_measuring()
        self._stop_measuring = offer(self._own_measures)

    async def close(self) -> None:
        """End streams and let go of connections; the engine is left alone."""
        self._stop_measuring()
        await self.hub.close()
        await self.reader.close()


def _named(host: str) -> Iterable[str]:
    """Return a host as a name that callers may use; an address that means every address is none."""
    return () if host in ("0.0.0.0", "::", "") else (host,)  # noqa: S104 - compared, not bound


def _announced() -> Token:
    """Make a token for an app that was given none, and print it: otherwise nobody could use it."""
    secret = new_token()
    sys.stderr.write(
        f"koan_ray.web: no tokens are configured ([web] tokens); this one lasts until the process ends: {secret}\n"
    )
    return token("generated", secret)


def import_modules(names: Iterable[str], setting: str) -> None:
    """Import the modules that define job classes, named in a setting.

    Raises:
        ConfigurationError: One cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            msg = f"{setting}: {name!r} cannot be imported: {type(error).__name__}: {error}"
            raise ConfigurationError(msg) from error


def _service(request: Request) -> Service:
    found: Service = request.app.state.koan
    return found


def _principal(request: Request) -> Principal:
    found: Principal = request.state.principal
    return found


Api = Annotated[Service, Depends(_service)]
Caller = Annotated[Principal, Depends(_principal)]
