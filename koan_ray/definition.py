"""What a job class declares, read once and checked: kind, types, retry, resources, the shape of `execute`."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_args, runtime_checkable

import pydantic
from pydantic_core import ValidationError

from koan_ray import declared
from koan_ray.declared import Names
from koan_ray.domain.durations import Duration, bound, number
from koan_ray.domain.metadata import MetadataError, plain_metadata
from koan_ray.domain.records import ActorSpec, Terms, identified
from koan_ray.domain.retry import RetryPolicy
from koan_ray.domain.status import Claim, Isolation, ParentPolicy
from koan_ray.domain.texts import quoted, readable, said
from koan_ray.errors import ConfigurationError, InvalidContextError, JobDefinitionError, PayloadTooLargeError
from koan_ray.exact import Codec, NotExactError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import timedelta

    from koan_ray.jobs import JobExecution

_WHOLE = "(whole context)"
_PARAMETERS = ("context", "progress", "cancellation")
_CONTAINERS = (dict, list, tuple, set, frozenset)
_MAX_AMOUNT = 2.0**63  # documents hold no larger whole number
_LEADS = 16  # jobs over items that one process goes through at a time
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Resources:
    """What the actor of a job holds while the job runs; the meaning of each is Ray's.

    Args:
        num_cpus: Cores, also fractions; 0 is allowed but starts no node in an autoscaling cluster.
        num_gpus: GPUs, also fractions.
        memory: Bytes to reserve.
        custom: Custom resources by name.
        runtime_env: Ray runtime environment of the job's actors: URIs, pip packages, variables.
        label_selector: Labels of the nodes to run on.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory: int | None = None
    custom: Mapping[str, float] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] | None = None
    label_selector: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        memory = None if self.memory is None else int(_amount("memory", self.memory))
        labels = self.label_selector
        object.__setattr__(self, "num_cpus", _amount("num_cpus", self.num_cpus))
        object.__setattr__(self, "num_gpus", _amount("num_gpus", self.num_gpus))
        object.__setattr__(self, "memory", memory)
        custom = {_word("custom", name): _amount(f"custom[{quoted(name)}]", amount) for name, amount in self.custom.items()}
        object.__setattr__(self, "custom", custom)
        if labels is not None:
            selector = {_word("label_selector", name): _word("label_selector", text) for name, text in labels.items()}
            object.__setattr__(self, "label_selector", selector)

    def spec(self, *, concurrency: int, dedicated: bool) -> ActorSpec:
        """Return the spec of the actors that jobs with these resources need."""
        env = json.dumps(self.runtime_env, sort_keys=True, default=str) if self.runtime_env else None
        return ActorSpec(
            self.num_cpus, self.num_gpus, self.memory, tuple(sorted(self.custom.items())),
            tuple(sorted((self.label_selector or {}).items())), env, concurrency, dedicated,
        )  # fmt: skip


def _amount(name: str, value: object) -> float:
    """Return how much of something is asked for, as a number that every store holds."""
    amount = number(value)
    if amount is None or not 0 <= amount < _MAX_AMOUNT:
        msg = f"resources.{name}: expected a number of at least 0 and below 2**63, got {quoted(value)}"
        raise JobDefinitionError(msg)
    return amount


def _word(name: str, value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        msg = f"resources.{name}: expected names and labels as printable text, got {quoted(value)}"
        raise JobDefinitionError(msg)
    return str.__str__(value)


@runtime_checkable
class CustomRetryPolicy(Protocol):
    """A job class that judges its own failures. Either method may be left out; both are synchronous.

    They are asked in the job actor after each failure, before ``max_attempts`` is applied, with the live exception.
    """

    def should_retry(self, last_execution: JobExecution) -> bool:
        """Return False to fail now; True leaves it to ``max_attempts``."""

    def get_retry_delay(self, last_execution: JobExecution) -> timedelta | None:
        """Return the wait before the next attempt; None for the policy's own."""


class Definition:
    """Everything the engine knows of a job class."""

    def __init__(self, job_type: type[Any]) -> None:
        self.job_type = job_type
        self.kind = _kind(job_type)
        self.is_finite = any("_koan_items" in cls.__dict__ for cls in job_type.__mro__)
        _refuse_shadowing(job_type)
        self.names = _names_in_bases(job_type)
        self._look_up_early()
        self.retry = _instance(job_type, "retry", RetryPolicy)
        self.resources = _instance(job_type, "resources", Resources)
        self.timeout_s = _timeout(job_type)
        self.isolation = _member(job_type, "isolation", Isolation)
        self.when_parent_ends = _member(job_type, "when_parent_ends", ParentPolicy)
        self.claim = _member(job_type, "claim", Claim)
        self.concurrency = _concurrency(job_type)
        self.has_body = _check_items(job_type) if self.is_finite else _check_execute(job_type)
        self.is_async = inspect.iscoroutinefunction(getattr(job_type, "execute", None))
        self.is_part_async = inspect.iscoroutinefunction(getattr(job_type, "process_item", None))
        self.judges = _judges(job_type)
        self.source_digest = _source_digest(job_type)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the adapters behind: a class that travels by value builds its own."""
        _ = self.types  # names are looked up where they are known
        return {
            name: value
            for name, value in self.__dict__.items()
            if name != "names" and not name.endswith(("_adapter", "_codec"))
        }

    names: Names | None = None  # of a class by value, all is looked up

    @cached_property
    def types(self) -> tuple[Any, Any]:
        """The declared types of context and result.

        Raises:
            JobDefinitionError: One of them names something that is not defined.
        """
        try:
            return _types(self.job_type, self)
        except NameError as error:
            msg = (
                f"job {self.kind!r}: the context or result type names {error.name!r}, which is not defined in module "
                f"{self.job_type.__module__!r}; define it there, or import it outside of `if TYPE_CHECKING:`"
            )
            raise JobDefinitionError(msg) from None
        except TypeError as error:
            msg = f"job class {self.job_type.__qualname__}: its context or result type cannot be resolved: {error}"
            raise JobDefinitionError(msg) from None

    @property
    def context_type(self) -> Any:
        """What contexts are declared as."""
        return self.types[0]

    @property
    def result_type(self) -> Any:
        """What results are declared as."""
        return self.types[1]

    def _look_up_early(self) -> None:
        """Look types up now, if all that they name is defined by now; else they are looked up when they are needed."""
        try:
            self.types = _types(self.job_type, self)
        except (NameError, TypeError):
            return
        if self.names is not None:
            self.names.settle()

    @cached_property
    def context_adapter(self) -> pydantic.TypeAdapter[Any]:
        """Validates and writes contexts."""
        return self._adapter(self.context_type, "context")

    @cached_property
    def result_adapter(self) -> pydantic.TypeAdapter[Any]:
        """Validates and writes results."""
        return self._adapter(self.result_type, "result")

    def terms(self, code_id: str, *, retry: RetryPolicy | None = None, timeout_s: float | None = None) -> Terms:
        """Return what the engine must know to run jobs of this class, with a recipe's replacements."""
        spec = self._spec()
        isolation = self.isolation
        if self.is_finite:  # its items are done in actors as declared; what leads them needs a process and nothing more
            spec = ActorSpec(num_cpus=0.0, runtime_env=spec.runtime_env, concurrency=_LEADS, lead=True)
            isolation = Isolation.POOLED
        terms = Terms(
            "", self.kind, code_id, retry or self.retry, timeout_s if timeout_s is not None else self.timeout_s, spec,
            isolation, self.when_parent_ends, self.claim,
        )  # fmt: skip
        return identified(terms)

    def part_terms(self, lead: Terms) -> Terms:
        """Return what the engine must know to run chunks of the items of a job with the terms ``lead``."""
        once = RetryPolicy(max_attempts=1)
        part = lead._replace(retry=once, timeout_s=None, spec=self._spec(), isolation=self.isolation, part=True)
        return identified(part._replace(claim=Claim.WRITE_BEHIND))  # nothing is written of it

    def runs_on_loop(self, terms: Terms) -> bool:
        """Tell whether the body that runs under these terms is a coroutine."""
        return self.is_part_async if terms.part else self.is_async

    def _spec(self) -> ActorSpec:
        return self.resources.spec(concurrency=self.concurrency, dedicated=self.isolation is Isolation.DEDICATED)

    @cached_property
    def context_codec(self) -> Codec:
        """Writes contexts that read back as they are, and reads them."""
        return Codec(self.context_adapter)

    @cached_property
    def result_codec(self) -> Codec:
        """Writes results that read back as they are, and reads them."""
        return Codec(self.result_adapter)

    def encode_context(self, context: object) -> bytes:
        """Return a context as JSON that reads back as the same value of the declared type.

        Raises:
            InvalidContextError: It does not fit the declared type, or would not reach the body as it is; with the path.
        """
        codec = self.context_codec
        encoded = codec.plainly(context)
        if encoded is not None:
            return encoded
        try:
            value = self.context_adapter.validate_python(context)
            _refuse_lost(context, value)
            encoded = codec.plainly(value) if value is not context else None
            return codec.write(value) if encoded is None else encoded
        except ValidationError as error:
            raise InvalidContextError(self.kind, _problems(error)) from None
        except NotExactError as error:
            raise InvalidContextError(self.kind, [(readable(error.path) or _WHOLE, readable(error.what))]) from None
        except Exception as error:
            raise InvalidContextError(self.kind, [(_WHOLE, f"its validation raised {_raised(error)}")]) from error

    def parse_context(self, written: bytes) -> Any:
        """Return a context that somebody wrote as JSON, as the declared type.

        Raises:
            InvalidContextError: It is no JSON, or does not fit; with the paths of the fields.
        """
        by_name: dict[str, Any] = {"by_name": True} if self.context_codec.reads_by_name else {}
        try:
            return self.context_adapter.validate_json(written, **by_name)
        except ValidationError as error:
            raise InvalidContextError(self.kind, _problems(error)) from None

    def decode_context(self, encoded: bytes) -> Any:
        """Return a context as the declared type.

        Raises:
            ContextRejectedError: It does not fit; the class differs from the one that the job was started with.
        """
        try:
            return self.context_codec.read(encoded)
        except ValidationError as error:
            raise ContextRejectedError(str(InvalidContextError(self.kind, _problems(error)))) from None

    def decode_result(self, encoded: bytes) -> Any:
        """Return a result as the declared type."""
        return self.result_codec.read(encoded)

    def encode_result(self, result: object, limit: int) -> bytes:
        """Return a result as JSON that reads back as the same value.

        Raises:
            ResultRejectedError: It is not of the declared type, would not reach a waiter as it is or is too large; in plain
                words, with the path.
        """
        encoded = self.result_codec.plainly(result)
        if encoded is None:
            encoded = self._checked_result(result)
        if len(encoded) > limit:
            raise ResultRejectedError(str(PayloadTooLargeError(self.kind, "result", len(encoded), limit)))
        return encoded

    def _checked_result(self, result: object) -> bytes:
        try:
            value = self.result_adapter.validate_python(result, strict=True)
            _refuse_lost(result, value)
            return self.result_codec.write(value)
        except ValidationError as error:
            problem = "; ".join(f"{path}: {message}" for path, message in _problems(error))
            raise ResultRejectedError(self._mismatch(result, problem)) from None
        except NotExactError as error:
            raise ResultRejectedError(self._mismatch(result, readable(str(error)))) from None
        except Exception as error:
            raise ResultRejectedError(self._mismatch(result, f"its validation raised {_raised(error)}")) from error

    def _mismatch(self, result: object, problem: str) -> str:
        declared = _name(self.result_type)
        return (
            f"job {self.kind!r}: execute() returned {type(result).__name__}, declared result is {declared} ({problem}); "
            f"return a value of the declared type or correct the declaration"
        )

    def _adapter(self, declared: Any, what: str) -> pydantic.TypeAdapter[Any]:
        try:
            return pydantic.TypeAdapter(declared)
        except pydantic.PydanticSchemaGenerationError:
            msg = (
                f"job {self.kind!r}: the {what} type {_name(declared)} is nothing pydantic can validate; use a model, "
                f"dataclass, TypedDict or builtin type"
            )
            raise JobDefinitionError(msg) from None
        except pydantic.PydanticUndefinedAnnotation as error:
            msg = f"job {self.kind!r}: the {what} type {_name(declared)} names {error.name!r}, which is not defined"
            raise JobDefinitionError(msg) from None
        except pydantic.PydanticUserError as error:
            msg = f"job {self.kind!r}: the {what} type {_name(declared)} cannot be used: {error.message}"
            raise JobDefinitionError(msg) from None


class ContextRejectedError(Exception):
    """A stored context no longer fits its class. Becomes the failed job's error; never raised to users."""


class ResultRejectedError(Exception):
    """A body returned what its class does not declare. Becomes the failed job's error; never raised to users."""


def encode_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata as plain JSON values.

    Raises:
        InvalidContextError: A key cannot be one, or a value cannot be kept; see `koan_ray.domain.metadata`.
    """
    try:
        return plain_metadata(metadata)
    except MetadataError as error:
        raise InvalidContextError("", [(error.path, error.problem)], "metadata") from None


def _refuse_lost(given: Any, value: Any, path: tuple[str, ...] = ()) -> None:
    """Refuse a value that validation has made less of: pydantic drops what a TypedDict does not declare, and equal keys.

    Raises:
        NotExactError: With the path of the first such place.
    """
    if given is value:
        return
    kind = type(given)
    if kind is int and type(value) is float and given != value:
        raise NotExactError(".".join(path), f"is {given}, which no float is; declare int")
    if kind is not type(value) or kind not in _CONTAINERS:
        return
    if len(given) > len(value):
        lost = [repr(key)[:60] for key in given if key not in value][:3]
        what = f"{', '.join(lost)} is not declared there" if lost else "some of its elements become equal by validation"
        raise NotExactError(".".join(path), f"would arrive with {len(value):,} of {len(given):,} elements; {what}")
    if kind is dict:
        for name, inner in given.items():
            if name in value:
                _refuse_lost(inner, value[name], (*path, str(name)))
    elif kind in (list, tuple) and len(given) == len(value):
        for place, (one, other) in enumerate(zip(given, value, strict=True)):
            if one is not other:
                _refuse_lost(one, other, (*path, str(place)))


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {said(error, 500)}"


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    return [(".".join(map(str, item["loc"])) or _WHOLE, item["msg"]) for item in error.errors(include_url=False)]


def _name(declared: Any) -> str:
    return getattr(declared, "__name__", None) or str(declared)


def _kind(job_type: type[Any]) -> str:
    kind = job_type.__dict__.get("kind", job_type.__name__)
    if not isinstance(kind, str) or not kind or len(kind) > 200 or not kind.isprintable():
        msg = f"job class {job_type.__qualname__}: kind must be printable text of 1 to 200 characters, got {quoted(kind)}"
        raise JobDefinitionError(msg)
    if kind in (".", ".."):
        msg = f"job class {job_type.__qualname__}: kind {kind!r} cannot stand in an address; give it another"
        raise JobDefinitionError(msg)
    return kind


_ITS_OWN = frozenset({  # what a job class says of itself, and the methods that it has for the engine to call
    "kind", "retry", "timeout", "resources", "isolation", "concurrency", "when_parent_ends", "claim", "execute", "items",
    "get_items", "process_item", "build_result", "count_items", "resume_from", "get_cursor", "should_retry",
    "get_retry_delay",
})  # fmt: skip


def _roots(job_type: type[Any]) -> tuple[type[Any], ...]:
    """Return `Job`, and `FiniteJob` where it is one, by their marks: they stand beside."""
    return tuple(cls for cls in job_type.__mro__ if "_koan_root" in cls.__dict__ or "_koan_items" in cls.__dict__)


def _refuse_shadowing(job_type: type[Any]) -> None:
    if "_koan_items" not in job_type.__dict__:  # FiniteJob itself may
        declared.refuse_shadowing(job_type, _roots(job_type), _ITS_OWN)


def _names_in_bases(job_type: type[Any]) -> Names | None:
    bases = job_type.__dict__.get("__orig_bases__", ())
    return Names(job_type) if any(declared.has_names(item) for base in bases for item in get_args(base)) else None


def _types(job_type: type[Any], own: Definition) -> tuple[Any, Any]:
    """Return context and result type as given by the class or its bases."""

    def names_of(cls: type[Any]) -> Names | None:
        definition = own if cls is job_type else cls.__dict__.get("definition")
        return definition.names if definition is not None else None

    context, result = declared.arguments(job_type, _roots(job_type)[-1], names_of)[:2]
    return context, result


def _source_digest(job_type: type[Any]) -> str | None:
    """Return the digest of the file of a class's module as it is now, when the class is defined; None if there is none.

    Later the file may hold another version than the one that was loaded.
    """
    file = getattr(sys.modules.get(job_type.__module__), "__file__", None)
    if file is None or job_type.__module__ == "__main__" or "<locals>" in job_type.__qualname__:
        return None
    try:
        return hashlib.blake2b(Path(file).read_bytes(), digest_size=12).hexdigest()
    except OSError:
        return None


def _instance(job_type: type[Any], name: str, expected: type[T]) -> T:
    value = getattr(job_type, name)
    if not isinstance(value, expected):
        msg = f"job class {job_type.__qualname__}: {name} must be a {expected.__name__}, got {quoted(value)}"
        raise JobDefinitionError(msg)
    return value


def _member(job_type: type[Any], name: str, expected: Any) -> Any:
    value = getattr(job_type, name)
    try:
        return expected(value)
    except ValueError:
        allowed = ", ".join(f"{expected.__name__}.{member.name}" for member in expected)
        msg = f"job class {job_type.__qualname__}: {name} must be one of {allowed}, got {quoted(value)}"
        raise JobDefinitionError(msg) from None


def _timeout(job_type: type[Any]) -> float | None:
    value: Duration | None = job_type.timeout
    if value is None:
        return None
    try:
        timeout_s = bound(value, name=f"job class {job_type.__qualname__}: timeout")
    except ConfigurationError as error:
        raise JobDefinitionError(str(error)) from None
    if timeout_s == 0:
        msg = f"job class {job_type.__qualname__}: timeout must be longer than 0 s; use None for no timeout"
        raise JobDefinitionError(msg)
    return timeout_s


def _concurrency(job_type: type[Any]) -> int:
    value = job_type.concurrency
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10_000:
        msg = f"job class {job_type.__qualname__}: concurrency must be 1 to 10,000, got {quoted(value)}"
        raise JobDefinitionError(msg)
    return value


def _check_execute(job_type: type[Any]) -> bool:
    execute = getattr(job_type, "execute", None)
    if execute is None or getattr(execute, "_koan_missing", False):
        return False
    where = f"job class {job_type.__qualname__}: execute"
    shape = "execute(self, context, progress, cancellation)"
    if not inspect.isfunction(execute) or inspect.isgeneratorfunction(execute) or inspect.isasyncgenfunction(execute):
        msg = f"{where} must be a plain or async method that returns the result; write {shape}"
        raise JobDefinitionError(msg)
    _check_call(execute, where, _PARAMETERS, shape)
    return True


def _check_call(method: Any, where: str, parameters: Sequence[str], shape: str) -> None:
    """Refuse a method that the engine could not call."""
    try:
        inspect.signature(method).bind(None, *parameters)
    except TypeError:
        msg = f"{where}{inspect.signature(method)} cannot be called with ({', '.join(parameters)}); write {shape}"
        raise JobDefinitionError(msg) from None


def _check_items(job_type: type[Any]) -> bool:
    """Check the three methods of a job over items; false while one of them is missing."""
    shapes = {
        "get_items": ("context",),
        "process_item": ("item", "index", "progress"),
        "build_result": ("summary",),
    }
    found = {name: getattr(job_type, name) for name in shapes}
    if any(getattr(method, "_koan_missing", False) for method in found.values()):
        return False
    for name, parameters in shapes.items():
        where, shape = f"job class {job_type.__qualname__}: {name}", f"{name}(self, {', '.join(parameters)})"
        method = found[name]
        is_generator = inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method)
        if not inspect.isfunction(method) or (is_generator and name != "get_items"):
            msg = f"{where} must be a plain or async method; write {shape}"
            raise JobDefinitionError(msg)
        _check_call(method, where, parameters, shape)
    if hasattr(job_type, "resume_from") != hasattr(job_type, "get_cursor"):
        msg = (
            f"job class {job_type.__qualname__}: resume_from(self, context, cursor) and get_cursor(self, item) belong "
            f"together; define both or neither"
        )
        raise JobDefinitionError(msg)
    if not getattr(job_type.execute, "_koan_conducts", False):
        msg = f"job class {job_type.__qualname__}: a FiniteJob has no execute of its own; the engine goes through the items"
        raise JobDefinitionError(msg)
    _instance(job_type, "items", type(job_type._koan_items))  # noqa: SLF001 - set by FiniteJob, which stands beside
    return True


def _judges(job_type: type[Any]) -> bool:
    found = False
    for name in ("should_retry", "get_retry_delay"):
        method = getattr(job_type, name, None)
        if method is None:
            continue
        if inspect.iscoroutinefunction(method):
            msg = f"job class {job_type.__qualname__}: {name} must be synchronous (def, not async def)"
            raise JobDefinitionError(msg)
        found = True
    return found
