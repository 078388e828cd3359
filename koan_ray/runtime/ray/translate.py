"""Ray's errors as ours."""

from __future__ import annotations

import re

from ray import exceptions

from koan_ray.errors import CoordinatorUnavailableError, KoanRayError, RuntimeUnavailableError

_GUESSES = re.compile(r" *Some common causes include:.*")  # the memory, in most of them, whatever it was


def is_gone(error: BaseException) -> bool:
    """Tell whether the actor is dead for sure."""
    return isinstance(error, exceptions.ActorDiedError)


def is_unknown(error: BaseException) -> bool:
    """Tell whether the call may or may not have been carried out, by an actor that may still live."""
    return isinstance(error, exceptions.ActorUnavailableError)


def cause_of_death(error: BaseException) -> str:
    """Return why an actor died, in one line: what Ray knows, without the list of what it may have been."""
    if isinstance(error, exceptions.RuntimeEnvSetupError):  # the last line of the trace that it holds is what helps
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"its runtime_env could not be set up: {lines[-1] if lines else 'for no known reason'}"[:500]
    text = _GUESSES.sub("", str(error)).strip()
    for line in text.splitlines():
        if "memory" in line.lower():
            return f"out of memory: {line.strip()}"[:500]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "cause" in line.lower() or "killed" in line.lower() or "died" in line.lower()]
    return (told or lines or [type(error).__name__])[-1][:500]


def to_ours(error: BaseException, what: str) -> BaseException:
    """Return our error for what Ray raised while ``what`` was called; Ray's is kept as its cause."""
    if isinstance(error, exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, KoanRayError):
            return cause
        ours: BaseException = RuntimeUnavailableError(f"{what}: failed inside the engine: {cause!r}")
    elif is_gone(error) or is_unknown(error):
        ours = CoordinatorUnavailableError(f"{what}: it did not answer ({type(error).__name__}); repeat the request")
    else:
        ours = RuntimeUnavailableError(f"{what}: Ray did not carry out the call: {type(error).__name__}: {error}"[:1000])
    ours.__cause__ = error
    return ours
