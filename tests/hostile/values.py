"""Types that pydantic takes, and values of them: drawn by Hypothesis, and the corpus of those that have done harm."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import ipaddress
import math
import pathlib
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Optional, Union

import pydantic
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    Json,
    RootModel,
    SecretBytes,
    SecretStr,
    computed_field,
)
from pydantic.alias_generators import to_camel
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(NamedTuple):
    x: int
    y: float = 0.5


class Movie(TypedDict, total=False):
    title: str
    year: int


@dataclasses.dataclass
class Plain:
    n: int
    text: str = "t"


@dataclasses.dataclass
class Counted:
    n: int
    seen: int = dataclasses.field(default=0, init=False)


class Aliased(BaseModel):
    max_rows: int = Field(default=3, alias="maxRows")


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)
    order_id: int
    line_items: list[int] = []


class Apart(BaseModel):
    read: int = Field(validation_alias=AliasChoices("readFrom", AliasPath("deep", 0)), serialization_alias="writtenTo")


class Excluded(BaseModel):
    kept: int
    left_out: int = Field(default=0, exclude=True)


class Login(BaseModel):
    user: str
    password: SecretStr
    pin: SecretBytes = SecretBytes(b"\x00\xff")


class Area(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: float
    b: float

    @computed_field
    @property
    def size(self) -> float:
        return self.a * self.b


class Cat(BaseModel):
    name: str
    lives: int = 9


class Dog(BaseModel):
    name: str
    tricks: list[str] = []


class Kitten(Cat):
    weeks: int = 1


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    n: int


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)
    n: int


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    n: int
    at: dt.datetime


class Doubling(BaseModel):
    n: Annotated[int, pydantic.AfterValidator(lambda n: n * 2)]


class Holder(BaseModel):
    pet: Cat
    pets: list[Union[Cat, Dog]] = []
    anything: Any = None


class Wrapped(RootModel[list[int]]):
    pass


class Encoded(BaseModel):
    inner: Json[list[int]]


class Hidden(BaseModel):
    n: int
    _note: str = pydantic.PrivateAttr(default="none")


class Tree(BaseModel):
    n: int = 0
    left: Optional[Tree] = None


def hidden(n: int, note: str) -> Hidden:
    made = Hidden(n=n)
    made._note = note
    return made


def constructed() -> Strict:
    return Strict.model_construct(n="no number", at=5)


NAN, INF = math.nan, math.inf
CORPUS: list[tuple[str, Any, Callable[[], Any]]] = [
    ("secret", Login, lambda: Login(user="u", password=SecretStr("hunter2"))),
    ("bare secret", SecretStr, lambda: SecretStr("made")),
    ("secrets in a list", list[SecretStr], lambda: [SecretStr("a"), SecretStr("*****")]),
    ("alias with default", Aliased, lambda: Aliased(maxRows=9)),
    ("camel aliases", Camel, lambda: Camel(orderId=7, lineItems=[1])),
    ("aliases in a list", list[Camel], lambda: [Camel(orderId=7)]),
    ("two aliases", Apart, lambda: Apart(readFrom=5)),
    ("nan in optional", Optional[float], lambda: NAN),
    ("nan in dict of any", dict[str, Any], lambda: {"x": NAN, "y": [INF, -INF]}),
    ("nan in any", Any, lambda: NAN),
    ("nan in a list", list[Optional[float]], lambda: [1.0, NAN]),
    ("nan as text beside nan", list[Union[float, str]], lambda: ["NaN", NAN, "Infinity"]),
    ("minus zero", float, lambda: -0.0),
    ("excluded", Excluded, lambda: Excluded(kept=1, left_out=5)),
    ("excluded, default", Excluded, lambda: Excluded(kept=1)),
    ("subclass instance", Cat, lambda: Kitten(name="k", weeks=3)),
    ("subclass in a field", Holder, lambda: Holder(pet=Kitten(name="k", weeks=3))),
    ("union of alike models", Holder, lambda: Holder(pet=Cat(name="c"), pets=[Dog(name="d"), Cat(name="c", lives=1)])),
    ("union of alike models, bare", Union[Cat, Dog], lambda: Dog(name="d")),
    ("model in any", Holder, lambda: Holder(pet=Cat(name="c"), anything=Dog(name="x"))),
    ("tuple in any", Any, lambda: (1, 2)),
    ("set in any", dict[str, Any], lambda: {"x": {1, 2}}),
    ("bytes in any", Any, lambda: b"\xff\x00"),
    ("bytes", bytes, lambda: b"\xff\x00\x80"),
    ("datetime in any", Any, lambda: dt.datetime(2024, 1, 2, tzinfo=dt.UTC)),
    ("decimal", decimal.Decimal, lambda: decimal.Decimal("1.50")),
    ("decimal nan", decimal.Decimal, lambda: decimal.Decimal("NaN")),
    ("decimal in any", Any, lambda: decimal.Decimal("1.10")),
    ("init=False", Counted, lambda: dataclasses.replace(Counted(1))),
    ("init=False, set", Counted, lambda: _counted(4)),
    ("keys 1 and '1'", dict[Any, int], lambda: {1: 10, "1": 20}),
    ("keys of union", dict[Union[int, str], int], lambda: {1: 10, "1": 20}),
    ("keys None and 'None'", dict[Any, int], lambda: {None: 1, "None": 2}),
    ("float keys", dict[float, int], lambda: {1.5: 1, 2.0: 2}),
    ("tuple keys", dict[tuple[int, int], str], lambda: {(1, 2): "a"}),
    ("bool keys", dict[bool, str], lambda: {True: "y", False: "n"}),
    ("True is not 1", list[Any], lambda: [True, 1, 1.0, 0, False]),
    ("union of int and bool", list[Union[int, bool]], lambda: [True, 1]),
    ("union of int and float", list[Union[float, int]], lambda: [1, 1.0, 2**60]),
    ("union of str and bytes", list[Union[str, bytes]], lambda: ["a", b"a"]),
    (
        "union of date and datetime",
        list[Union[dt.date, dt.datetime]],
        lambda: [dt.date(2024, 1, 1), dt.datetime(2024, 1, 1)],
    ),
    ("union of str and uuid", list[Union[str, uuid.UUID]], lambda: [str(uuid.UUID(int=5)), uuid.UUID(int=5)]),
    ("big int", int, lambda: 2**200),
    ("big int in any", Any, lambda: {"n": 2**63, "m": -(2**70)}),
    ("above 2**53", list[int], lambda: [2**53 + 1]),
    ("computed field", Area, lambda: Area(a=2, b=3)),
    ("extra allowed", Loose, lambda: Loose(n=1, more=[1, {"x": None}])),
    ("frozen", Frozen, lambda: Frozen(n=1)),
    ("strict", Strict, lambda: Strict(n=1, at=dt.datetime(2024, 1, 1, tzinfo=dt.UTC))),
    ("not idempotent", Doubling, lambda: Doubling(n=2)),
    ("root model", Wrapped, lambda: Wrapped([1, 2])),
    ("json", Encoded, lambda: Encoded(inner="[1, 2]")),
    ("private attribute", Hidden, lambda: hidden(1, "set")),
    ("private attribute, default", Hidden, lambda: Hidden(n=1)),
    ("constructed, not valid", Strict, constructed),
    ("recursive", Tree, lambda: Tree(n=1, left=Tree(n=2))),
    ("namedtuple", Point, lambda: Point(1)),
    ("typed dict", Movie, lambda: {"title": "t"}),
    ("typed dict with more", Movie, lambda: {"title": "t", "stars": 5}),
    ("dataclass", Plain, lambda: Plain(1)),
    ("path", pathlib.Path, lambda: pathlib.Path("a/b")),
    ("uuid", uuid.UUID, lambda: uuid.UUID(int=7)),
    ("address", ipaddress.IPv4Address, lambda: ipaddress.IPv4Address("127.0.0.1")),
    ("enum", Colour, lambda: Colour.BLUE),
    ("enum in any", Any, lambda: Colour.RED),
    ("int enum in a list", list[Level], lambda: [Level.LOW]),
    ("literal", Literal["a", 1, True], lambda: True),
    ("naive datetime", dt.datetime, lambda: dt.datetime(2024, 1, 2, 3, 4, 5, 999_999)),
    (
        "datetime with zone",
        dt.datetime,
        lambda: dt.datetime(2024, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30))),
    ),
    ("fold", dt.datetime, lambda: dt.datetime(2024, 10, 27, 2, 30, fold=1)),
    ("timedelta", dt.timedelta, lambda: dt.timedelta(days=-1, microseconds=1)),
    ("long timedelta", dt.timedelta, lambda: dt.timedelta.max),
    ("time with zone", dt.time, lambda: dt.time(1, 2, 3, 4, tzinfo=dt.UTC)),
    ("frozenset", frozenset[int], lambda: frozenset({1, 2})),
    ("tuple of two", tuple[int, str], lambda: (1, "a")),
    ("surrogate", str, lambda: "caf\udce9.txt"),
    ("surrogate in any", Any, lambda: ["\ud800"]),
    ("surrogate as key", dict[str, int], lambda: {"\udcff": 1}),
    ("controls", str, lambda: "a\x00\x1b[31mb\r\n"),
    ("complex", Any, lambda: 1 + 2j),
    ("object", Any, object),
    ("class", Any, lambda: int),
    ("function", Any, lambda: len),
    ("generator", Any, lambda: (n for n in range(3))),
    ("endless", Any, lambda: _itself()),
    ("deep", Any, lambda: _deep(500)),
    ("str subclass", str, lambda: _Text("sub")),
    ("int subclass in any", Any, lambda: Level.HIGH),
]


class _Text(str):
    __slots__ = ()


def _counted(seen: int) -> Counted:
    made = Counted(1)
    made.seen = seen
    return made


def _itself() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def _deep(levels: int) -> Any:
    made: Any = 1
    for _ in range(levels):
        made = [made]
    return made


# --- drawn -----------------------------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    ["NaN", "1", "null", "", "{}", "\x1b[0m"]
)
_WHOLE = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, -1, 2**31, 2**53 + 1, 2**63, 2**64])
_LOOSE: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | _WHOLE
    | st.floats()
    | _TEXT
    | st.binary(max_size=6)
    | st.sampled_from(list(Colour))
    | st.dates()
    | st.decimals(allow_nan=True, places=2)
    | st.uuids(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(_TEXT | st.integers(0, 3), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sets(st.integers(0, 9), max_size=2)
    ),
    max_leaves=6,
)
_LEAVES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, _WHOLE),
    (float, st.floats()),
    (bool, st.booleans()),
    (str, _TEXT),
    (bytes, st.binary(max_size=8)),
    (Any, _LOOSE),
    (type(None), st.none()),
    (decimal.Decimal, st.decimals(allow_infinity=True)),
    (dt.date, st.dates()),
    (dt.datetime, st.datetimes(timezones=st.none() | st.just(dt.UTC) | st.timezones())),
    (dt.timedelta, st.timedeltas()),
    (dt.time, st.times()),
    (uuid.UUID, st.uuids()),
    (Colour, st.sampled_from(list(Colour))),
    (Level, st.sampled_from(list(Level))),
    (SecretStr, _TEXT.map(SecretStr)),
    (pathlib.Path, st.just(pathlib.Path("a b/c"))),
    (Literal["a", 1], st.sampled_from(["a", 1])),
    (Cat, st.builds(Cat, name=st.just("n"), lives=st.integers(0, 9)) | st.just(Kitten(name="k", weeks=2))),
    (Aliased, st.integers(0, 9).map(lambda n: Aliased(maxRows=n))),
    (Excluded, st.builds(Excluded, kept=st.integers(0, 3), left_out=st.integers(0, 2))),
    (Plain, st.builds(Plain, n=st.integers(), text=_TEXT)),
    (Point, st.builds(Point, x=st.integers(), y=st.floats())),
    (Counted, st.integers(0, 2).map(_counted)),
    (Movie, st.fixed_dictionaries({}, optional={"title": _TEXT, "year": _WHOLE})),
]

_Typed = tuple[Any, st.SearchStrategy[Any]]


@st.composite
def typed(draw: Any, depth: int = 2) -> tuple[Any, Any]:
    """Draw a type and a value that an instance of it would have."""
    declared, values = draw(_types(depth))
    return declared, draw(values)


@st.composite
def _types(draw: Any, depth: int) -> _Typed:
    shape = draw(
        st.sampled_from(["leaf", "leaf", "list", "dict", "tuple", "set", "optional", "union", "model", "dataclass"])
    )
    if depth == 0 or shape == "leaf":
        return draw(st.sampled_from(_LEAVES))
    if shape == "set":
        declared, values = draw(
            st.sampled_from([each for each in _LEAVES if each[0] in (int, str, bytes, dt.date, uuid.UUID)])
        )
        return set[declared], st.sets(values, max_size=3)
    declared, values = draw(_types(depth - 1))
    if shape == "list":
        return list[declared], st.lists(values, max_size=3)
    if shape == "dict":
        key, keys = draw(st.sampled_from([(str, _TEXT), (int, st.integers(-3, 3)), (Any, _TEXT | st.integers(0, 2))]))
        return dict[key, declared], st.dictionaries(keys, values, max_size=3)
    if shape == "tuple":
        return tuple[declared, ...], st.lists(values, max_size=3).map(tuple)
    if shape == "optional":
        return Optional[declared], st.none() | values
    other, others = draw(_types(depth - 1))
    if shape == "union":
        return Union[declared, other], values | others
    if shape == "dataclass":
        made = dataclasses.make_dataclass("Drawn", [("one", declared), ("two", other)])
        return made, st.builds(made, one=values, two=others)
    return _model(draw, declared, values, other, others)


def _model(draw: Any, one: Any, ones: Any, two: Any, twos: Any) -> _Typed:
    config = draw(
        st.sampled_from(
            [
                {},
                {"extra": "allow"},
                {"extra": "forbid"},
                {"alias_generator": to_camel, "populate_by_name": True},
                {"frozen": True},
                {"populate_by_name": True, "ser_json_inf_nan": "constants"},
            ]
        )
    )
    options = draw(
        st.sampled_from(
            [
                {},
                {"alias": "theOne"},
                {"validation_alias": "inName"},
                {"serialization_alias": "outName"},
                {"exclude": True},
                {"repr": False},
            ]
        )
    )
    config = {**config, "populate_by_name": True}
    if any("Counted" in repr(each) for each in (one, two)):  # pydantic takes no init=False beside extra="allow"
        config.pop("extra", None)
    made = pydantic.create_model(
        "DrawnModel",
        __config__=ConfigDict(**config),
        __module__=__name__,
        first_one=(one, Field(..., **options)),
        second=(two, ...),
    )
    return made, st.builds(lambda first, second: made.model_construct(first_one=first, second=second), ones, twos)
