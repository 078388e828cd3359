"""Puts the module's stub into a Ray installation, takes it away, and tells how it is.

The stub is all that Ray imports, and it cannot fail: whatever its one import raises is logged and swallowed, so that Ray's
dashboard starts without our page when koan_ray was removed, is broken, or does not fit the Ray it finds.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NAME = "koan"
_MARK = "# Written by `koan-ray dashboard install`; `koan-ray dashboard remove` deletes it.\n"
_STUB = """
try:
    from koan_ray.runtime.ray.dashboard.head import KoanHead  # noqa: F401 - Ray finds it as a subclass
except BaseException as error:  # whatever it is, Ray's own dashboard must start
    import logging

    logging.getLogger(__name__).warning("koan-ray's page is left out: %s: %s", type(error).__name__, error)
"""
_FILES: Mapping[str, str] = {"__init__.py": _MARK, "koan_head.py": _MARK + _STUB}


class State(NamedTuple):
    """How the module is installed."""

    path: Path
    is_installed: bool
    is_current: bool  # the files are those of this version


def modules_of_ray() -> Path:
    """Return where this environment's Ray has the modules of its dashboard; Ray is found, not imported.

    Raises:
        ConfigurationError: It has none: the dashboard is not installed.
    """
    import importlib.util

    spec = importlib.util.find_spec("ray")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    for place in places:
        if (found := Path(place) / "dashboard" / "modules").is_dir():
            return found
    msg = "this environment's Ray has no dashboard; install it with pip install 'ray[default]'"
    raise ConfigurationError(msg)


def state(modules: Path) -> State:
    """Tell how the module is installed."""
    path = modules / NAME
    found = {name: _read(path / name) for name in _FILES}
    return State(path, _is_ours(path), found == _FILES)


def install(modules: Path) -> State:
    """Write the stub, or bring it up to date. Dashboards that run already go on without it.

    Raises:
        ConfigurationError: Something else has our place, or it cannot be written.
    """
    path = modules / NAME
    if path.exists() and not _is_ours(path):
        msg = f"{path}: is there already and was not written by koan-ray; nothing was changed. Move it away first."
        raise ConfigurationError(msg)
    with _told(path):
        path.mkdir(exist_ok=True)
        for name, text in _FILES.items():
            (path / name).write_text(text, encoding="utf-8")
    return state(modules)


def remove(modules: Path) -> bool:
    """Delete the stub; false if there was none.

    Raises:
        ConfigurationError: What is there was not written by us, or cannot be deleted.
    """
    path = modules / NAME
    if not path.exists():
        return False
    if not _is_ours(path):
        msg = f"{path}: was not written by koan-ray; nothing was deleted"
        raise ConfigurationError(msg)
    with _told(path):
        for name in _FILES:
            (path / name).unlink(missing_ok=True)
        cache = path / "__pycache__"
        for compiled in cache.glob("*.pyc") if cache.is_dir() else ():
            compiled.unlink()
        with contextlib.suppress(FileNotFoundError):
            cache.rmdir()
        path.rmdir()
    return True


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"{path}: cannot be changed: {error.strerror}; run this as the owner of the Ray installation"
        raise ConfigurationError(msg) from error


def _is_ours(path: Path) -> bool:
    return (_read(path / "__init__.py") or "").startswith(_MARK)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
