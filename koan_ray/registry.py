"""Job classes of this process by kind, filled as they are defined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koan_ray.errors import UnknownKindError

if TYPE_CHECKING:
    from collections.abc import Callable

    from koan_ray.jobs import Job

_by_kind: dict[str, type[Job[Any, Any]]] = {}
_told: Callable[[type[Job[Any, Any]]], None] | None = None


def register(kind: str, job_type: type[Job[Any, Any]]) -> None:
    """Make ``job_type`` the class of its kind. A class defined later replaces an earlier one, as in a notebook cell."""
    _by_kind[kind] = job_type
    if _told is not None:
        _told(job_type)


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
