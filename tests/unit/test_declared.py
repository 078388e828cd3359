"""What a job class declares: types through generic bases and late names, and names that are the engine's."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Annotated, Any, Generic, TypeVar

import pytest
from pydantic import BaseModel
from typing_extensions import TypeVar as DefaultedTypeVar

import koan_ray as koan

T = TypeVar("T")
U = TypeVar("U")
R = TypeVar("R")
B = TypeVar("B", bound=BaseModel)
D = DefaultedTypeVar("D", default=int)


class Order(BaseModel):
    n: int


class Box(BaseModel, Generic[T]):
    inside: T


class Body:
    def execute(self, context, progress, cancellation): ...


class Lists(Body, koan.Job[list[T], R], Generic[T, R]): ...


class Deep(Body, koan.Job[dict[str, list[T | None]], Annotated[tuple[T, U], "said"]], Generic[T, U]): ...


class Boxes(Body, koan.Job[list[Box[T]], Box[T]], Generic[T]): ...


class Renamed(Lists[U, T], Generic[T, U]): ...


class Named(Body, koan.Job["list[T]", "R"], Generic[T, R]): ...


class Batch(koan.FiniteJob[list[T], R, T], Generic[T, R]):
    def get_items(self, context): ...
    def process_item(self, item, index, progress): ...
    def build_result(self, summary): ...


class Mixin(Generic[T]): ...


def declared(job_type):
    return job_type.definition.context_type, job_type.definition.result_type


@pytest.mark.parametrize(
    ("base", "types_"),
    [
        (Lists[Order, int], (list[Order], int)),
        (Deep[Order, str], (dict[str, list[Order | None]], Annotated[tuple[Order, str], "said"])),
        (Boxes[int], (list[Box[int]], Box[int])),
        (Renamed[str, Order], (list[Order], str)),
        (Named[Order, int], (list[Order], int)),
        (Batch[Order, int], (list[Order], int)),
        (Lists["Order", "int"], (list[Order], int)),
        (Lists[list["Order"], int], (list[list[Order]], int)),
    ],
)
def test_type_parameters_inside_of_containers_are_substituted(base, types_):
    class Concrete(base): ...

    class Below(Mixin[bytes], Concrete): ...

    assert declared(Concrete) == declared(Below) == types_


def test_a_body_gets_what_a_container_of_parameters_holds(local_engine):
    class Sum(Lists[Order, int]):
        def execute(self, context, progress, cancellation) -> int:
            return sum(order.n for order in context)

    assert Sum.start([Order(n=1), Order(n=2)]).run().get(10).wait(10).get() == 3


def test_a_parameter_that_is_given_nothing_may_be_anything_or_what_it_is_bound_to():
    class Loose(Body, koan.Job[T, R], Generic[T, R]): ...

    class Bound(Body, koan.Job[B, D], Generic[B, D]): ...

    class Unsaid(Body, koan.Job): ...

    assert declared(Loose) == declared(Unsaid) == (Any, Any)
    assert Bound.definition.encode_result(3, 100) == b"3"
    with pytest.raises(koan.InvalidContextError):
        Bound.start(3)


SOURCE = """
from __future__ import annotations
from typing import TYPE_CHECKING
import koan_ray as koan

if TYPE_CHECKING:
    from koan_ray import CancellationToken, JobProgress
    from somewhere import Nowhere

@koan.job
def late_send(context: LateOrder, progress: JobProgress, cancellation: CancellationToken) -> int:
    return context.n

@koan.job
def late_never(context: Nowhere, progress: JobProgress) -> int: ...

class Late(koan.Job["LateOrder", "list[LateOrder]"]):
    def execute(self, context: Nowhere, progress: JobProgress, cancellation: CancellationToken):
        return [context]

class Never(koan.Job["Nowhere", int]):
    def execute(self, context: Nowhere, progress: JobProgress, cancellation: CancellationToken) -> int: ...

from pydantic import BaseModel

class LateOrder(BaseModel):
    n: int
"""


@pytest.fixture
def late():
    made = sys.modules["shop_late"] = types.ModuleType("shop_late")
    exec(compile(SOURCE, "shop_late.py", "exec"), vars(made))
    yield made
    del sys.modules["shop_late"]


def test_types_that_are_defined_later_in_the_module_are_found_when_they_are_needed(late, local_engine):
    assert late.late_send.start(late.LateOrder(n=4)).run().get(10).wait(10).get() == 4
    assert late.Late.start({"n": 4}).run().get(10).wait(10).get() == [late.LateOrder(n=4)]


@pytest.mark.parametrize("name", ["Never", "late_never"])
def test_a_type_that_only_type_checkers_know_is_named(late, name):
    with pytest.raises(koan.JobDefinitionError, match=r"names 'Nowhere', which is not defined in module 'shop_late'"):
        getattr(late, name).start(None)


def test_names_of_a_function_are_found_in_it():
    class Here(BaseModel):
        n: int

    class Uses(Body, koan.Job["Here", "There"]): ...

    class There(BaseModel):
        n: int

    @koan.job
    def uses(context: Here) -> list[Here]: ...

    assert declared(Uses) == (Here, There)
    assert declared(uses) == (Here, list[Here])


# --- names that are the engine's ----------------------------------------------------------------------------------------


def shadow(**members):
    return type("Shadow", (koan.Job,), {"execute": Body.execute, **members})


@pytest.mark.parametrize(
    "name", ["id", "status", "name", "wait", "result", "context", "start", "progress", "metadata", "cancel", "_view", "get"]
)
@pytest.mark.parametrize("value", ["text", property(lambda self: 1), lambda self: 1, classmethod(lambda cls: 1), None])
def test_an_attribute_under_a_name_of_the_engines_is_refused_with_its_name(name, value):
    with pytest.raises(koan.JobDefinitionError, match=rf"Shadow: '{name}' is set, but job\.{name} .* give it another name"):
        shadow(**{name: value})


def test_an_annotation_alone_is_refused_as_well_and_one_that_narrows_is_not():
    with pytest.raises(koan.JobDefinitionError, match="'status'"):

        class Annotated_(Body, koan.Job):
            status: str

    class Narrow(Body, koan.Job[Order, int]):
        context: Order


def test_what_a_mixin_or_slots_bring_is_refused_with_the_mixin():
    class Tagged:
        def name(self): ...

    for bases in ((Tagged, Body, koan.Job), (Body, koan.Job, Tagged)):
        with pytest.raises(koan.JobDefinitionError, match=r"'name' is set by its base .*Tagged"):
            type("Mixed", bases, {})
    with pytest.raises(koan.JobDefinitionError, match="'duration'"):
        shadow(__slots__=("duration",))


def test_jobs_over_items_have_more_names_of_their_own():
    with pytest.raises(koan.JobDefinitionError, match="'items_total'"):

        class Many(Batch[int, int]):
            items_total = 3

    assert shadow(items_total=3, failed_items=lambda self: ()).items_total == 3


def test_other_names_and_what_a_job_may_set_stay_free(local_engine):
    @dataclasses.dataclass
    class Options:
        retries_left: int = 3

        def helper(self):
            return self.retries_left

    class Free(Options, koan.Job[int, int]):
        __slots__ = ("cache",)
        kind = "free"
        retry = koan.RetryPolicy(max_attempts=1)
        timeout = 5
        my_status = "x"
        _private = 1
        limit: int = 4

        def should_retry(self, last_execution):
            return False

        def execute(self, context, progress, cancellation) -> int:
            self.state = context
            return self.limit + self.helper() + self._private + self.state

    class Below(Free):
        kind = "free.below"

    assert Free.start(1).run().get(10).wait(10).get() == 9
    assert Below.start(2).run().get(10).wait(10).get() == 10
