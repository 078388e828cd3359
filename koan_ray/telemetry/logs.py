r"""Structured logs on top of the standard library's, under the logger ``koan_ray``.

In somebody's application (`koan_ray.init`, whichever runtime) nothing is configured: its own logging decides where our
records go, and without any the standard library prints warnings. The processes that are ours (commands, coordinator, broker,
job actors and the children of ``Isolation.PROCESS``) call `configure`, which writes to standard error: on a cluster that is
the worker's file among Ray's logs.

Events are constants in the past tense, everything else is a field. Ray owns the names ``job_id``, ``actor_id`` and
``node_id`` in its JSON records; ours carry a ``koan_`` in front there. One record is one line, whatever users' texts hold:
control characters are escaped, and the lines of a stack trace are indented.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import structlog

from koan_ray import ambient
from koan_ray.domain.texts import readable, said

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_RAYS: Final = frozenset({"job_id", "task_id", "actor_id", "node_id", "worker_id"})
_RESERVED: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_EVENT, _TRACE = "koan_event", "koan_trace"  # attributes of records: the event's name, and the stack trace as text
_MOST_TRACE: Final = 20_000
_MOST_TEXT: Final = 4_000


class Logging(NamedTuple):
    """How a process of ours logs: from which ``level`` on, as ``text`` or ``json``, and ``who`` it is."""

    level: str = "warning"
    format: str = "text"
    who: str = ""


def get_logger(**bound: Any) -> structlog.stdlib.BoundLogger:
    """Return the package's logger with these fields bound."""
    logger = structlog.wrap_logger(
        logging.getLogger("koan_ray"),
        processors=[structlog.stdlib.filter_by_level, structlog.contextvars.merge_contextvars, _bind_attempt, _render],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=True,
    )
    return cast("structlog.stdlib.BoundLogger", logger.bind(**bound))


def is_enabled() -> bool:
    """Tell whether anybody wants to read of changes of state: building an event costs more than many of them do."""
    return logging.getLogger("koan_ray").isEnabledFor(logging.INFO)


def configure(level: str = "warning", format: str = "text", who: str = "") -> None:
    """Have this process write the records of koan_ray to standard error; called again it replaces what it was told before.

    Where the root logger has handlers, as after `logging.basicConfig` or with Ray's ``LoggingConfig``, those get the records
    and nothing is written besides: no record appears twice.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``. With ``info`` each move of each job is a line.
        format: ``text``, or ``json`` for one object a line.
        who: What this process is, such as ``coordinator``.
    """
    logger = logging.getLogger("koan_ray")
    for handler in list(logger.handlers):
        if isinstance(handler, _Handler):
            logger.removeHandler(handler)
    logger.addHandler(_Handler(Logging(level, format, who)))
    logger.setLevel(level.upper())


def adopt(name: str) -> None:
    """Have the records of another logger written where ours are, if this process was told to write ours."""
    if (how := in_force()) is not None:
        other = logging.getLogger(name)
        if not any(isinstance(each, _Handler) for each in other.handlers):
            other.addHandler(_Handler(how))


def in_force() -> Logging | None:
    """Return how this process was told to log; None if that was left to the application."""
    return next((each.how for each in logging.getLogger("koan_ray").handlers if isinstance(each, _Handler)), None)


def bound(**fields: Any) -> Any:
    """Return a block in which all records of this task carry these fields."""
    return structlog.contextvars.bound_contextvars(**fields)


def _bind_attempt(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Name the job that the current code belongs to."""
    for name, value in _attempt_fields().items():
        event.setdefault(name, value)
    return event


def _attempt_fields() -> dict[str, str]:
    attempt = ambient.attempt.get()
    if attempt is None:
        return {}
    execution_id = getattr(getattr(attempt, "order", None), "execution_id", None)
    return {"job_id": attempt.job_view.id, **({"execution_id": execution_id} if execution_id else {})}


def _render(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> tuple[tuple[str], dict[str, Any]]:
    """Write ``event key=value …`` for people, and the fields as attributes of the record for JSON formatters."""
    name = str(event.pop("event", ""))
    trace = _trace(event.pop("exc_info", None))
    text = " ".join([name, *(f"{key}={_shown(value)}" for key, value in event.items())])
    extra = {_attribute(key): value for key, value in event.items()}
    extra |= {_EVENT: name, _TRACE: trace}
    return (f"{text}\n{_indented(trace)}" if trace else text,), {"extra": extra}


def _attribute(key: str) -> str:
    return f"koan_{key}" if key in _RAYS or key in _RESERVED else key


def _shown(value: object) -> str:
    text = said(value, _MOST_TEXT) if isinstance(value, str) else readable(_repr(value), _MOST_TEXT)
    return text if text.isprintable() and " " not in text and text else repr(text)


def _repr(value: object) -> str:
    try:
        return repr(value)
    except Exception as problem:  # noqa: BLE001 - a user's __repr__; to log must not raise
        return f"(repr of {type(value).__name__} raised {type(problem).__name__})"


def _trace(given: Any) -> str:
    """Return a stack trace as readable text, of ``exc_info`` as `logging` takes it; empty where there is none."""
    error = given if isinstance(given, BaseException) else given[1] if isinstance(given, tuple) else None
    if error is None and given:
        error = sys.exc_info()[1]
    if error is None:
        return ""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as problem:  # noqa: BLE001 - formatting calls a user's code, too
        text = f"{type(error).__name__} (its stack trace could not be formatted: {type(problem).__name__})"
    return readable(text[-2 * _MOST_TRACE :])[-_MOST_TRACE:].rstrip()


def _indented(text: str) -> str:
    return "\n".join(f"  {_one_line(line.expandtabs(4))}" for line in text.split("\n"))


def _one_line(text: str) -> str:
    """Return text in which whatever could end or hide a line is written out."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class _Handler(logging.StreamHandler[Any]):
    """Writes to what `sys.stderr` is at the time, while the root logger has no handlers of its own."""

    def __init__(self, how: Logging) -> None:
        super().__init__(sys.stderr)
        self.how = how
        self.setFormatter(_Json(how.who) if how.format == "json" else _Text(how.who))

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _stream: Any) -> None:
        """It is looked up anew: commands and tests replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        if not _root_listens() and self.stream is not None:
            super().emit(record)


def _root_listens() -> bool:
    return bool(logging.getLogger().handlers)


class _Text(logging.Formatter):
    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = f"{who or 'koan_ray'}[{os.getpid()}]"

    def format(self, record: logging.LogRecord) -> str:
        if hasattr(record, _EVENT):  # of our own making
            text = record.getMessage()
        else:
            fields = "".join(f" {key}={value}" for key, value in _attempt_fields().items())
            text = _shown_line(record) + fields
            if trace := _trace(record.exc_info):
                text = f"{text}\n{_indented(trace)}"
        return f"{_at(record)} {record.levelname} {self._who} {text}"


class _Json(logging.Formatter):
    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who or "koan_ray"

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "at": _at(record), "level": record.levelname.lower(), "logger": record.name, "process": self._who,
            "pid": os.getpid(), "event": getattr(record, _EVENT, None) or _shown_line(record),
        }  # fmt: skip
        fields = {name: value for name, value in record.__dict__.items() if name not in _RESERVED}
        trace = fields.pop(_TRACE, None) or _trace(record.exc_info)
        if fields.pop(_EVENT, None) is None:
            fields |= {_attribute(name): value for name, value in _attempt_fields().items()}
        found |= {name: value if isinstance(value, (int, float, bool)) else _plain(value) for name, value in fields.items()}
        if trace:
            found["exception"] = trace
        return json.dumps(found, default=said)


def _plain(value: object) -> str | None:
    return None if value is None else said(value if isinstance(value, str) else _repr(value), _MOST_TEXT)


def _shown_line(record: logging.LogRecord) -> str:
    """Return the message of a record that was made with the standard library, as one line."""
    try:
        text = record.getMessage()
    except Exception as problem:  # noqa: BLE001 - an argument's __str__ is a user's
        text = f"{said(record.msg)} (its arguments could not be shown: {type(problem).__name__})"
    return _one_line(readable(text, _MOST_TEXT))


def _at(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
