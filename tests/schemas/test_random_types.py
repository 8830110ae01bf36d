"""Random types and random instances: what is written as JSON comes back equal, and what is corrupted is refused or fits."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import json
import typing
import uuid
from typing import Any

import attrs
import jsonschema
import msgspec
import pydantic
from hypothesis import HealthCheck, given, settings, strategies as st

from fluxibly._schemas.incomplete import NOTHING, value_so_far
from fluxibly._schemas.shapes import shape_of

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


class Colour(enum.Enum):
    RED = "red"
    ONE = 1


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(enum.StrEnum):
    YES = "yes"
    NO = "no"


LEAVES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (bool, st.booleans()),
    (int, st.integers()),
    (float, FLOATS),
    (str, TEXTS),
    (type(None), st.none()),
    (dt.date, st.dates()),
    (dt.datetime, st.datetimes(timezones=st.just(dt.UTC))),
    (dt.timedelta, st.timedeltas(dt.timedelta(-1_000), dt.timedelta(1_000))),
    (decimal.Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (uuid.UUID, st.uuids()),
    (bytes, st.binary(max_size=8)),
    (Colour, st.sampled_from(Colour)),
    (Level, st.sampled_from(Level)),
    (Word, st.sampled_from(Word)),
    (typing.Literal["a", 1, True], st.sampled_from(["a", 1, True])),
]
NAMES = [f"x{number}" for number in range(4)]


@st.composite
def pairs(draw: Any, depth: int = 2) -> tuple[Any, st.SearchStrategy[Any]]:
    """Return a type, and a strategy of its instances."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(LEAVES))
    kind = draw(
        st.sampled_from(
            [
                "list",
                "tuple",
                "row",
                "set",
                "dict",
                "optional",
                "attrs",
                "dataclass",
                "TypedDict",
                "Struct",
                "NamedTuple",
            ]
        )
    )
    if kind in ("set", "dict"):
        key, keys = draw(st.sampled_from([LEAVES[1], LEAVES[3], LEAVES[5], LEAVES[13]]))
        if kind == "set":
            return frozenset[key], st.frozensets(keys, max_size=3)
        inner, values = draw(pairs(depth - 1))
        return dict[key, inner], st.dictionaries(keys, values, max_size=3)
    if kind in ("list", "tuple", "optional"):
        inner, values = draw(pairs(depth - 1))
        if kind == "optional":
            return typing.Optional[inner], st.none() | values  # noqa: UP045  # `inner` may be None
        if kind == "list":
            return list[inner], st.lists(values, max_size=3)
        return tuple[inner, ...], st.lists(values, max_size=3).map(tuple)
    parts = draw(st.lists(pairs(depth - 1), min_size=1, max_size=4))
    if kind == "row":
        return tuple[tuple(inner for inner, _ in parts)], st.tuples(*[values for _, values in parts])
    fields = {name: inner for name, (inner, _) in zip(NAMES, parts, strict=False)}
    strategies = {name: values for name, (_, values) in zip(NAMES, parts, strict=False)}
    if kind == "TypedDict":
        return typing.TypedDict("Made", fields), st.fixed_dictionaries(strategies)  # type: ignore[operator]
    cls = made(kind, fields)
    names = {name: f.alias for name, f in zip(fields, attrs.fields(cls), strict=True)} if kind == "attrs" else {}
    return cls, st.builds(cls, **{names.get(name, name): values for name, values in strategies.items()})


def made(kind: str, fields: dict[str, Any]) -> Any:
    """Return a class of a kind with fields."""
    if kind == "attrs":
        return attrs.make_class("Made", {f"_{name}": attrs.field(type=inner) for name, inner in fields.items()})
    if kind == "dataclass":
        return dataclasses.make_dataclass("Made", fields.items(), kw_only=True)
    if kind == "Struct":
        return msgspec.defstruct("Made", fields.items(), kw_only=True, rename="upper")
    if kind == "pydantic":
        return pydantic.create_model("Made", **{name: (inner, ...) for name, inner in fields.items()})  # type: ignore[call-overload]
    return typing.NamedTuple("Made", fields.items())  # type: ignore[misc]


def plain(value: Any) -> Any:
    """Return an instance as a JSON value."""
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="json")
    if attrs.has(type(value)):
        return {f.alias: plain(getattr(value, f.name)) for f in attrs.fields(type(value))}
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, msgspec.Struct):
        return {f.encode_name: plain(getattr(value, f.name)) for f in msgspec.structs.fields(value)}
    if isinstance(value, (list, tuple, frozenset)):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {str(plain(key)): plain(each) for key, each in value.items()}
    return msgspec.to_builtins(value)


TYPED = pairs().flatmap(lambda pair: pair[1].map(lambda value: (pair[0], value)))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def sent(shape: Any, value: Any) -> Any:
    """Return what a service sends for a value."""
    return {"value": value} if shape.wrapped else value


@FEW
@given(TYPED)
def test_an_instance_survives_json(typed: tuple[Any, Any]) -> None:
    """The JSON of an instance matches the schema of its type, and makes an equal instance, wrapped or not."""
    kind, value = typed
    shape = shape_of(kind)
    written = plain(value)
    jsonschema.Draft202012Validator.check_schema(shape.response_format)
    jsonschema.validate(sent(shape, written), shape.response_format)
    for text in (json.dumps(sent(shape, written)), f"```json\n{json.dumps(written)}\n```"):
        found = shape.parse(text)
        assert found == value
        assert type(found) is type(value)
    assert shape.partial(json.dumps(sent(shape, written))) == value


def corrupted(draw: Any, value: Any) -> Any:
    """Return a JSON value with a part of it replaced or left out."""
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], *([corrupted(draw, value[at])] if draw(st.booleans()) else []), *value[at + 1 :]]
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        rest = {name: each for name, each in value.items() if name != key}
        return {**rest, key: corrupted(draw, value[key])} if draw(st.booleans()) else rest
    return draw(JSON)


@FEW
@given(TYPED, st.data())
def test_what_is_corrupted_is_refused_or_fits(typed: tuple[Any, Any], data: Any) -> None:
    """A value with a wrong part raises ValueError with a short message, or makes an instance whose JSON matches the schema."""
    kind, value = typed
    shape = shape_of(kind)
    wrong = corrupted(data.draw, plain(value))
    problem = ""
    try:
        found = shape.parse(json.dumps(sent(shape, wrong)))
    except ValueError as error:
        problem = str(error)
    if problem:
        assert problem.startswith(f"the answer does not fit {shape.name}: $")
        assert len(problem) < 12_000
    else:
        jsonschema.validate(sent(shape, plain(found)), shape.response_format)
    shape.partial(json.dumps(sent(shape, wrong))[: data.draw(st.integers(0, 60))])


@FEW
@given(st.lists(st.sampled_from([leaf for leaf in LEAVES if leaf[0] is not bytes]), min_size=1, max_size=4), st.data())
def test_models_of_pydantic_survive_json(leaves: list[tuple[Any, Any]], data: Any) -> None:
    """The same for pydantic models, which check their values themselves, and for which bytes are UTF-8."""
    model = made("pydantic", {f"x{number}": list[kind] for number, (kind, _) in enumerate(leaves)})
    value = model(
        **{f"x{number}": data.draw(st.lists(values, max_size=2)) for number, (_, values) in enumerate(leaves)}
    )
    shape = shape_of(list[model])
    written = [value.model_dump(mode="json")]
    jsonschema.validate({"value": written}, shape.response_format)
    assert shape.parse(json.dumps({"value": written})) == [value]


def is_beginning(part: Any, whole: Any) -> bool:
    """Whether a value is the beginning of another."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return list(part) == list(whole)[: len(part)] and all(is_beginning(part[key], whole[key]) for key in part)
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) <= len(whole) and all(is_beginning(*both) for both in zip(part, whole, strict=False))
    if isinstance(part, str) and isinstance(whole, str):
        return whole.startswith(part)
    return type(part) is type(whole) and part == whole


@FEW
@given(JSON, st.booleans(), st.sampled_from([None, 1]))
def test_every_beginning_of_json_has_a_value(value: Any, escape: bool, indent: int | None) -> None:
    """Whatever has come of a JSON text, its value is a beginning of the whole, never shrinks, and is the whole in the end."""
    text = json.dumps({"value": value}, ensure_ascii=escape, indent=indent)
    before: Any = NOTHING
    for cut in range(len(text) + 1):
        found = value_so_far(text[:cut])
        if found is NOTHING:
            assert before is NOTHING
            continue
        assert is_beginning(found, {"value": value})
        assert before is NOTHING or is_beginning(before, found)
        before = found
    assert before == {"value": value}


@FEW
@given(st.text(st.sampled_from('{}[]:,"\\u0dD89ea 1.-+tn\ud800é'), max_size=40))
def test_any_text_is_taken(text: str) -> None:
    """No text, however wrong, raises."""
    found = value_so_far(text)
    assert found is NOTHING or json.dumps(found)
