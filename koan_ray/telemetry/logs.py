"""Structured logs on top of the standard library's: an application's own logging configuration decides where they go.

Events are constants in the past tense, everything else is a field. Ray owns the names ``job_id``, ``actor_id`` and
``node_id`` in its JSON records; ours carry a ``koan_`` in front there.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_RAYS = frozenset({"job_id", "task_id", "actor_id", "node_id", "worker_id"})

logging.getLogger("koan_ray").addHandler(logging.NullHandler())


def get_logger(**bound: Any) -> structlog.stdlib.BoundLogger:
    """Return the package's logger with these fields bound."""
    logger = structlog.wrap_logger(
        logging.getLogger("koan_ray"),
        processors=[structlog.stdlib.filter_by_level, structlog.processors.format_exc_info, _render],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return cast("structlog.stdlib.BoundLogger", logger.bind(**bound))


def is_enabled() -> bool:
    """Tell whether anybody wants to read of changes of state: building an event costs more than many of them do."""
    return logging.getLogger("koan_ray").isEnabledFor(logging.INFO)


def _render(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> tuple[tuple[str], dict[str, Any]]:
    """Write ``event key=value …`` for people, and the fields as attributes of the record for JSON formatters."""
    name = event.pop("event", "")
    trace = event.pop("exception", None)
    text = " ".join([str(name), *(f"{key}={_shown(value)}" for key, value in event.items())])
    extra = {(f"koan_{key}" if key in _RAYS else key): value for key, value in event.items()}
    reserved = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime"}
    extra = {(f"koan_{key}" if key in reserved else key): value for key, value in extra.items()}
    return (f"{text}\n{trace}" if trace else text,), {"extra": extra}


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if text.isprintable() and " " not in text and text else repr(text)
