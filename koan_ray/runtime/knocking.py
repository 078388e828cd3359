"""Asking whether anybody listens, before a library is let loose that would try for minutes."""

from __future__ import annotations

import socket

_TIMEOUT_S = 3.0


def knock(address: str) -> None:
    """Return if somebody listens at ``host:port``, or if the address is of another form, such as ``auto``.

    Raises:
        OSError: Nobody does, or does not answer within three seconds.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_TIMEOUT_S).close()
