"""Whether the server around the app has been asked to end.

A server waits for its open responses before it ends the app, and an open stream has no end of its own: without a look at
the server, Ctrl-C would take as long as the server's patience, which is for ever as uvicorn comes. ASGI has no message
for it. uvicorn, on its own or under gunicorn, handles signals by a method of the server, which is where it can be found; our
own server (`koan_ray.web.serving`) says so itself.
"""

from __future__ import annotations

import signal


def is_server_ending() -> bool:
    """Tell whether the server that handles this process's signals, if there is one, has been asked to end."""
    handlers = (signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
    return any(getattr(getattr(handler, "__self__", None), "should_exit", False) is True for handler in handlers)
