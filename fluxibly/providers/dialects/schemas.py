"""JSON Schemas for services that take only some of them, or none: narrowed, or put into words for the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import attrs

from fluxibly._checks import is_list, is_mapping
from fluxibly._formats import SchemaFormat
from fluxibly.errors import ProviderError
from fluxibly.providers.dialects.encoding import format_of, json_of
from fluxibly.types import Message, Request, Text

MOST_REFUSED: Final = 1_000
"""The maximum number of models and schemas of which a codec remembers that the service refused them."""
_ABOUT_FORMATS: Final = re.compile(
    r"response.?(format|mime|schema|json.?schema)|output.?(config|format|schema)|text.?format|structured.?output",
    re.IGNORECASE,
)
_ABOUT_SCHEMAS: Final = re.compile(r"json.?schema|schema in format|grammar", re.IGNORECASE)
"""Errors about schemas, which may also be those of tools."""
_ABOUT_TOOLS: Final = re.compile(r"\btools?\b|\bfunctions?\b", re.IGNORECASE)


def with_schema_in_words(request: Request, schema: Mapping[str, Any]) -> Request:
    """Return a request that says in a system message what the answer has to be, and has no `response_format`.

    Raises:
        BadRequest: the schema is not JSON.
    """
    words = f"Answer with JSON alone, without any other text. It has to match this JSON Schema:\n{json_of(schema, request).decode()}"
    first, *others = request.messages
    if first.role != "system":
        return request.evolve(messages=(Message.system(words), *request.messages), response_format=None)
    content = (*first.content, Text(f"\n\n{words}"))
    if all(isinstance(part, Text) and part.raw is None for part in content):
        content = (Text(f"{first.text}\n\n{words}"),)
    return request.evolve(messages=(attrs.evolve(first, content=content), *others), response_format=None)


@attrs.frozen(kw_only=True)
class SchemaLearner:
    """The base of codecs that put a schema into words for the model, once its service has refused it.

    Services say nowhere which of their models take which schemas; only an error does.
    """

    _refused: set[tuple[str, str]] = attrs.field(factory=set[tuple[str, str]], init=False, repr=False, eq=False)
    """The models and their schemas."""

    def with_known_form(self, request: Request) -> Request:
        """Return a request with its schema in words if the service has refused it before."""
        if not self._refused or not is_mapping(request.response_format):
            return request
        wanted = format_of(request)
        if isinstance(wanted, SchemaFormat) and _key(request, wanted) in self._refused:
            return with_schema_in_words(request, wanted.schema)
        return request

    def learn(self, request: Request, sent: bytes, error: ProviderError, /) -> str | None:
        """Remember that the service does not take a schema for a model, if `error` says so; see `Learner`.

        A schema that the caller wants strictly is never put into words.
        """
        message = str(error)  # only the service's own words count: the body may quote the prompt
        about_tools = bool(request.tools) and _ABOUT_TOOLS.search(message) is not None
        is_refusal = _ABOUT_FORMATS.search(message) or (_ABOUT_SCHEMAS.search(message) and not about_tools)
        if error.status not in (400, 422, 500) or not is_refusal:
            return None
        wanted = format_of(request) if is_mapping(request.response_format) else None
        if not isinstance(wanted, SchemaFormat) or wanted.strict:
            return None
        if len(self._refused) >= MOST_REFUSED or _key(request, wanted) in self._refused:
            return None
        self._refused.add(_key(request, wanted))
        return "tells the model the JSON Schema in words"


def _key(request: Request, wanted: SchemaFormat) -> tuple[str, str]:
    return request.model, json_of(wanted.schema, request).decode()


def is_recursive(schema: Mapping[str, Any]) -> bool:
    """Whether a schema holds itself."""
    tables: list[Any] = [schema.get(word) for word in ("$defs", "definitions")]
    definitions = {name: each for table in tables if is_mapping(table) for name, each in table.items()}
    leads = {name: _names_in(each) for name, each in definitions.items()}
    root = {word: each for word, each in schema.items() if word not in ("$defs", "definitions")}
    if "" in _names_in(root) | {each for names in leads.values() for each in names}:
        return True
    done: set[str] = set()

    def circles(name: str, above: frozenset[str]) -> bool:
        if name in above:
            return True
        if name in done:
            return False
        found = any(circles(each, above | {name}) for each in leads.get(name, ()))
        done.add(name)
        return found

    return any(circles(name, frozenset()) for name in leads)


def _names_in(schema: Any) -> set[str]:
    """Return the names of the definitions that a schema refers to; "" for its root."""
    if is_list(schema):
        return {name for each in schema for name in _names_in(each)}
    if not is_mapping(schema):
        return set()
    ref: object = schema.get("$ref")
    own = {ref.rpartition("/")[2] if "/" in ref else ""} if isinstance(ref, str) and ref.startswith("#") else set[str]()
    return own | {name for each in schema.values() for name in _names_in(each)}


_KEPT: Final = frozenset(
    (
        *("type", "title", "description", "enum", "const", "anyOf", "allOf", "$ref", "$defs", "definitions", "$schema"),
        *("properties", "required", "additionalProperties"),
    )
)
_FORMATS: Final = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid")
)


class _NoForm(Exception):
    """Claude has no form for a schema."""


def for_claude(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a schema as Claude's structured outputs take it; None if they have no form for it.

    Constraints on numbers, texts and the length of arrays, which the service refuses, go into descriptions. Schemas that
    hold themselves, objects with any properties, and values of any type have no form.
    """
    try:
        return None if is_recursive(schema) else _claudes(schema)
    except (_NoForm, RecursionError):
        return None


def _claudes(schema: Any) -> dict[str, Any]:
    if not is_mapping(schema) or not schema.keys() & {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}:
        raise _NoForm
    kept: dict[str, Any] = {word: value for word, value in schema.items() if word in _KEPT}
    rest = {word: value for word, value in schema.items() if word not in _KEPT}
    if "oneOf" in rest:
        kept["anyOf"] = rest.pop("oneOf")
    for word in ("default", "discriminator"):
        rest.pop(word, None)
    for word in ("anyOf", "allOf"):
        if word in kept:
            kept[word] = [_claudes(each) for each in kept[word]]
    for word in ("$defs", "definitions", "properties"):
        if word in kept:
            kept[word] = {name: _claudes(each) for name, each in kept[word].items()}
    if schema.get("additionalProperties", False) is not False or "patternProperties" in schema:
        raise _NoForm
    if is_mapping(rest.get("items")):
        kept["items"] = _claudes(rest.pop("items"))
    if rest.get("minItems") in (0, 1):
        kept["minItems"] = rest.pop("minItems")
    if rest.get("format") in _FORMATS:
        kept["format"] = rest.pop("format")
    if rest:
        note = ", ".join([f"{word}: {value}" for word, value in rest.items()])
        kept["description"] = f"{kept['description']} ({note})" if "description" in kept else note
    return kept
