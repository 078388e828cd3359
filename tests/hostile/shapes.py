"""Job classes of odd shapes: what Python lets somebody write. Each is refused when it is defined or used, or it works."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import enum
import functools
import threading
import types
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import koan_ray as koan

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
R = TypeVar("R")
ONCE = koan.RetryPolicy(max_attempts=1)


def _logged(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


class _Described:
    """A callable object as a body."""

    async def __call__(self, context, progress, cancellation):
        return context


def abstract():
    class Abstract(koan.Job[int, int], abc.ABC):
        retry = ONCE

        def execute(self, context, progress, cancellation) -> int:
            return context

        @abc.abstractmethod
        def other(self): ...

    return Abstract


def frozen_dataclass():
    @dataclasses.dataclass(frozen=True)
    class Frozen(koan.Job[int, int]):
        n: int = 0

        def execute(self, context, progress, cancellation) -> int:
            return context

    return Frozen


def setattr_raises():
    class Closed(koan.Job[int, int]):
        retry = ONCE

        def __setattr__(self, name, value):
            raise AttributeError("closed")

        def execute(self, context, progress, cancellation) -> int:
            return context

    return Closed


def getattribute_raises():
    class Blind(koan.Job[int, int]):
        retry = ONCE

        def __getattribute__(self, name):
            if name == "_view":
                raise RuntimeError("blind")
            return super().__getattribute__(name)

        def execute(self, context, progress, cancellation) -> int:
            return context

    return Blind


def new_raises():
    class Never(koan.Job[int, int]):
        retry = ONCE

        def __new__(cls, *args):
            raise RuntimeError("never")

        def execute(self, context, progress, cancellation) -> int:
            return context

    return Never


def slots():
    class Slotted(koan.Job[int, int]):
        __slots__ = ("n",)
        retry = ONCE

        def execute(self, context, progress, cancellation) -> int:
            self.n = context
            return self.n

    return Slotted


def eq_raises():
    class Unequal(koan.Job[int, int]):
        retry = ONCE

        def __eq__(self, other):
            raise RuntimeError("no equal")

        def __hash__(self):
            raise RuntimeError("no hash")

        def __repr__(self):
            raise RuntimeError("no repr")

        def execute(self, context, progress, cancellation) -> int:
            return context

    return Unequal


def metaclass():
    class Meta(type(koan.Job)):
        def __call__(cls, *args, **kwargs):
            raise RuntimeError("not to be called")

    class Made(koan.Job[int, int], metaclass=Meta):
        retry = ONCE

        def execute(self, context, progress, cancellation) -> int:
            return context

    return Made


def wrapped_async():
    class Wrapped(koan.Job[int, int]):
        retry = ONCE

        @_logged
        async def execute(self, context, progress, cancellation) -> int:
            await asyncio.sleep(0)
            return context

    return Wrapped


def static_body():
    class Static(koan.Job[int, int]):
        retry = ONCE

        @staticmethod
        def execute(context, progress, cancellation) -> int:
            return context

    return Static


def class_body():
    class Classy(koan.Job[int, int]):
        retry = ONCE

        @classmethod
        def execute(cls, context, progress, cancellation) -> int:
            return context

    return Classy


def partial_body():
    class Partial(koan.Job[int, int]):
        retry = ONCE
        execute = functools.partialmethod(lambda self, extra, context, progress, cancellation: context, 1)

    return Partial


def callable_body():
    class Callable_(koan.Job[int, int]):
        retry = ONCE
        execute = _Described()

    return Callable_


def lambda_body():
    class Lambda(koan.Job[int, int]):
        retry = ONCE
        execute = lambda self, context, progress, cancellation: context  # noqa: E731

    return Lambda


def keyword_only_body():
    class Keyword(koan.Job[int, int]):
        retry = ONCE

        def execute(self, *, context, progress, cancellation) -> int:
            return context

    return Keyword


def star_body():
    class Star(koan.Job[int, int]):
        retry = ONCE

        def execute(self, *args) -> int:
            return args[0]

    return Star


def generator_body():
    class Generates(koan.Job[int, Any]):
        retry = ONCE

        def execute(self, context, progress, cancellation):
            yield context

    return Generates


def generic_list():
    class Base(koan.Job[list[T], R], Generic[T, R]):
        retry = ONCE

        def execute(self, context, progress, cancellation):
            return context[0]

    class Concrete(Base[int, int]):
        def start_value(self): ...

    return Concrete


def generic_unbound():
    class Open(koan.Job[list[T], T], Generic[T]):
        retry = ONCE

        def execute(self, context, progress, cancellation):
            return context[0]

    return Open


def bare_generic():
    class Bare(koan.Job):
        retry = ONCE

        def execute(self, context, progress, cancellation):
            return context

    return Bare


def two_bases():
    class Mixin:
        def helper(self):
            return 1

    class Mixed(Mixin, koan.Job[int, int]):
        retry = ONCE

        def execute(self, context, progress, cancellation) -> int:
            return context * self.helper()

    return Mixed


def _plain_body(self, context, progress, cancellation) -> int:
    return context


def odd_attribute(name: str, value: Any) -> Callable[[], Any]:
    """A class with an attribute that the engine reads or has, with a value that it cannot use."""
    members = {"execute": _plain_body, name: value, "__module__": __name__, "retry": ONCE}
    return lambda: types.new_class("Odd", (koan.Job[int, int],), {}, lambda body: body.update({**members, name: value}))


def unpicklable():
    lock = threading.Lock()

    class Holds(koan.Job[int, int]):
        retry = ONCE

        def execute(self, context, progress, cancellation) -> int:
            with lock:
                return context

    return Holds


def init_needed():
    class Needs(koan.Job[int, int]):
        retry = ONCE

        def __init__(self, n):
            self.n = n

        def execute(self, context, progress, cancellation) -> int:
            return context

    return Needs


def init_subclass_raises():
    class Base(koan.Job[int, int]):
        def __init_subclass__(cls, **options):
            raise RuntimeError("no subclasses")

    class Sub(Base):
        def execute(self, context, progress, cancellation) -> int:
            return context

    return Sub


def function_odd_signature():
    @koan.job
    def takes_defaults(context: int, extra: int = 3, *args, **kwargs) -> int:
        return context

    return takes_defaults


def function_forward():
    @koan.job
    def forward(context: int, progress: NotDefinedAnywhere) -> int:  # noqa: F821
        return context

    return forward


def function_wrapped():
    @koan.job
    @_logged
    async def wrapped(context: int) -> int:
        await asyncio.sleep(0)
        return context

    return wrapped


def context_manager_body():
    class Manages(koan.Job[int, Any]):
        retry = ONCE

        @contextlib.contextmanager
        def execute(self, context, progress, cancellation):
            yield context

    return Manages


class _Odd(enum.Enum):
    POOLED = "elsewhere"


SHAPES: dict[str, Callable[[], Any]] = {
    name: made
    for name, made in list(globals().items())
    if callable(made)
    and getattr(made, "__module__", "") == __name__
    and not name.startswith("_")
    and not isinstance(made, type)
    and name != "odd_attribute"
}
SHAPES |= {
    f"shadows {name}": odd_attribute(name, 5)
    for name in (
        "status",
        "id",
        "name",
        "wait",
        "result",
        "context",
        "progress",
        "cancel",
        "metadata",
        "refresh",
        "start",
        "definition",
    )
}
SHAPES |= {
    f"{name} = {value!r:.30}": odd_attribute(name, value)
    for name, value in (
        ("kind", ""),
        ("kind", 5),
        ("kind", "a\x00b"),
        ("kind", "\udce9"),
        ("kind", "x" * 300),
        ("retry", 3),
        ("timeout", -1),
        ("timeout", float("nan")),
        ("timeout", "soon"),
        ("timeout", 10**400),
        ("concurrency", 0),
        ("concurrency", 10**9),
        ("resources", {"num_cpus": 1}),
        ("isolation", _Odd.POOLED),
        ("isolation", None),
        ("claim", "maybe"),
        ("when_parent_ends", 1),
    )
}
EXPECTED = {
    "setattr_raises": 7,
    "slots": 7,
    "eq_raises": 7,
    "metaclass": 7,
    "wrapped_async": 7,
    "two_bases": 7,
    "star_body": 7,
    "function_wrapped": 7,
    "init_needed": 7,
    "bare_generic": 7,
    "frozen_dataclass": 7,
}
