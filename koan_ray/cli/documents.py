"""Where the commands keep documents: what the settings say of the source ``default``, or the document server in ./.koan."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray.runtime.knocking import knock
from koan_ray.stores.embedded import DEFAULT_DIRECTORY, DocumentServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from koan_ray.client import Engine
    from koan_ray.config import Settings

ENV_FILE = DEFAULT_DIRECTORY.parent / "env"
URL_VARIABLE = "KOAN_RAY_SOURCES__DEFAULT__URL"
AUTH_VARIABLE = "RAY_AUTH_MODE"
_OPENS_WITHIN_S = 30.0


class Documents(NamedTuple):
    """Where the source ``default`` is; ``server`` if it is the one of this directory."""

    url: str
    server: DocumentServer | None

    @property
    def overrides(self) -> dict[str, Any]:
        """What `koan_ray.init` is to be told."""
        return {"sources": {"default": {"url": self.url}}} if self.server is not None else {}


@contextlib.contextmanager
def documents(settings: Settings) -> Iterator[Documents]:
    """Hand out the place of documents; a server that was started for it is ended afterwards.

    Raises:
        ConfigurationError: The settings name none, and the server is not installed.
        StoreUnavailableError: The server does not start; the message names its log.
    """
    server = DocumentServer()
    configured = settings.sources.get("default")
    # What `.koan/env` says is the server of this directory, which may have to be started again.
    if configured is not None and not configured.url.startswith("memory://") and not server.is_at(configured.url):
        yield Documents(configured.url, None)
        return
    asyncio.run(server.start())
    try:
        yield Documents(server.url, server)
    finally:
        with no_interrupts():
            asyncio.run(server.stop())


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """Let Ctrl-C do nothing while something is being ended, which takes a few seconds at most."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def why_not_open(engine: Engine) -> str | None:
    """Wait until the engine takes durable jobs; return why it does not if that lasts."""
    until = time.monotonic() + _OPENS_WITHIN_S
    while True:
        source = engine.status().get(timeout=_OPENS_WITHIN_S)["sources"].get("default")
        if source is None:
            return "the engine of this cluster keeps no documents"
        if source["state"] == "active":
            return None
        if source["state"] == "standby":
            return "another engine works on these documents"
        if time.monotonic() > until:
            return str(source["problem"] or f"the source is {source['state']}")
        time.sleep(0.1)


def write_env(variables: dict[str, str]) -> None:
    """Write what another terminal needs to find this engine, for ``. .koan/env``."""
    ENV_FILE.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
    with os.fdopen(os.open(ENV_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.writelines(lines)


def address_of_dev() -> str | None:
    """Return the Ray address of a ``koan-ray dev`` that runs in this directory, and let Ray use its token there.

    Call it before Ray is imported, which reads its mode of authentication once.
    """
    try:
        lines = Path(ENV_FILE).read_text(encoding="utf-8").splitlines()
        found = {
            name: shlex.split(value)[0] for name, value in (line.removeprefix("export ").split("=", 1) for line in lines)
        }
        address = found["RAY_ADDRESS"]
        knock(address)
    except (OSError, ValueError, KeyError, IndexError):
        return None
    if AUTH_VARIABLE in found:
        os.environ.setdefault(AUTH_VARIABLE, found[AUTH_VARIABLE])
    return address
