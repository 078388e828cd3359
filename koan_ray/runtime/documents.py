"""A session that reads jobs from their documents where no engine runs; what would change anything is refused."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from koan_ray import wiring
from koan_ray.engine.session import Session
from koan_ray.runtime.code import LocalCode
from koan_ray.runtime.loop import LoopThread
from koan_ray.telemetry import traces

if TYPE_CHECKING:
    from collections.abc import Callable

    from koan_ray.engine.reading import Reader
    from koan_ray.engine.settings import EngineSettings

_READS = frozenset({"get", "details", "query", "count", "executions"})
_CLOSE_S = 10.0


class DocumentsRuntime:
    """Opens the sources of the settings for reading; also the transport to them, see `koan_ray.ports.Transport`.

    Raises:
        ConfigurationError: No source keeps documents, or one cannot be used as configured.
        StoreUnavailableError: A source does not answer.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._thread = LoopThread("koan-documents")
        self._opened = contextlib.AsyncExitStack()
        try:
            self._reader: Reader = self._thread.run(self._opened.enter_async_context(wiring.reader(settings)))
        except BaseException:
            self._thread.stop()
            raise
        self.session = Session(self, inline_limit=settings.inline_limit, ship=LocalCode().ship, trace=traces.current)

    def coordinator(self, method: str, args: tuple[Any, ...], done: Callable[[Any, BaseException | None], None]) -> None:
        """Answer a question about stored jobs; refuse everything else."""
        work = getattr(self._reader, method)(*args) if method in _READS else self._reader.refuse(method)
        self._thread.begin(work, done)

    def broker(self, method: str, args: tuple[Any, ...], done: Callable[[Any, BaseException | None], None]) -> None:
        """Tell that there is no progress newer than what is stored."""
        self._thread.begin(self._reader.latest(*args) if method == "latest" else self._reader.refuse(method), done)

    def stop(self) -> None:
        """Close the sources."""
        self.session.close("the documents were closed")
        with contextlib.suppress(TimeoutError):
            self._thread.run(self._opened.aclose(), timeout=_CLOSE_S)
        self._thread.stop()
