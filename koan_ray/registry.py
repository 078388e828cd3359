"""Job classes of this process by kind, filled as they are defined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koan_ray.errors import UnknownKindError

if TYPE_CHECKING:
    from koan_ray.jobs import Job

_by_kind: dict[str, type[Job[Any, Any]]] = {}


def register(kind: str, job_type: type[Job[Any, Any]]) -> None:
    """Make ``job_type`` the class of its kind. A class defined later replaces an earlier one, as in a notebook cell."""
    _by_kind[kind] = job_type


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
