"""The HTTP API, and what serves the dashboard. ``create_app()`` returns it as a FastAPI app.

What is asked where
    Reads go to the sources of documents, which this process opens for itself, read-only; only jobs that live in the
    coordinator's memory are asked of the coordinator, in bounded pages. Live progress comes from the broker. Writes go to
    the coordinator, the one writer of jobs. So a busy API slows no job down, and a busy coordinator no list of documents.

Live lists
    While somebody follows ``/api/events``, this process listens to one feed of the coordinator and one of the broker
    (`koan_ray.engine.feed`) and gives what comes to all its readers, each with a bounded buffer.

Who may do what
    Every route declares a role (`koan_ray.web.routing`); one without cannot be made. The guard (`koan_ray.web.guard`)
    stands before each route and looks at a request's head before it reads its body. Tokens are compared by hash in constant
    time; a dashboard holds a signed cookie that scripts cannot read, and needs a second token for whatever changes
    something. Callers are never trusted for their address: behind a proxy everybody comes from the same.

Open to everybody are ``/healthz`` and ``/readyz``, which tell nothing, the dashboard's files, which hold nothing, and
``POST /api/session``, which is how one stops being nobody.

What is recorded
    Every request that would change something (`koan_ray.web.audit`).
"""

from __future__ import annotations

try:
    import fastapi as _fastapi  # noqa: F401 - is it there?
except ImportError as error:  # pragma: no cover - the extra is installed where this is tested
    msg = "koan_ray.web needs FastAPI: pip install 'koan-ray[web]'"
    raise ImportError(msg) from error

from koan_ray.web.app import create_app
from koan_ray.web.security import Principal, Role, token

__all__ = ["Principal", "Role", "create_app", "token"]
