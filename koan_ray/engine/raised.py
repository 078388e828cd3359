"""What it means for a job that its code has raised something.

Exceptions come alone or in groups, as an `asyncio.TaskGroup` raises them; of a group count the exceptions in it, however
deep. The rule:

1. `NonRetryable` wins: one among any others ends the job at once, with the error that it carries.
2. `asyncio.CancelledError` says nothing beside others: a group cancels the siblings of what failed.
3. Where then only `Reschedule` is left, the job runs again later, after the longest of their delays.
4. Anything else is a failure, and a `Reschedule` beside it is not listened to.

``__cause__`` and ``__context__`` are not looked at: what led to an exception was handled by whoever raised the next.

Nothing here calls a user's code but to read ``error`` and ``after``, and nothing raises: classes of exceptions are users'
code, and one whose ``__class__`` or ``__init__`` misbehaves must not take its job's place with it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from koan_ray.domain.durations import seconds
from koan_ray.domain.texts import readable
from koan_ray.errors import ConfigurationError, NonRetryable, Reschedule

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_WRAPPED: Final = 10  # NonRetryable(NonRetryable(…))
_MOST_TOLD: Final = 100  # exceptions in and behind one whose stack traces are written down
_MOST_NAME: Final = 200
_MOST_DELAY_S: Final = 100 * 366 * 86400.0  # of a reschedule; instants beyond the year 9999 cannot be stored


class Meaning(NamedTuple):
    """What follows; ``outcome`` is ``non_retryable``, ``rescheduled``, ``cancelled`` or ``failed``, as in a report."""

    outcome: str
    error: object  # that tells why: an exception, or what a `NonRetryable` was given instead of one
    delay_s: float = 0.0  # of a reschedule


def meaning(error: BaseException) -> Meaning:
    """Return what it means for a job that its code has raised ``error``; see the module's docstring for the rule."""
    is_group = isa(error, BaseExceptionGroup)
    said = [each for each in leaves(error) if not isa(each, asyncio.CancelledError)] if is_group else [error]
    for each in said:
        if isa(each, NonRetryable):
            return Meaning("non_retryable", carried(each))
    if not said or isa(error, asyncio.CancelledError):
        return Meaning("cancelled", error)
    if not all(isa(each, Reschedule) for each in said):
        return Meaning("failed", error)
    try:
        return Meaning("rescheduled", error, max(_delay_s(each) for each in said))
    except ConfigurationError as problem:
        return Meaning("failed", problem)


def isa(error: object, expected: type[BaseException]) -> bool:
    """Tell whether an exception is of a class, by its type: `isinstance` believes what its ``__class__`` says."""
    return issubclass(type(error), expected)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions of a group that are no groups, in order, however deep they are."""
    left = [error]
    while left:
        each = left.pop()
        if isa(each, BaseExceptionGroup):
            left.extend(reversed(_members(each)))
        else:
            yield each


def carried(error: BaseException) -> object:
    """Return what a `NonRetryable` was given; itself where a subclass has lost that."""
    found: Any = error
    for _ in range(_MOST_WRAPPED):
        if not isa(found, NonRetryable):
            break
        try:
            inner = found.error
        except BaseException:  # noqa: BLE001 - a subclass need not have called our __init__, and may compute it
            break
        if inner is found:
            break
        found = inner
    return found


def _members(group: Any) -> tuple[BaseException, ...]:
    members: tuple[BaseException, ...] = BaseExceptionGroup.exceptions.__get__(group)
    return members


def _delay_s(error: Any) -> float:
    """Return the delay of a `Reschedule` in seconds.

    Raises:
        ConfigurationError: It is no duration, or too long.
    """
    name = "Reschedule(after=…)"
    try:
        after = error.after
        delay_s = seconds(after, name=name)
    except ConfigurationError:
        raise
    except BaseException as problem:  # noqa: BLE001 - a subclass may not have it; a number may be anything
        msg = f"{name}: expected a timedelta or a number of seconds, but reading it raised {type(problem).__name__}"
        raise ConfigurationError(msg) from None
    if delay_s > _MOST_DELAY_S:
        msg = f"{name}: expected at most {_MOST_DELAY_S:.0f} s (100 years), got {delay_s:g} s; use NonRetryable to give up"
        raise ConfigurationError(msg)
    return delay_s


def name_of(error: object) -> str:
    """Return the name of the class of an exception, whatever its metaclass answers."""
    return readable(type.__dict__["__name__"].__get__(type(error)), _MOST_NAME)


def is_vast(error: BaseException) -> bool:
    """Tell whether an exception has so many others in or behind it that to write them all down takes seconds."""
    left, seen = [error], {id(error)}
    while left:
        each = left.pop()
        members = _members(each) if isa(each, BaseExceptionGroup) else ()
        for other in (*members[: _MOST_TOLD + 1], each.__cause__, each.__context__):
            if other is not None and id(other) not in seen:
                seen.add(id(other))
                left.append(other)
        if len(seen) > _MOST_TOLD:
            return True
    return False
