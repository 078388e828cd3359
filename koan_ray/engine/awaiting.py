"""What a user's function gives may have to be awaited, whatever the function says of itself.

An async function behind a plain decorator is a plain function that returns a coroutine. So nobody decides by the function
alone: what it gives is looked at.
"""

from __future__ import annotations

import inspect
from types import CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable

NEVER: Final = frozenset(
    {type(None), bool, int, float, str, bytes, list, dict, tuple, set}
)  # types that are not, for hot paths
_MOST: Final = 10  # awaitables that give awaitables, as decorators do that are async around a plain one


def is_awaitable(given: object) -> bool:
    """Tell whether something has to be awaited. Asks its type, not itself: results may answer to any attribute."""
    kind = type(given)
    if kind in NEVER:
        return False
    if kind is CoroutineType or hasattr(kind, "__await__"):
        return True
    return isinstance(given, GeneratorType) and bool(given.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE)


async def awaited(given: Awaitable[Any]) -> Any:
    """Return what comes of something that is awaited, and of what that gives in its turn."""
    result = await given
    for _ in range(_MOST):
        if not is_awaitable(result):
            break
        result = await result
    return result


def drop(given: object) -> None:
    """Let go of something that nobody will await, without the warning that it never was."""
    if isinstance(given, CoroutineType):
        given.close()
