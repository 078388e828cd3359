"""Hangs up on connections that do not say what they want.

uvicorn waits for ever for the head of the first request, so that a thousand silent connections would hold a thousand file
descriptors. Bodies have a limit of their own (`koan_ray.web.guard`).
"""

from __future__ import annotations

from typing import Any, Final

_HEAD_WITHIN_S: Final = 10.0


def prompt_protocol(within_s: float = _HEAD_WITHIN_S) -> Any:
    """Return uvicorn's HTTP protocol with an end to its patience: the first request's head has to be there in time."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class PromptProtocol(H11Protocol):
        """One connection."""

        _hanging_up: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._hanging_up = self.loop.call_later(within_s, self._hang_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self._hanging_up.cancel()
            super().connection_lost(exc)

        def _hang_up(self) -> None:
            # After an upgrade to WebSocket another protocol has the connection.
            cycle: Any = self.cycle  # None until a head was read, whatever its annotation says
            if cycle is None and self.transport.get_protocol() is self and not self.transport.is_closing():
                self.transport.close()

    return PromptProtocol
