"""Twenty thousand items, some of which fail, wait, or end their process; and everything that runs them is killed on the way.

The job is kept as documents, so what has ended is known whatever dies: its job actors, the process that leads it, the
coordinator, or this script. Kill it with `kill -9` and run it again: the second run goes on where the first one was.

    python examples/12_items.py
"""

import asyncio
import hashlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass

import ray
from pydantic import BaseModel

import koan_ray as koan
from koan_ray.runtime.ray.options import COORDINATOR_NAME
from koan_ray.stores.embedded import DocumentServer

N = 20_000
POISON = 12_345  # this one ends the process that works on it


@dataclass
class Reading:
    """What a station has measured."""

    station: int
    value: float


class Report(BaseModel):
    readings: int
    checked: int
    skipped: int
    failed: int
    warmest: float


class CheckReadings(koan.FiniteJob[int, Report, Reading]):
    retry = koan.RetryPolicy(max_attempts=20, initial_delay=0.2, max_delay=1)
    items = koan.ItemOptions(
        retry=koan.RetryPolicy(max_attempts=3, initial_delay=0.05, max_delay=0.2),
        max_failed_items=0.05,
        checkpoint_every=0.5,
    )

    def get_items(self, context):
        numbers = random.Random(context)  # the same items each time that it is asked
        for n in range(N):
            yield Reading(n, numbers.gauss(15, 8))

    def process_item(self, item, index, progress):
        digest = hashlib.sha256(f"{item.station}:{item.value}".encode())
        for _ in range(200):
            digest = hashlib.sha256(digest.digest())
        if item.station == POISON:
            os._exit(1)
        if item.station % 100 == 7:
            return koan.ItemResult.skipped("station is being repaired")
        if item.station % 500 == 3:
            raise ValueError(f"station {item.station}: {item.value:.1f} cannot be right")
        if item.station % 50 == 9 and random.random() < 0.5:
            raise ConnectionError("the line is bad")  # tried again a moment later; a few have no luck three times
        return koan.ItemResult.success(round(item.value, 2))

    def build_result(self, summary) -> Report:
        return Report(
            readings=summary.total_items,
            checked=summary.processed_items,
            skipped=summary.skipped_items,
            failed=summary.failed_items,
            warmest=max(summary.values),
        )


def unfinished():
    """Return the job that an earlier run of this script has left, if there is one."""
    left = koan.Jobs.query(kind="CheckReadings", status=["queued", "running"], source="default").get()
    return left[0] if left else None


def kill_something(engine, what):
    """Send SIGKILL, as a machine that goes down would."""
    if what == "coordinator":
        pid = ray.get(ray.get_actor(COORDINATOR_NAME, namespace="items").pid.remote())
    else:
        is_lead = what == "lead"
        found = [a["pid"] for a in engine.status().get()["actors"] if a["pid"] and (a["spec"] == "lead") == is_lead]
        if not found:
            return
        pid = found[0]
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # an item has ended it a moment ago, and the engine has yet to hear of that
        return
    print(f"killed the {what}, process {pid}")


def main() -> None:
    server = DocumentServer()
    url = asyncio.run(server.start())
    try:
        settings = {"namespace": "items", "lease_ttl": 3}
        with koan.init(engine=settings, sources={"default": {"url": url}}) as engine:
            job = unfinished()
            print("going on with", job.id) if job else print("a new job")
            job = job or CheckReadings.start(2026).persist().run().get()

            victims = ["job actor", "lead", "coordinator"]
            shown = -1
            for update in job.progress_stream().blocking():
                if update.message and int(update.percentage * 20) > shown:
                    shown = int(update.percentage * 20)
                    print(f"{update.percentage:5.0%}  {update.message}")
                if victims and update.percentage > 0.25 * (4 - len(victims)):
                    kill_something(engine, victims.pop(0))

            report = job.wait().get(timeout=60)
            print(report)
            assert report.checked + report.skipped + report.failed == report.readings == N
            print("every item is accounted for")

            dead = job.failed_items().get()
            print(len(dead), "dead items:", Counter(item.error_type for item in dead).most_common())
            (poison,) = [item for item in dead if item.error_type == "ProcessLost"]
            print(f"item {poison.index} ended its process {poison.attempts} times")
            job.export_failed_items(".koan/dead.jsonl").get()  # one JSON object a line
    finally:
        asyncio.run(server.stop())


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s")
