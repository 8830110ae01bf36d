"""The shape of an answer: a JSON Schema to send, and the conversion of the answer's text into a value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import attrs

from fluxibly._checks import is_list, is_mapping
from fluxibly._formats import SchemaFormat, output_format
from fluxibly._schemas.checking import check_schema, problems_of
from fluxibly._schemas.classes import EXPECTED, name_of, resolved, schemas_of
from fluxibly._schemas.incomplete import NOTHING, value_so_far
from fluxibly._schemas.structuring import Misfit, structured
from fluxibly.errors import ConfigError

VALUE = "value"
"""The property that holds a value which is not an object, because most services require an object at the root."""


@attrs.frozen(eq=False)
class Shape:
    """What an answer has to be.

    Args:
        wanted: a type, or a JSON Schema.
        response_format: the schema for `Request.response_format`. Its root is an object.
        wrapped: whether the value is the property `value` of that object.
    """

    wanted: object
    response_format: Mapping[str, Any] = attrs.field(repr=False)
    wrapped: bool

    def parse(self, text: str) -> Any:
        """Return the value of an answer's text. A Markdown code fence around it is ignored.

        Raises:
            ValueError: the text is not JSON or does not fit. The message says what the model has to correct.
            ConfigError: the schema has a reference that leads outside of it.
        """
        try:
            value: Any = json.loads(_without_fence(text), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the answer is not valid JSON: {error}") from None
        if self.wrapped and is_mapping(value) and set(value) == {VALUE}:
            value = value[VALUE]
        return self._built(value)

    def partial(self, text: str) -> Any:
        """Return the value of the beginning of an answer's text; None: nothing of it has come.

        It is an instance of the type if it fits already, and plain JSON values else. Of a list the items are instances; the last
        is left out until it fits.
        """
        value = value_so_far(_without_fence(text))
        if self.wrapped and is_mapping(value):
            value = value if value.keys() - {VALUE} else value.get(VALUE, NOTHING)
        if value is NOTHING:
            return None
        kind = resolved(self.wanted)
        if is_list(value) and getattr(kind, "__origin__", None) is list:
            (item,) = kind.__args__
            return _fitting(value, item)
        try:
            return self._built(value)
        except ValueError:
            return value

    def _built(self, value: Any) -> Any:
        if is_mapping(self.wanted):
            schema = _schema_in(self.wanted)
            problems = problems_of(value, schema)
            if problems:
                raise ValueError(f"the answer does not match the JSON Schema: {'; '.join(problems)}")
            return value
        try:
            return structured(value, self.wanted, name_of(self.wanted))
        except Misfit as misfit:
            raise ValueError(f"the answer does not fit {name_of(self.wanted)}: {misfit}") from None


def _fitting(values: list[Any], kind: object) -> list[Any]:
    """Return the items of a list as instances, as far as they fit; the last only if it does."""
    found: list[Any] = []
    for number, value in enumerate(values, 1):
        try:
            found.append(structured(value, kind))
        except Misfit:
            if number < len(values):
                found.append(value)
    return found


def shape_of(wanted: object, name: str = "schema") -> Shape:
    """Return the shape of the answers that a type or a JSON Schema describes.

    Args:
        name: the parameter that `wanted` was given as, for errors.

    Raises:
        ConfigError: it describes none, or jsonschema is not installed, which JSON Schemas need.
    """
    try:
        if is_mapping(wanted):
            return _shape_of_schema(wanted)
        if wanted is None or isinstance(wanted, (str, bytes, int, float, list, tuple)):
            raise ConfigError(f"{EXPECTED}, got {wanted!r}")
        return _shape_of_type(wanted)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _schema_in(wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a mapping, which may be a table of OpenAI's client."""
    try:
        wanted_format = output_format(wanted)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from None
    if not isinstance(wanted_format, SchemaFormat):
        raise ConfigError(f"{EXPECTED}, got {wanted!r}")
    return wanted_format.schema


def _shape_of_schema(wanted: Mapping[str, Any]) -> Shape:
    schema = _schema_in(wanted)
    check_schema(schema)
    if schema.get("type") == "object" or schema is not wanted:
        return Shape(wanted, wanted, wrapped=False)
    return Shape(wanted, _wrapped(schema), wrapped=True)


def _shape_of_type(kind: object) -> Shape:
    try:
        return _kept(kind)
    except TypeError:  # it has no hash, as an annotation with a list in it
        return _made(kind)


def _made(kind: object) -> Shape:
    (schema,), defs = schemas_of([kind])
    name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    if name in defs:
        root = defs[name]
        if root.get("type") == "object":
            if not _refers(defs, name):
                defs = {other: each for other, each in defs.items() if other != name}
            return Shape(kind, {**root, **({"$defs": defs} if defs else {})}, wrapped=False)
    whole = {**schema, **({"$defs": defs} if defs else {})}
    if schema.get("type") == "object":
        return Shape(kind, {"title": name_of(kind), **whole}, wrapped=False)
    return Shape(kind, {"title": name_of(kind), **_wrapped(whole)}, wrapped=True)


_kept = lru_cache(maxsize=256)(_made)


def _wrapped(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema as that of the property `value` of an object, with its definitions at the root."""
    apart = {word: schema[word] for word in ("$schema", "$defs", "definitions") if word in schema}
    inner = {word: value for word, value in schema.items() if word not in apart}
    return {
        "type": "object",
        "properties": {VALUE: inner},
        "required": [VALUE],
        "additionalProperties": False,
        **apart,
    }


def _refers(schema: Any, name: str) -> bool:
    """Whether a schema refers to a definition."""
    if is_list(schema):
        return any(_refers(each, name) for each in schema)
    if not is_mapping(schema):
        return False
    return schema.get("$ref") == f"#/$defs/{name}" or any(_refers(each, name) for each in schema.values())


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _without_fence(text: str) -> str:
    """Return a text without the Markdown code fence around it, which may be open still."""
    text = text.strip()
    if not text.startswith("```"):
        return text
    first, _, rest = text.partition("\n")
    return rest.removesuffix("```") if first[3:].strip().isalnum() or not first[3:].strip() else text
