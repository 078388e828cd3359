"""Jobs over items on a real Ray, with one job actor: items that kill their process, leads that are killed."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass

import pytest

import koan_ray as koan
from tests.conftest import eventually
from tests.integration.conftest import kill9

pytestmark = pytest.mark.ray
ENGINE = {"max_actors": 1}


@dataclass
class Counts:
    total: int
    processed: int
    failed: int
    skipped: int
    values: list


class Base(koan.FiniteJob[dict, Counts, int]):
    """Counts what its items came to."""

    retry = koan.RetryPolicy(max_attempts=2, initial_delay=0.1)

    def get_items(self, context):
        return range(context["n"])

    def build_result(self, summary) -> Counts:
        done = summary.processed_items, summary.failed_items, summary.skipped_items
        assert sum(done) == summary.total_items
        return Counts(summary.total_items, *done, sorted(summary.values))


class Poisoned(Base):
    """Some of its items end their process."""

    def process_item(self, item, index, progress):
        if item in self.context["poison"]:
            os._exit(7)
        return koan.ItemResult.success(item)


class Written(Base):
    """One line for each time that an item was processed."""

    def process_item(self, item, index, progress):
        fd = os.open(self.context["ledger"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{item} {os.getpid()}\n".encode())
        os.close(fd)
        time.sleep(self.context["takes"])
        return koan.ItemResult.success(item)


class Awaited(Base):
    """Waits a little."""

    items = koan.ItemOptions(concurrency=100)

    async def process_item(self, item, index, progress):
        await asyncio.sleep(0.01)
        return koan.ItemResult.success(item)


class Fatal(Base):
    """Its source ends the process that reads it."""

    def get_items(self, context):
        yield from range(10)
        os._exit(9)

    def process_item(self, item, index, progress):
        return koan.ItemResult.success(item)


class Rows(Base):
    """Takes its items from a Ray Dataset."""

    def get_items(self, context):
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        return ray.data.range(context["n"])

    def process_item(self, item, index, progress):
        return koan.ItemResult.success(int(item["id"]))


def lines_of(path):
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def pids_of(engine, spec):
    found = engine.status().get(10)["actors"]
    return [actor["pid"] for actor in found if actor["pid"] and (actor["spec"] == "lead") == (spec == "lead")]


def test_items_are_done_by_the_only_actor(engine):
    job = Written.start({"n": 0, "ledger": "", "takes": 0}).run().get(30)
    assert job.wait().get(30).total == 0
    job = Poisoned.start({"n": 100_000, "poison": []}).run().get(30)
    assert job.wait().get(60).values == list(range(100_000))
    assert {actor["spec"] for actor in engine.status().get(10)["actors"]} == {"lead", "cpu=1"}


def test_async_items_wait_together(engine):
    began = time.monotonic()
    assert Awaited.start({"n": 2000}).run().get(30).wait().get(60).processed == 2000
    assert time.monotonic() - began < 2000 * 0.01 / 2  # one after the other they would take twice as long


def test_a_dataset_is_a_source(engine):
    pytest.importorskip("pyarrow")
    assert Rows.start({"n": 5000}).run().get(30).wait().get(90).values == list(range(5000))


def test_a_poison_item_is_dead_and_its_neighbours_are_processed(engine):
    job = Poisoned.start({"n": 500, "poison": [77]}).run().get(30)
    result = job.wait().get(90)
    assert (result.processed, result.failed) == (499, 1)
    assert result.values == [n for n in range(500) if n != 77]
    (dead,) = job.failed_items().get(10)
    assert (dead.index, dead.item, dead.error_type) == (77, 77, "ProcessLost")
    assert dead.attempts >= 3


def test_a_killed_actor_costs_no_item(engine, tmp_path):
    ledger = tmp_path / "ledger"
    job = Written.start({"n": 400, "ledger": str(ledger), "takes": 0.005}).run().get(30)
    eventually(lambda: len(lines_of(ledger)) > 50, within=20)
    kill9(pids_of(engine, "items")[0])
    result = job.wait().get(60)
    assert result.values == list(range(400))
    assert len(lines_of(ledger)) < 400 + 100


def test_a_lead_that_is_killed_goes_on_where_it_was(engine, tmp_path):
    ledger = tmp_path / "ledger"
    job = Written.start({"n": 1000, "ledger": str(ledger), "takes": 0.005}).run().get(30)
    eventually(lambda: job.refresh().get(10)._view.items is not None, within=20)  # a checkpoint is kept
    eventually(lambda: len(lines_of(ledger)) > 400, within=20)
    kill9(pids_of(engine, "lead")[0])
    n_before = len(lines_of(ledger))
    eventually(lambda: len(lines_of(ledger)) > n_before + 60, within=20)  # sooner than a stuck actor is noticed
    result = job.wait().get(60)
    assert (result.total, result.processed) == (1000, 1000)
    assert result.values == list(range(1000))
    assert len(lines_of(ledger)) < 1000 + 500  # what a checkpoint interval and the chunks that were out hold


def test_a_source_that_ends_its_process_is_the_jobs_poison(engine):
    job = Fatal.start({"n": 0}).run().get(30)
    with pytest.raises(koan.JobFailedError, match="poison") as caught:
        job.wait().get(90)
    assert caught.value.error_type == "ProcessLost"


def test_a_cancelled_job_goes_on_where_it_was_when_it_is_resumed(engine, tmp_path):
    ledger = tmp_path / "ledger"
    job = Written.start({"n": 1000, "ledger": str(ledger), "takes": 0.005}).run().get(30)
    eventually(lambda: len(lines_of(ledger)) > 200, within=20)
    job.cancel("later").get(10)
    with pytest.raises(koan.JobCancelledError):
        job.wait().get(30)
    n_before = len(lines_of(ledger))
    assert n_before < 1000
    again = koan.Jobs.retry(job.id, resume=True).get(10)
    result = again.wait().get(60)
    assert (result.total, result.processed) == (1000, 1000)
    assert result.values == list(range(1000))
    assert len(lines_of(ledger)) <= 1000 + 1  # only what was in the middle of its work is done again
