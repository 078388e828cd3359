"""What a job actor does with a chunk of a `FiniteJob`'s items, and how items travel.

Items go as one pickle, with classes by value where the actor cannot import them; it is made and read inside a cluster and
stored nowhere. What comes back is plain: a byte for each item, values and failures as JSON and text.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections import Counter, OrderedDict
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import cloudpickle  # type: ignore[import-untyped]
from pydantic_core import to_json

from koan_ray.domain.items import FAILED, PROCESSED, PRODUCED, RETRY, SKIPPED, Failure, Outcomes
from koan_ray.domain.records import MAX_ERROR_MESSAGE, MAX_PART, ErrorInfo
from koan_ray.domain.texts import quoted, readable, said
from koan_ray.engine.attempt import describe_any
from koan_ray.engine.awaiting import awaited, is_awaitable
from koan_ray.engine.produce import in_arrays
from koan_ray.engine.raised import isa, meaning
from koan_ray.exact import loose
from koan_ray.finite import ItemResult, Success

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from koan_ray.cancellation import CancellationToken
    from koan_ray.domain.records import JobView
    from koan_ray.finite import FiniteJob
    from koan_ray.progress import JobProgress

_MAX_SHOWN = 2_000  # bytes of an item in the record of its failure
_MAX_VALUE = MAX_PART - 65_536
_MAX_REASON = 200
_MAX_TRACES = 100  # failures of a chunk that keep their stack trace
_FULL = 8 * 1_048_576  # bytes of values and failures after which a chunk gives back what it has not begun
_KEPT_JOBS = 8
_LOOK_S = 0.001  # between two looks at the clock and the token, about
_MAX_STRIDE = 1024
_SUCCESS = ItemResult.success()
_PLAIN = (int, float, bool)
_TOGETHER = 16_384  # numbers that are written together


class ChunkOrder(NamedTuple):
    """A chunk on its way to an actor."""

    lead: str  # the execution of the job that sent it
    view: JobView  # the job
    indexes: Sequence[int]
    items: bytes
    limit_s: float | None  # what was not begun after this goes back


def dump(items: list[Any]) -> bytes:
    """Return items as bytes; raises whatever is in the way."""
    blob: bytes = cloudpickle.dumps(items, protocol=5)
    return blob


def write(order: ChunkOrder) -> bytes:
    """Return an order as bytes."""
    return pickle.dumps(tuple(order), protocol=5)


def shown(item: object) -> bytes:
    """Return an item for people, as JSON; its ``repr`` where JSON cannot hold it, and cut where it is long."""
    try:
        encoded = to_json(item, inf_nan_mode="strings")
    except BaseException:  # noqa: BLE001 - anything may be an item, and what writes it may be its own code
        encoded = to_json(quoted(item, _MAX_SHOWN))
    if len(encoded) <= _MAX_SHOWN:
        return encoded
    return to_json(encoded[: _MAX_SHOWN - 3].decode(errors="ignore") + "…")


# --- in the actor ------------------------------------------------------------------------------------------------------

_jobs: OrderedDict[str, FiniteJob[Any, Any, Any]] = OrderedDict()  # by lead; one object serves all of a job's items here
_finding = threading.Lock()  # two chunks of a job may begin at the same time


def _job_of(order: ChunkOrder, job_type: type[FiniteJob[Any, Any, Any]]) -> FiniteJob[Any, Any, Any]:
    with _finding:
        job = _jobs.get(order.lead)
        if job is None:
            job = _jobs[order.lead] = job_type._in_hand(order.view)  # noqa: SLF001 - instances are made by the engine
            while len(_jobs) > _KEPT_JOBS:
                _jobs.popitem(last=False)
        return job


class _Desk:
    """Takes in the results of a chunk's items."""

    __slots__ = ("codes", "failures", "items", "job", "order", "plain", "reasons", "size", "values")

    def __init__(self, payload: bytes, job_type: type[FiniteJob[Any, Any, Any]]) -> None:
        self.order = ChunkOrder(*pickle.loads(payload))  # noqa: S301 - made inside this cluster
        self.items: list[Any] = pickle.loads(self.order.items)  # noqa: S301 - as above
        self.job = _job_of(self.order, job_type)
        self.codes = bytearray(len(self.items))
        self.values: list[tuple[bytes, int]] = []  # JSON arrays without their brackets, and their lengths
        self.plain: list[Any] = []  # numbers, which are written together: that takes a tenth of writing each
        self.failures: list[Failure] = []
        self.reasons: Counter[str] = Counter()
        self.size = 0  # bytes of values and failures

    def take(self, place: int, result: object) -> None:
        """Note what ``process_item`` returned."""
        if result is _SUCCESS:
            self.codes[place] = PROCESSED
        elif not isinstance(result, ItemResult):
            text = (
                f"process_item() returned {type(result).__name__}, not an ItemResult; return ItemResult.success(value), "
                f".skipped(reason) or .failed(error)"
            )
            self._fail(place, ErrorInfo("TypeError", text), FAILED)
        elif result.outcome == "success":
            self._keep(place, result.value)
        elif result.outcome == "skipped":
            self.codes[place] = SKIPPED
            if result.reason is not None:
                self.reasons[said(result.reason, _MAX_REASON)] += 1
        else:
            self.refuse(place, result.reason)

    def refuse(self, place: int, error: object) -> None:
        """Note that an item failed with ``error``."""
        code = RETRY
        if isa(error, BaseException) and (what := meaning(cast("BaseException", error))).outcome == "non_retryable":
            error, code = what.error, FAILED
        self._fail(place, describe_any(error, "ItemFailed"), code)

    def _keep(self, place: int, value: object) -> None:
        if not self.job.items.keep_values:
            self.codes[place] = PROCESSED
            return
        try:  # now, because the body may go on to change what it has returned
            encoded = loose.encoded([self.order.indexes[place], value] if self.job.items.ordered else value)
        except Exception as problem:  # noqa: BLE001 - anything may be a value
            text = (
                f"the value of the item, a {type(value).__name__}, cannot be written as JSON: {said(problem, 1000)}; return "
                f"plain values, models or dataclasses"
            )
            self._fail(place, ErrorInfo(type(problem).__name__, readable(text, MAX_ERROR_MESSAGE)), FAILED)
            return
        if len(encoded) > _MAX_VALUE:
            text = (
                f"the value of the item takes {len(encoded):,} bytes as JSON, the limit is {_MAX_VALUE:,}; store it "
                f"elsewhere and return a reference to it"
            )
            self._fail(place, ErrorInfo("PayloadTooLargeError", text), FAILED)
            return
        self.settle_plain()
        self.codes[place] = PRODUCED
        self.values.append((encoded, 1))
        self.size += len(encoded)

    def settle_plain(self) -> None:
        """Write the numbers that were put aside, before a value that is none, so that all are in order."""
        if self.plain:
            encoded = to_json(self.plain)[1:-1]
            if b"N" in encoded or b"I" in encoded:  # not a number, or infinity, for which JSON has no word
                encoded = loose.encoded(self.plain)[1:-1]
            self.values.append((encoded, len(self.plain)))
            self.plain.clear()
            self.size += len(encoded)

    def _fail(self, place: int, error: ErrorInfo, code: int) -> None:
        self.codes[place] = code
        if len(self.failures) >= _MAX_TRACES:
            error = error._replace(stack_trace="")
        failure = Failure(place, error, shown(self.items[place]))
        self.failures.append(failure)
        self.size += failure.size

    def result(self, duration_s: float) -> bytes:
        self.settle_plain()
        arrays = tuple(in_arrays(self.values))
        outcomes = Outcomes(bytes(self.codes), arrays, tuple(self.failures), tuple(self.reasons.items()), duration_s)
        return pickle.dumps(tuple(outcomes), protocol=5)


def read_outcomes(result: bytes) -> Outcomes:
    """Return what an actor said of a chunk."""
    return Outcomes(*pickle.loads(result))  # noqa: S301 - made inside this cluster


def process_blocking(
    payload: bytes, job_type: type[FiniteJob[Any, Any, Any]], progress: JobProgress, token: CancellationToken
) -> bytes | Coroutine[Any, Any, bytes]:
    """Process a chunk in this thread, one item after the other.

    A coroutine when ``process_item`` turns out to give something to await: it goes on with that item, and the rest.
    """
    desk = _Desk(payload, job_type)
    process, take, codes, put_aside = desk.job.process_item, desk.take, desk.codes, desk.plain.append
    plain_types = _PLAIN if desk.job.items.keep_values and not desk.job.items.ordered else ()
    began = looked = monotonic()
    until = began + desk.order.limit_s if desk.order.limit_s is not None else float("inf")
    stride, look_at = 1, 1
    for place, (item, index) in enumerate(zip(desk.items, desk.order.indexes, strict=True), start=1):
        try:
            result = process(item, index, progress)
            if result is _SUCCESS:
                codes[place - 1] = PROCESSED
            elif type(result) is Success and type(value := result.value) in plain_types:
                codes[place - 1] = PRODUCED
                put_aside(value)
            elif not isinstance(result, ItemResult) and is_awaitable(result):
                return _process(desk, progress, token, from_place=place - 1, given=result)
            else:
                take(place - 1, result)
        except asyncio.CancelledError as error:
            if token.requested:  # the item is given back
                break
            desk.refuse(place - 1, error)
        except BaseException as error:  # noqa: BLE001 - whatever a body raises becomes its outcome
            desk.refuse(place - 1, error)
        if place >= look_at:
            now = monotonic()
            if now >= until or token.requested or desk.size > _FULL:
                break
            if len(desk.plain) >= _TOGETHER:
                desk.settle_plain()
            stride = min(stride * 2, _MAX_STRIDE) if now - looked < _LOOK_S else max(1, stride // 2)
            look_at, looked = place + stride, now
    return desk.result(monotonic() - began)


def _look_at(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        done.exception()


async def process(
    payload: bytes, job_type: type[FiniteJob[Any, Any, Any]], progress: JobProgress, token: CancellationToken
) -> bytes:
    """Process a chunk on this loop, ``ItemOptions.concurrency`` items at a time."""
    return await _process(_Desk(payload, job_type), progress, token)


async def _process(
    desk: _Desk, progress: JobProgress, token: CancellationToken, *, from_place: int = 0, given: Any = None
) -> bytes:
    """Process a chunk from a place on; ``given``: what the item there gave already, to be awaited."""
    now = asyncio.get_running_loop().time
    began = now()
    until = began + desk.order.limit_s if desk.order.limit_s is not None else float("inf")
    places = iter(range(from_place, len(desk.items)))
    indexes = desk.order.indexes

    async def go_on(given: Any = None) -> None:
        for place in places:
            try:
                result = given if given is not None else desk.job.process_item(desk.items[place], indexes[place], progress)
                given = None
                desk.take(place, await awaited(result) if is_awaitable(result) else result)
            except asyncio.CancelledError as error:
                if token.requested:
                    return
                desk.refuse(place, error)
            except BaseException as error:  # noqa: BLE001 - whatever a body raises becomes its outcome
                desk.refuse(place, error)
            if now() >= until or token.requested or desk.size > _FULL:
                return

    width = min(desk.job.items.concurrency, len(desk.items) - from_place)
    going = asyncio.gather(*[asyncio.ensure_future(go_on(None if n else given)) for n in range(width)])
    going.add_done_callback(_look_at)  # asyncio logs what nobody has looked at
    asked_to_stop = asyncio.ensure_future(token.wait())
    both: set[asyncio.Future[Any]] = {going, asked_to_stop}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not going.done():
            going.cancel()
            await asyncio.wait({going})
        elif not going.cancelled():
            going.result()
    finally:
        asked_to_stop.cancel()
        going.cancel()
    return desk.result(now() - began)
