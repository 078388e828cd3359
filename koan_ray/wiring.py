"""Builds the engine from settings: the one place that picks concrete classes."""

from __future__ import annotations

import random
from dataclasses import fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from koan_ray.domain.ids import new_id
from koan_ray.engine.broker import Broker
from koan_ray.engine.coordinator import Coordinator
from koan_ray.engine.settings import EngineSettings
from koan_ray.stores.memory import MemoryStore
from koan_ray.telemetry import traces

if TYPE_CHECKING:
    from koan_ray.config import Settings
    from koan_ray.ports import Clock, Launcher

attempt_span = traces.attempt_span


def engine_settings(settings: Settings) -> EngineSettings:
    """Return the engine's numbers as the user's settings say."""
    numbers: dict[str, Any] = {}
    for field in fields(EngineSettings):
        for section in (settings.engine, settings.memory):
            value = getattr(section, field.name.removesuffix("_s"), None)
            if value is not None:
                numbers[field.name] = value.total_seconds() if isinstance(value, timedelta) else value
                break
    return EngineSettings(**numbers)


def coordinator(settings: EngineSettings, launcher: Launcher, clock: Clock) -> Coordinator:
    """Return a coordinator that keeps its jobs in memory; nothing is started."""
    store = MemoryStore(
        completed_retention_s=settings.completed_retention_s,
        faulted_retention_s=settings.faulted_retention_s,
        max_finished=settings.max_finished,
    )
    return Coordinator(settings, store=store, launcher=launcher, clock=clock, random=random.Random(), epoch=_epoch())


def broker(settings: EngineSettings, clock: Clock) -> Broker:
    """Return a progress broker; nothing is started."""
    return Broker(settings, clock, _epoch())


def _epoch() -> str:
    # The random half of a UUIDv7: unique for each start, and short, because actors carry it in their names.
    return new_id()[-12:]
