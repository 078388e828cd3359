"""Sortable ids: UUID version 7 as text, ordered by the time of creation."""

from __future__ import annotations

import uuid

from uuid_utils import uuid7

from koan_ray.errors import ConfigurationError, JobNotFoundError

# Fixed, so that a child id is the same function of parent and key in every process and version.
_CHILDREN = uuid.UUID("6f6e616b-7279-5f61-9c68-696c6472656e")


def new_id() -> str:
    """Return a new UUIDv7 as 36 characters; ids of one process sort in the order of their creation."""
    return str(uuid7())


def child_id(parent_id: str, key: str) -> str:
    """Return the id of the child that ``key`` names under ``parent_id``: always the same one.

    The time part is the parent's, so that it is a valid UUIDv7 and sorts beside its parent; the rest is a hash.
    """
    parent = uuid.UUID(parent_id).int
    digest = uuid.uuid5(_CHILDREN, f"{parent_id}/{key}").int
    time_part = (parent >> 80) << 80
    random_part = digest & ((1 << 80) - 1)
    value = time_part | random_part
    value = (value & ~(0xF << 76)) | (0x7 << 76)  # version 7
    value = (value & ~(0x3 << 62)) | (0x2 << 62)  # variant of RFC 9562
    return str(uuid.UUID(int=value))


def made_at(job_id: str) -> float:
    """Return when an id was made, in epoch seconds, by the clock of whoever made it; 0.0 for what is no UUIDv7."""
    if not is_id(job_id) or (made := uuid.UUID(job_id)).version != 7:
        return 0.0
    return (made.int >> 80) / 1000


def is_id(value: object) -> bool:
    """Tell whether ``value`` is the text form of a UUID."""
    if not isinstance(value, str) or len(value) != 36:
        return False
    try:
        return str(uuid.UUID(value)) == value.lower()
    except ValueError:
        return False


def checked_id(value: object) -> str:
    """Return the id of a job: a UUID as text in lower case, as all ids are stored.

    Raises:
        JobNotFoundError: It is another text, so that no job can have it.
        ConfigurationError: It is no text.
    """
    if isinstance(value, uuid.UUID):
        return str(value)
    if not isinstance(value, str):
        # By name: jobs stand above the domain.
        hint = "; of a job in hand that is job.id" if hasattr(type(value), "definition") else ""
        msg = f"job id: expected the id of a job (a UUID as text), got {type(value).__name__} {value!r:.100}{hint}"
        raise ConfigurationError(msg)
    if not is_id(value) or value != value.lower():
        raise JobNotFoundError(value, looked_in=())
    return value
