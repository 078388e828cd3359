"""Serves the API with uvicorn, after seeing that it may listen where it is asked to."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koan_ray.errors import ConfigurationError
from koan_ray.telemetry import logs
from koan_ray.web.app import create_app
from koan_ray.web.security import new_token, token

if TYPE_CHECKING:
    from koan_ray.client import Engine
    from koan_ray.config import Settings
    from koan_ray.web.security import Token

_GRACE_S = 3  # for open streams, when the server ends
_MAX_HEAD = 32 * 1024  # bytes of a request's head
_MAX_MESSAGE = 64 * 1024  # of a WebSocket's message


class Door:
    """Where the API listens and who may come in, decided before anything is started.

    Args:
        settings: ``[web]`` of them.
        token_file: A file that holds one token for everything.
        makes_token: Make a token although the address is not loopback.

    Raises:
        ConfigurationError: The address is open to others and there is no token, or no name that it may be called by.
    """

    def __init__(self, settings: Settings, token_file: str | None = None, *, makes_token: bool = False) -> None:
        web = settings.web
        self.tokens: list[Token] = []
        self.generated: str | None = None
        is_local = is_loopback(web.host)
        if token_file is not None:
            self.tokens.append(token("file", read_token(token_file)))
        if not self.tokens and not web.tokens:
            if not is_local and not makes_token:
                msg = (
                    f"web.host: {web.host!r} can be reached from other machines, and no token is configured; add "
                    f"[[web.tokens]] to koan.toml, or use --token-file or --generate-token, or listen on 127.0.0.1"
                )
                raise ConfigurationError(msg)
            self.generated = new_token()
            self.tokens.append(token("generated", self.generated))
        if web.host in ("0.0.0.0", "::") and not web.allowed_hosts and not web.public_url:  # noqa: S104 - compared, not bound
            msg = (
                f"web.host: {web.host!r} means every address, and by which name callers may come is not said; set [web] "
                f'allowed_hosts or public_url, for example allowed_hosts = ["jobs.example.com"]'
            )
            raise ConfigurationError(msg)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(path: str) -> str:
    """Return the token in a file.

    Raises:
        ConfigurationError: It cannot be read, others may read it, or it holds no good token.
    """
    try:
        with Path(path).open(encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(1000).strip()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"--token-file: {path!r} cannot be read: {error}"
        raise ConfigurationError(msg) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        msg = f"--token-file: {path!r} can be read by others (mode {stat.S_IMODE(mode):o}); use chmod 600"
        raise ConfigurationError(msg)
    if not 20 <= len(secret) <= 200 or not secret.isprintable() or " " in secret:
        msg = f"--token-file: {path!r} holds no token of 20 to 200 characters; make one with `openssl rand -hex 32`"
        raise ConfigurationError(msg)
    return secret


def server(engine: Engine, settings: Settings, door: Door) -> Any:
    """Return a uvicorn server of the API; nothing listens yet. It ends when its ``should_exit`` is set.

    Raises:
        ConfigurationError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError:
        msg = "serving the API needs uvicorn: pip install 'koan-ray[web]'"
        raise ConfigurationError(msg) from None
    from koan_ray.web.patience import prompt_protocol

    class PromptServer(uvicorn.Server):
        """Ends its streams first; whoever runs it takes the signals, because a second one would cut off what ends."""

        def capture_signals(self) -> Any:
            return contextlib.nullcontext()

        async def shutdown(self, sockets: Any = None) -> None:
            app.state.koan.hub.end()
            await super().shutdown(sockets)

    logs.adopt("uvicorn")
    app = create_app(engine, settings=settings, tokens=door.tokens)
    config = uvicorn.Config(
        app,
        host=settings.web.host,
        port=settings.web.port,
        http=prompt_protocol(),
        log_config=None,  # uvicorn's records go where ours go
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # a caller's word for where it comes from is not taken
        server_header=False,
        date_header=True,
        timeout_graceful_shutdown=_GRACE_S,
        h11_max_incomplete_event_size=_MAX_HEAD,
        ws_max_size=_MAX_MESSAGE,
    )
    return PromptServer(config)


def url(settings: Settings, port: int | None = None) -> str:
    """Return the address for browsers."""
    web = settings.web
    if web.public_url:
        return web.public_url
    host = "127.0.0.1" if web.host in ("0.0.0.0", "::") else web.host  # noqa: S104 - compared, not bound
    return f"http://{f'[{host}]' if ':' in host else host}:{port or web.port}"
