"""What exceptions mean, alone and in groups, and how the most unwilling of them are described."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

import koan_ray as koan
from koan_ray.domain.records import MAX_ERROR_MESSAGE, MAX_STACK_TRACE
from koan_ray.engine.attempt import describe
from koan_ray.engine.raised import meaning
from koan_ray.errors import ConfigurationError

FATAL, LATER, PLAIN, STOPPED = (
    koan.NonRetryable(KeyError("never")),
    koan.Reschedule(5),
    ValueError("x"),
    asyncio.CancelledError(),
)


def group(*errors: BaseException) -> BaseException:
    return BaseExceptionGroup("of a TaskGroup", list(errors))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (FATAL, "non_retryable"),
        (LATER, "rescheduled"),
        (PLAIN, "failed"),
        (STOPPED, "cancelled"),
        (SystemExit(3), "failed"),
        (group(FATAL), "non_retryable"),
        (group(group(group(FATAL))), "non_retryable"),
        (group(PLAIN, LATER, STOPPED, group(PLAIN, FATAL)), "non_retryable"),
        (group(SystemExit(), FATAL), "non_retryable"),
        (group(LATER), "rescheduled"),
        (group(LATER, group(koan.Reschedule(9))), "rescheduled"),
        (group(LATER, STOPPED), "rescheduled"),
        (group(LATER, PLAIN), "failed"),
        (group(PLAIN, STOPPED), "failed"),
        (group(STOPPED, group(STOPPED)), "cancelled"),
    ],
)
def test_of_a_group_count_the_exceptions_in_it(error, outcome):
    assert meaning(error).outcome == outcome


def test_several_reschedules_wait_for_the_longest():
    assert meaning(group(LATER, koan.Reschedule(timedelta(minutes=1)), koan.Reschedule())).delay_s == 60.0


def test_a_non_retryable_tells_the_error_that_it_carries():
    assert meaning(group(PLAIN, FATAL)).error is FATAL.error
    assert meaning(koan.NonRetryable(koan.NonRetryable("why"))).error == "why"


def test_causes_are_not_looked_at():
    error = ValueError("wrapped")
    error.__cause__ = FATAL
    error.__context__ = LATER
    assert meaning(error).outcome == "failed"


def test_a_group_of_a_hundred_thousand_in_ten_thousand_others_is_read_to_its_end():
    error = group(*[PLAIN] * 100_000, FATAL)
    for _ in range(10_000):
        error = group(error)
    assert meaning(error).outcome == "non_retryable"


class Bare(koan.Reschedule):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("after", [10**400, -1, float("nan"), float("inf"), 1e300, timedelta.max, None, "soon", [1]])
def test_a_reschedule_for_no_time_at_all_is_a_failure_that_says_so(after):
    found = meaning(koan.Reschedule(after=after))
    assert (found.outcome, type(found.error)) == ("failed", ConfigurationError)
    assert "Reschedule(after=…)" in str(found.error)


def test_a_reschedule_that_has_lost_its_delay_is_a_failure():
    assert meaning(Bare()).outcome == "failed"


class Lost(koan.NonRetryable):
    def __init__(self) -> None:
        pass


class Raises(koan.NonRetryable):
    def __init__(self) -> None:
        pass

    @property
    def error(self):
        raise SystemExit(1)


class Itself(koan.NonRetryable):
    def __init__(self) -> None:
        self.error = self


@pytest.mark.parametrize("of", [Lost, Raises, Itself])
def test_a_non_retryable_that_carries_nothing_is_one_all_the_same(of):
    assert meaning(of()).outcome == "non_retryable"


class LyingError(Exception):
    @property
    def __class__(self):
        return koan.NonRetryable


class RefusingError(Exception):
    @property
    def __class__(self):
        raise SystemExit(1)


@pytest.mark.parametrize("of", [LyingError, RefusingError])
def test_an_exception_is_what_its_type_says(of):
    assert meaning(of()).outcome == "failed"


def nameless() -> BaseException:
    class NamelessType(type):
        @property
        def __name__(cls):
            raise SystemExit(1)

    class NamelessError(Exception, metaclass=NamelessType):
        pass

    return NamelessError("x")  # made here: test runners ask what modules hold for its name


class MuteError(Exception):
    def __str__(self):
        raise KeyboardInterrupt

    __repr__ = __str__


class TracelessError(Exception):
    @property
    def __traceback__(self):
        raise SystemExit(1)


class NotedError(Exception):
    @property
    def __notes__(self):
        raise SystemExit(1)


def chained(n: int) -> BaseException:
    first = error = ValueError("0")
    for i in range(n):
        error.__cause__ = error = ValueError(str(i))
    return first


def looped() -> BaseException:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    return one


def deep(n: int) -> BaseException:
    error: BaseException = PLAIN
    for _ in range(n):
        error = group(error)
    return error


@pytest.mark.parametrize(
    "make",
    [
        nameless, MuteError, TracelessError, NotedError, LyingError, RefusingError, looped,
         lambda: chained(100_000), lambda: deep(50_000),
        lambda: group(*[ValueError(str(n)) for n in range(100_000)]), lambda: ValueError("x" * 10_000_000),
        lambda: ValueError("\udce9\x1b[31m\x00"), type("Bell\x07", (Exception,), {}), BaseException,
        lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), lambda: SyntaxError("bad", ("f\udcff", 1, 1, "text", 1, 1)),
    ],
)  # fmt: skip
def test_every_exception_becomes_text_that_can_be_stored(make):
    try:
        raise make()
    except BaseException as error:
        info = describe(error)
    assert info.type
    assert len(info.message) <= MAX_ERROR_MESSAGE
    assert len(info.stack_trace) <= MAX_STACK_TRACE
    "".join(info).encode()
