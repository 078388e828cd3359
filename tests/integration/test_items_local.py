"""Jobs over items in this process: every kind of source, result and trouble, and the counts always add up."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
import time

import pytest
from pydantic import BaseModel

import koan_ray as koan

FAST = koan.RetryPolicy(max_attempts=3, initial_delay=0.01, max_delay=0.05)


@pytest.fixture(scope="module", autouse=True)
def engine():
    with koan.init(runtime="local", engine={"max_actors": 2, "cancel_grace": 1.0}) as engine:
        yield engine


class Counts(BaseModel):
    total: int
    processed: int
    failed: int
    skipped: int
    values: list[object] = []


class Base(koan.FiniteJob[int, Counts, int]):
    """Counts what its items came to."""

    def get_items(self, context):
        return range(context)

    def process_item(self, item, index, progress):
        return koan.ItemResult.success(item)

    def build_result(self, summary) -> Counts:
        counts = Counts(
            total=summary.total_items,
            processed=summary.processed_items,
            failed=summary.failed_items,
            skipped=summary.skipped_items,
            values=list(summary.values),
        )
        assert counts.processed + counts.failed + counts.skipped == counts.total
        assert len(summary.values) == len(counts.values)
        return counts


def finished(job_type, context, timeout=30):
    return job_type.start(context).run().get().wait().get(timeout=timeout)


def test_all_three_outcomes_are_counted():
    class Mixed(Base):
        def process_item(self, item, index, progress):
            assert item == index
            if item % 10 == 3:
                return koan.ItemResult.skipped("three")
            if item % 10 == 7:
                return koan.ItemResult.failed("seven")
            if item % 10 == 9:
                raise ValueError(f"nine in {item}")
            return koan.ItemResult.success(item)

    job = Mixed.start(1000).run().get()
    result = job.wait().get(timeout=30)
    assert (result.total, result.processed, result.failed, result.skipped) == (1000, 700, 200, 100)
    assert sorted(result.values) == [n for n in range(1000) if n % 10 not in (3, 7, 9)]
    dead = {item.index: item for item in job.failed_items().get(timeout=5)}
    assert sorted(dead) == [n for n in range(1000) if n % 10 in (7, 9)]
    assert (dead[7].item, dead[7].error, dead[7].attempts) == (7, "ItemFailed: seven", 1)
    assert dead[9].error == "ValueError: nine in 9"
    assert "test_items_local" in dead[9].stack_trace
    assert job.progress_message.startswith("1,000 of 1,000 items, 200 failed, 100 skipped")
    assert (job.current_step, job.total_steps) == (1000, 1000)


async def _afew(n):
    for number in range(n):
        await asyncio.sleep(0)
        yield number


def _generated(n):
    yield from range(n)


class _Dataset:
    """As much of a Ray Dataset as is used."""

    def __init__(self, n):
        self._n = n

    def iter_rows(self):
        return iter([{"id": number} for number in range(self._n)])


@pytest.mark.parametrize(
    "source", [range, _generated, _afew, list, lambda n: set(range(n)), lambda n: iter(range(n))],
    ids=["range", "generator", "async generator", "type", "set", "iterator"],
)  # fmt: skip
def test_any_iterable_is_a_source(source):
    class Sourced(Base):
        def get_items(self, context):
            return list(range(context)) if source is list else source(context)

    result = finished(Sourced, 500)
    assert result.processed == 500
    assert sorted(result.values) == list(range(500))


def test_get_items_may_be_a_coroutine_or_give_rows():
    class Awaited(Base):
        async def get_items(self, context):
            await asyncio.sleep(0)
            return range(context)

    class Rows(Base):
        def get_items(self, context):
            return _Dataset(context)

        def process_item(self, item, index, progress):
            return koan.ItemResult.success(item["id"])

    assert finished(Awaited, 30).processed == 30
    assert sorted(finished(Rows, 30).values) == list(range(30))


def test_items_that_cannot_be_iterated_over_fail_the_job_at_once():
    class Seven(Base):
        def get_items(self, context):
            return 7

    began = time.monotonic()
    with pytest.raises(koan.JobFailedError, match=r"after 1 attempt: JobDefinitionError: get_items\(\) returned int"):
        finished(Seven, 1)
    assert time.monotonic() - began < Seven.retry.initial_delay.total_seconds()


def test_no_items_complete_the_job():
    assert finished(Base, 0) == Counts(total=0, processed=0, failed=0, skipped=0)


def test_async_items_run_at_the_same_time():
    class Waiting(Base):
        items = koan.ItemOptions(concurrency=50)

        async def process_item(self, item, index, progress):
            await asyncio.sleep(0.02)
            return koan.ItemResult.success(item)

    began = time.monotonic()
    result = finished(Waiting, 1000)
    assert sorted(result.values) == list(range(1000))
    assert time.monotonic() - began < 1000 * 0.02 / 2  # one after the other they would take twice as long


def test_ordered_values_come_in_the_order_of_the_items():
    class Ordered(Base):
        items = koan.ItemOptions(ordered=True, chunk_size=7, retry=FAST)
        seen: set[int] = set()

        def process_item(self, item, index, progress):
            time.sleep(0.002 * (item % 5 == 0))
            if item % 50 == 3 and item not in self.seen:
                self.seen.add(item)
                raise ValueError("again")
            return koan.ItemResult.success({"n": item})

    assert [value["n"] for value in finished(Ordered, 400).values] == list(range(400))


def test_a_failed_item_is_tried_again_and_its_attempts_are_counted():
    tries: dict[int, int] = {}

    class Flaky(Base):
        items = koan.ItemOptions(retry=FAST)

        def process_item(self, item, index, progress):
            tries[item] = tries.get(item, 0) + 1
            if item == 5 or (item % 10 == 0 and tries[item] < 3):
                raise RuntimeError("not yet")
            if item == 6:
                raise koan.NonRetryable(KeyError("never"))
            return koan.ItemResult.success()

    job = Flaky.start(100).run().get()
    result = job.wait().get(timeout=30)
    assert (result.processed, result.failed) == (98, 2)
    dead = {item.index: item for item in job.failed_items().get(timeout=5)}
    assert {index: item.attempts for index, item in dead.items()} == {5: 3, 6: 1}
    assert dead[6].error_type == "KeyError"
    assert tries[5] == 3
    assert tries[10] == 3
    assert tries[6] == 1


@pytest.mark.parametrize(("most", "shown"), [(3, "allows 3"), (0.05, "allows 5.0%")])
def test_too_many_failed_items_end_the_job(most, shown):
    class Doomed(Base):
        items = koan.ItemOptions(max_failed_items=most)

        def process_item(self, item, index, progress):
            time.sleep(0.001)
            if item % 3 == 0:
                raise ValueError("bad")
            return koan.ItemResult.success()

    job = Doomed.start(100_000).run().get()
    with pytest.raises(koan.JobFailedError, match=r"items have failed, ItemOptions\.max_failed_items") as caught:
        job.wait().get(timeout=30)
    assert shown in str(caught.value)
    assert caught.value.error_type == "TooManyFailedItemsError"
    assert caught.value.attempts == 1
    assert len(job.failed_items().get(timeout=5)) > 3


@pytest.mark.parametrize("returned", [None, 42, True, "done"])
def test_what_is_no_item_result_fails_the_item(returned):
    class Wrong(Base):
        def process_item(self, item, index, progress):
            return returned if item == 2 else koan.ItemResult.success()

    job = Wrong.start(5).run().get()
    assert job.wait().get(timeout=30).failed == 1
    (dead,) = job.failed_items().get(timeout=5)
    assert dead.index == 2
    assert f"process_item() returned {type(returned).__name__}, not an ItemResult" in dead.error


def test_an_item_that_cannot_travel_is_dead_and_its_neighbours_go_on():
    class Locks(Base):
        def get_items(self, context):
            return [threading.Lock() if n % 10 == 4 else n for n in range(context)]

    job = Locks.start(100).run().get()
    result = job.wait().get(timeout=30)
    assert (result.processed, result.failed) == (90, 10)
    dead = job.failed_items().get(timeout=5)
    assert {item.index for item in dead} == set(range(4, 100, 10))
    assert "cannot be sent to a job actor" in dead[0].error


class _Bomb:
    """Can be sent, and not read."""

    def __reduce__(self):
        return int, ("no number",)


def test_an_item_that_cannot_be_read_is_dead_and_its_neighbours_go_on():
    class Bombs(Base):
        items = koan.ItemOptions(chunk_size=20)

        def get_items(self, context):
            return [_Bomb() if n == 33 else n for n in range(context)]

    job = Bombs.start(100).run().get()
    result = job.wait().get(timeout=30)
    assert (result.processed, result.failed) == (99, 1)
    (dead,) = job.failed_items().get(timeout=5)
    assert dead.index == 33
    assert "invalid literal for int" in dead.error


@pytest.mark.parametrize("value", [object(), b"\xff\xfe", "x" * 2_000_000], ids=["object", "bytes", "large"])
def test_a_value_that_is_no_json_or_too_large_fails_its_item(value):
    class Odd(Base):
        def process_item(self, item, index, progress):
            return koan.ItemResult.success(value if item == 1 else item)

    job = Odd.start(4).run().get()
    assert job.wait().get(timeout=30).failed == 1
    (dead,) = job.failed_items().get(timeout=5)
    assert dead.index == 1
    assert "the value of the item" in dead.error


def test_large_items_go_in_smaller_chunks_and_huge_ones_are_refused():
    class Large(Base):
        items = koan.ItemOptions(chunk_size=50)

        def get_items(self, context):
            for _ in range(context):
                yield os.urandom(200_000)
            yield b"x" * (20 << 20)

        def process_item(self, item, index, progress):
            return koan.ItemResult.success(len(item))

    job = Large.start(60).run().get()
    result = job.wait().get(timeout=60)
    assert (result.processed, result.failed) == (60, 1)
    assert set(result.values) == {200_000}
    assert "20,971" in job.failed_items().get(timeout=5)[0].error


def test_a_source_that_raises_half_way_fails_the_job_and_keeps_what_was_done():
    calls = itertools.count()
    done: list[int] = []

    class Breaks(Base):
        retry = koan.RetryPolicy(max_attempts=2, initial_delay=0.01)

        def get_items(self, context):
            next(calls)
            yield from range(100)
            raise OSError("the catalogue is gone")

        def process_item(self, item, index, progress):
            done.append(item)
            return koan.ItemResult.success()

    job = Breaks.start(0).run().get()
    with pytest.raises(koan.JobFailedError, match="the catalogue is gone"):
        job.wait().get(timeout=30)
    assert next(calls) == 2
    assert sorted(done) == list(range(100))  # the second attempt went on from where the first had come
    assert job.refresh().get().progress_message.startswith("100 items")


def test_an_endless_source_can_be_cancelled():
    class Endless(Base):
        def get_items(self, context):
            return itertools.count()

    job = Endless.start(0).run().get()
    _until(lambda: (job.refresh().get().progress_message or "").partition(" ")[0].replace(",", "") > "0")
    job.cancel("enough").get()
    with pytest.raises(koan.JobCancelledError, match="enough"):
        job.wait().get(timeout=20)


def test_a_source_that_blocks_can_be_cancelled():
    release = threading.Event()

    class Blocks(Base):
        def get_items(self, context):
            yield 1
            release.wait(30)

    job = Blocks.start(0).run().get()
    _until(lambda: (job.refresh().get().progress_message or "").startswith("1 items"))
    job.cancel().get()
    with pytest.raises(koan.JobCancelledError):
        job.wait().get(timeout=20)
    release.set()


def test_a_timeout_stops_the_items():
    class Slow(Base):
        timeout = 0.5
        retry = koan.RetryPolicy(max_attempts=1)

        def process_item(self, item, index, progress):
            time.sleep(0.01)
            return koan.ItemResult.success()

    job = Slow.start(100_000).run().get()
    with pytest.raises(koan.JobFailedError, match=r"timeout of 0\.5 s"):
        job.wait().get(timeout=20)


def test_dead_items_are_run_again_alone():
    broken = {"is": True}

    class Mends(Base):
        def process_item(self, item, index, progress):
            assert item == index
            if broken["is"] and item % 100 == 50:
                raise ValueError("broken")
            return koan.ItemResult.success(item)

    job = Mends.start(1000).run().get()
    assert job.wait().get(timeout=30).failed == 10
    broken["is"] = False
    again = job.retry_failed_items().get(timeout=5)
    result = again.wait().get(timeout=30)
    assert (result.total, result.processed) == (10, 10)
    assert sorted(result.values) == list(range(50, 1000, 100))


def test_dead_items_are_exported_as_json_lines(tmp_path):
    class Fails(Base):
        def process_item(self, item, index, progress):
            raise LookupError(f"no {item}")

    job = Fails.start(3000).run().get()
    assert job.wait().get(timeout=30).failed == 3000
    assert job.export_failed_items(tmp_path / "dead.jsonl").get(timeout=10) == 3000
    rows = [json.loads(line) for line in (tmp_path / "dead.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(3000))
    assert (rows[0]["error_type"], rows[0]["error_message"]) == ("LookupError", f"no {rows[0]['item']}")


def test_a_job_with_a_cursor_goes_on_from_there():
    asked: list[object] = []
    done: list[int] = []

    class Cursored(Base):
        retry = koan.RetryPolicy(max_attempts=2, initial_delay=0.01)
        items = koan.ItemOptions(checkpoint_every=0.05, chunk_size=10)

        def get_items(self, context):
            asked.append("beginning")
            for n in range(context):
                if n == 600 and len(asked) == 1:
                    raise OSError("the line broke")
                yield {"key": n}

        def get_cursor(self, item):
            return item["key"]

        def resume_from(self, context, cursor):
            asked.append(cursor)
            return ({"key": n} for n in range(cursor + 1, context))

        def process_item(self, item, index, progress):
            assert item["key"] == index
            time.sleep(0.0005)
            done.append(index)
            return koan.ItemResult.success(index)

    result = finished(Cursored, 1000)
    assert sorted(result.values) == list(range(1000))
    assert asked == ["beginning", 599]
    assert sorted(done) == list(range(1000))


def test_other_items_than_before_are_refused():
    calls = itertools.count()

    class Changes(Base):
        retry = koan.RetryPolicy(max_attempts=2, initial_delay=0.01)

        def get_items(self, context):
            offset = next(calls) * 7
            yield from range(offset, offset + 600)
            raise OSError("the line broke")

    job = Changes.start(0).run().get()
    with pytest.raises(koan.JobFailedError, match=r"does not give the 600 items again .*verify_items=False"):
        job.wait().get(timeout=30)


def test_a_job_that_failed_for_its_items_can_be_resumed():
    class Fails(Base):
        items = koan.ItemOptions(max_failed_items=5)

        def process_item(self, item, index, progress):
            if item < 50:
                raise ValueError("bad")
            time.sleep(0.0005)
            return koan.ItemResult.success()

    job = Fails.start(2000).run().get()
    with pytest.raises(koan.JobFailedError, match="items have failed"):
        job.wait().get(timeout=30)
    while True:  # each run may have five more
        job = koan.Jobs.retry(job.id, resume=True).get(timeout=5)
        try:
            result = job.wait().get(timeout=30)
        except koan.JobFailedError:
            continue
        break
    assert (result.total, result.processed, result.failed) == (2000, 1950, 50)


def test_a_chunk_that_waits_behind_a_long_one_goes_to_another_actor(engine):
    class Uneven(Base):
        items = koan.ItemOptions(chunk_size=1)

        def process_item(self, item, index, progress):
            time.sleep(1.5 if item == 0 else 0.01)
            return koan.ItemResult.success((item, time.monotonic()))

    before = engine.status().get()["counters"]["returned"]
    finished(Uneven, 2)  # both actors are there
    result = finished(Uneven, 60)
    ends = dict(map(tuple, result.values))
    assert result.processed == 60
    assert max(end for item, end in ends.items() if item) < ends[0]  # nobody had to wait for the long one
    assert engine.status().get()["counters"]["returned"] > before


def test_jobs_with_other_needs_are_not_kept_waiting_by_items():
    class Long(Base):
        def process_item(self, item, index, progress):
            time.sleep(0.01)
            return koan.ItemResult.success()

    class Other(koan.Job[int, int]):
        resources = koan.Resources(num_cpus=0.5)

        def execute(self, context, progress, cancellation) -> int:
            return context

    class Same(koan.Job[int, int]):
        def execute(self, context, progress, cancellation) -> int:
            return context

    job = Long.start(100_000).run().get()
    _until(lambda: (job.refresh().get().current_step or 0) > 100)
    assert Same.start(1).run().get().wait().get(timeout=5) == 1
    assert Other.start(2).run().get().wait().get(timeout=10) == 2
    job.cancel().get()
    with pytest.raises(koan.JobCancelledError):
        job.wait().get(timeout=20)


def test_what_a_long_item_says_is_shown(engine):
    class Long(Base):
        def process_item(self, item, index, progress):
            until = time.monotonic() + 5
            while time.monotonic() < until and not progress.cancellation_requested:
                progress.report(0.5, f"half of {item}")
                time.sleep(0.02)
            return koan.ItemResult.success()

    job = Long.start(2).run().get()
    _until(lambda: "; half of " in (job.refresh().get().progress_message or ""))
    assert engine.status().get()["running"] == 1  # its chunks are no jobs
    job.cancel().get()
    with pytest.raises(koan.JobCancelledError):
        job.wait().get(timeout=20)


class InProcess(Base):
    """Each chunk is done in a process of its own."""

    isolation = koan.Isolation.PROCESS

    def process_item(self, item, index, progress):
        if item == 77:
            os._exit(3)
        return koan.ItemResult.success(os.getpid())


class Dedicated(Base):
    """Each chunk is done in an actor of its own."""

    isolation = koan.Isolation.DEDICATED
    items = koan.ItemOptions(chunk_size=50)


@pytest.mark.slow
def test_chunks_may_run_in_processes_of_their_own():
    job = InProcess.start(200).run().get()
    result = job.wait().get(timeout=60)
    assert (result.processed, result.failed) == (199, 1)
    assert os.getpid() not in result.values
    (dead,) = job.failed_items().get(timeout=5)
    assert (dead.index, dead.error_type) == (77, "ProcessLost")


def test_chunks_may_run_in_actors_of_their_own():
    assert finished(Dedicated, 300).processed == 300


class Files(koan.FiniteJob[dict, int, int]):
    """Leaves its values in files."""

    def get_items(self, context):
        return range(context["n"])

    def process_item(self, item, index, progress):
        return koan.ItemResult.success({"id": item, "name": f"item {item}"} if item != self.context.get("odd") else item)

    def build_result(self, summary) -> int:
        summary.values.write_json_lines(f"{self.context['folder']}/values.jsonl")
        return summary.values.write_parquet(f"{self.context['folder']}/values.parquet")


def test_values_are_written_to_files(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert finished(Files, {"n": 25_000, "folder": str(tmp_path)}) == 25_000
    rows = [json.loads(line) for line in (tmp_path / "values.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == list(range(25_000))
    table = parquet.read_table(tmp_path / "values.parquet").to_pylist()
    assert sorted(table, key=lambda row: row["id"]) == sorted(rows, key=lambda row: row["id"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["values.jsonl", "values.parquet"]


def test_values_that_are_no_rows_leave_no_file(tmp_path):
    pytest.importorskip("pyarrow")
    once = type("Once", (Files,), {"retry": koan.RetryPolicy(max_attempts=1)})
    with pytest.raises(koan.JobFailedError, match="does not fit the columns"):
        finished(once, {"n": 10, "odd": 7, "folder": str(tmp_path)})
    assert [path.name for path in tmp_path.iterdir()] == ["values.jsonl"]


def test_the_job_is_one_object_for_the_items_of_an_actor_and_knows_its_context():
    made = itertools.count()

    class Shares(Base):
        items = koan.ItemOptions(max_workers=1)

        def process_item(self, item, index, progress):
            if not hasattr(self, "model"):
                self.model = next(made)
            assert self.context == 300
            return koan.ItemResult.success()

    assert finished(Shares, 300).processed == 300
    assert next(made) <= 2


def test_items_may_start_jobs_of_their_own():
    class Leaf(koan.Job[int, int]):
        def execute(self, context, progress, cancellation) -> int:
            return context + 1

    class Parent(Base):
        items = koan.ItemOptions(chunk_size=2)

        def process_item(self, item, index, progress):
            return koan.ItemResult.success(self.start_child(Leaf, item).run().get().wait().get(timeout=20))

    job = Parent.start(10).run().get()
    assert sorted(job.wait().get(timeout=30).values) == list(range(1, 11))
    children = job.get_children().get(timeout=5)
    assert {child.kind for child in children} == {"Leaf"}  # chunks are nobody's children
    assert len(children) == 10


def test_nested_item_jobs_do_not_wait_for_each_others_places():
    class Inner(Base):
        pass

    class Outer(Base):
        items = koan.ItemOptions(chunk_size=1)

        def process_item(self, item, index, progress):
            return koan.ItemResult.success(Inner.start(item).child_of(self).run().get().wait().get(timeout=60).total)

    assert sorted(finished(Outer, 40, timeout=60).values) == list(range(40))


def test_chunks_are_no_jobs_that_anybody_sees():
    before = koan.Jobs.count().get(timeout=5)
    finished(Base, 5000)
    assert koan.Jobs.count().get(timeout=5) == before + 1


def test_an_item_job_has_no_execute_of_its_own():
    with pytest.raises(koan.JobDefinitionError, match="has no execute of its own"):

        class Own(Base):
            def execute(self, context, progress, cancellation):
                return None

    class Half(koan.FiniteJob[int, int, int]):
        def get_items(self, context):
            return []

    with pytest.raises(koan.JobDefinitionError, match="process_item"):
        Half.start(1)


@pytest.mark.parametrize(
    "wrong", [{"max_workers": 0}, {"chunk_size": -1}, {"concurrency": None}, {"max_failed_items": -1},
              {"max_failed_items": 1.5}, {"checkpoint_every": 0.001}, {"retry": 3}],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(koan.ConfigurationError, match=f"ItemOptions.{next(iter(wrong))}"):
        koan.ItemOptions(**wrong)


def _until(is_so, within_s=20.0):
    limit = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_there_is_no_dataset_without_ray_and_no_collection_without_a_source(monkeypatch):
    pytest.importorskip("pyarrow")
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    class Sunk(Base):
        retry = koan.RetryPolicy(max_attempts=1)

        def build_result(self, summary) -> Counts:
            if self.context == 1:
                summary.values.to_dataset()
            elif self.context == 2:
                summary.values.write_documents(7)
            summary.values.write_documents("numbers")

    for context, told in (
        (1, "to_dataset needs Ray, to which this process is not connected"),
        (2, "expected names as text, got collection=7"),
        (3, "source 'default', the default, is no document store of this engine .known: none."),
    ):
        with pytest.raises(koan.JobFailedError, match=told):
            finished(Sunk, context)
