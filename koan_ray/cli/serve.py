"""``koan-ray serve``: the HTTP API and the dashboard, until Ctrl-C."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console

import koan_ray as koan
from koan_ray.cli.reach import begin_logging, look_here
from koan_ray.cli.signals import Stop
from koan_ray.config import load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

_LISTENS_WITHIN_S = 30.0


def run(
    address: str | None,
    *,
    local: bool,
    host: str | None,
    port: int | None,
    modules: Sequence[str],
    token_file: str | None,
    makes_token: bool,
) -> int:
    """Serve until a signal and return the exit code."""
    from koan_ray.web.serving import Door, server

    look_here()
    console = Console(highlight=False, soft_wrap=True, markup=False)
    asked: dict[str, Any] = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    if modules:
        asked["modules"] = tuple(modules)
    settings = load_settings(None, {"web": asked} if asked else None)
    begin_logging(settings, "koan-ray serve")
    door = Door(settings, token_file, makes_token=makes_token)  # before the engine: a refusal should not take seconds
    # An engine on a cluster is joined as it is: whoever started it has said how it runs.
    with koan.init(runtime="local", settings=settings) if local else koan.init(address) as engine:
        serving = server(engine, settings, door)

        def end() -> None:
            serving.should_exit = True

        threading.Thread(target=_tell, args=(serving, settings, door, console), name="koan-tell", daemon=True).start()
        with Stop(end).on_signals():
            serving.run()
        return 0 if serving.started else 1


def _tell(serving: Any, settings: Any, door: Any, console: Console) -> None:
    """Say where it listens once it does."""
    from koan_ray.web.serving import url

    until = time.monotonic() + _LISTENS_WITHIN_S
    while not serving.started:
        if time.monotonic() > until or serving.should_exit:
            return
        time.sleep(0.05)
    port = next((bound.getsockname()[1] for listening in serving.servers for bound in listening.sockets), None)
    address = url(settings, port)
    console.print(f"koan_ray answers at {address}; Ctrl-C ends it.")
    if door.generated is not None:
        console.print(
            "\nNo token is configured. This one, for everything, lasts until the end of this process and is not shown again:"
        )
        console.print(f"\n  {door.generated}\n\nor open {address}/#token={door.generated}")
