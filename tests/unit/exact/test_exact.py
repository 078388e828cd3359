"""What a body gets equals what was given, for every type that pydantic takes; or it is refused where it was given."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import ipaddress
import json
import math
import pathlib
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    Json,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    RootModel,
    Secret,
    SecretBytes,
    SecretStr,
    computed_field,
)
from pydantic.alias_generators import to_camel
from pydantic_core import core_schema
from typing_extensions import TypedDict

import koan_ray as koan
from koan_ray.exact import difference

T = TypeVar("T")


class Login(BaseModel):
    user: str
    password: SecretStr


class Vault(BaseModel):
    raw: SecretBytes
    day: Secret[dt.date]
    logins: dict[str, Login] = {}
    one: SecretStr | None = None


class Reading(BaseModel):
    value: float | None = None


class Limits(BaseModel):
    max_rows: int = Field(default=3, alias="maxRows")


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid")
    order_id: int
    inner_reading: Reading = Reading()


class Paths(BaseModel):
    x: int = Field(default=1, validation_alias=AliasPath("a", 0))
    y: int = Field(default=1, validation_alias=AliasChoices("yy", AliasPath("b", "c")))


class BothAliases(BaseModel):
    model_config = ConfigDict(serialize_by_alias=True)
    a: int = Field(default=1, validation_alias="in", serialization_alias="out")


class ByName(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    a: int = Field(default=1, alias="A")


class Computed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int

    @computed_field
    def double(self) -> int:
        return 2 * self.a


class Jsons(BaseModel):
    j: Json[list[int]]


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)
    f: float
    d: dt.datetime
    s: SecretStr
    b: bytes
    t: tuple[int, ...]


class Node(BaseModel):
    value: float
    below: list[Node] = []


class Box(BaseModel, Generic[T]):
    inside: T


class Cat(BaseModel):
    animal: Literal["cat"] = "cat"
    weight: float


class Dog(BaseModel):
    animal: Literal["dog"] = "dog"
    weight: float


@dataclasses.dataclass
class Point:
    x: float
    norm: float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self):
        self.norm = abs(self.x)


class Row(TypedDict):
    a: float


class Pair(NamedTuple):
    a: int
    b: str


class Colour(enum.Enum):
    RED = "red"
    ONE = 1


class Cached(BaseModel):
    a: int
    _seen: int = PrivateAttr(default=0)
    _handle: Any = PrivateAttr(default_factory=object)


class A(BaseModel):
    x: int


class B(BaseModel):
    x: int


class Sub(A):
    y: int = 1


class HoldsA(BaseModel):
    a: A


class EitherAlike(BaseModel):
    it: A | B


class Branch(BaseModel):
    it: A | B | list[Branch | A | B]


class Excluded(BaseModel):
    a: int = Field(default=1, exclude=True)


class Swapped(BaseModel):
    a: int = Field(alias="b")
    b: int = Field(alias="a")


BERLIN = ZoneInfo("Europe/Berlin")
moment = dt.datetime

KEPT = [
    (int, 5), (int, 2**70), (int, -(2**63)), (bool, True), (float, math.nan), (float, -math.inf), (float, -0.0),
    (None, None),
    (str, "caf\udce9"), (str, "koan:float"), (dict[str, str], {"koan:float": "NaN"}), (bytes, b"\xff"), (bytes, b"x"),
    (Login, Login(user="u", password="hunter2")), (SecretStr, SecretStr("x")), (dict, {"a": SecretStr("x")}),
    (Vault, Vault(raw=b"\xff", day=Secret(dt.date(2020, 1, 1)), logins={"l": Login(user="u", password="p")})),
    (Vault, Vault(raw=b"", day=Secret(dt.date(2020, 1, 1)), one="one")),
    (Reading, Reading(value=math.nan)), (Reading, Reading(value=-math.inf)), (Reading, Reading()),
    (dict[str, Any], {"x": math.nan}), (list[float | None], [1.0, math.nan, None]), (Any, [math.inf, {"a": math.nan}]),
    (Row, {"a": math.nan}), (Point, Point(math.inf)), (float | str, math.nan), (str | float, math.inf), (str | float, "NaN"),
    (Limits, Limits(maxRows=9)), (Camel, Camel(orderId=7, innerReading=Reading(value=math.inf))),
    (Paths, Paths(a=[4], b={"c": 5})), (BothAliases, BothAliases(**{"in": 4})), (ByName, ByName(a=5)),
    (Computed, Computed(a=1)), (Jsons, Jsons(j="[1,2]")), (Open, Open(a=1, z=(1, math.nan), y={"q": b"\xff"})),
    (Strict, Strict(f=math.nan, d=moment(2020, 1, 1, tzinfo=BERLIN), s=SecretStr("x"), b=b"\xff", t=(1, 2))),
    (Node, Node(value=math.nan, below=[Node(value=1.0), Node(value=math.inf)])),
    (Box[float], Box[float](inside=math.nan)), (Box[Any], Box[Any](inside=(1, 2))),
    (RootModel[list[float]], RootModel[list[float]]([math.inf])),
    (Annotated[Cat | Dog, Field(discriminator="animal")], Dog(weight=math.inf)), (Cat | Dog, Dog(weight=1.0)),
    (Pair, Pair(1, "x")), (Colour, Colour.ONE), (Cached, Cached(a=1)), (A | Sub, Sub(x=1)),
    (Any, (1, 2)), (Any, {1, 2.5, "x"}), (Any, frozenset({(1, "a")})), (Any, {1: "a", "1": "b", None: (1,)}), (dict, {1: 2}),
    (Any, {"koan:float": "NaN"}), (Any, {"koan:dict": {"koan:tuple": []}}), (Any, b"\x00\xff"),
    (Any, decimal.Decimal("1.50")),
    (Any, decimal.Decimal("NaN")), (Any, uuid.UUID(int=7)), (Any, dt.date(2020, 1, 1)),
    (Any, dt.timedelta(days=-3, microseconds=1)), (Any, moment(2020, 1, 1, tzinfo=BERLIN)),
    (moment, moment(2020, 10, 25, 2, 30, fold=1, tzinfo=BERLIN)), (moment, moment(2020, 1, 1, tzinfo=dt.UTC)),
    (moment, moment(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=5, seconds=3)))),
    (dt.time, dt.time(2, 30, fold=1)), (dt.timedelta, dt.timedelta.max),
    (dt.timedelta, dt.timedelta.min), (dt.timedelta, dt.timedelta(microseconds=1)),
    (decimal.Decimal, decimal.Decimal("1.50")), (uuid.UUID, uuid.UUID(int=1)), (pathlib.Path, pathlib.Path("/x")),
    (ipaddress.IPv4Address, ipaddress.ip_address("1.2.3.4")), (complex, complex(1, math.nan)),
    (A | B, B(x=1)), (EitherAlike, EitherAlike(it=B(x=1))), (list[A | B], [A(x=1), B(x=1), B(x=2)]), (dict | A, A(x=1)),
    (str | bytes, b"x"), (pathlib.Path | str, "x"), (str | pathlib.Path, pathlib.Path("x")),
    (uuid.UUID | str, str(uuid.UUID(int=1))), (list[int] | tuple[int, ...], (1,)),
    (str | decimal.Decimal, decimal.Decimal("1.5")), (dt.date | dt.datetime, dt.datetime(2020, 1, 1)),
    (Branch, Branch(it=[Branch(it=B(x=1)), A(x=1)])), (Sequence[int], (1, 2)), (Sequence[int], [1, 2]), (A | B | None, None),
    (int | float | bool | str, True), (int | float | str, 1.0), (tuple, (1, (2, 3))), (list, [(1,)]), (set, {1, 2}),
]  # fmt: skip


def job_of(declared, result=None):
    class Echo(koan.Job[declared, result or declared]):
        def execute(self, context, progress, cancellation):
            return context

    return Echo.definition


def no_constant(word):
    raise AssertionError(f"{word} is no JSON")


@pytest.mark.parametrize(("declared", "value"), KEPT, ids=lambda each: repr(each)[:60].encode(errors="replace").decode())
def test_a_context_and_a_result_read_back_as_they_were_given(declared, value):
    definition = job_of(declared)
    for encoded, read in (
        (definition.encode_context(value), definition.decode_context),
        (definition.encode_result(value, 10**6), definition.decode_result),
    ):
        json.loads(encoded, parse_constant=no_constant)
        assert difference(value, read(encoded)) is None
        assert encoded == definition.encode_context(read(encoded))  # a second submission is recognised by its content


REFUSED = [
    (A, Sub(x=1), "(whole context)"),
    (HoldsA, HoldsA.model_construct(a=Sub(x=1)), "a"),
    (HoldsA, HoldsA(a=Sub(x=1)), "a"),
    (Excluded, Excluded(a=5), "a"),
    (Swapped, Swapped(a=1, b=2), "a"),
    (A, A.model_construct(x="five"), "x"),
    (Any, {"deep": [Colour.RED]}, "deep.0"),
    (dict, {"deep": {"point": Point(1.0)}}, "deep.point"),
    (Any, A(x=1), "(whole context)"),
    (dict[str, Any], {"x": np.float32(1.5)}, "x"),
    (dict[int | str, str], {1: "a", "1": "b"}, "(whole context)"),
    (Annotated[int, AfterValidator(lambda value: value + 1)], 5, "(whole context)"),
    (Row, {"a": 1.0, "more": 2}, "(whole context)"),
    (list[Row], [{"a": 1.0, "more": 2}], "0"),
    (dict[int, str], {1: "a", "1": "b"}, "(whole context)"),
    (Annotated[float, PlainSerializer(round)], 1.5, "(whole context)"),
    (pathlib.Path, pathlib.Path("caf\udce9"), "(whole context)"),
]  # fmt: skip


@pytest.mark.parametrize(("declared", "value", "path"), REFUSED)
def test_what_would_arrive_as_something_else_is_refused_with_its_path(declared, value, path):
    with pytest.raises(koan.InvalidContextError) as refused:
        job_of(declared).encode_context(value)
    assert refused.value.problems[0][0] == path
    str(refused.value).encode()


def test_a_private_attribute_that_was_set_is_refused_and_one_that_holds_a_handle_is_not_looked_at():
    value = Cached(a=1)
    value._seen = 7
    with pytest.raises(koan.InvalidContextError, match="_seen: is a private attribute"):
        job_of(Cached).encode_context(value)


def test_an_attribute_of_a_dataclass_that_only_init_sets_is_refused_when_it_was_changed():
    value = Point(1.0)
    value.norm = 9.0
    with pytest.raises(koan.InvalidContextError, match=r"norm: reads back changed: 9\.0 becomes 1\.0"):
        job_of(Point).encode_context(value)


def test_a_float_of_numpy_is_a_float():
    definition = job_of(dict[str, Any], float)
    assert definition.decode_context(definition.encode_context({"loss": np.float64(0.5)})) == {"loss": 0.5}
    assert definition.encode_result(np.float64(0.5), 100) == b"0.5"
    assert definition.encode_result(3, 100) == b"3.0"  # an int is a float where a float is declared


def test_a_whole_number_that_no_float_is_is_not_rounded():
    with pytest.raises(Exception, match=f"is {2**53 + 1}, which no float is"):
        job_of(float).encode_result(2**53 + 1, 100)


def test_a_value_whose_comparison_raises_is_refused_and_not_more():
    class Odd:
        def __eq__(self, other):
            raise RuntimeError("no")

        __hash__ = None

        @classmethod
        def __get_pydantic_core_schema__(cls, source, handler):
            return core_schema.no_info_plain_validator_function(
                lambda value: value if isinstance(value, Odd) else Odd(),
                serialization=core_schema.plain_serializer_function_ser_schema(lambda _: 1),
            )

    with pytest.raises(koan.InvalidContextError, match="its __eq__ raised RuntimeError"):
        job_of(Odd).encode_context(Odd())


def test_arrays_are_compared_by_what_they_hold():
    def array(dtype):
        return Annotated[
            np.ndarray,
            PlainValidator(lambda value: np.asarray(value, dtype)),
            PlainSerializer(lambda value: [None if np.isnan(item) else item for item in value.tolist()]),
        ]

    definition = job_of(array(float))
    for value in (np.array([1.0, 2.5]), np.array([1.0, math.nan])):
        got = definition.decode_context(definition.encode_context(value))
        assert got.tobytes() == value.tobytes()
    with pytest.raises(koan.InvalidContextError, match="cannot be compared: its __eq__ raised ValueError"):
        job_of(
            Annotated[np.ndarray, PlainValidator(np.asarray), PlainSerializer(lambda value: [*value.tolist(), 1])]
        ).encode_context(np.array([1.0, 2.0]))


def test_a_class_without_a_comparison_is_compared_by_what_it_consists_of():
    class Money:
        def __init__(self, cents):
            self.cents = cents

        @classmethod
        def __get_pydantic_core_schema__(cls, source, handler):
            return core_schema.no_info_plain_validator_function(
                lambda value: value if isinstance(value, Money) else Money(value),
                serialization=core_schema.plain_serializer_function_ser_schema(lambda money: money.cents),
            )

    definition = job_of(Money)
    assert definition.decode_context(definition.encode_context(Money(5))).cents == 5


def test_contents_of_plain_types_are_written_as_pydantic_writes_them():
    definition = job_of(A)
    assert definition.encode_context(A(x=1)) == definition.encode_context({"x": "1"}) == b'{"x":1}'
    assert job_of(Limits).encode_context(Limits(maxRows=9)) == b'{"max_rows":9}'


def test_what_was_stored_under_an_alias_is_read_as_well():
    assert job_of(Limits).decode_context(b'{"maxRows":9}') == Limits(maxRows=9)


def test_a_cycle_is_refused():
    value: list[Any] = []
    value.append(value)
    with pytest.raises(koan.InvalidContextError):
        job_of(Any).encode_context(value)
    with pytest.raises(koan.InvalidContextError):
        job_of(list).encode_context([1, value])


def test_deep_values_are_kept_or_refused():
    deep: Any = 1
    for _ in range(150):
        deep = [deep]
    definition = job_of(Any)
    assert difference(deep, definition.decode_context(definition.encode_context(deep))) is None
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(koan.InvalidContextError):
        definition.encode_context(deep)
