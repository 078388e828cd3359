"""``koan-ray doctor``: reads every stored job and tells what must not be.

Where an engine is known to run, by ``RAY_ADDRESS`` or a ``koan-ray dev`` of this directory, it is asked what its jobs wait
for that is not there. That is no fault of what is stored, and changes no exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING

from koan_ray import wiring
from koan_ray.cli.documents import address_of_dev
from koan_ray.cli.present import obstacles
from koan_ray.cli.reach import begin_logging, document_settings
from koan_ray.cli.safe import as_json, counted, safe
from koan_ray.config import load_settings
from koan_ray.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from koan_ray.config import Settings
    from koan_ray.engine.doctor import Finding
    from koan_ray.engine.settings import EngineSettings


def run(source: str | None, *, machine: bool) -> int:
    """Look at everything and return the exit code."""
    settings = load_settings()
    begin_logging(settings)
    with contextlib.ExitStack() as stack:
        numbers = document_settings(stack, settings, source)
        code = asyncio.run(_look(numbers, source, machine=machine))
    for text in _obstacles(settings):
        print(as_json({"waits": text}) if machine else f"note: {text}", flush=True)
    return code


def _obstacles(settings: Settings) -> list[str]:
    """Return what the jobs of an engine wait for that is not there; nothing where no engine is known."""
    address = os.environ.get("RAY_ADDRESS") or address_of_dev()
    if address is None:
        return []
    from koan_ray.runtime.ray import admin

    try:
        return obstacles(admin.status(address, settings.engine.namespace))
    except RuntimeUnavailableError:  # an address, and no engine there
        return []


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
