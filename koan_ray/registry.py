"""Job classes of this process by kind, filled as they are defined."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from koan_ray.errors import JobDefinitionError, UnknownKindError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from koan_ray.jobs import Job

_LEVELS: Final = 12  # of the stack between the definition of a class and what unpickles it

_by_kind: dict[str, type[Job[Any, Any]]] = {}
_redefined: set[tuple[str, str]] = set()  # modules and qualified names of classes that were defined again
_refuses = True
_told: Callable[[type[Job[Any, Any]]], None] | None = None


def register(kind: str, job_type: type[Job[Any, Any]]) -> None:
    """Make ``job_type`` the class of its kind.

    A class that is defined anew in its module, by a notebook cell or a reload, takes the place of the one before.

    Raises:
        JobDefinitionError: A class of another module has this kind; names both, and the way out.
    """
    known = _by_kind.get(kind)
    is_second = known is not None and known is not job_type and not _is_redefinition(job_type, known)
    if is_second and _refuses and not _is_unpickled():
        del known
        _refuse_second(kind, job_type)
    replace(kind, job_type)


def accept_all() -> None:
    """Refuse no class any more: from now on this process runs classes of others, which may know other classes of a kind."""
    global _refuses  # noqa: PLW0603 - a property of the process
    _refuses = False


def replace(kind: str, job_type: type[Job[Any, Any]]) -> None:
    """Make ``job_type`` the class of its kind, whatever was that before; for classes that were not defined here."""
    known = _by_kind.get(kind)
    if known is not None and known is not job_type and _names(known) == _names(job_type):
        _redefined.add(_names(job_type))
    _by_kind[kind] = job_type
    if _told is not None:
        _told(job_type)


def is_redefined(job_type: type[Any]) -> bool:
    """Tell whether a class has been defined more than once in this process, so that its module's name says too little."""
    return _names(job_type) in _redefined


def on_register(told: Callable[[type[Job[Any, Any]]], None] | None) -> None:
    """Call ``told`` with every class that is defined from now on; None: nobody wants to know any more."""
    global _told  # noqa: PLW0603 - one engine a process
    _told = told


def everything() -> list[type[Job[Any, Any]]]:
    """Return all classes that are defined here."""
    return list(_by_kind.values())


def find(kind: str) -> type[Job[Any, Any]] | None:
    """Return the class of this kind, if one is defined here."""
    return _by_kind.get(kind)


def resolve(kind: str) -> type[Job[Any, Any]]:
    """Return the class of this kind.

    Raises:
        UnknownKindError: None is defined in this process.
    """
    job_type = _by_kind.get(kind)
    if job_type is None:
        raise UnknownKindError(kind, sorted(_by_kind))
    return job_type


def _names(job_type: type[Any]) -> tuple[str, str]:
    return job_type.__module__, job_type.__qualname__


def _is_redefinition(job_type: type[Any], known: type[Any]) -> bool:
    """Tell whether two classes are one, defined twice: in one module, which may run as ``__main__`` as well."""
    if job_type.__module__ == known.__module__:
        return True
    if job_type.__qualname__ != known.__qualname__ or "<locals>" in known.__qualname__:
        return False
    if not {job_type.__module__, known.__module__} & {"__main__", "__mp_main__"}:
        return False
    file = _file(job_type)
    return file is not None and file == _file(known)


def _file(job_type: type[Any]) -> str | None:
    """Return the file that a class was defined in."""
    for name in ("execute", "process_item"):
        function = job_type.__dict__.get(name)
        function = getattr(job_type, "function", function)  # of `koan_ray.job`
        code = getattr(function, "__code__", None)
        if code is not None and Path(code.co_filename).is_file():
            return str(Path(code.co_filename).resolve())
    return None


def _is_unpickled() -> bool:
    """Tell whether the class that is being defined is a copy of one of another process."""
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - only the stack says that
    for _ in range(_LEVELS):
        if frame is None:
            return False
        if "cloudpickle" in frame.f_globals.get("__name__", ""):
            return True
        frame = frame.f_back
    return False


def _refuse_second(kind: str, job_type: type[Job[Any, Any]]) -> None:
    """Refuse a second class, unless nobody has the first any more.

    A class that was defined in a function, or in a module that is gone, and that only this registry still knows, is left
    from a test or a call that has ended.
    """
    known = _by_kind[kind]
    module = sys.modules.get(known.__module__)
    if "<locals>" in known.__qualname__ or module is None:
        old = weakref.ref(_by_kind.pop(kind))
        del known
        gc.collect()
        left = old()
        if left is None:
            return
        known = _by_kind[kind] = left
    other = f"{job_type.__module__.rpartition('.')[2].strip('_')}.{kind}"
    msg = (
        f"job class {job_type.__module__}.{job_type.__qualname__}: {known.__module__}.{known.__qualname__} has the kind "
        f"{kind!r} already, and stored jobs find their class by its kind alone; give one of the two another, for example "
        f'kind = "{other}" in the class body, or @koan.job(kind="{other}")'
    )
    raise JobDefinitionError(msg)
