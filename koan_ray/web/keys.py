"""The key that signs a dashboard's cookies, kept so that who has signed in stays so when the server is started again."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from koan_ray.telemetry import logs

if TYPE_CHECKING:
    from koan_ray.config import WebSettings

_BYTES: Final = 32


def session_key(web: WebSettings) -> bytes:
    """Return the key of the settings, that of their file, or a new one, which is written there for the next start.

    A file that others may read or that cannot be used is left alone and reported; then the key is this process's.
    """
    if web.session_key is not None:
        return web.session_key.get_secret_value().encode()
    if not web.session_key_file:
        return secrets.token_bytes(_BYTES)
    path = Path(web.session_key_file)
    try:
        return _read(path) or _make(path)
    except (OSError, ValueError) as error:
        logs.get_logger().warning("session_key_not_kept", file=str(path), problem=str(error))
        return secrets.token_bytes(_BYTES)


def _read(path: Path) -> bytes | None:
    """Return the key in a file; None if there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        key = file.read(_BYTES + 1)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        msg = f"others may read it (mode {stat.S_IMODE(mode):o}); delete it, or use chmod 600"
        raise ValueError(msg)
    if len(key) != _BYTES:
        msg = f"expected {_BYTES} bytes, found {len(key)}; delete it for a new one"
        raise ValueError(msg)
    return key


def _make(path: Path) -> bytes:
    """Write a new key, whole or not at all; of two processes that do so at once, both return the one that is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = secrets.token_bytes(_BYTES)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(unfinished, path)  # unlike a rename, it does not replace another process's
        except FileExistsError:
            return _read(path) or key
    finally:
        unfinished.unlink()
    return key
