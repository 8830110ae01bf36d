"""Types of every kind as JSON Schemas, and JSON as their instances: `shape_of`."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import json
import sys
import threading
import time
import typing
import uuid
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, NotRequired, Required, TypedDict, TypeVar

import attrs
import jsonschema
import msgspec
import pydantic
import pytest
import typing_extensions

from fluxibly._schemas.classes import schemas_of
from fluxibly._schemas.incomplete import value_so_far
from fluxibly._schemas.shapes import Shape, shape_of
from fluxibly._schemas.structuring import structured
from fluxibly.errors import ConfigError
from fluxibly.providers.dialects.openai_schema import fits_strict_mode

T = TypeVar("T")
N = TypeVar("N", int, str)
UserId = NewType("UserId", int)


def schema(kind: Any) -> dict[str, Any]:
    """Return what is sent for a type, which is a JSON Schema."""
    sent = dict(shape_of(kind).response_format)
    jsonschema.Draft202012Validator.check_schema(sent)
    return sent


def parse(kind: Any, value: Any) -> Any:
    return shape_of(kind).parse(json.dumps(value))


def problem(kind: Any, value: Any) -> str:
    """Return what is wrong with a value, as the model is told."""
    with pytest.raises(ValueError, match="the answer does not fit") as caught:
        parse(kind, value)
    return str(caught.value).partition(f"does not fit {shape_of(kind).name}: ")[2]


class Colour(enum.Enum):
    RED = "red"
    ONE = 1


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(enum.StrEnum):
    YES = "yes"
    NO = "no"


@attrs.define
class Point:
    """A place."""

    x: int
    y: int = 0


@attrs.define
class Person:
    name: str = attrs.field(metadata={"description": "in full"})
    age: Annotated[int, "in years"] = attrs.field(validator=attrs.validators.ge(0))
    tags: list[str] = attrs.field(factory=list)
    _code: str = "none"
    short: str = attrs.field(default="", alias="nickname")
    seen: int = attrs.field(init=False, default=7)
    at: Point | None = None
    height: float = attrs.field(default=0.0, converter=float)


@attrs.frozen(slots=False)
class Employee(Person):
    boss: Person | None = None


@attrs.define
class Page(Generic[T]):
    items: list[T]
    more: Page[T] | None = None


@attrs.define
class People(Page[Person]):
    title: str = ""


@attrs.define
class Tree:
    kids: list[Tree]
    named: dict[str, Tree] = attrs.field(factory=dict)


@dataclass
class Order:
    """An order."""

    id: int
    _: KW_ONLY
    note: str
    rush: InitVar[bool] = False
    lines: list[Point] = field(default_factory=list)
    total: int = field(init=False, default=0)
    count: typing.ClassVar[int] = 0

    def __post_init__(self, rush: bool) -> None:
        self.total = 100 if rush else 1


class Base(TypedDict):
    a: int
    b: NotRequired[str]


class Options(Base, total=False):
    c: Required[int]
    d: Annotated[int, "dd"]


class Extended(typing_extensions.TypedDict):
    a: typing_extensions.Required[int]
    b: typing_extensions.NotRequired[typing_extensions.ReadOnly[str]]


class Place(NamedTuple):
    lat: float
    lon: float
    name: str = ""


class Model(pydantic.BaseModel):
    x: int = pydantic.Field(ge=0, description="an x", alias="theX")


class Struct(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    first_name: str
    age: Annotated[int, msgspec.Meta(ge=0, description="in years")] = 3
    point: Point | None = None
    model: Model | None = None
    nick: str | msgspec.UnsetType = msgspec.UNSET


class Cat(msgspec.Struct, tag="cat"):
    lives: int


class Dog(msgspec.Struct, tag="dog"):
    tricks: int = 0


class Row(msgspec.Struct, array_like=True, tag="row"):
    a: int
    b: str = "b"


class Node(pydantic.BaseModel):
    value: int
    kids: list[Node] = []
    best: Model | None = None


class Ship(pydantic.BaseModel):
    kind: Literal["ship"]
    sails: int


class Car(pydantic.BaseModel):
    kind: Literal["car"]
    wheels: int

    @pydantic.field_validator("wheels")
    @classmethod
    def _some(cls, value: int) -> int:
        if value > 18:
            raise ValueError("too many")
        return value

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def axles(self) -> int:
        return self.wheels // 2


class Garage(pydantic.BaseModel):
    things: list[Annotated[Ship | Car, pydantic.Field(discriminator="kind")]]
    cost: decimal.Decimal = decimal.Decimal(0)


class Box(pydantic.BaseModel, Generic[T]):
    inside: T


@pydantic.dataclasses.dataclass
class Day:
    on: dt.date
    n: int = 0


Numbers = pydantic.RootModel[list[int]]
Alias = typing_extensions.TypeAliasType("Alias", list[Point])
JSON = typing_extensions.TypeAliasType("JSON", "dict[str, JSON] | list[JSON] | str | int | float | bool | None")


class TestClasses:
    def test_the_schema_of_an_attrs_class(self) -> None:
        """It has the arguments of the constructor, what they are for, and no defaults. What may be null is required."""
        assert schema(Person) == {
            "title": "Person",
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "in full"},
                "age": {"type": "integer", "description": "in years"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "code": {"type": "string"},
                "nickname": {"type": "string"},
                "at": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]},
                "height": {"type": "number"},
            },
            "required": ["name", "age", "at"],
            "additionalProperties": False,
            "$defs": {
                "Point": {
                    "title": "Point",
                    "description": "A place.",
                    "type": "object",
                    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
                    "required": ["x"],
                    "additionalProperties": False,
                }
            },
        }

    def test_an_attrs_class(self) -> None:
        """Defaults, factories, private names, aliases and converters are those of the class. What is unknown is left out."""
        given = {"name": "Ann", "age": 3, "code": "s", "nickname": "A", "at": {"x": 1}, "height": 2, "other": 5}
        found = parse(Person, given)
        assert found == Person("Ann", 3, code="s", nickname="A", at=Point(1), height=2)
        assert type(found.height) is float
        assert parse(Person, {"name": "Ann", "age": 3}) == Person("Ann", 3)
        boss = parse(Employee, {"name": "Bo", "age": 1, "boss": given}).boss
        assert boss == found

    @pytest.mark.parametrize(
        ("value", "told"),
        [
            ({"age": True}, "$.name: it is missing; $.age: expected an integer, got a boolean"),
            (
                {"name": 5, "age": "3"},
                "$.name: expected a string, got an integer; $.age: expected an integer, got a string",
            ),
            ({"name": "Ann", "age": 3.0}, "$.age: expected an integer, got a number"),
            ({"name": "Ann", "age": -1}, "$: 'age' must be >= 0: -1"),
            ({"name": "Ann", "age": 1, "height": "2"}, "$.height: expected a number, got a string"),
            ({"name": "Ann", "age": 1, "at": {"x": None}}, "$.at.x: expected an integer, got null"),
            ({"name": "Ann", "age": 1, "at": []}, "$.at: expected Point or None, got an array"),
            ([{"name": "Ann"}], "$: expected an object, got an array"),
        ],
    )
    def test_what_does_not_fit(self, value: Any, told: str) -> None:
        """Every problem is told, with its path, in the words of JSON."""
        assert problem(Person, value) == told

    def test_generic_classes(self) -> None:
        """A type variable stands for what it is given, in bases too, or else for its bound."""
        assert parse(Page[Point], {"items": [{"x": 1}], "more": {"items": [{"x": 2}]}}) == Page(
            [Point(1)], Page([Point(2)])
        )
        assert problem(Page[int], {"items": [1], "more": {"items": ["a"]}}) == (
            "$.more.items[0]: expected an integer, got a string"
        )
        assert parse(People, {"title": "t", "items": [{"name": "A", "age": 1}]}).items == [Person("A", 1)]
        assert parse(Page, {"items": [1, "a"]}) == Page([1, "a"])
        assert schema(Page[Point])["title"] == "Page[Point]"
        assert set(schema(Page[Point])["$defs"]) == {"Point", "Page_Point"}

        @attrs.define
        class Bound(Generic[N]):
            value: N

        assert schema(Bound)["properties"]["value"] == {"anyOf": [{"type": "integer"}, {"type": "string"}]}
        assert schema(Bound[str])["properties"]["value"] == {"type": "string"}

    def test_a_recursive_class(self) -> None:
        """A class that holds itself is a definition that refers to itself."""
        assert parse(Tree, {"kids": [{"kids": []}], "named": {"a": {"kids": []}}}) == Tree([Tree([])], {"a": Tree([])})
        assert problem(list[Tree], {"value": [{"kids": [{"kids": [1]}]}]}) == (
            "$.value[0].kids[0].kids[0]: expected an object, got an integer"
        )
        assert fits_strict_mode(schema(list[Node])) is False  # `kids` has a default
        deep = '{"kids": [' * 100_000
        with pytest.raises(ValueError, match="nested too deeply"):
            shape_of(Tree).parse(deep + "]}" * 100_000)
        assert shape_of(Tree).partial(deep) is None

    def test_a_dataclass(self) -> None:
        """Keyword-only fields and those of the constructor alone (`InitVar`) are given, and those without `init` not."""
        assert schema(Order)["required"] == ["id", "note"]
        assert set(schema(Order)["properties"]) == {"id", "note", "rush", "lines"}
        assert parse(Order, {"id": 1, "note": "n", "rush": True, "lines": [{"x": 1}], "total": 5}) == (
            dataclasses.replace(Order(1, note="n", lines=[Point(1)]), rush=True)
        )

    def test_typed_dicts(self) -> None:
        """Required and other names are told apart, and unknown ones left out."""
        assert schema(Options)["required"] == ["a", "c"]
        assert schema(Options)["properties"]["d"] == {"type": "integer", "description": "dd"}
        assert parse(Options, {"a": 1, "c": 2, "zz": 3}) == {"a": 1, "c": 2}
        assert problem(Options, {"a": 1, "b": 2}) == "$.b: expected a string, got an integer; $.c: it is missing"
        assert parse(Extended, {"a": 1, "b": "x"}) == {"a": 1, "b": "x"}
        odd = TypedDict("odd", {"first-name": str, "it's": int})  # type: ignore[misc]
        assert parse(odd, {"first-name": "A", "it's": 1}) == {"first-name": "A", "it's": 1}
        assert problem(odd, {"first-name": 5, "it's": 1}) == "$['first-name']: expected a string, got an integer"

    def test_named_tuples(self) -> None:
        """A named tuple is an array, whose last items may be left out if they have defaults."""
        assert parse(Place, {"value": [1, 2.5]}) == Place(1.0, 2.5)
        assert problem(Place, {"value": [1]}) == "$.value: expected an array of 2 to 3, got one of 1"
        assert problem(Place, {"value": [1, "a"]}) == "$.value[1]: expected a number, got a string"

    def test_structs(self) -> None:
        """Names, constraints, tags and unknown names are as the Struct has them, and so are classes of others in it."""
        sent = schema(Struct)
        assert sent["properties"]["age"] == {"type": "integer", "minimum": 0, "description": "in years"}
        assert sent["required"] == ["firstName", "point", "model"]
        given = {"firstName": "A", "point": {"x": 1}, "model": {"theX": 2}, "nick": "n"}
        assert parse(Struct, given) == Struct("A", point=Point(1), model=Model(theX=2), nick="n")
        assert parse(Struct, {"firstName": "A"}).nick is msgspec.UNSET
        assert problem(Struct, {"firstName": "A", "age": -1, "zz": 1}) == (
            "$.age: expected `int` >= 0; $.zz: there is no such field; expected age, firstName, model, nick, point"
        )
        assert (
            problem(Struct, {"firstName": "A", "point": {"x": "1"}}) == "$.point.x: expected an integer, got a string"
        )
        assert parse(Cat | Dog, {"value": {"type": "dog", "tricks": 2}}) == Dog(2)
        assert parse(Cat, {"type": "cat", "lives": 9}) == Cat(9)
        assert problem(Cat, {"type": "dog", "lives": 9}) == '$.type: expected one of "cat", got "dog"'
        assert parse(list[Row], {"value": [["row", 1], ["row", 2, "c"]]}) == [Row(1), Row(2, "c")]

    def test_pydantic_models(self) -> None:
        """Aliases, constraints, validators, recursion, generics, tagged unions and roots are pydantic's, in strict mode."""
        assert parse(Node, {"value": 1, "kids": [{"value": 2}], "best": {"theX": 1}}).kids[0].value == 2
        assert problem(Node, {"value": "1", "best": {"theX": -1}}) == (
            "$.value: input should be a valid integer; $.best.theX: input should be greater than or equal to 0"
        )
        found = parse(Garage, {"things": [{"kind": "car", "wheels": 4}, {"kind": "ship", "sails": 1}], "cost": "1.5"})
        assert found.things[0].axles == 2
        assert "too many" in problem(Garage, {"things": [{"kind": "car", "wheels": 40}]})
        assert parse(Box[int], {"inside": 1}).inside == 1
        assert parse(Numbers, {"value": [1]}).root == [1]
        assert parse(Day, {"on": "2020-01-02"}) == Day(dt.date(2020, 1, 2))
        assert parse(Ship | Car | None, {"value": {"kind": "ship", "sails": 3}}) == Ship(kind="ship", sails=3)
        properties = schema(Garage)["properties"]["things"]["items"]
        assert properties == {"anyOf": [{"$ref": "#/$defs/Ship"}, {"$ref": "#/$defs/Car"}]}

    def test_two_classes_of_one_name(self) -> None:
        """Each has a definition."""
        other = attrs.make_class("Point", {"z": attrs.field(type=str)})
        both = attrs.make_class("Both", {"a": attrs.field(type=Point), "b": attrs.field(type=other)})
        assert {"Point", "Point_2"} <= schema(both)["$defs"].keys()
        assert parse(both, {"a": {"x": 1}, "b": {"z": "s"}}) == both(Point(1), other("s"))

    def test_what_openai_holds_the_model_to(self) -> None:
        """Classes without defaults fit OpenAI's strict mode, with unions, null, lists, enums and recursion."""

        @attrs.define
        class Strict:
            at: Point | None
            colour: Colour | Literal["none"]
            when: dt.datetime
            words: list[Word]
            size: Annotated[int, msgspec.Meta(ge=1), "in metres"]
            plain: set[str]
            where: Annotated[Ship | Car, "either"]

        without = attrs.make_class("Point", {"x": attrs.field(type=int)})
        Strict.__annotations__["at"] = without | None
        for kind in (Strict, list[Strict], Strict | None, Ship | Car, JSON, Annotated[Ship, "One."]):
            wanted = kind is not JSON  # whose objects have names that nobody knows
            assert fits_strict_mode(schema(kind)) is wanted, kind


class TestOtherTypes:
    @pytest.mark.parametrize(
        ("kind", "value", "made"),
        [
            (int, 1, 1),
            (float, 1, 1.0),
            (str, "x", "x"),
            (type(None), None, None),
            (Colour, 1, Colour.ONE),
            (Level, 2, Level.HIGH),
            (Word, "no", Word.NO),
            (Literal["a", 1, True] | None, True, True),
            (Literal[Word.YES], "yes", Word.YES),
            (Point | None, None, None),
            (int | str | None, "a", "a"),
            (int | float, 1, 1),
            (int | float, 1.5, 1.5),
            (float | str, 1, 1.0),
            (Point | list[Point] | int, [{"x": 1}], [Point(1)]),
            (Annotated[Point, "A point."], {"x": 1}, Point(1)),
            (Annotated[list[int], msgspec.Meta(min_length=1)], [1], [1]),
            (UserId, 5, 5),
            (Alias, [{"x": 1}], [Point(1)]),
            (JSON, [1, {"a": [None, 1.5]}], [1, {"a": [None, 1.5]}]),
            (dt.date, "2020-01-02", dt.date(2020, 1, 2)),
            (dt.datetime, "2020-01-02T03:04:05Z", dt.datetime(2020, 1, 2, 3, 4, 5, tzinfo=dt.UTC)),
            (dt.time, "03:04:05", dt.time(3, 4, 5)),
            (dt.timedelta, "PT3S", dt.timedelta(seconds=3)),
            (decimal.Decimal, "1.50", decimal.Decimal("1.50")),
            (uuid.UUID, "12345678-1234-5678-1234-567812345678", uuid.UUID("12345678-1234-5678-1234-567812345678")),
            (bytes, "YWJj", b"abc"),
            (tuple[int, str], [1, "a"], (1, "a")),
            (tuple[int, ...], [1, 2], (1, 2)),
            (tuple[()], [], ()),
            (set[int], [1, 1, 2], {1, 2}),
            (frozenset[Word], ["yes"], frozenset({Word.YES})),
            (collections.deque[int], [1], collections.deque([1])),
            (typing.Sequence[int], [1], [1]),
            (typing.Iterable[int], [1], [1]),
            (list, [1, None], [1, None]),
            (Any, {"a": 1}, {"a": 1}),
        ],
        ids=str,
    )
    def test_a_value(self, kind: Any, value: Any, made: Any) -> None:
        """Whatever is not an object is sent as the property `value` of one, and read with it and without."""
        sent = schema(kind)
        assert sent["properties"].keys() == {"value"}
        jsonschema.validate({"value": value}, sent)
        for text in ({"value": value}, value):
            found = parse(kind, text)
            assert found == made
            assert type(found) is type(made)

    @pytest.mark.parametrize(
        ("kind", "value", "made"),
        [
            (dict[str, int], {"value": 1}, {"value": 1}),
            (dict[int, Point], {"1": {"x": 1}}, {1: Point(1)}),
            (dict[UserId, int], {"1": 2}, {1: 2}),
            (dict[Level, int], {"2": 1}, {Level.HIGH: 1}),
            (dict[Word, int], {"yes": 1}, {Word.YES: 1}),
            (dict[dt.date, int], {"2020-01-02": 1}, {dt.date(2020, 1, 2): 1}),
            (typing.Mapping[str, int], {"a": 1}, {"a": 1}),
            (collections.OrderedDict[str, int], {"a": 1}, collections.OrderedDict(a=1)),
            (dict, {"a": None}, {"a": None}),
        ],
        ids=str,
    )
    def test_a_table(self, kind: Any, value: Any, made: Any) -> None:
        """A table is sent as it is. Its keys are strings in JSON, whatever they stand for."""
        assert schema(kind)["type"] == "object"
        assert parse(kind, value) == made

    @pytest.mark.parametrize(
        ("kind", "value", "told"),
        [
            (bool, 1, "$: expected a boolean, got an integer"),
            (int, True, "$: expected an integer, got a boolean"),
            (str, None, "$: expected a string, got null"),
            (Word, "maybe", '$: expected one of "yes", "no", got "maybe"'),
            (Level, "1", '$: expected one of 1, 2, got "1"'),
            (Colour, True, '$: expected one of "red", 1, got true'),
            (Word, "x" * 1_000_000, '$: expected one of "yes", "no", got a string'),
            (int | str, 1.5, "$: expected int or str, got a number"),
            (Point | Place, {"z": 1}, "$.x: it is missing"),
            (Cat | Dog, {"type": "cow"}, "$: expected Cat or Dog (Cat: .type"),
            (dt.date, "soon", "$: invalid RFC3339 encoded date"),
            (uuid.UUID, 5, "$: expected `uuid`, got `int`"),
            (bytes, "nö", "$: invalid base64 encoded string"),
            (tuple[int, str], [1], "$: expected an array of 2, got one of 1"),
            (tuple[int, str], ["a", 1], "$[0]: expected an integer, got a string; $[1]: expected a string"),
            (set[int], [1, "a"], "$[1]: expected an integer, got a string"),
            (dict[int, int], {"a": 1}, "$.a: as the name, expected `int`, got `str`"),
            (dict[Word, int], {"maybe": 1}, "$.maybe: expected one of yes, no as the name"),
            (
                Annotated[list[Annotated[int, msgspec.Meta(ge=3)]], msgspec.Meta(max_length=2)],
                [1, 4],
                "$[0]: expected `int` >= 3",
            ),
        ],
        ids=lambda each: str(each)[:40],
    )
    def test_what_does_not_fit(self, kind: Any, value: Any, told: str) -> None:
        """The message says what was expected where."""
        assert problem(kind, value).startswith(told)

    def test_numbers_beyond_floats(self) -> None:
        """A number that no float holds is a problem of the answer."""
        assert problem(float, 10**400) == "$: the number is too large"
        with pytest.raises(ValueError, match="1e999 is too large a number"):
            shape_of(float).parse("1e999")
        with pytest.raises(ValueError, match="NaN is not a JSON value"):
            shape_of(float).parse("NaN")
        assert parse(int, 10**40) == 10**40
        assert parse(decimal.Decimal, 1.5) == decimal.Decimal("1.5")
        assert parse(Box[int], {"inside": 2**70}).inside == 2**70

    def test_half_a_character(self) -> None:
        """Half a surrogate pair is a text like any other, except for pydantic, which takes none."""
        assert shape_of(str).parse('{"value": "\\ud800"}') == "\ud800"
        with pytest.raises(ValueError, match="half a character"):
            shape_of(Box[str]).parse('{"inside": "\\ud800"}')

    def test_a_wrapped_value_that_was_not_wrapped(self) -> None:
        """A class with a property `value` fits a union, wrapped or not."""
        kind = attrs.make_class("Kind", {"value": attrs.field(type=int)})
        assert parse(kind | Point, {"value": 1}) == kind(1)
        assert parse(kind | Point, {"value": {"value": 1}}) == kind(1)

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="`type X = …` is a word of Python 3.12")
    def test_aliases_of_python_3_12(self) -> None:
        """An alias is what it stands for, with parameters too; one that holds itself is a definition."""
        names: dict[str, Any] = {"Point": Point, "__name__": __name__}
        exec("type Pair[T] = tuple[T, T]\ntype Nested = list[Nested] | int\ntype Points = list[Point]", names)  # noqa: S102  # a syntax error to Python 3.11
        assert parse(names["Pair"][int], [1, 2]) == (1, 2)
        assert parse(names["Points"], [{"x": 1}]) == [Point(1)]
        assert parse(names["Nested"], [1, [2]]) == [1, [2]]
        assert schema(names["Nested"])["$defs"].keys() == {"Nested"}


class Plain:
    a: int


UNKNOWN: list[tuple[Any, str]] = [
    (Plain, "Plain has no JSON Schema: expected an attrs class"),
    (complex, "complex has no JSON Schema"),
    (typing.Callable[[int], int], "has no JSON Schema"),
    (range, "range has no JSON Schema"),
    (type, "type has no JSON Schema"),
    (typing.Self, "Self has no JSON Schema"),
    (set[Point], "set[Point]: Point has no hash; write list[Point]"),
    (dict[tuple[int, int], int], "dict[tuple[int, int], int]: expected keys that are str, int or an enum of these"),
    (Literal[b"a"], "expected values that are JSON"),
    (enum.Enum("Odd", {"A": object()}), "expected values that are JSON"),
    (enum.Enum("Nothing", {}), "expected values that are JSON"),
    (Point(1), "got Point(x=1, y=0)"),
    (None, "got None"),
    ("Point", "got 'Point'"),
    (5, "got 5"),
    ([Point], "got [<class"),
    (attrs.make_class("Holder", {"plain": attrs.field(type=Plain)}), "Holder.plain: Plain has no JSON Schema"),
    (
        attrs.make_class("Lost", {"a": attrs.field(type="Nowhere")}),
        "Lost: an annotation cannot be read: name 'Nowhere'",
    ),
    (typing_extensions.TypeAliasType("Lost", "list[Nowhere]"), "Lost: an annotation cannot be read: name 'Nowhere'"),  # noqa: F821
]


@pytest.mark.parametrize(("kind", "message"), UNKNOWN, ids=lambda each: str(each)[:50])
def test_what_has_no_schema(kind: Any, message: str) -> None:
    """A type without a schema is refused when it is given, and the error says where it is and what was expected."""
    with pytest.raises(ConfigError) as caught:
        shape_of(kind, "into")
    assert str(caught.value).startswith("into: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pydantic_model_without_a_schema() -> None:
    """What pydantic cannot describe is a ConfigError, too."""

    class Odd(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
        plain: Plain

    with pytest.raises(ConfigError, match="Odd has no JSON Schema: Cannot generate"):
        shape_of(Odd)


def test_many_types_share_their_definitions() -> None:
    """Schemas that are made together, as those of a function's arguments, have one table of definitions."""
    (first, second), definitions = schemas_of([list[Point], Node])
    assert first == {"type": "array", "items": {"$ref": "#/$defs/Point"}}
    assert second["$ref"] in {f"#/$defs/{name}" for name in definitions}
    assert {"Point", "Node", "Model"} <= definitions.keys()


class TestMessages:
    def test_a_huge_wrong_value_is_cut(self) -> None:
        """However large a value and however many its problems, the message has a few thousand characters."""
        many = shape_of(list[int])
        with pytest.raises(ValueError, match="and 99980 more problems") as caught:
            many.parse(json.dumps(["x" * 100] * 100_000))
        assert len(str(caught.value)) < 3_000
        huge = "y" * 1_000_000
        for kind, value in (
            (dict[str, int], {huge: "a"}),
            (list[Person], [{"name": huge, "age": -1}]),
            (Struct, {huge: 1}),
            (Garage, {"things": [{"kind": huge}]}),
        ):
            assert len(problem(kind, value)) < 2_000
        for given in (
            {"type": "object", "properties": {"a": {"enum": [1]}}},
            {"items": {"type": "integer"}, "type": "array"},
        ):
            with pytest.raises(ValueError, match="does not match") as caught:
                shape_of(given).parse(json.dumps({"a": huge} if "properties" in given else [huge] * 50))
            assert len(str(caught.value)) < 9_000

    def test_an_error_of_the_class(self) -> None:
        """What a class's constructor raises is told without its traceback, and without what attrs adds to its message."""
        kind = attrs.make_class("Kind", {"a": attrs.field(type=Any, validator=attrs.validators.instance_of(str))})
        assert problem(kind, {"a": 5}) == "$: 'a' must be <class 'str'> (got 5 that is a <class 'int'>)."

    def test_the_path_of_a_wrapped_value(self) -> None:
        """The path leads through what the model wrote."""
        assert problem(list[int], {"value": ["a"]}) == "$.value[0]: expected an integer, got a string"
        assert problem(list[int], ["a"]) == "$[0]: expected an integer, got a string"
        with pytest.raises(ValueError, match=r"\$\.value\[0\]: 'a' is not of type 'integer'"):
            shape_of({"type": "array", "items": {"type": "integer"}}).parse('{"value": ["a"]}')

    def test_structured(self) -> None:
        """`structured` names the path that it is given."""
        with pytest.raises(ValueError, match=r"^point\.x: it is missing$"):
            structured({}, Point, "point")


class TestJSONSchemas:
    def test_a_schema_that_refers_to_its_root_can_be_wrapped(self) -> None:
        """References of a schema that is no object lead to the same place once it is the property `value`."""
        nested = {"type": ["array", "integer"], "items": {"$ref": "#"}}
        shape = shape_of(nested)
        assert shape.wrapped
        jsonschema.validate({"value": [1, [2]]}, shape.response_format)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"value": [1, ["a"]]}, shape.response_format)
        assert shape.parse('{"value": [1, [2]]}') == [1, [2]]
        inner = {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"$ref": "#/prefixItems/0"}}
        jsonschema.validate({"value": [1, 2]}, shape_of(inner).response_format)

    def test_an_object_is_sent_as_it_is(self) -> None:
        """A schema of an object, or a table of OpenAI's client, is not touched."""
        given = {"type": "object", "properties": {"a": {"type": "integer", "default": 1}}}
        assert shape_of(given).response_format is given
        table = {"type": "json_schema", "json_schema": {"name": "n", "schema": given}}
        assert shape_of(table).response_format is table
        assert shape_of(table).parse('{"a": 1}') == {"a": 1}


class TestPartial:
    def test_a_value_grows(self) -> None:
        """A class is an instance as soon as it fits, and the beginning of one is plain."""
        shape = shape_of(Person)
        assert shape.partial("") is None
        assert shape.partial("{") == {}
        assert shape.partial('{"name": "An') == {"name": "An"}
        assert shape.partial('{"name": "Ann", "age": 3') == {"name": "Ann"}
        assert shape.partial('{"name": "Ann", "age": 3, "tags": ["a') == Person("Ann", 3, ["a"])
        assert shape.partial('```json\n{"name": "Ann", "age": 3, "ta') == Person("Ann", 3)
        assert shape.partial("no JSON at all") is None

    def test_a_list_has_instances(self) -> None:
        """The last item comes once it fits."""
        shape = shape_of(list[Point])
        assert shape.partial("{") is None
        assert shape.partial('{"value": [') == []
        assert shape.partial('{"value": [{"x": 1}, {"x"') == [Point(1)]
        assert shape.partial('{"value": [{"x": 1}, {"x": 2,') == [Point(1), Point(2)]
        assert shape.partial('{"value": [{"y": 1}, {"x": 2,') == [{"y": 1}, Point(2)]

    def test_a_json_schema(self) -> None:
        """Of a JSON Schema, the values are plain."""
        shape = shape_of({"type": "array", "items": {"type": "integer"}})
        assert shape.partial('{"value": [1, 2') == [1]

    def test_the_time_grows_with_the_length(self) -> None:
        """Twice the text takes about twice the time, for many values, long texts, and deep nesting."""
        for begun in ('[{"name": "abc", "n": 1.5, "t": [null, "x"]}, ', '{"a": "é\\n', "[" * 10, '{"a": '):
            times = []
            for copies in (2_000, 8_000):
                text = "[" + begun * copies if begun.startswith("[{") else begun + '\\"x' * copies * 5
                text = begun * copies if begun in ("[" * 10, '{"a": ') else text
                times.append(min(timed(text) for _ in range(3)))
            assert times[1] < 12 * times[0] + 0.01


def timed(text: str) -> float:
    began = time.thread_time()
    value_so_far(text)
    return time.thread_time() - began


def test_threads_make_one_type() -> None:
    """Many threads that ask for a recursive type at once get a shape that works."""
    kind = attrs.make_class("Deep", {"a": attrs.field(type=Page[Tree]), "b": attrs.field(type=dict[str, Page[Tree]])})
    found: list[Shape] = []
    start = threading.Barrier(20)

    def ask() -> None:
        start.wait()
        shape = shape_of(kind)
        assert shape.parse('{"a": {"items": [{"kids": []}]}, "b": {}}').a.items == [Tree([])]
        found.append(shape)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20


def test_a_scalar_has_the_constraints_of_pydantic():
    """Also as the field of an attrs class, or the parameter of a function."""

    @attrs.define
    class Stay:
        nights: Annotated[int, pydantic.Field(ge=1, description="how many")]

    assert shape_of(Stay).response_format["properties"]["nights"] == {
        "type": "integer",
        "minimum": 1,
        "description": "how many",
    }
    assert shape_of(Stay).parse('{"nights": 2}') == Stay(2)
    with pytest.raises(ValueError, match=r"\$\.nights: input should be greater than or equal to 1"):
        shape_of(Stay).parse('{"nights": 0}')
