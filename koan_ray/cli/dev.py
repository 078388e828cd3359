"""``koan-ray dev``: everything that jobs need on one machine, in one terminal, until Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

import koan_ray as koan
from koan_ray.cli.documents import AUTH_VARIABLE, ENV_FILE, URL_VARIABLE, documents, why_not_open, write_env
from koan_ray.cli.reach import begin_logging
from koan_ray.cli.signals import Stop
from koan_ray.config import load_settings
from koan_ray.errors import ConfigurationError, KoanRayError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from koan_ray.cli.documents import Documents
    from koan_ray.config import Settings, WebSettings

_LOOKS_EVERY_S = 0.5
_ENDS_WITHIN_S = 10.0  # of the page's server
_CREDENTIALS = re.compile(r"//[^/@\s]*@")


def run(address: str | None, *, modules: Sequence[str] = (), port: int | None = None) -> int:
    """Run until a signal and return the exit code."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    logging.getLogger("ray").setLevel(logging.WARNING)
    settings = load_settings()
    begin_logging(settings, "koan-ray dev")
    stopping = Stop()
    began = time.monotonic()
    with stopping.on_signals(), documents(settings) as where:
        console.print("Starting Ray and the engine (a few seconds) …")
        with _engine(address, settings, where, stopping) as (engine, problem):
            if problem is not None:
                console.print(f"koan-ray: {problem}", style="red")
                return 1
            with _page(engine, settings, modules, port, stopping) as page:
                if not stopping.is_asked:
                    _explain(console, where, settings, page, time.monotonic() - began)
                _watch(console, where, stopping)
                console.print("\nStopping (a few seconds) …")
    console.print("Ended. What was kept is still there.")
    return 0


@contextlib.contextmanager
def _engine(
    address: str | None, settings: Settings, where: Documents, stopping: Stop
) -> Iterator[tuple[koan.Engine, str | None]]:
    """Start or join an engine; hand it out with what is wrong with it. One that was started here ends with us."""
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
        yield engine, problem and f"{problem}: {_shown(where.url)}"


def _end(engine: koan.Engine, namespace: str | None) -> None:
    """Disconnect, and end the engine in the namespace that was started here."""
    from koan_ray.runtime.ray import admin

    if namespace is not None:
        with contextlib.suppress(KoanRayError):  # it is gone already
            admin.end(admin.ray_address(), namespace)
    engine.shutdown()


@contextlib.contextmanager
def _page(
    engine: koan.Engine, settings: Settings, modules: Sequence[str], port: int | None, stopping: Stop
) -> Iterator[str]:
    """Serve API and dashboard on a thread; hand out where, or why not."""
    try:
        from koan_ray.web import serving
    except ImportError:
        yield "not installed: pip install 'koan-ray[web]'"
        return
    offered = (*settings.web.modules, *modules) or ("koan_ray.cli.samples",)
    sys.path.insert(0, str(Path.cwd()))  # as for `python -m`
    web = settings.web.model_copy(update={"modules": offered, "port": _free_port(settings.web, port)})
    shown = engine.settings.model_copy(update={"web": web})
    door = serving.Door(shown)
    server = serving.server(engine, shown, door)
    thread = threading.Thread(target=server.run, name="koan-page", daemon=True)
    thread.start()
    try:
        while not (server.started or stopping.wait(_LOOKS_EVERY_S / 10)):
            if not thread.is_alive():
                msg = f"web.port: nothing can listen at {web.host}:{web.port}; choose another with --port"
                raise ConfigurationError(msg)
        yield serving.url(shown) + (f"/#token={door.generated}" if door.generated is not None else "")
    finally:
        server.should_exit = True
        thread.join(_ENDS_WITHIN_S)


def _free_port(web: WebSettings, asked: int | None) -> int:
    """Return the port that was asked for, else the usual one, or any where something else has that."""
    port = web.port if asked is None else asked
    with socket.socket(socket.AF_INET6 if ":" in web.host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((web.host, port))
        except OSError:
            if asked:
                return port  # whoever asks for it is told by the server
            trial.bind((web.host, 0))
        return int(trial.getsockname()[1])


def _variables(where: Documents, address: str) -> dict[str, str]:
    # A URL of the user's own stays where it is: it may hold a password.
    urls = {URL_VARIABLE: where.url} if where.server is not None else {}
    # Ray's default is a token here and none for whoever gives an address: unless told, our own scripts would be refused.
    modes = {AUTH_VARIABLE: mode} if (mode := os.environ.get(AUTH_VARIABLE)) else {}
    return {"RAY_ADDRESS": address, **modes, **urls}


def _explain(console: Console, where: Documents, settings: Settings, page: str, took_s: float) -> None:
    from koan_ray.runtime.ray import admin

    what = "document server in ./.koan/store" if where.server is not None else "as the settings say"
    namespace = settings.engine.namespace
    address = admin.ray_address()
    console.print(f"Up after {took_s:.0f} s. Open\n", style="green")
    console.print(f"  {page}\n", style="bold")
    console.print(f"  documents       {_shown(where.url).partition('?')[0]}  ({what})")
    console.print(f"  Ray             {address}")
    console.print(f"  Ray dashboard   {_ray_dashboard(admin.dashboard_url())}")
    console.print(f"  engine          namespace {namespace!r}\n")
    console.print("In another terminal, in this directory:\n")
    console.print(f"  . {ENV_FILE}              # so that the others find this engine")
    console.print("  python your_script.py     # koan.init() joins it; .persist() keeps jobs here")
    console.print(f"  koan-ray status{'' if namespace == 'koan' else f' --namespace {namespace}'}")
    console.print("  koan-ray doctor\n")
    console.print("Ctrl-C ends all of it; the documents stay.")


def _ray_dashboard(url: str | None) -> str:
    """Say where Ray's own dashboard is, how one gets in, and whether jobs are shown there."""
    from koan_ray.runtime.ray.dashboard import installation

    if url is None:
        return "not started"
    notes = []
    if os.environ.get(AUTH_VARIABLE, "").lower() == "token":
        notes.append("its token: ray get-auth-token")  # at its first page only; the others answer 401 before
    if installation.state(installation.modules_of_ray()).is_current:
        notes.append("then /koan has jobs as well" if notes else "/koan has jobs as well")
    return url + (f"  ({'; '.join(notes)})" if notes else "")


def _watch(console: Console, where: Documents, stopping: Stop) -> None:
    """Wait for a signal, and tell when the document server was started again."""
    pid = where.server.pid if where.server is not None else None
    while not stopping.wait(_LOOKS_EVERY_S):
        if where.server is not None and where.server.pid != pid:
            pid = where.server.pid
            console.print("The document server was gone and has been started again.", style="yellow")


def _shown(url: str) -> str:
    return _CREDENTIALS.sub("//***@", url)
