"""The forms of `response_format`: fluxibly's words, a JSON Schema, and the tables of OpenAI's client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from fluxibly._checks import is_mapping, problem


class SchemaFormat(NamedTuple):
    """An answer that follows a JSON Schema. `name`, `strict` and `description` are None if the caller left them out."""

    schema: Mapping[str, Any]
    name: str | None = None
    strict: bool | None = None
    description: str | None = None


_WORDS: Final[Mapping[object, Literal["text", "json"]]] = {"text": "text", "json_object": "json"}
"""fluxibly's words for OpenAI's types without a schema."""
_FIELDS: Final[Mapping[str, type]] = {"schema": Mapping, "name": str, "strict": bool, "description": str}


def output_format(wanted: object) -> Literal["text", "json"] | SchemaFormat | None:
    """Return the format that a `response_format` asks for.

    `wanted` is None, "text", "json", a JSON Schema, or a table as OpenAI's client takes it: `{"type": "text"}`,
    `{"type": "json_object"}`, or `{"type": "json_schema", …}` with the schema in the table itself (Responses) or in its
    `json_schema` (chat completions).

    Raises:
        TypeError, ValueError: `wanted` is none of these.
    """
    if wanted is None:
        return None
    if wanted in ("text", "json"):
        return "text" if wanted == "text" else "json"
    if not is_mapping(wanted):
        raise TypeError(problem("response_format", "'text', 'json' or a JSON Schema (a mapping)", wanted))
    kind: object = wanted.get("type")
    if kind == "json_schema":
        return _described(wanted)
    if kind == "json_object" and is_mapping(wanted.get("schema")):  # as llama.cpp and Together take it
        return SchemaFormat(wanted["schema"])
    word = _WORDS.get(kind) if isinstance(kind, str) else None
    return SchemaFormat(wanted) if word is None else word


def _described(table: Mapping[str, Any]) -> SchemaFormat:
    path, fields = "response_format", {name: value for name, value in table.items() if name != "type"}
    if "json_schema" in fields:
        path, fields = "response_format.json_schema", fields["json_schema"]
        if not is_mapping(fields):
            raise TypeError(problem(path, "a mapping with a schema", fields))
    given = {name: value for name, value in fields.items() if value is not None}
    if "schema" not in given:
        raise ValueError(
            f"{path}: expected a mapping with a schema, got one with {', '.join(map(repr, given)) or 'nothing'}"
        )
    for name, value in given.items():
        if name not in _FIELDS:
            raise ValueError(f"{path}: expected {', '.join(_FIELDS)}, got {name!r}")
        if not isinstance(value, _FIELDS[name]):
            kind = {"schema": "a mapping", "strict": "true or false"}.get(name, "a str")
            raise TypeError(problem(f"{path}.{name}", kind, value))
    return SchemaFormat(**given)
