"""``koan-ray dev``: everything that jobs need on one machine, in one terminal, until Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console

import koan_ray as koan
from koan_ray.cli.documents import ENV_FILE, URL_VARIABLE, documents, why_not_open, write_env
from koan_ray.config import load_settings
from koan_ray.errors import KoanRayError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from koan_ray.cli.documents import Documents
    from koan_ray.config import Settings

_LOOKS_EVERY_S = 0.5
_CREDENTIALS = re.compile(r"//[^/@\s]*@")


def run(address: str | None) -> int:
    """Run until a signal and return the exit code."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    logging.getLogger("ray").setLevel(logging.WARNING)
    settings = load_settings()
    stopping = _Stop()
    began = time.monotonic()
    with stopping.on_signals(), documents(settings) as where:
        console.print("Starting Ray and the engine (a few seconds) …")
        with _engine(address, settings, where, stopping) as problem:
            if problem is not None:
                console.print(f"koan-ray: {problem}", style="red")
                return 1
            if not stopping.asked.is_set():
                _explain(console, where, settings, time.monotonic() - began)
            _watch(console, where, stopping)
            console.print("\nStopping (a few seconds) …")
    console.print("Ended. What was kept is still there.")
    return 0


class _Stop:
    """The first signal asks us to stop; more of them change nothing."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.take_signals()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take_signals(self) -> None:
        """Install our handlers; again after Ray, which installs its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self.asked.set()


@contextlib.contextmanager
def _engine(address: str | None, settings: Settings, where: Documents, stopping: _Stop) -> Iterator[str | None]:
    """Start or join an engine; hand out what is wrong with it. One that was started here ends with us."""
    from koan_ray.runtime.ray import admin

    with contextlib.ExitStack() as stack:
        was_there = stack.enter_context(admin.joined(address, settings))
        stopping.take_signals()
        engine = koan.init(**where.overrides)
        stack.callback(_end, engine, None if was_there else settings.engine.namespace)
        problem = why_not_open(engine)
        if problem is None:
            write_env(_variables(where, admin.ray_address()))
            stack.callback(ENV_FILE.unlink, missing_ok=True)
        yield problem and f"{problem}: {_shown(where.url)}"


def _end(engine: koan.Engine, namespace: str | None) -> None:
    """Disconnect, and end the engine in the namespace that was started here."""
    from koan_ray.runtime.ray import admin

    if namespace is not None:
        with contextlib.suppress(KoanRayError):  # it is gone already
            admin.end(admin.ray_address(), namespace)
    engine.shutdown()


def _variables(where: Documents, address: str) -> dict[str, str]:
    # A URL of the user's own stays where it is: it may hold a password.
    urls = {URL_VARIABLE: where.url} if where.server is not None else {}
    return {"RAY_ADDRESS": address, **urls}


def _explain(console: Console, where: Documents, settings: Settings, took_s: float) -> None:
    from koan_ray.runtime.ray import admin

    what = "document server in ./.koan/store" if where.server is not None else "as the settings say"
    dashboard = admin.dashboard_url() or "not started"
    namespace = settings.engine.namespace
    address = admin.ray_address()
    console.print(f"Up after {took_s:.0f} s.\n", style="green")
    console.print(f"  documents       {_shown(where.url)}  ({what})")
    console.print(f"  Ray             {address}")
    console.print(f"  Ray dashboard   {dashboard}")
    console.print(f"  engine          namespace {namespace!r}\n")
    console.print("In another terminal, in this directory:\n")
    console.print(f"  . {ENV_FILE}                # sets {', '.join(_variables(where, address))}")
    console.print("  python your_script.py       # koan.init() joins this engine; .persist() keeps jobs in these documents")
    console.print(f"  koan-ray status{'' if namespace == 'koan' else f' --namespace {namespace}'}")
    console.print("  koan-ray doctor\n")
    console.print("Ctrl-C ends all of it; the documents stay.")


def _watch(console: Console, where: Documents, stopping: _Stop) -> None:
    """Wait for a signal, and tell when the document server was started again."""
    pid = where.server.pid if where.server is not None else None
    while not stopping.asked.wait(_LOOKS_EVERY_S):
        if where.server is not None and where.server.pid != pid:
            pid = where.server.pid
            console.print("The document server was gone and has been started again.", style="yellow")


def _shown(url: str) -> str:
    return _CREDENTIALS.sub("//***@", url)
