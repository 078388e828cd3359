"""``koan-ray doctor``: reads every stored job and tells what must not be."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING

from koan_ray import wiring
from koan_ray.cli.reach import begin_logging, document_settings
from koan_ray.cli.safe import as_json, counted, safe
from koan_ray.config import load_settings

if TYPE_CHECKING:
    from koan_ray.engine.doctor import Finding
    from koan_ray.engine.settings import EngineSettings


def run(source: str | None, *, machine: bool) -> int:
    """Look at everything and return the exit code."""
    settings = load_settings()
    begin_logging(settings)
    with contextlib.ExitStack() as stack:
        numbers = document_settings(stack, settings, source)
        return asyncio.run(_look(numbers, source, machine=machine))


async def _look(settings: EngineSettings, source: str | None, *, machine: bool) -> int:
    n_found = 0
    async with wiring.doctor(settings, source) as doctor:
        async for found in doctor.findings():
            n_found += 1
            print(_as_json(found) if machine else _as_text(found), flush=True)
        if machine:
            print(as_json({"jobs": doctor.n_jobs, "problems": n_found}))
        else:
            print(f"{counted(doctor.n_jobs, 'job')} read; {counted(n_found, 'problem') if n_found else 'nothing is wrong'}")
    sys.stdout.flush()
    return 1 if n_found else 0


def _as_json(found: Finding) -> str:
    invariant, job_id, what = found.violation
    return as_json(
        {"source": found.source, "partition": found.partition, "invariant": invariant, "id": job_id, "what": what}
    )


def _as_text(found: Finding) -> str:
    where = f"source {found.source}" + (f", partition {found.partition}" if found.partition else "")
    return safe(f"{found.violation}  ({where})")
