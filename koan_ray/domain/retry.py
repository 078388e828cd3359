"""Whether a failed attempt is followed by another, and after how long."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from koan_ray.domain.durations import Duration, bound, seconds
from koan_ray.domain.status import FailureKind, Reason
from koan_ray.domain.texts import quoted
from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable


MAX_ATTEMPTS = 2**63 - 1  # sys.maxsize, for "as often as it takes"; no document holds a larger number


class RetryStrategy(StrEnum):
    """How the wait before the next attempt grows."""

    NONE = "none"
    IMMEDIATE = "immediate"
    FIXED_DELAY = "fixed_delay"
    LINEAR_BACKOFF = "linear_backoff"
    EXPONENTIAL_BACKOFF = "exponential_backoff"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon a failing job is tried again.

    Args:
        max_attempts: Attempts in all, the first included; at least 1. 1 means no retry.
        strategy: How the delay grows with the attempts.
        initial_delay: Delay after the first failure; `timedelta` or seconds. Kept as `timedelta`.
        backoff_multiplier: Factor between two delays of ``EXPONENTIAL_BACKOFF``; at least 1.
        max_delay: No delay is longer than this; `timedelta` or seconds, at least ``initial_delay``.
        jitter: Random share of the delay, 0 to 1. A delay ``d`` becomes one between ``d`` and ``d * (1 + jitter)``; at
            ``max_delay`` between ``max_delay * (1 - jitter)`` and ``max_delay``, so that the cap holds and jobs failed
            by one outage do not return in the same second.

    Raises:
        ConfigurationError: A value is out of its range; the message names it.
    """

    max_attempts: int = 3
    strategy: RetryStrategy = RetryStrategy.EXPONENTIAL_BACKOFF
    initial_delay: Duration = timedelta(seconds=5)
    backoff_multiplier: float = 2.0
    max_delay: Duration = timedelta(seconds=300)
    jitter: float = 0.1

    def __post_init__(self) -> None:
        attempts: object = self.max_attempts
        if not isinstance(attempts, int) or isinstance(attempts, bool) or not 1 <= attempts <= MAX_ATTEMPTS:
            msg = (
                f"retry.max_attempts: expected a whole number from 1 to {MAX_ATTEMPTS:,}, got {quoted(attempts)}; "
                f"use 1 for no retry"
            )
            raise ConfigurationError(msg)
        try:
            strategy = RetryStrategy(self.strategy)
        except ValueError:
            msg = f"retry.strategy: expected one of {', '.join(RetryStrategy)}, got {quoted(self.strategy)}"
            raise ConfigurationError(msg) from None
        initial_s = seconds(self.initial_delay, name="retry.initial_delay")
        max_s = bound(self.max_delay, name="retry.max_delay")
        if max_s < initial_s:
            msg = f"retry.max_delay: expected a duration >= retry.initial_delay ({initial_s:g}s), got {max_s:g}s"
            raise ConfigurationError(msg)
        if not _is_within(1.0, self.backoff_multiplier, 1e6):
            msg = f"retry.backoff_multiplier: expected 1 to 1,000,000, got {quoted(self.backoff_multiplier)}"
            raise ConfigurationError(msg)
        if not _is_within(0.0, self.jitter, 1.0):
            msg = f"retry.jitter: expected a share between 0 and 1, got {quoted(self.jitter)}"
            raise ConfigurationError(msg)
        object.__setattr__(self, "max_attempts", int(attempts))
        object.__setattr__(self, "backoff_multiplier", float(self.backoff_multiplier))
        object.__setattr__(self, "strategy", strategy)
        object.__setattr__(self, "initial_delay", timedelta(seconds=initial_s))
        object.__setattr__(self, "max_delay", timedelta(seconds=max_s))
        object.__setattr__(self, "jitter", float(self.jitter))

    def delay_s(self, failures: int, random: Callable[[], float]) -> float:
        """Return the wait before the next attempt, in seconds, never above ``max_delay``.

        Args:
            failures: Attempts that have failed so far, from 1.
            random: Uniform in [0, 1).
        """
        cap = seconds(self.max_delay, name="retry.max_delay")
        base = min(self._base_s(failures), cap)
        spread = base * self.jitter * random()
        return base + spread if base + spread <= cap else cap - min(spread, cap)

    def _base_s(self, failures: int) -> float:
        initial = seconds(self.initial_delay, name="retry.initial_delay")
        match self.strategy:
            case RetryStrategy.NONE | RetryStrategy.IMMEDIATE:
                return 0.0
            case RetryStrategy.FIXED_DELAY:
                return initial
            case RetryStrategy.LINEAR_BACKOFF:
                return initial * failures
            case RetryStrategy.EXPONENTIAL_BACKOFF:
                # The exponent is bounded before the power is taken: 2.0 ** 5000 raises OverflowError.
                return initial * self.backoff_multiplier ** min(failures - 1, 50)


def _is_within(least: float, value: object, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


class Advice(NamedTuple):
    """What the job's own `CustomRetryPolicy` answered, in the job actor, about the execution that just failed."""

    should_retry: bool | None = None  # None: not asked
    delay_s: float | None = None  # None: the policy's own delay


class Verdict(NamedTuple):
    """What follows a failure: another attempt after ``delay_s``, or the end with ``failure``."""

    retry: bool
    delay_s: float
    failure: FailureKind | None


_ASKED_NOTHING = Advice()
_PERMANENT = {
    Reason.NON_RETRYABLE: FailureKind.NON_RETRYABLE,
    Reason.RESULT_REJECTED: FailureKind.RESULT_REJECTED,
    Reason.CONTEXT_REJECTED: FailureKind.CONTEXT_REJECTED,
    Reason.UNKNOWN_KIND: FailureKind.UNKNOWN_KIND,
}


def decide(
    policy: RetryPolicy, reason: Reason, attempts: int, random: Callable[[], float], advice: Advice = _ASKED_NOTHING
) -> Verdict:
    """Decide what follows a failed attempt.

    Args:
        policy: The job's policy.
        reason: How the attempt failed. A permanent reason ends the job whatever is left.
        attempts: Attempts used, this one included, from 1.
        random: Uniform in [0, 1); used for jitter only.
        advice: The answers of the job's `CustomRetryPolicy`. It can end the job early or change the delay; it cannot
            exceed ``max_attempts``.
    """
    if permanent := _PERMANENT.get(reason):
        return Verdict(retry=False, delay_s=0.0, failure=permanent)
    timed_out = reason is Reason.TIMEOUT
    if advice.should_retry is False:
        return Verdict(retry=False, delay_s=0.0, failure=FailureKind.TIMEOUT if timed_out else FailureKind.NON_RETRYABLE)
    if policy.strategy is RetryStrategy.NONE or attempts >= policy.max_attempts:
        return Verdict(retry=False, delay_s=0.0, failure=FailureKind.TIMEOUT if timed_out else FailureKind.EXHAUSTED)
    delay = advice.delay_s if advice.delay_s is not None else policy.delay_s(attempts, random)
    return Verdict(retry=True, delay_s=delay, failure=None)
