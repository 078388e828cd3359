"""A record of every request that would change something, the refused ones included: who, when, what, and what came of it.

Kept as JSON lines in a file that is only ever appended to (``[web] audit_file``, mode 0600), and told to the log as
``audit``. Payloads, filters and reasons are not part of it. Bounded: a full file is renamed to ``….1`` and so on, four are
kept. When a record cannot be written the request is refused: an engine that is operated without a trace is worse than one
that is not operated for a while.

A file and not the source of jobs: the API only reads sources, because a job's documents have one writer, and a refused
request must leave its trace when the database is away as well.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from koan_ray.errors import StoreUnavailableError
from koan_ray.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEPT: Final = 4
_MAX_TEXT: Final = 200


class AuditTrail:
    """Append-only record of requests. Safe from several threads, and from several processes on one file.

    Args:
        path: The file; None for the log only.
        limit: Bytes of one file.
    """

    def __init__(self, path: str | Path | None, limit: int = 16 * 1024**2) -> None:
        self._path = Path(path) if path else None
        self._limit = limit
        self._lock = threading.Lock()
        self._log = logs.get_logger()

    def check(self) -> None:
        """See that a record can be written; to be called before something is changed.

        Raises:
            StoreUnavailableError: It cannot.
        """
        self._append(b"")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record.

        Raises:
            StoreUnavailableError: It could not be written.
        """
        plain = {name: value[:_MAX_TEXT] if isinstance(value, str) else value for name, value in record.items()}
        self._log.info("audit", **plain)
        # ASCII, so that no control character and no mark that turns text around is in the file as such.
        self._append(json.dumps(plain, ensure_ascii=True, separators=(",", ":"), default=str).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        if self._path is None:
            return
        try:
            with self._lock:
                descriptor = self._open(self._path)
                try:
                    if line:
                        os.write(descriptor, line)  # one write with O_APPEND: lines of several processes do not mix
                    is_full = os.fstat(descriptor).st_size >= self._limit
                finally:
                    os.close(descriptor)
                if is_full:
                    self._rotate(self._path)
        except OSError as error:
            msg = (
                f"the audit record {self._path} cannot be written ({error.strerror}); nothing was changed. Make room or "
                f"correct [web] audit_file"
            )
            self._log.error("audit_failed", path=str(self._path), problem=str(error))
            raise StoreUnavailableError(msg) from None

    @staticmethod
    def _open(path: Path) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            return os.open(path, flags, 0o600)

    def _rotate(self, path: Path) -> None:
        if path.stat().st_size < self._limit:
            return  # another process was faster
        for place in range(_KEPT - 1, 0, -1):
            older = path.with_name(f"{path.name}.{place}")
            if older.exists():
                older.replace(path.with_name(f"{path.name}.{place + 1}"))
        path.replace(path.with_name(f"{path.name}.1"))
