"""Functions as tools: what a model is told of a function, how its arguments arrive, and what it returns."""

import dataclasses
import enum
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache, partial, wraps
from types import MappingProxyType
from typing import Annotated, Any, Literal, NotRequired, TypedDict
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest

from fluxibly import tool
from fluxibly._schemas.docstrings import described
from fluxibly.errors import ConfigError
from fluxibly.tools import BadArguments, FunctionTool
from fluxibly.types import Image, Text, Tool, ToolCall


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@attrs.frozen
class Place:
    city: str
    country: str = "FR"


@dataclasses.dataclass
class Range:
    low: int
    high: int = 10


class Options(TypedDict):
    verbose: bool
    depth: NotRequired[int]


class Struct(msgspec.Struct):
    x: float


class Model(pydantic.BaseModel):
    name: str
    tags: list[str] = []


def weather(city: str, unit: Literal["c", "f"] = "c") -> str:
    """Return the weather of a city.

    It is that of today.

    Args:
        city: its English name,
            in full.
        unit: Celsius or Fahrenheit.

    Returns:
        A sentence.
    """
    return f"{city}: 20 {unit}"


class Station:
    """A weather station."""

    def __init__(self, name):
        self.name = name

    def wind(self, hour: int) -> str:
        """Return the wind."""
        return f"{self.name} {hour}"

    @staticmethod
    def sun(hour: int) -> int:
        return hour

    @classmethod
    def rain(cls, hour: int) -> int:
        return hour

    def __call__(self, hour: int) -> str:
        """Measure."""
        return f"measured at {hour}"


def call_of(made, arguments):
    return ToolCall("c1", made.name, raw_arguments=arguments if isinstance(arguments, str) else json.dumps(arguments))


def run(made, **arguments):
    """Call a tool as a model does."""
    return made.content_of(made(**made.read(call_of(made, arguments))))


def refused(made, arguments):
    with pytest.raises(BadArguments) as caught:
        made.read(call_of(made, arguments))
    return str(caught.value)


def properties(function, **options):
    return tool(function, **options).parameters["properties"]


class TestWhatTheModelIsTold:
    def test_a_function(self):
        """Name, description and schema come from the function; the docstring's sections from `Args:` on are left out."""
        made = tool(weather)
        assert (made.name, made.description) == ("weather", "Return the weather of a city.\n\nIt is that of today.")
        assert made.parameters == {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its English name, in full."},
                "unit": {"type": "string", "enum": ["c", "f"], "description": "Celsius or Fahrenheit."},
            },
            "required": ["city"],
            "additionalProperties": False,
        }

    def test_it_is_a_tool(self):
        """It goes wherever a `Tool` goes, and can still be called."""
        made = tool(weather)
        assert isinstance(made, Tool)
        assert isinstance(made, FunctionTool)
        assert made("Rome") == "Rome: 20 c"
        assert made.function is weather
        assert "function" not in repr(made)
        assert made == tool(weather)
        assert hash(made.name) == hash(tool(weather).name)
        assert attrs.evolve(made, strict=True).strict is True

    def test_a_decorator(self):
        @tool
        def one(a: int) -> int:
            """Double."""
            return a * 2

        @tool(name="second", description="Triple.")
        def two(a: int) -> int:
            return a * 3

        assert (one.name, one.description, one(2)) == ("one", "Double.", 4)
        assert (two.name, two.description, two(2)) == ("second", "Triple.", 6)

    def test_a_tool_of_a_tool(self):
        """A tool can be renamed; without changes it stays the same."""
        made = tool(weather)
        assert tool(made) is made
        renamed = tool(made, name="forecast", description="Forecast.")
        assert (renamed.name, renamed.description, renamed.parameters) == ("forecast", "Forecast.", made.parameters)
        assert run(renamed, city="Rome") == "Rome: 20 c"
        assert tool(made, parameters={"properties": {"city": {}}}).parameters == {"properties": {"city": {}}}

    def test_no_parameters(self):
        assert tool(lambda: 1, name="one").parameters == {
            "type": "object",
            "properties": {},
            "additionalProperties": False,
        }

    def test_classes_are_definitions(self):
        """Parameters of the same class share its definition; a description stands beside the reference."""

        def route(start: Place, end: Annotated[Place, "where to"]):
            """Plan."""

        parameters = tool(route).parameters
        assert parameters["properties"]["start"] == {"$ref": "#/$defs/Place"}
        assert parameters["properties"]["end"] == {"anyOf": [{"$ref": "#/$defs/Place"}], "description": "where to"}
        assert [*parameters["$defs"]] == ["Place"]
        assert parameters["required"] == ["start", "end"]

    @pytest.mark.parametrize(
        ("kind", "schema"),
        [
            (int, {"type": "integer"}),
            (list[int], {"type": "array", "items": {"type": "integer"}}),
            (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
            (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
            (Colour, {"type": "string", "enum": ["red", "blue"]}),
            (Literal[1, 2], {"type": "integer", "enum": [1, 2]}),
            (Any, {}),
        ],
        ids=str,
    )
    def test_types(self, kind, schema):
        def function(value):
            return value

        function.__annotations__ = {"value": kind}
        assert properties(function) == {"value": schema}

    def test_without_an_annotation(self):
        """Such a parameter takes any JSON value."""
        assert properties(lambda value: value, name="f") == {"value": {}}
        assert tool(lambda value: value, name="f").read(ToolCall("1", "f", {"value": [1, {}]})) == {"value": [1, {}]}

    def test_descriptions_beside_types(self):
        """They come before those of the docstring. pydantic's and msgspec's count as well."""

        def find(
            a: Annotated[int, "first"],
            b: Annotated[int, msgspec.Meta(description="second", ge=1)],
            c: Annotated[int, pydantic.Field(description="third")],
            d: Annotated[int, 4],
        ):
            """Find.

            Args:
                a: not this
                d: fourth
            """

        found = properties(find)
        assert [found[name]["description"] for name in "abcd"] == ["first", "second", "third", "fourth"]
        assert found["b"]["minimum"] == 1

    def test_wherever_functions_come_from(self):
        """Bound methods, static ones, partials, callables, decorated and cached functions are functions."""

        def loudly(function):
            @wraps(function)
            def wrapper(*args, **kwargs):
                return function(*args, **kwargs).upper()

            return wrapper

        station = Station("Oslo")
        made = [tool(each) for each in (station.wind, station, Station.sun, Station.rain, loudly(weather))]
        assert [each.name for each in made] == ["wind", "Station", "sun", "rain", "weather"]
        assert [each.description for each in made][:2] == ["Return the wind.", "Measure."]
        assert [run(each, hour=3) for each in made[:4]] == ["Oslo 3", "measured at 3", "3", "3"]
        assert run(made[4], city="Rome") == "ROME: 20 C"
        assert run(tool(lru_cache(weather)), city="Rome") == "Rome: 20 c"

    def test_objects_whose_call_has_no_docstring(self):
        """What their class says describes them."""

        class Weather:
            """Return the weather of a city."""

            def __call__(self, city: str) -> str:
                return city

        class Plain:
            def __call__(self) -> str:
                return ""

        made = [tool(Weather()), tool(partial(Weather(), "Rome")), tool(Plain())]
        assert [each.description for each in made] == [*["Return the weather of a city."] * 2, ""]

    def test_what_a_partial_has_set(self):
        """The model is not told of it, and cannot set it."""
        made = tool(partial(partial(weather, "Rome"), unit="f"))
        assert (made.name, made.description.splitlines()[0]) == ("weather", "Return the weather of a city.")
        assert made.parameters["properties"] == {}
        assert run(made) == "Rome: 20 f"
        assert refused(made, {"unit": "c"}) == "unit is unknown; expected no arguments"

    def test_async_functions(self):
        async def wait(seconds: float):
            """Wait."""

        class Waiting:
            async def __call__(self, seconds: float):
                """Wait, too."""

        assert tool(wait).is_async
        assert tool(partial(wait, 1.0)).is_async
        assert tool(Waiting()).is_async
        assert not tool(weather).is_async

    def test_a_schema_of_ones_own(self):
        """With `parameters`, a function may take whatever the schema names, as an MCP server's tool does."""
        schema = {"type": "object", "properties": {"q": {"type": "string"}, "n": {}}, "required": ["q"]}

        def search(**arguments: Any) -> str:
            return json.dumps(arguments)

        made = tool(search, name="search", description="Search.", parameters=schema)
        assert made.parameters is schema
        assert run(made, q="x", n=2, other=[1]) == '{"q": "x", "n": 2, "other": [1]}'
        assert refused(made, {"n": 1}) == "q is required, and missing"

    def test_a_schema_for_named_parameters(self):
        """The annotations are not read: the function gets the JSON values."""
        made = tool(lambda at: f"{at}", name="go", parameters={"type": "object", "properties": {"at": {}}})
        assert run(made, at={"city": "Rome"}) == "{'city': 'Rome'}"
        assert refused(made, {"by": 1}) == "by is unknown; expected at (required); at is required, and missing"


class TestWhatCannotBeATool:
    @pytest.mark.parametrize(
        ("function", "problem"),
        [
            (3, "tool: expected a function, got an int; write tool(function)"),
            (
                lambda: 1,
                "tool: expected a name of at most 128 ASCII letters, digits, '_', '-', '.' and ':', got '<lambda>'",
            ),
            (Place, r"tool(Place): expected a function, got a class; write a function that returns an instance"),
            (
                Station.wind,
                "tool(wind): expected a method of an object, got the function of its class; write tool(object.wind)",
            ),
            (dict.get, "tool(get): "),
        ],
        ids=["number", "lambda", "class", "method of a class", "function of C"],
    )
    def test_what_is_no_function(self, function, problem):
        with pytest.raises(ConfigError) as caught:
            tool(function)
        assert problem in str(caught.value)

    def test_kinds_of_parameters(self):
        """The message says what to write instead."""

        def positional(a, /):
            pass

        def several(*names):
            pass

        def named(**options):
            pass

        def generator():
            yield 1

        async def agenerator():
            yield 1

        expected = {
            positional: "tool(positional): a: expected a parameter that can be given by name, got a positional-only one; "
            "leave the / out, or write a function that calls this one",
            several: "tool(several): expected parameters that are named, got *names; write names: list[…]",
            named: "tool(named): expected parameters that are named, got **options; name them, or write "
            "tool(function, parameters={…}) with their JSON Schema",
            generator: "tool(generator): expected a function that returns its value, got a generator function; return a list",
            agenerator: "tool(agenerator): expected a function that returns its value, got a generator function; return a list",
        }
        for function, problem in expected.items():
            with pytest.raises(ConfigError) as caught:
                tool(function)
            assert str(caught.value) == problem

    def test_annotations(self):
        """A type without a JSON Schema names the parameter; so does a name that cannot be found."""

        def odd(a: int, b: Station):
            pass

        def unknown(a: "Nowhere"):  # noqa: F821  # it is nowhere
            pass

        with pytest.raises(ConfigError, match=r"^tool\(odd\): b: Station has no JSON Schema: expected .*parameters="):
            tool(odd)
        with pytest.raises(ConfigError, match=r"^tool\(unknown\): .*Nowhere.*parameters="):
            tool(unknown)
        assert run(tool(odd, parameters={"properties": {"a": {}, "b": {}}}), a=1, b=2) == "null"

    @pytest.mark.parametrize(
        ("parameters", "problem"),
        [
            ("{}", "parameters: expected a JSON Schema (a mapping), got a str"),
            ({"properties": 3}, "parameters: expected the JSON Schema of an object, with 'properties'"),
            (
                {"properties": {"b": {}, "a": {}}},
                "expected only parameters that the function takes, got b; add **kwargs",
            ),
            ({"properties": {}}, "parameters: expected a property for a, got none"),
        ],
    )
    def test_a_schema_that_does_not_fit(self, parameters, problem):
        with pytest.raises(ConfigError) as caught:
            tool(lambda a: a, name="f", parameters=parameters)
        assert problem in str(caught.value)

    def test_descriptions(self):
        for function in (weather, tool(weather)):
            with pytest.raises(ConfigError, match=r"^tool\(weather\): description: expected a str, got an int$"):
                tool(function, description=5)

    @pytest.mark.parametrize("name", ["", "two words", "größe", "x" * 129, 5])
    def test_names(self, name):
        with pytest.raises(ConfigError, match="tool: expected a name of at most 128"):
            tool(weather, name=name)
        with pytest.raises(ConfigError, match="tool: expected a name of at most 128"):
            tool(tool(weather), name=name)


class TestArguments:
    @pytest.mark.parametrize(
        ("kind", "value", "expected"),
        [
            (Place, {"city": "Rome"}, Place("Rome")),
            (Range, {"low": 1, "high": 2}, Range(1, 2)),
            (Options, {"verbose": True}, {"verbose": True}),
            (Struct, {"x": 1}, Struct(1.0)),
            (Model, {"name": "n", "tags": ["t"]}, Model(name="n", tags=["t"])),
            (Colour, "red", Colour.RED),
            (list[Place], [{"city": "Rome"}], [Place("Rome")]),
            (Place | None, None, None),
            (Place | Range, {"low": 1}, Range(1)),
            (datetime, "2026-01-02T03:04:05Z", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
            (float, 1, 1.0),
        ],
        ids=str,
    )
    def test_values_have_the_types_of_the_parameters(self, kind, value, expected):
        def take(value):
            return value

        take.__annotations__ = {"value": kind}
        assert tool(take).read(call_of(tool(take), {"value": value})) == {"value": expected}

    @pytest.mark.parametrize("value", [1, None, ["Rome"], True])
    def test_they_are_as_strict_as_json(self, value):
        assert refused(tool(weather), {"city": value}).startswith("city: expected a string, got ")

    def test_all_mistakes_are_told_at_once(self):
        found = refused(tool(weather), {"unit": "k", "town": "Rome"})
        assert found.startswith("town is unknown; expected city (required), unit; city is required, and missing; ")
        assert "unit" in found.split("; ")[-1]
        assert '"c", "f"' in found

    @pytest.mark.parametrize("kind", [Any, list, list[Any], list[dict[str, Any]]], ids=str)
    def test_they_are_the_functions_own(self, kind):
        """A function that changes them does not change what the model said."""

        def change(places):
            places[0]["visited"] = True
            places[0]["in"].append("Italy")
            places.append({"city": "Oslo"})

        change.__annotations__ = {"places": kind}
        called = call_of(tool(change), {"places": [{"city": "Rome", "in": []}]})
        change(**tool(change).read(called))
        assert called.arguments == {"places": [{"city": "Rome", "in": []}]}

    @pytest.mark.parametrize("depth", [900, 5000, 100_000])
    def test_deep_ones(self, depth):
        """They are told to the model at worst, whatever depth Python can read."""
        made = tool(lambda value: value, name="f")
        text = f'{{"value": {"[" * depth}{"]" * depth}}}'
        try:
            found = json.dumps(made.read(call_of(made, text)))
        except BadArguments as error:
            found = str(error)
        assert found in (text, "the arguments are nested too deeply; expected a JSON object with value (required)")

    @pytest.mark.parametrize("text", ["{", '{"city": "Ro', "[1]", '"Rome"', "nonsense"])
    def test_what_is_no_json_object(self, text):
        assert refused(tool(weather), text).endswith("; expected a JSON object with city (required), unit")

    def test_no_text_is_no_arguments(self):
        assert tool(lambda: 1, name="one").read(ToolCall("1", "one", raw_arguments="")) == {}

    def test_defaults_are_the_function_s(self):
        """What the model leaves out is not passed on."""
        assert tool(weather).read(call_of(tool(weather), {"city": "Rome"})) == {"city": "Rome"}


class TestResults:
    @pytest.mark.parametrize(
        ("result", "content"),
        [
            ("plain", "plain"),
            ("", ""),
            (None, "null"),
            (3, "3"),
            (True, "true"),
            ({"a": [1, 2.5]}, '{"a":[1,2.5]}'),
            (["a", "b"], '["a","b"]'),
            ([], "[]"),
            ((1, 2), "[1,2]"),
            (Place("Rom"), '{"city":"Rom","country":"FR"}'),
            (Range(1), '{"low":1,"high":10}'),
            (Struct(1.5), '{"x":1.5}'),
            (Model(name="n"), '{"name":"n","tags":[]}'),
            ([Model(name="n"), Place("Rom")], '[{"name":"n","tags":[]},{"city":"Rom","country":"FR"}]'),
            (Colour.RED, "red"),
            ([Colour.RED], '["red"]'),
            (datetime(2026, 1, 2, tzinfo=UTC), '"2026-01-02T00:00:00Z"'),
            (Decimal("1.50"), '"1.50"'),
            (UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
            (MappingProxyType({"a": 1}), '{"a":1}'),
            (2**80, str(2**80)),
            (["\ud83d"], '["\\ud83d"]'),
            ("größe", "größe"),
            ({"größe": 1}, '{"größe":1}'),
        ],
        ids=repr,
    )
    def test_json(self, result, content):
        assert tool(weather).content_of(result) == content

    def test_texts_and_media(self):
        """They are content as they are; a list of plain strings is JSON."""
        image = Image(data=b"x", media_type="image/png")
        made = tool(weather)
        assert made.content_of(image) == [image]
        assert made.content_of(Text("t")) == [Text("t")]
        assert made.content_of(["see:", image]) == ["see:", image]
        assert made.content_of((Text("a"), image)) == (Text("a"), image)

    def test_what_json_does_not_have(self):
        """The error names the function."""
        cycle: list[Any] = []
        cycle.append(cycle)
        for result in (Station("x"), {"a": Station("x")}, {(1, 2): 3}, cycle):
            with pytest.raises(TypeError, match=r"^the tool weather returned .*, which is not JSON: .*; return a str"):
                tool(weather).content_of(result)


GOOGLE = """Find a place.

    Near or far.

    Args:
        name (str): its name,
            in full
        size (Optional[int], optional): how large: or small
        *rest: the rest

    Raises:
        ValueError: never
    """
NUMPY = """Find a place.

    Near or far.

    Parameters
    ----------
    name : str
        its name,
        in full
    size : int, optional
        how large: or small

    Returns
    -------
    str
        The place.
    """
SPHINX = """Find a place.

    Near or far.

    :param str name: its name,
        in full
    :param size: how large: or small
    :type size: int
    :returns: the place
    """


class TestDocstrings:
    @pytest.mark.parametrize("text", [GOOGLE, NUMPY, SPHINX], ids=["Google", "NumPy", "Sphinx"])
    def test_styles(self, text):
        found = described(text, ["name", "size"])
        assert found.text == "Find a place.\n\nNear or far."
        assert found.parameters == {"name": "its name, in full", "size": "how large: or small"}

    def test_without_parameters(self):
        assert described("Just this.", ["a"]) == ("Just this.", {})
        assert described("", ["a"]) == ("", {})
        assert described("Find.\n\nReturns:\n    It.", ["a"]) == ("Find.", {})

    def test_words_that_are_no_sections(self):
        """A line that only looks like one stays in the text."""
        text = "Find.\n\nNote: this is fast\nand the parameters\nare: a, b"
        assert described(text, ["a"]).text == text

    def test_several_parameters_of_one_description(self):
        text = "Find.\n\nParameters\n----------\nlow, high : int\n    the range"
        assert described(text, ["low", "high"]).parameters == {"low": "the range", "high": "the range"}

    def test_parameters_in_two_sections(self):
        text = "Find.\n\nArgs:\n    a: one\n\nKeyword Args:\n    b: two\n"
        assert described(text, ["a", "b"]).parameters == {"a": "one", "b": "two"}


def test_the_schema_is_a_mapping_of_ones_own():
    """Two tools of a function share nothing that could change."""
    one, other = tool(weather).parameters, tool(weather).parameters
    assert isinstance(one, Mapping)
    assert one["properties"] is not other["properties"]
