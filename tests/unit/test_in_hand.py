"""A job in hand is made of classes that refuse to be made or changed by others."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import pytest

import koan_ray as koan
from koan_ray.domain.records import JobView
from koan_ray.finite import FiniteJob

VIEW = JobView(
    "id", "kind", "running", b"7", 0.0, None, None, None, None, None, 0, None, None, None, None, 1, None, None, None, None
)


@dataclasses.dataclass(frozen=True)
class Frozen(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        return context


class Guarded(koan.Job[int, int]):
    def __setattr__(self, name, value):
        raise AttributeError(f"{name} cannot be set")

    def execute(self, context, progress, cancellation) -> int:
        return context


class Slotted(koan.Job[int, int]):
    __slots__ = ("n_done",)

    def execute(self, context, progress, cancellation) -> int:
        return context


class Choosy(koan.Job[int, int]):
    def __new__(cls, needed):
        raise AssertionError("instances are made by the engine")

    def execute(self, context, progress, cancellation) -> int:
        return context


class Mapping(koan.Job[int, int], dict):
    def execute(self, context, progress, cancellation) -> int:
        return context


@dataclasses.dataclass(frozen=True)
class FrozenItems(FiniteJob[int, int, int]):
    def get_items(self, context):
        return [1]

    def process_item(self, item, index, progress):
        return koan.ItemResult.success()

    def build_result(self, summary):
        return 1


@pytest.mark.parametrize("of", [Frozen, Guarded, Slotted, Choosy, Mapping, FrozenItems])
def test_a_class_with_rules_of_its_own_about_instances_gives_a_job_in_hand(of):
    job = of._in_hand(VIEW)
    assert (type(job), job.id, job.context) == (of, "id", 7)


def test_an_abstract_class_says_what_is_missing():
    class Unfinished(koan.Job[int, int], ABC):
        def execute(self, context, progress, cancellation) -> int:
            return self.step()

        @abstractmethod
        def step(self) -> int: ...

    with pytest.raises(TypeError, match=r"Unfinished.*step"):
        Unfinished._in_hand(VIEW)
