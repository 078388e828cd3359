"""Jobs over items whose methods hide what they are, and whose items raise what nobody expects."""

from __future__ import annotations

import asyncio
import functools
import threading

import pytest

import koan_ray as koan

RETRIED = koan.RetryPolicy(max_attempts=3, initial_delay=0.01, max_delay=0.05)


@pytest.fixture(scope="module", autouse=True)
def engine():
    with koan.init(runtime="local", engine={"max_actors": 2, "cancel_grace": 1.0}) as engine:
        yield engine


def decorated(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):  # as most decorators are written: it does not know of async
        return function(*args, **kwargs)

    return inner


class Wrapped(koan.FiniteJob[int, list[int], int]):
    retry = koan.RetryPolicy(max_attempts=1)
    items = koan.ItemOptions(concurrency=8, ordered=True)

    @decorated
    async def get_items(self, context):
        await asyncio.sleep(0)
        return range(context)

    @decorated
    async def process_item(self, item, index, progress):
        await asyncio.sleep(0.001)
        assert threading.current_thread().name == "koan-bodies"
        return koan.ItemResult.success(item * 2)

    @decorated
    async def build_result(self, summary) -> list[int]:
        await asyncio.sleep(0)
        return [summary.processed_items, sum(summary.values)]


def test_async_methods_behind_plain_decorators_are_awaited():
    assert Wrapped.start(200).run().get(10).wait(20).get() == [200, 2 * sum(range(200))]
    assert Wrapped.definition.is_part_async
    assert Wrapped.start(200).run().get(10).wait(20).get() == [200, 2 * sum(range(200))]


class Mixed(koan.FiniteJob[int, list[int], int]):
    """Gives a result at once for even items, and something to await for odd ones."""

    def get_items(self, context):
        return range(context)

    def process_item(self, item, index, progress):
        result = koan.ItemResult.success({"n": item})
        return result if item % 2 == 0 else asyncio.sleep(0, result)

    def build_result(self, summary) -> list[int]:
        return sorted(value["n"] for value in summary.values)


def test_items_may_be_awaited_or_not_one_by_one():
    assert Mixed.start(51).run().get(10).wait(20).get() == list(range(51))


class Raises(koan.FiniteJob[str, list[int], int]):
    items = koan.ItemOptions(retry=RETRIED)

    def get_items(self, context):
        return range(6)

    async def process_item(self, item, index, progress):
        async def fails() -> None:
            await asyncio.sleep(0)
            raise self.errors()[self.context]

        if item == 3:
            async with asyncio.TaskGroup() as group:
                group.create_task(fails())
        return koan.ItemResult.success()

    def errors(self):
        return {
            "never": koan.NonRetryable(ValueError("never")),
            "exit": SystemExit(1),
            "interrupt": KeyboardInterrupt(),
            "plain": ValueError("again"),
        }

    def build_result(self, summary) -> list[int]:
        return [summary.processed_items, summary.failed_items]


@pytest.mark.parametrize(("what", "attempts"), [("never", 1), ("exit", 3), ("interrupt", 3), ("plain", 3)])
def test_what_a_task_of_an_item_raises_is_the_items_alone(what, attempts):
    job = Raises.start(what).run().get(10)
    assert job.wait(20).get() == [5, 1]
    assert [item.attempts for item in job.failed_items().get(10)] == [attempts]


class Unwilling:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __str__(self):
        raise self.error

    __repr__ = __str__


class Odd(koan.FiniteJob[int, list[int], int]):
    def get_items(self, context):
        return range(8)

    def process_item(self, item, index, progress):
        error = SystemExit(1) if item % 2 else ValueError("text")
        if item < 2:
            raise koan.NonRetryable(Unwilling(error))
        if item < 4:
            return koan.ItemResult.failed(Unwilling(error))
        if item < 6:
            return koan.ItemResult.skipped(Unwilling(error))
        return koan.ItemResult.success()

    def build_result(self, summary) -> list[int]:
        return [summary.processed_items, summary.skipped_items, summary.failed_items]


def test_reasons_and_errors_whose_text_raises_are_told_without_it():
    assert Odd.start(0).run().get(10).wait(20).get() == [2, 2, 4]


class EndsOddly(koan.FiniteJob[int, int, int]):
    retry = koan.RetryPolicy(max_attempts=1)

    def get_items(self, context):
        return range(2)

    def process_item(self, item, index, progress):
        return koan.ItemResult.success()

    def build_result(self, summary) -> int:
        raise [StopIteration(1), SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError()][self.context]


@pytest.mark.parametrize("which", range(4))
def test_whatever_build_result_raises_the_job_ends(which):
    with pytest.raises(koan.JobFailedError):
        EndsOddly.start(which).run().get(10).wait(20).get()
