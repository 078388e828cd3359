"""What a job class declares of its types: resolved from its bases and annotations, whatever they are written as."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from typing import TYPE_CHECKING, Any, Final, ForwardRef, Literal, TypeVar, get_args, get_origin

from koan_ray.errors import JobDefinitionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import FrameType

_MOST_LEVELS: Final = 50
_MOST_FRAMES: Final = 50


class Names:
    """The names that the bases of a class may use: those of its module, and of the function that it is defined in.

    They are looked up late if need be, as a class that is named may be defined after the one that names it.
    """

    def __init__(self, job_type: type[Any]) -> None:
        self._module = job_type.__module__
        self._own = {job_type.__name__: job_type}
        self._frame = _frame_of(job_type) if "<locals>" in job_type.__qualname__ else None
        self._known: dict[Any, Any] = {}

    def evaluated(self, annotation: Any) -> Any:
        """Return an annotation without forward references.

        Raises:
            NameError: A name is not defined, or not yet.
        """
        key = repr(annotation)
        if key not in self._known:
            module = vars(sys.modules[self._module]) if self._module in sys.modules else {}
            around = {**self._own, **(self._frame.f_locals if self._frame is not None else {})}
            self._known[key] = evaluated(annotation, module, around)
        return self._known[key]

    def settle(self) -> None:
        """Let go of the function's call: all has been evaluated."""
        self._frame = None


def evaluated(annotation: Any, module: Mapping[str, Any], around: Mapping[str, Any]) -> Any:
    """Return an annotation without forward references, which are names of a module or of what is around.

    Raises:
        NameError: A name is not defined there.
    """
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    return typing.get_type_hints(holder, globalns=dict(module), localns=dict(around), include_extras=True)["it"]


def _frame_of(job_type: type[Any]) -> FrameType | None:
    """Return the call of the function that a class is being defined in."""
    within = job_type.__qualname__.rpartition(".<locals>.")[0]
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - nothing else has the locals of a caller
    for _ in range(_MOST_FRAMES):
        if frame is None or frame.f_code.co_qualname == within:
            return frame
        frame = frame.f_back
    return None


def arguments(job_type: type[Any], root: Any, names_of: Callable[[type[Any]], Names | None]) -> tuple[Any, ...]:
    """Return what a class gives the parameters of its generic root, through all bases between.

    A parameter that is given nothing stays one if it has a bound, constraints or a default, else anything may be there.

    Args:
        job_type: The class.
        root: The generic class on top, such as ``Job``.
        names_of: Gives the names that forward references in the bases of a class are looked up among.

    Raises:
        NameError: A forward reference cannot be resolved, or not yet.
        TypeError: Something cannot be given to a parameter.
    """
    return tuple(_open(item) for item in _arguments(job_type, root, {}, names_of))


def _arguments(
    cls: Any, root: Any, given: Mapping[Any, Any], names_of: Callable[[type[Any]], Names | None]
) -> Sequence[Any]:
    if cls is root:
        return [given.get(parameter, parameter) for parameter in root.__parameters__]
    found: list[Any] = list(root.__parameters__)
    names = names_of(cls)
    for base in cls.__dict__.get("__orig_bases__", cls.__bases__):
        origin = get_origin(base) or base
        if not (isinstance(origin, type) and issubclass(origin, root)):
            continue
        below = {}
        for parameter, item in zip(getattr(origin, "__parameters__", ()), get_args(base), strict=False):
            whole = names.evaluated(item) if names is not None and has_names(item) else item
            below[parameter] = substituted(whole, given)
        for place, item in enumerate(_arguments(origin, root, below, names_of)):
            if found[place] is root.__parameters__[place]:  # the first base that says something has its way
                found[place] = item
    return found


def substituted(annotation: Any, given: Mapping[Any, Any]) -> Any:  # noqa: PLR0911 - one for each form of annotation
    """Return an annotation with values for its type parameters, at all depths."""
    if isinstance(annotation, TypeVar):
        return given.get(annotation, annotation)
    about = getattr(annotation, "__pydantic_generic_metadata__", None)
    if isinstance(annotation, type) and about is not None:  # a model, such as Box[T], which is Box where T is its own
        if not any(parameter in given for parameter in about["parameters"]):
            return annotation
        open_: Any = annotation
        return open_[tuple(given.get(parameter, parameter) for parameter in about["parameters"])]
    origin = get_origin(annotation)
    if origin is None or origin is Literal:
        return annotation
    if origin is typing.Annotated:
        inner = substituted(annotation.__origin__, given)
        return annotation if inner is annotation.__origin__ else typing.Annotated[(inner, *annotation.__metadata__)]
    before = getattr(annotation, "__args__", ())
    after = tuple(substituted(item, given) for item in before)
    if all(one is other for one, other in zip(before, after, strict=True)):
        return annotation
    if origin in (typing.Union, types.UnionType):
        return typing.Union[after]  # noqa: UP007 - made of what is known at run time only
    if isinstance(annotation, types.GenericAlias):
        return types.GenericAlias(origin, after)
    return annotation.copy_with(after)


def _open(item: Any) -> Any:
    if not isinstance(item, TypeVar):
        return item
    default = getattr(item, "__default__", None)
    has_default = default is not None and "NoDefault" not in repr(default)
    return item if item.__bound__ is not None or item.__constraints__ or has_default else Any


def has_names(annotation: Any, level: int = 0) -> bool:
    """Tell whether an annotation has a name within that must be looked up."""
    if isinstance(annotation, (str, ForwardRef)):
        return True
    origin = get_origin(annotation)
    if level > _MOST_LEVELS or origin is None or origin is Literal:
        return False
    inner = (annotation.__origin__,) if origin is typing.Annotated else getattr(annotation, "__args__", ())
    return any(has_names(item, level + 1) for item in inner)


# --- names that are taken --------------------------------------------------------------------------------------------


def refuse_shadowing(job_type: type[Any], roots: tuple[type[Any], ...], may_set: frozenset[str]) -> None:
    """Refuse a class with an attribute of its own under a name that the engine uses for what it knows of a job.

    Raises:
        JobDefinitionError: It has one, itself or by a mixin, which would lie, hang or be hidden.
    """
    known = {name for root in roots for name in (*root.__dict__, *inspect.get_annotations(root))}
    taken = {name for name in known if not name.startswith("__")} - may_set
    for cls in job_type.__mro__:
        if cls in roots or cls is typing.Generic or cls.__module__ == "builtins":
            continue
        own = {name for name in cls.__dict__ if name not in _SET_BY_US or "definition" not in cls.__dict__}
        annotated = {name for name in inspect.get_annotations(cls) if name not in _NARROWED}
        clash = min(taken & (own | annotated), default=None)
        if clash is not None:
            where = "" if cls is job_type else f" by its base {cls.__module__}.{cls.__qualname__}"
            what = "is the engine's" if clash.startswith("_") else "is what the engine says of each job"
            msg = (
                f"job class {job_type.__qualname__}: {clash!r} is set{where}, but job.{clash} {what}; give it another name, "
                f"such as {'my' if clash.startswith('_') else 'my_'}{clash}"
            )
            raise JobDefinitionError(msg)


_SET_BY_US: Final = frozenset({"definition", "kind"})
_NARROWED: Final = frozenset({"context", "result"})  # an annotation without a value says what is so
