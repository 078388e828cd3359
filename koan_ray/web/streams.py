"""Live streams: server-sent events and WebSockets, of one job and of all."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import Header, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from koan_ray.domain.ids import checked_id
from koan_ray.domain.status import JobStatus
from koan_ray.domain.texts import said
from koan_ray.progress import JobProgressUpdate
from koan_ray.telemetry import logs
from koan_ray.web import presenting, problems
from koan_ray.web.hub import Batch, Event
from koan_ray.web.redaction import clean_text
from koan_ray.web.routing import Table
from koan_ray.web.schemas import Ask, Change, Gap, JobId, Kind, Progress, Removed
from koan_ray.web.security import Principal, Role
from koan_ray.web.service import Api, Caller, Service

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from starlette.types import Send

    from koan_ray.domain.records import JobRecord

routes = Table("live")
_KEEP_ALIVE_S: Final = 15.0
_BUFFER: Final = 64
_GOING_DOWN: Final = 1012  # of a WebSocket: connect again, as uvicorn says it
_SSE: Final = "text/event-stream"
_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends the response ends their source as well."""

    media_type = _SSE

    async def stream_response(self, send: Send) -> None:
        """Send until the source ends or the reader is gone."""
        try:
            await super().stream_response(send)
        finally:
            close = getattr(self.body_iterator, "aclose", None)
            if close is not None:
                await close()


def sse(name: str, data: str, event_id: object = None) -> str:
    """Return one event as it goes over the wire; ``data`` is JSON, which has no line breaks."""
    head = f"id: {event_id}\n" if event_id is not None else ""
    return f"{head}event: {name}\ndata: {data}\n\n"


class _Updates:
    """One job's progress on its way to one reader: the newest `_BUFFER` updates, the last one never lost."""

    def __init__(self, service: Service, job: JobRecord) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._updates: deque[JobProgressUpdate | BaseException] = deque(maxlen=_BUFFER)
        self._stop = service.session.watch_id(job.id, self._deliver)

    def end(self) -> None:
        """Let the reader go."""
        self._news.set()

    def _deliver(self, update: JobProgressUpdate | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed under its reader
            self._loop.call_soon_threadsafe(self._put, update)

    def _put(self, update: JobProgressUpdate | BaseException) -> None:
        self._updates.append(update)
        self._news.set()

    async def next(self, timeout_s: float) -> JobProgressUpdate | BaseException | None:
        """Return the next update; None if there is none in time."""
        if not self._updates:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
        return self._updates.popleft() if self._updates else None

    def close(self) -> None:
        """Watch no more."""
        self._stop()


async def _progress(service: Service, job: JobRecord, who: Principal, after: int) -> AsyncGenerator[Progress | None]:
    """Yield the states of a job that are newer than ``after`` until its end; None now and then when there is no news."""
    updates = _Updates(service, job)
    try:
        with service.hub.ending(updates.end):
            while not service.hub.is_closed and not who.is_expired(time.time()):
                update = await updates.next(_KEEP_ALIVE_S)
                if update is None:
                    yield None
                elif isinstance(update, BaseException):
                    if not isinstance(update, Exception):
                        raise update
                    raise problems.noted(update) from update
                else:
                    is_final = update.status.is_final
                    if update.sequence > after or is_final:
                        after = max(update.sequence, after + is_final)  # the end is told, whatever had been told before
                        yield _shown(update, after)
                    if is_final:
                        return
    finally:
        updates.close()


def _shown(update: JobProgressUpdate, sequence: int) -> Progress:
    return Progress(
        job_id=update.job_id,
        sequence=sequence,
        status=update.status,
        percentage=min(1.0, max(0.0, update.percentage)),
        message=clean_text(update.message) if update.message else None,
        current_step=update.current_step,
        total_steps=update.total_steps,
        estimated_completion=update.estimated_completion,
        updated_at=update.updated_at,
    )


_END = "-end"  # behind the number in the id of a job's last event
LastEventId = Annotated[
    str, Header(pattern=rf"^([0-9]{{1,16}}({_END})?)?$", description="The id of the last event that was seen.")
]


@routes.get(
    "/api/jobs/{job_id}/events",
    Role.VIEWER,
    response_class=EventStream,
    problems=(404,),
    responses={
        200: {
            "content": {_SSE: {"schema": {"type": "string"}}},
            "description": "Events `progress`, then `problem` or the end.",
        },
        204: {"description": "The job has ended, and its end was seen."},
    },
)
async def job_events(job_id: JobId, api: Api, who: Caller, request: Request, last_event_id: LastEventId = "") -> Response:
    """Follow one job: its latest progress now, each newer one, and last the one with its final status.

    The id of an event is the progress sequence, of the last one with ``-end`` behind it. With ``Last-Event-ID`` only newer
    ones are sent, and nothing after the end: 204, at which browsers stop asking.
    """
    job = await api.reader.job(job_id)
    seen = last_event_id or "-1"
    if job.status.is_final and seen.endswith(_END):
        return Response(status_code=204)
    after = int(seen.removesuffix(_END))
    api.hub.check()

    async def events() -> AsyncIterator[str]:
        with api.hub.stream():
            yield "retry: 1000\n\n"
            try:
                async with contextlib.aclosing(_progress(api, job, who, after)) as updates:
                    async for progress in updates:
                        if progress is None:
                            yield ": still here\n\n"
                        else:
                            end = _END if progress.status.is_final else ""
                            yield sse("progress", progress.model_dump_json(), f"{progress.sequence}{end}")
            except problems.ProblemError as problem:
                yield sse("problem", problems.document(problem, "", request.state.request_id).model_dump_json())

    return EventStream(events(), headers=_HEADERS)


class EventFilters(Ask):
    """Which jobs a stream of all tells of."""

    kind: Annotated[list[Kind], Query(max_length=50)] | None = None
    parent_job_id: JobId | None = None


@routes.get(
    "/api/events",
    Role.VIEWER,
    response_class=EventStream,
    responses={
        200: {
            "content": {_SSE: {"schema": {"type": "string"}}},
            "description": "Events `job`, `progress`, `removed`, and `gap` when some were dropped: read the list anew.",
        }
    },
)
async def all_events(
    api: Api, who: Caller, filters: Annotated[EventFilters, Query()], last_event_id: LastEventId = ""
) -> Response:
    """Follow all jobs: the newest state of each that changes, coalesced.

    Changes that are made while nobody listens are not kept: a reader that comes back is told of a gap first.
    """
    api.hub.check()
    shown: dict[str, None] = {}  # jobs that the filters let through, for their progress

    async def events() -> AsyncIterator[str]:
        with api.hub.stream():
            async with contextlib.aclosing(_batches(api, who, is_back=last_event_id != "")) as batches:
                async for batch in batches:
                    yield _shown_batch(batch, filters, shown) if batch is not None else ": still here\n\n"

    return EventStream(events(), headers=_HEADERS)


async def _batches(api: Service, who: Principal, *, is_back: bool) -> AsyncGenerator[Batch | None]:
    """Yield what changes, until the credential expires or the app goes down; None now and then when there is no news."""
    async with api.hub.reading() as reading:
        yield Batch([Event("open", "", None, api.hub.last_number)])
        if is_back:
            reading.gap(None)
        while not reading.is_over and not who.is_expired(time.time()):
            found = await reading.take(_KEEP_ALIVE_S)
            for batch in found:
                yield batch
            if not found:
                yield None


def _shown_batch(batch: Batch, filters: EventFilters, shown: dict[str, None]) -> str:
    if filters.kind is None and filters.parent_job_id is None:
        return batch.text(_as_sse)
    return "".join(_as_sse(event) for event in batch.events if _passes(event, filters, shown))


def _as_sse(event: Event) -> str:
    data = _data(event)
    return ": one change cannot be shown\n\n" if data is None else sse(event.name, data, event.number or None)


def _data(event: Event) -> str | None:
    """Return the JSON of an event; None for one that cannot be shown, and the log says which: the others go on."""
    try:
        return event.data(_render)
    except Exception as error:  # noqa: BLE001 - one odd record must not end everybody's stream
        logs.get_logger().error("change_not_shown", job_id=event.job_id, problem=said(error, 500))
        return None


def _passes(event: Event, filters: EventFilters, shown: dict[str, None]) -> bool:
    if event.name in ("gap", "open"):
        return True
    if event.name != "job":
        return event.job_id in shown
    job: JobRecord = event.state
    fits = (filters.kind is None or job.terms.kind in filters.kind) and (
        filters.parent_job_id is None or job.particulars.parent_job_id == filters.parent_job_id
    )
    if fits:
        shown[job.id] = None
        if len(shown) > 10_000:
            del shown[next(iter(shown))]
    return fits


def _render(event: Event) -> str:
    if event.name == "open":
        return "{}"
    if event.name == "gap":
        return Gap(n_lost=event.state).model_dump_json()
    if event.name == "removed":
        return Removed(job_id=event.job_id).model_dump_json()
    if event.name == "job":
        return Change(job=presenting.summary(event.state)).model_dump_json()
    return presenting.progress_state(event.job_id, event.state, JobStatus.RUNNING).model_dump_json()


# --- WebSockets: the same, as messages {"event": …, "id": …, "data": …} --------------------------------------------------


@routes.socket("/api/jobs/{job_id}/ws", Role.VIEWER)
async def job_socket(socket: WebSocket, who: Principal) -> None:
    """Follow one job; closes with 1000 after its end."""
    api: Service = socket.app.state.koan
    job = await api.reader.job(checked_id(str(socket.path_params["job_id"])))

    async def tell() -> None:
        async with contextlib.aclosing(_progress(api, job, who, -1)) as updates:
            async for progress in updates:
                if progress is not None:
                    await socket.send_text(_message("progress", progress.sequence, progress.model_dump_json()))

    await _talk(socket, tell(), api)


@routes.socket("/api/ws", Role.VIEWER)
async def all_socket(socket: WebSocket, who: Principal) -> None:
    """Follow all jobs."""
    api: Service = socket.app.state.koan

    async def tell() -> None:
        async with contextlib.aclosing(_batches(api, who, is_back=False)) as batches:
            async for batch in batches:
                for event in batch.events if batch is not None else ():
                    if (data := _data(event)) is not None:
                        await socket.send_text(_message(event.name, event.number, data))

    await _talk(socket, tell(), api)


def _message(name: str, event_id: int, data: str) -> str:
    return f'{{"event":"{name}","id":{event_id},"data":{data}}}'


async def _talk(socket: WebSocket, telling: Any, api: Service) -> None:
    """Tell until there is nothing more, or the other side is gone; what it says is not read."""
    told = asyncio.ensure_future(telling)
    gone = asyncio.ensure_future(_until_gone(socket))
    try:
        await asyncio.wait([told, gone], return_when=asyncio.FIRST_COMPLETED)
        if told.done():
            told.result()
            await socket.close(_GOING_DOWN if api.hub.is_closed else 1000)
    finally:
        for task in (told, gone):
            task.cancel()
        await asyncio.wait([told, gone])
        _ = told.cancelled() or told.exception()  # a reader that was gone in the middle of a message is no news


async def _until_gone(socket: WebSocket) -> None:
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            await socket.receive()
