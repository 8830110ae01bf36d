"""JSON Schemas as OpenAI's dialects take them, and the check whether a schema fits strict mode.

The rules of strict mode are those of OpenAI's guide "Structured Outputs", section "Supported schemas".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from fluxibly._checks import is_list, is_mapping
from fluxibly._formats import SchemaFormat

_TYPES: Final = frozenset(("string", "number", "boolean", "integer", "object", "array", "null"))
_KEYWORDS: Final = frozenset(
    (
        *("type", "title", "description", "enum", "const", "anyOf", "$ref", "$defs", "definitions", "$schema"),
        *("properties", "required", "additionalProperties", "items", "minItems", "maxItems", "pattern", "format"),
        *("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    )
)
_STRING_FORMATS: Final = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")
)
_LOOKAROUND: Final = re.compile(r"\(\?<?[=!]")
_MAX_PROPERTIES: Final = 5_000
_MAX_LEVELS: Final = 10
"""The maximum number of objects inside one another."""
_MAX_ENUM_VALUES: Final = 1_000
_MAX_CHARACTERS: Final = 120_000
"""The maximum length of all names of properties and definitions and all values of enums, in characters."""


def named_schema(wanted: SchemaFormat) -> dict[str, Any]:
    """Return a schema with the name that OpenAI requires. What the caller left out of a named schema stays out."""
    name = wanted.name
    strict = wanted.strict
    if name is None:
        name = re.sub(r"[^a-zA-Z0-9_-]+", "_", str(wanted.schema.get("title") or "response"))[:64]
        strict = fits_strict_mode(wanted.schema) if strict is None else strict
    named: dict[str, Any] = {"name": name, "schema": wanted.schema}
    if wanted.description is not None:
        named["description"] = wanted.description
    if strict is not None:
        named["strict"] = strict
    return named


def fits_strict_mode(schema: Mapping[str, Any]) -> bool:
    """Whether OpenAI accepts a schema in strict mode. It answers any other schema with a 400."""
    try:
        return schema.get("type") == "object" and "anyOf" not in schema and _Check().fits(schema, level=1)
    except RecursionError:
        return False


class _Check:
    """The check of one schema. It counts what strict mode limits in total."""

    def __init__(self) -> None:
        self._properties = 0
        self._enum_values = 0
        self._characters = 0

    def fits(self, schema: object, level: int) -> bool:
        """Whether a schema within `level` objects fits strict mode."""
        if not is_mapping(schema) or not schema.keys() <= _KEYWORDS:
            return False
        if "$ref" in schema:  # no other word may stand beside it
            return len(schema) == 1 and str(schema["$ref"]).startswith("#")
        kinds = _kinds(schema)
        if kinds is None or not self._count(schema):
            return False
        definitions = {**_table(schema.get("$defs")), **_table(schema.get("definitions"))}
        return (
            ("object" not in kinds or self._fits_object(schema, level))
            and ("array" not in kinds or self.fits(schema.get("items"), level))
            and ("format" not in schema or schema["format"] in _STRING_FORMATS)
            and _LOOKAROUND.search(str(schema.get("pattern", ""))) is None
            and all(self.fits(each, level) for each in schema.get("anyOf", ()))
            and all(self.fits(each, 0) for each in definitions.values())
        )

    def _fits_object(self, schema: Mapping[str, Any], level: int) -> bool:
        """Whether an object is closed and requires all its properties."""
        properties: object = schema.get("properties", {})
        required: object = schema.get("required", [])
        if schema.get("additionalProperties") is not False or level > _MAX_LEVELS:
            return False
        if not is_mapping(properties) or not isinstance(required, (list, tuple)):
            return False
        names = [name for name in cast("Iterable[object]", required) if isinstance(name, str)]
        return set(names) == set(properties) and all(self.fits(each, level + 1) for each in properties.values())

    def _count(self, schema: Mapping[str, Any]) -> bool:
        """Count the properties, the enum's values and their characters. Return whether the totals are allowed."""
        properties = _table(schema.get("properties"))
        values: list[object] = list(schema["enum"]) if is_list(schema.get("enum")) else []
        names = [*properties, *_table(schema.get("$defs")), *_table(schema.get("definitions")), *values]
        self._properties += len(properties)
        self._enum_values += len(values)
        self._characters += sum([len(str(name)) for name in names])
        return (
            self._properties <= _MAX_PROPERTIES
            and self._enum_values <= _MAX_ENUM_VALUES
            and self._characters <= _MAX_CHARACTERS
        )


def _kinds(schema: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the types that a schema allows, none for an `anyOf`; None if it has neither, or an unknown type."""
    kind: object = schema.get("type")
    if kind is None:
        return frozenset[str]() if is_list(schema.get("anyOf")) else None
    given = cast("list[object]", kind) if is_list(kind) else [kind]
    kinds = frozenset(each for each in given if isinstance(each, str))
    return kinds if len(kinds) == len(given) and kinds <= _TYPES else None


def _table(value: object) -> Mapping[str, Any]:
    return value if is_mapping(value) else {}
