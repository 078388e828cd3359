"""How a command reaches jobs: the engine of a cluster, or their documents where none runs."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from koan_ray import ambient
from koan_ray.cli.options import Where
from koan_ray.errors import ConfigurationError, RuntimeUnavailableError
from koan_ray.stores.embedded import DEFAULT_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from koan_ray.config import Settings
    from koan_ray.engine.settings import EngineSettings

TIMEOUT_S = 30.0


@contextlib.contextmanager
def reach(where: Where, *, only_reads: bool = False) -> Iterator[str | None]:
    """Make an engine the one that the jobs of this process use; hand out what the user should know of it, if anything.

    A process that has an engine keeps it. ``only_reads``: where no cluster is found, the documents that the settings name
    will do.

    Raises:
        RuntimeUnavailableError: There is no engine, and nothing to be read instead.
    """
    from koan_ray.config import load_settings

    if ambient.current_engine() is not None:
        yield None
        return
    settings = load_settings()
    begin_logging(settings)
    with contextlib.ExitStack() as stack:
        if where.documents:
            _open_documents(stack, settings)
            yield None
            return
        try:
            _join(stack, where, settings)
        except RuntimeUnavailableError as error:
            if not only_reads or where.address is not None or not _keeps_documents(settings):
                raise
            _open_documents(stack, settings)
            yield f"no engine was found ({_brief(error)}); this is read from the documents"
            return
        yield None


def begin_logging(settings: Settings | None = None, who: str = "koan-ray") -> None:
    """Have this command write koan_ray's log to standard error, as the settings say; once, whatever is called in it."""
    from koan_ray.config import load_settings
    from koan_ray.telemetry import logs

    found = (settings or load_settings()).logging
    logs.configure(found.level, found.format, who)


def _join(stack: contextlib.ExitStack, where: Where, settings: Settings) -> None:
    from koan_ray.cli.documents import address_of_dev

    address = where.address or os.environ.get("RAY_ADDRESS") or address_of_dev() or "auto"
    from koan_ray.runtime.ray import admin  # after it: it may say how Ray authenticates

    session = stack.enter_context(admin.session(address, where.namespace or settings.engine.namespace))
    ambient.set_engine(session)
    stack.callback(ambient.set_engine, None)


def _open_documents(stack: contextlib.ExitStack, settings: Settings) -> None:
    from koan_ray.runtime.documents import DocumentsRuntime

    runtime = DocumentsRuntime(document_settings(stack, settings))
    stack.callback(runtime.stop)
    ambient.set_engine(runtime.session)
    stack.callback(ambient.set_engine, None)


def document_settings(stack: contextlib.ExitStack, settings: Settings, source: str | None = None) -> EngineSettings:
    """Return the engine's settings; with the document server of this directory, started for ``stack``, as ``default``."""
    from koan_ray import wiring
    from koan_ray.cli.documents import documents

    numbers = wiring.engine_settings(settings)
    if source in (None, "default") and (DEFAULT_DIRECTORY / "data").exists():
        url = stack.enter_context(documents(settings)).url
        numbers = replace(numbers, sources=tuple({**dict(numbers.sources), "default": url}.items()))
    return numbers


def _keeps_documents(settings: Settings) -> bool:
    urls = [source.url for source in settings.sources.values()]
    return any(not url.startswith("memory://") for url in urls) or (DEFAULT_DIRECTORY / "data").exists()


def _brief(error: RuntimeUnavailableError) -> str:
    return str(error).partition(";")[0].partition(". ")[0][:200]


def look_here() -> None:
    """Let modules of the current directory be imported, as ``python -m`` does."""
    if "" not in sys.path and os.getcwd() not in sys.path:  # noqa: PTH109 - as a script would have it
        sys.path.insert(0, os.getcwd())  # noqa: PTH109


def import_modules(named: tuple[str, ...] | list[str]) -> None:
    """Import the modules that define job classes: those named, and those of the settings; from this directory as well.

    Raises:
        ConfigurationError: One cannot be imported; the message says why.
    """
    import importlib

    from koan_ray.config import load_settings

    look_here()
    for name in dict.fromkeys((*load_settings().jobs.modules, *named)):
        try:
            importlib.import_module(name)
        except Exception as error:
            msg = (
                f"module {name!r} (--module, or jobs.modules in the settings) cannot be imported: "
                f"{type(error).__name__}: {error}"
            )
            raise ConfigurationError(msg) from error
