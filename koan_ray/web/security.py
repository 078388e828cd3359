"""Who is asking, and what that may do. Values and checks; nothing here knows a route or a request.

Roles are sets of permissions, not ranks. Each includes viewer; none but admin includes another:

=========== ========================================================================================================
viewer      metadata: what runs, how far it is, when it ended
reader      payloads: contexts, results, error messages, stack traces
submitter   start jobs
operator    cancel jobs, run them anew
admin       all of these; archive, restore, delete
=========== ========================================================================================================

A token is known by its SHA-256, compared in constant time and with all others whatever the outcome. A dashboard exchanges
its token for a cookie: name of the token, end, and a random part, signed; it holds no more rights than the token has at
that moment, and dies with it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from koan_ray.config import TokenSettings

COOKIE: Final = "koan_ray_session"
CSRF_HEADER: Final = "x-koan-csrf"
SUBPROTOCOL: Final = "koan-ray"
TOKEN_SUBPROTOCOL: Final = "koan-ray.token."  # noqa: S105 - followed by the token
_MAX_TOKEN: Final = 500
_MAX_BUCKETS: Final = 10_000


class Role(StrEnum):
    """What a route asks for. ``PUBLIC`` asks for nothing and is meant for probes and for logging in."""

    PUBLIC = "public"
    VIEWER = "viewer"
    READER = "reader"
    SUBMITTER = "submitter"
    OPERATOR = "operator"
    ADMIN = "admin"


def permissions(roles: Iterable[str]) -> frozenset[Role]:
    """Return these roles with all that they include."""
    given = {Role(role) for role in roles}
    if Role.ADMIN in given:
        return frozenset(Role)
    return frozenset(given | {Role.VIEWER, Role.PUBLIC}) if given else frozenset()


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who has said who they are. ``roles`` come from `permissions`. An authentication plug-in returns these."""

    name: str
    roles: frozenset[Role]
    expires_at: float | None = None  # epoch seconds
    csrf: str | None = None  # set for those who came with a cookie

    @classmethod
    def of(cls, name: str, roles: Iterable[str], expires_at: float | None = None) -> Principal:
        """Return a principal with these roles and what they include."""
        return cls(name, permissions(roles), expires_at)

    def may(self, role: Role) -> bool:
        """Tell whether the roles cover what a route asks for."""
        return role in self.roles

    def is_expired(self, now: float) -> bool:
        """The credential has passed its end."""
        return self.expires_at is not None and now >= self.expires_at


@dataclass(frozen=True, slots=True)
class Token:
    """One bearer token, by its SHA-256."""

    principal: Principal
    digest: bytes


def new_token() -> str:
    """Return a new token: 256 random bits."""
    return secrets.token_urlsafe(32)


def token(name: str, secret: str, roles: Iterable[str] = ("admin",)) -> Token:
    """Return a token with these roles."""
    return Token(Principal.of(name, roles), hashlib.sha256(secret.encode()).digest())


def tokens_of(settings: Iterable[TokenSettings]) -> list[Token]:
    """Return the tokens that the settings name."""
    return [
        Token(
            Principal.of(item.name, item.roles, item.expires_at.timestamp() if item.expires_at is not None else None),
            item.digest,
        )
        for item in settings
    ]


class Credentials:
    """All tokens of one process, and the cookies made from them.

    Args:
        tokens: Those that are valid.
        session_s: How long a cookie lasts.
        key: Signs cookies; processes that share it take each other's.
        now: Epoch seconds.
    """

    def __init__(self, tokens: Sequence[Token], session_s: float, key: bytes, now: Callable[[], float] = time.time) -> None:
        self._tokens, self._session_s, self._now = tuple(tokens), session_s, now
        self._key = hashlib.sha256(b"koan_ray cookie\0" + key).digest()
        self._by_name = {item.principal.name: item for item in tokens}

    def by_token(self, secret: str) -> Principal | None:
        """Return whose token this is; None if it is nobody's, or has expired."""
        if not 0 < len(secret) <= _MAX_TOKEN:
            return None
        digest = hashlib.sha256(secret.encode("utf-8", "replace")).digest()
        found: Principal | None = None
        for item in self._tokens:  # all of them, so that the time tells nothing
            if hmac.compare_digest(item.digest, digest):
                found = item.principal
        return None if found is None or found.is_expired(self._now()) else found

    def cookie(self, principal: Principal) -> tuple[str, Principal]:
        """Return a new cookie's value for the holder of a token, and the principal that it stands for."""
        ends = int(self._now() + self._session_s)
        if principal.expires_at is not None:
            ends = min(ends, int(principal.expires_at))
        text = f"{principal.name}|{ends}|{secrets.token_urlsafe(18)}"
        value = f"{_b64(text.encode())}.{self._sign(text, principal.name)}"
        return value, self._with_cookie(principal, text, ends)

    def by_cookie(self, value: str) -> Principal | None:
        """Return for whom this cookie stands; None if it is not ours, has expired, or its token is gone."""
        encoded, _, signature = value.partition(".")
        try:
            text = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
            name, ends, _ = text.split("|")
            until = int(ends)
        except (ValueError, UnicodeDecodeError):
            return None
        if not hmac.compare_digest(signature.encode("utf-8", "replace"), self._sign(text, name).encode()):
            return None
        known = self._by_name.get(name)
        if known is None or until <= self._now() or known.principal.is_expired(self._now()):
            return None
        return self._with_cookie(known.principal, text, until)

    def _with_cookie(self, principal: Principal, text: str, until: int) -> Principal:
        return replace(principal, expires_at=float(until), csrf=self._mac(f"csrf|{text}"))

    def _sign(self, text: str, name: str) -> str:
        known = self._by_name.get(name)
        return self._mac(f"cookie|{text}|{known.digest.hex() if known is not None else ''}")

    def _mac(self, text: str) -> str:
        return _b64(hmac.new(self._key, text.encode(), hashlib.sha256).digest())


def is_equal(given: str, expected: str | None) -> bool:
    """Compare two texts in constant time; nothing equals None."""
    return expected is not None and hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


class Rates:
    """A token bucket for each name: ``rate`` a second in the long run, ``burst`` at once.

    Bounded: above ten thousand names the one that asked longest ago is forgotten.
    """

    def __init__(self, rate: float, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._now = rate, float(burst), now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, name: str) -> float:
        """Take one from the bucket; return 0, or after how long there will be one."""
        now = self._now()
        left, at = self._buckets.get(name, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate)
        took = left >= 1.0
        self._buckets[name] = (left - 1.0 if took else left, now)
        self._buckets.move_to_end(name)
        if len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return 0.0 if took else (1.0 - left) / self._rate


class Hosts:
    """Which names this API answers to, and which pages may call it: its own. Against rebinding and forgery.

    Args:
        hosts: Names and addresses, without ports.
        public_url: How browsers reach it, if a proxy stands between.
    """

    def __init__(self, hosts: Iterable[str], public_url: str = "") -> None:
        self._public = origin_of(public_url) if public_url else None
        public_host = (urlsplit(public_url).hostname or "") if public_url else ""
        self._hosts = {host.lower().strip("[]") for host in (*hosts, public_host) if host}

    @property
    def is_behind_tls(self) -> bool:
        """Browsers reach us by HTTPS, whatever a proxy speaks to us."""
        return self._public is not None and self._public[0] == "https"

    def has(self, header: str) -> bool:
        """Tell whether a ``Host`` header names us."""
        return host_name(header) in self._hosts

    def is_own(self, origin: str, scheme: str, host: str) -> bool:
        """Tell whether an ``Origin`` header is that of our own pages."""
        given = origin_of(origin)
        return given is not None and given in (origin_of(f"{scheme}://{host}"), self._public)


def host_name(header: str) -> str | None:
    """Return the name in a ``Host`` header, without the port; None if it is malformed."""
    try:
        parts = urlsplit(f"//{header}")
        _ = parts.port
    except ValueError:
        return None
    if not header or parts.path or parts.query or parts.fragment or parts.username is not None:
        return None
    return (parts.hostname or "").lower() or None


def origin_of(url: str) -> tuple[str, str, int] | None:
    """Return scheme, host and port of a URL; None if it has none, as in ``null``."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80)


def cookies_of(headers: Mapping[str, str]) -> list[str]:
    """Return all values of our cookie; a page on another port of this host may have set one, too."""
    found = []
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            found.append(value)
    return found[:4]


def _b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
