"""HEAD, wherever GET is answered: load balancers, monitors and browsers ask with it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Head:
    """Around the app: answers HEAD as it would answer GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            exchange = _Exchange(receive, send)
            await self._app({**scope, "method": "GET"}, exchange.receive, exchange.send)
        else:
            await self._app(scope, receive, send)


class _Exchange:
    """The answer to a GET without its body, for HEAD. A stream without end ends with its headers."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._began = asyncio.Event()

    async def receive(self) -> Message:
        """Return the next message of the caller, who is said to have left once the headers are out."""
        if self._began.is_set():
            return {"type": "http.disconnect"}
        reading = asyncio.ensure_future(self._receive())
        began = asyncio.ensure_future(self._began.wait())
        try:
            await asyncio.wait((reading, began), return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else {"type": "http.disconnect"}
        finally:
            reading.cancel()
            began.cancel()

    async def send(self, message: Message) -> None:
        """Pass on the headers, and an empty body in place of the body."""
        if message["type"] == "http.response.start":
            await self._send(message)
            await self._send({"type": "http.response.body", "body": b""})
            self._began.set()
