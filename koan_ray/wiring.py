"""Builds the engine from settings: the one place that picks concrete classes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from dataclasses import fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from koan_ray.domain.ids import new_id
from koan_ray.domain.lease import shard_name
from koan_ray.engine.broker import Broker
from koan_ray.engine.coordinator import Coordinator
from koan_ray.engine.doctor import Doctor, Patient
from koan_ray.engine.reading import Reader, Shelf
from koan_ray.engine.settings import EngineSettings
from koan_ray.engine.tenure import Source
from koan_ray.errors import ConfigurationError, RecordCorruptError
from koan_ray.ports import LoopClock
from koan_ray.stores.holders import is_dead, this_process
from koan_ray.stores.memory import MemoryStore
from koan_ray.telemetry import logs, traces

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from koan_ray.config import Settings
    from koan_ray.ports import Clock, DocumentStore, Launcher, Log

attempt_span = traces.attempt_span


def engine_settings(settings: Settings) -> EngineSettings:
    """Return the engine's numbers as the user's settings say."""
    numbers: dict[str, Any] = {"sources": tuple((name, source.url) for name, source in sorted(settings.sources.items()))}
    for field in fields(EngineSettings):
        for section in (settings.engine, settings.memory, settings.jobs):
            value = getattr(section, field.name.removesuffix("_s"), None)
            if value is not None:
                numbers[field.name] = value.total_seconds() if isinstance(value, timedelta) else value
                break
    archival = settings.archival
    return EngineSettings(
        **numbers,
        archives=archival.enabled,
        archive_interval_s=archival.check_interval.total_seconds(),
        archival_policies=archival.resolved(),
        log_level=settings.logging.level,
        log_format=settings.logging.format,
    )


def coordinator(settings: EngineSettings, launcher: Launcher, clock: Clock) -> Coordinator:
    """Return a coordinator; nothing is started. To be called where it will run: its loop is the running one."""
    store = MemoryStore(
        completed_retention_s=settings.completed_retention_s,
        faulted_retention_s=settings.faulted_retention_s,
        max_finished=settings.max_finished,
        max_part_bytes=settings.max_part_bytes,
        monotonic=clock.monotonic,
    )
    log = logs.get_logger()
    return Coordinator(
        settings, store=store, launcher=launcher, clock=clock, random=random.Random(), epoch=_epoch(),
        sources=_sources(settings), log=cast("Log", log), tells_moves=logs.is_enabled(),
    )  # fmt: skip


def _sources(settings: EngineSettings) -> list[Source]:
    """Return what keeps documents: every source but those in memory, each with a client of its own for the beat."""
    urls = {name: url for name, url in settings.sources if not url.startswith("memory://")}
    if settings.audit_source and settings.audit_source not in urls:
        msg = f"jobs.audit_source: there is no source {settings.audit_source!r} (known: {', '.join(urls) or 'none'})"
        raise ConfigurationError(msg)
    _check_policies(settings, list(urls))
    holder = this_process()
    return [
        Source(
            name,
            open_store(name, url, keeps_executions=settings.audit_source in ("", name)),
            audit=open_store(settings.audit_source, urls[settings.audit_source])
            if settings.audit_source not in ("", name)
            else None,
            heart=open_store(name, url),
            holder=holder,
            aside=_beside,
            is_dead=is_dead,
        )
        for name, url in urls.items()
    ]


def _check_policies(settings: EngineSettings, names: list[str]) -> None:
    """Refuse policies that name no source of ours, or that would part executions from their jobs."""
    for place, policy in enumerate(settings.archival_policies):
        for field in ("source", "target_source"):
            name = getattr(policy, field)
            if name is not None and name not in names:
                msg = f"archival.policies.{place}.{field}: there is no source {name!r} (known: {', '.join(names) or 'none'})"
                raise ConfigurationError(msg)
        audit, target = settings.audit_source, policy.target_source
        if audit and target not in (None, audit) and policy.source in (None, audit):
            msg = (
                f"archival.policies.{place}.target_source: jobs of {audit!r} keep their executions with them, and "
                f"{target!r} keeps none (jobs.audit_source is {audit!r}); give the policy another source than {audit!r}"
            )
            raise ConfigurationError(msg)


def check_sources(settings: EngineSettings) -> None:
    """Refuse sources that no provider here can keep; nothing is connected.

    Raises:
        ConfigurationError: A URL has no provider, or a name is not among the sources.
    """
    _sources(settings)


def open_store(
    name: str,
    url: str,
    *,
    keeps_executions: bool = True,
    read_only: bool = False,
    on_corrupt: Callable[[str, RecordCorruptError], None] | None = None,
) -> DocumentStore:
    """Return the store of a source; it connects when it is opened.

    Raises:
        ConfigurationError: No provider is known for the URL.
    """
    if url.startswith(("mongodb://", "mongodb+srv://")):
        from koan_ray.stores.mongo import MongoStore

        return MongoStore(
            url,
            source=name,
            keeps_executions=keeps_executions,
            on_corrupt=on_corrupt or _tell_of_corrupt,
            read_only=read_only,
        )
    scheme = url.partition(":")[0]
    msg = f"sources.{name}.url: no provider for {scheme!r} is part of this version; use mongodb:// or memory://"
    raise ConfigurationError(msg)


@contextlib.asynccontextmanager
async def doctor(settings: EngineSettings, only: str | None = None) -> AsyncIterator[Doctor]:
    """Open sources for reading, and hand out a doctor for them.

    Args:
        settings: They name the sources.
        only: The one to be looked at; all that keep documents by default.

    Raises:
        ConfigurationError: There is no such source, or none at all; or it cannot be used as configured.
        StoreUnavailableError: A source does not answer.
    """
    urls, asked = _asked(settings, only)
    async with contextlib.AsyncExitStack() as stack:
        patients = [await _patient(stack, name, urls, settings.audit_source or name) for name in asked]
        clock = LoopClock(asyncio.get_running_loop())
        shard, ttl_s = shard_name(0), settings.lease_ttl_s
        yield Doctor(patients, shard=shard, ttl_s=ttl_s, max_crashes=settings.max_crashes, clock=clock)


def _asked(settings: EngineSettings, only: str | None) -> tuple[dict[str, str], list[str]]:
    """Return the URLs of all sources that keep documents, and the names of those that are asked for."""
    urls = {name: url for name, url in settings.sources if not url.startswith("memory://")}
    asked = list(urls) if only is None else [only]
    if not asked or not urls.keys() >= set(asked):
        named = f"there is no source {only!r}" if only is not None else "no source keeps documents"
        msg = f"sources: {named} (known: {', '.join(urls) or 'none'}); set sources.default.url, for example in koan.toml"
        raise ConfigurationError(msg)
    return urls, asked


@contextlib.asynccontextmanager
async def reader(settings: EngineSettings) -> AsyncIterator[Reader]:
    """Open all sources for reading, and hand out what reads them.

    Raises:
        ConfigurationError: No source keeps documents, or one cannot be used as configured.
        StoreUnavailableError: A source does not answer.
    """
    urls, asked = _asked(settings, None)
    async with contextlib.AsyncExitStack() as stack:
        patients = [await _patient(stack, name, urls, settings.audit_source or name) for name in asked]
        yield Reader([Shelf(patient.name, patient.store, patient.audit) for patient in patients], MemoryStore())


async def _patient(stack: contextlib.AsyncExitStack, name: str, urls: dict[str, str], audit: str) -> Patient:
    if audit not in urls:
        msg = f"jobs.audit_source: there is no source {audit!r} (known: {', '.join(urls)})"
        raise ConfigurationError(msg)
    unreadable: list[RecordCorruptError] = []
    opened: dict[str, DocumentStore] = {}
    for source in {name, audit}:
        store = open_store(source, urls[source], read_only=True, on_corrupt=lambda _id, error: unreadable.append(error))
        await store.open()
        stack.push_async_callback(store.close)
        opened[source] = store
    return Patient(name, opened[name], opened[audit], unreadable, is_dead)


def _tell_of_corrupt(record_id: str, error: Exception) -> None:
    logs.get_logger().error("record_skipped", record_id=record_id, problem=str(error))


def _beside(work: Coroutine[Any, Any, None]) -> Callable[[], None]:
    """Run the beat of a lease on a loop and thread of its own; returns what ends it."""
    loop = asyncio.new_event_loop()
    beating = loop.create_task(work)
    was_ended = threading.Event()

    def turn() -> None:
        try:
            loop.run_until_complete(beating)
        except asyncio.CancelledError:
            pass
        except Exception as error:  # noqa: BLE001 - the tenure notices that nothing beats; the log says why
            logs.get_logger().error("engine_failed", where="heart", problem=f"{type(error).__name__}: {error}")
        finally:
            loop.close()

    threading.Thread(target=turn, name="koan-heart", daemon=True).start()

    def end() -> None:
        if was_ended.is_set():
            return  # being cancelled again would interrupt the closing of its client
        was_ended.set()
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(lambda: beating.cancelling() or beating.cancel())  # once: it closes its client then

    return end


def broker(settings: EngineSettings, clock: Clock) -> Broker:
    """Return a progress broker; nothing is started."""
    return Broker(settings, clock, _epoch(), cast("Log", logs.get_logger()))


def _epoch() -> str:
    # The random half of a UUIDv7: unique for each start, and short, because actors carry it in their names.
    return new_id()[-12:]
