"""The dashboard as users get it: an engine in this process, its API on a port of its own, and a real browser."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import koan_ray as koan
from koan_ray.config import Settings, load_settings
from koan_ray.web.serving import Door, server

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)
ROLES = ("viewer", "admin")
TOKENS = {role: f"{role}-token-0123456789" for role in ROLES}


@contextlib.contextmanager
def site(directory: Path, **overrides: Any):
    """A local engine and its dashboard; yields the engine and the address."""
    web = {
        "port": 0,
        "tokens": [{"name": role, "roles": [role], "token": TOKENS[role]} for role in ROLES],
        "audit_file": str(directory / "audit.jsonl"),
        "limits": {"requests_per_second": 1e6, "burst": 1_000_000},
    }
    asked = {"engine": {"max_actors": 8, "cancel_grace": 0.2}, "web": web, **overrides}
    settings: Settings = load_settings(None, asked)
    with koan.init(runtime="local", settings=settings) as engine:
        serving = server(engine, settings, Door(settings))
        thread = threading.Thread(target=serving.run, name="site")
        thread.start()
        try:
            end = time.monotonic() + 20
            while not serving.started:
                assert thread.is_alive()
                assert time.monotonic() < end
                time.sleep(0.01)
            port = serving.servers[0].sockets[0].getsockname()[1]
            yield engine, f"http://127.0.0.1:{port}"
        finally:
            serving.should_exit = True
            thread.join(10)


@contextlib.contextmanager
def browser():
    """Headless Chromium of the system."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield found
        finally:
            found.close()
