"""What users call their jobs and say about them, one function for each kind: made readable, or refused.

The builder, filters, the control plane, HTTP and the command line use the same, so that a job is found by the name that it
was given. What is too long for its place is refused and not cut: it would not be found.
"""

from __future__ import annotations

from typing import Final

from koan_ray.domain.texts import is_unicode, quoted, readable
from koan_ray.errors import ConfigurationError

MAX_NAME: Final = 500
MAX_REASON: Final = 500


def job_name(value: object) -> str:
    """Return the name of a job."""
    if not isinstance(value, str) or str.__len__(value) > MAX_NAME:
        msg = f"named: expected text of at most {MAX_NAME} characters, got {quoted(value)}"
        raise ConfigurationError(msg)
    return readable(value)


def description(value: object) -> str | None:
    """Return what a job is for; how long that may be is the session's to say."""
    return None if value is None else _text(value, "named", "a description as text")


def correlation_id(value: object, name: str) -> str | None:
    """Return a correlation id."""
    return None if value is None else _text(value, name, "a correlation id as text")


def cancel_reason(value: object) -> str | None:
    """Return why a job is cancelled; a long text is cut, because nobody looks for it."""
    return (readable(_text(value, "cancel", "a reason as text"), MAX_REASON) or None) if value is not None else None


def child_key(value: object) -> str | None:
    """Return what names a child under its parent. Unchanged, because another key is another child."""
    if value is not None and (not isinstance(value, str) or not is_unicode(value)):
        msg = f"child key: expected text that is Unicode, got {quoted(value)}; use str(key), or repr(key) for odd file names"
        raise ConfigurationError(msg)
    return None if value is None else str.__str__(value)


def _text(value: object, name: str, expected: str) -> str:
    if not isinstance(value, str):
        msg = f"{name}: expected {expected}, got {quoted(value)}"
        raise ConfigurationError(msg)
    return readable(value)
