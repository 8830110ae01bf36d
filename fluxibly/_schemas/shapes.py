"""The shape of an answer: a JSON Schema to send, and the conversion of the answer's text into a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import attrs

from fluxibly._checks import is_list, is_mapping
from fluxibly._formats import SchemaFormat, output_format
from fluxibly._schemas.checking import check_schema, checked
from fluxibly._schemas.incomplete import NOTHING, value_of, value_so_far
from fluxibly._schemas.references import with_references
from fluxibly.errors import ConfigError

VALUE = "value"
"""The property that holds a value which is not an object, because most services require an object at the root."""


@attrs.frozen(eq=False)
class Shape:
    """The shape that an answer has to have.

    Args:
        wanted: a type, or a JSON Schema.
        name: the type's name; None for a JSON Schema.
        response_format: the schema for `Request.response_format`. Its root is an object.
        wrapped: whether the value is the property `value` of that object.
        read: the function that makes a JSON value into what is wanted. It raises ValueError if the value does not fit, with the
            problems and their paths below the path that it is given.
        read_item: the function for an item, if a list is wanted.
    """

    wanted: object
    name: str | None
    response_format: Mapping[str, Any] = attrs.field(repr=False)
    wrapped: bool
    read: Callable[[Any, str], Any] = attrs.field(repr=False)
    read_item: Callable[[Any], Any] | None = attrs.field(default=None, repr=False)

    def parse(self, text: str) -> Any:
        """Return the value of an answer's text. A Markdown code fence around it is ignored.

        Raises:
            ValueError: the text is not JSON or does not fit. The message says what the model has to correct.
            ConfigError: the schema has a reference that leads outside of it.
        """
        try:
            value = value_of(_without_fence(text))
        except ValueError as error:
            raise ValueError(f"the answer is not valid JSON: {error}") from None
        inner = self._unwrapped(value)
        try:
            return self.read(inner, "$" if inner is value else f"$.{VALUE}")
        except ConfigError:
            raise
        except ValueError as misfit:
            if inner is not value:  # perhaps not wrapped, with a property of this name
                with suppress(ValueError):
                    return self.read(value, "$")
            what = "match the JSON Schema" if self.name is None else f"fit {self.name}"
            raise ValueError(f"the answer does not {what}: {misfit}") from None

    def partial(self, text: str) -> Any:
        """Return the value of the beginning of an answer's text; None: nothing of it has come.

        It is an instance of the type if it fits already, and plain JSON values else. Of a list the items are instances; the last
        is left out until it fits.
        """
        value = value_so_far(_without_fence(text))
        if self.wrapped and value == {}:
            return None
        value = self._unwrapped(value)
        if value is NOTHING:
            return None
        if self.read_item is not None and is_list(value):
            return _fitting(value, self.read_item)
        try:
            return self.read(value, "$")
        except ValueError:
            return value

    def _unwrapped(self, value: Any) -> Any:
        return value[VALUE] if self.wrapped and is_mapping(value) and set(value) == {VALUE} else value


def _fitting(values: list[Any], read: Callable[[Any], Any]) -> list[Any]:
    """Return the items of a list as instances, as far as they fit; the last only if it does."""
    found: list[Any] = []
    for number, value in enumerate(values, 1):
        try:
            found.append(read(value))
        except (ValueError, RecursionError):
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
            raise ConfigError(f"{_expected()}, got {wanted!r}")
        return _shape_of_type(wanted)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _expected() -> str:
    from fluxibly._schemas.classes import EXPECTED

    return EXPECTED


def _schema_in(wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a mapping, which may be a table of OpenAI's client."""
    try:
        wanted_format = output_format(wanted)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from None
    if not isinstance(wanted_format, SchemaFormat):
        raise ConfigError(f"{_expected()}, got {wanted!r}")
    return wanted_format.schema


def _shape_of_schema(wanted: Mapping[str, Any]) -> Shape:
    schema = _schema_in(wanted)
    check_schema(schema)
    read = partial(checked, schema)
    if schema.get("type") == "object" or schema is not wanted:
        return Shape(wanted, None, wanted, wrapped=False, read=read)
    return Shape(wanted, None, _wrapped(with_references(schema, _moved)), wrapped=True, read=read)


def _shape_of_type(kind: object) -> Shape:
    try:
        return _kept(kind)
    except TypeError:  # it has no hash, as an annotation with a list in it
        return _made(kind)


def _made(kind: object) -> Shape:
    # Imported late, because they load msgspec, and whoever imports `Validation` imports this module.
    from fluxibly._schemas.classes import schemas_of
    from fluxibly._schemas.kinds import item_of, name_of
    from fluxibly._schemas.structuring import read_by, structurer

    (schema,), defs = schemas_of([kind])
    name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    if name in defs and defs[name].get("type") == "object":
        schema = defs[name]
        if not _refers(defs, name):
            defs = {other: each for other, each in defs.items() if other != name}
    whole = {**schema, **({"$defs": defs} if defs else {})}
    wrapped = schema.get("type") != "object"
    item = item_of(kind)
    return Shape(
        kind,
        name_of(kind),
        {"title": name_of(kind), **(_wrapped(whole) if wrapped else whole)},
        wrapped=wrapped,
        read=partial(read_by, structurer(kind)),
        read_item=None if item is None else structurer(item),
    )


_kept = lru_cache(maxsize=256)(_made)


def _wrapped(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema as that of the property `value` of an object, with its definitions at the root."""
    apart = {word: schema[word] for word in ("$schema", "$id", "$defs", "definitions") if word in schema}
    inner = {word: value for word, value in schema.items() if word not in apart}
    return {
        "type": "object",
        "properties": {VALUE: inner},
        "required": [VALUE],
        "additionalProperties": False,
        **apart,
    }


def _moved(ref: str) -> str:
    """Return a reference for the property `value`: one to the root, or to a place in it, leads there."""
    inside = ref == "#" or (ref.startswith("#/") and not ref.startswith(("#/$defs/", "#/definitions/")))
    return f"#/properties/{VALUE}{ref[1:]}" if inside else ref


def _refers(schema: Any, name: str) -> bool:
    """Whether a schema refers to a definition."""
    if is_list(schema):
        return any(_refers(each, name) for each in schema)
    if not is_mapping(schema):
        return False
    return schema.get("$ref") == f"#/$defs/{name}" or any(_refers(each, name) for each in schema.values())


def _without_fence(text: str) -> str:
    """Return a text without the Markdown code fence around it, which may be open still."""
    text = text.strip()
    if not text.startswith("```"):
        return text
    first, _, rest = text.partition("\n")
    return rest.removesuffix("```") if first[3:].strip().isalnum() or not first[3:].strip() else text
