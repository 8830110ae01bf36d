"""`response_format`: its forms in each dialect, and the schemas that OpenAI's strict mode takes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fluxibly.errors import BadRequest
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.cohere import CohereCodec
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_responses import ResponsesCodec
from fluxibly.providers.dialects.openai_schema import fits_strict_mode
from fluxibly.types import Request

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}
NAMED = {"name": "tide", "schema": SCHEMA, "strict": False, "description": "The tide."}
CODECS: dict[str, Any] = {
    "chat": OpenAICodec(),
    "responses": ResponsesCodec(),
    "anthropic": AnthropicCodec(),
    "gemini": GeminiCodec(),
    "ollama": OllamaCodec(),
    "cohere": CohereCodec(),
}


def sent(dialect: str, wanted: object) -> Any:
    """Return the body's part that has the response format."""
    request = Request(model="m", messages="Hi", response_format=wanted)  # type: ignore[arg-type]
    body = json.loads(CODECS[dialect].encode(request, stream=False).body)
    where: dict[str, Any] = {
        "chat": lambda: body.get("response_format"),
        "responses": lambda: body.get("text", {}).get("format"),
        "anthropic": lambda: body.get("output_config", {}).get("format"),
        "gemini": lambda: {key: v for key, v in body.get("generationConfig", {}).items() if key.startswith("response")},
        "ollama": lambda: body.get("format"),
        "cohere": lambda: body.get("response_format"),
    }
    return where[dialect]()


FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"type": "text"},
        {
            "chat": {"type": "text"},
            "responses": {"type": "text"},
            "anthropic": None,
            "gemini": {"responseMimeType": "text/plain"},
            "ollama": None,
            "cohere": {"type": "text"},
        },
    ),
    (
        {"type": "json_object"},
        {
            "chat": {"type": "json_object"},
            "responses": {"type": "json_object"},
            "gemini": {"responseMimeType": "application/json"},
            "ollama": "json",
            "cohere": {"type": "json_object"},
        },
    ),
    (
        {"type": "json_schema", "json_schema": NAMED},
        {
            "chat": {"type": "json_schema", "json_schema": NAMED},
            "responses": {"type": "json_schema", **NAMED},
            "anthropic": {"type": "json_schema", "schema": SCHEMA},
            "gemini": {"responseMimeType": "application/json", "responseJsonSchema": SCHEMA},
            "ollama": SCHEMA,
            "cohere": {"type": "json_object", "json_schema": SCHEMA},
        },
    ),
    ({"type": "json_schema", **NAMED}, {"chat": {"type": "json_schema", "json_schema": NAMED}, "ollama": SCHEMA}),
    (
        {"type": "json_schema", "json_schema": {"name": "tide", "schema": SCHEMA}},
        {
            "chat": {"type": "json_schema", "json_schema": {"name": "tide", "schema": SCHEMA}},
            "responses": {"type": "json_schema", "name": "tide", "schema": SCHEMA},
        },
    ),
    (
        {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}},
        {"chat": {"type": "json_schema", "json_schema": {"name": "response", "schema": SCHEMA, "strict": True}}},
    ),
    (
        {"type": "json_object", "schema": SCHEMA},
        {"chat": {"type": "json_schema", "json_schema": {"name": "response", "schema": SCHEMA, "strict": False}}},
    ),
    (
        {"title": "My answer!", **SCHEMA},
        {
            "chat": {
                "type": "json_schema",
                "json_schema": {"name": "My_answer_", "schema": {"title": "My answer!", **SCHEMA}, "strict": False},
            }
        },
    ),
]


@pytest.mark.parametrize(
    ("dialect", "wanted", "expected"),
    [(dialect, wanted, expected) for wanted, by_dialect in FORMS for dialect, expected in by_dialect.items()],
)
def test_each_form_in_each_dialect(dialect: str, wanted: dict[str, Any], expected: object) -> None:
    """Each dialect gets the format in its own words, and OpenAI's dialects get a named schema as the caller wrote it."""
    assert sent(dialect, wanted) == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"type": "json_schema"}, "response_format: expected a mapping with a schema, got one with nothing"),
        (
            {"type": "json_schema", "json_schema": SCHEMA},
            "expected a mapping with a schema, got one with 'type', 'properties'",
        ),
        (
            {"type": "json_schema", "json_schema": "x"},
            "response_format.json_schema: expected a mapping with a schema, got 'x'",
        ),
        (
            {"type": "json_schema", "json_schema": {**NAMED, "strict": "no"}},
            "response_format.json_schema.strict: expected true or false, got 'no'",
        ),
        ({"type": "json_schema", "json_schema": {**NAMED, "name": 5}}, "json_schema.name: expected a str, got 5"),
        ({"type": "json_schema", **NAMED, "strcit": True}, "expected schema, name, strict, description, got 'strcit'"),
        ("xml", "response_format: expected 'text', 'json' or a JSON Schema (a mapping), got 'xml'"),
        ([SCHEMA], "response_format: expected 'text', 'json' or a JSON Schema (a mapping), got a list"),
    ],
)
@pytest.mark.parametrize("dialect", CODECS)
def test_a_wrong_form_is_refused(dialect: str, wanted: object, message: str) -> None:
    """A response format that cannot be understood is not sent, and the error names the wrong part."""
    with pytest.raises(BadRequest) as caught:
        sent(dialect, wanted)
    assert message in str(caught.value)


def closed(**properties: Any) -> dict[str, Any]:
    """Return an object that strict mode takes, if it takes the properties."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def nested(levels: int) -> dict[str, Any]:
    return closed(inner=nested(levels - 1)) if levels > 1 else closed()


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"anyOf": [schema]}
    return schema


TEXT = {"type": "string"}
INNER = {"$defs": {"Inner": closed(n={"type": "integer"})}}
STRICT: list[dict[str, Any]] = [
    closed(),
    closed(a=TEXT, b={"type": ["number", "null"]}),
    {**closed(a={"$ref": "#/$defs/Inner"}, b={"$ref": "#"}), **INNER, "title": "T", "description": "D"},
    closed(a={"anyOf": [closed(x=TEXT), {"type": "null"}], "description": "either"}),
    closed(a={"type": "array", "items": closed(b=TEXT), "minItems": 1, "maxItems": 2}),
    closed(a={"type": "string", "enum": ["x", "y"]}, b={"type": "string", "const": "z", "title": "Z"}),
    closed(a={"type": "string", "pattern": "^a", "format": "date-time"}, b={"type": "number", "minimum": 0}),
    nested(10),
    closed(**{f"p{i}": TEXT for i in range(4_999)}),
]
NOT_STRICT: list[dict[str, Any]] = [
    {},
    TEXT,
    {"type": "array", "items": TEXT},
    {"anyOf": [closed()]},
    {**closed(), "anyOf": [closed()]},
    {"type": ["object", "null"], "properties": {}, "required": [], "additionalProperties": False},
    {"type": "object", "properties": {"a": TEXT}, "required": ["a"]},
    {"type": "object", "properties": {"a": TEXT}, "additionalProperties": False},
    {"type": "object", "properties": {"a": TEXT}, "required": ["a", "b"], "additionalProperties": False},
    {"type": "object", "properties": [TEXT], "required": [], "additionalProperties": False},
    {"type": "object", "properties": {}, "required": 5, "additionalProperties": False},
    closed(a={}),
    closed(a=True),
    closed(a={"type": "object"}),
    closed(a={"type": "array"}),
    closed(a={"type": "array", "items": {"type": "object"}}),
    closed(a={"type": "array", "prefixItems": [TEXT], "minItems": 1, "maxItems": 1}),
    closed(a={"type": "text"}),
    closed(a={"type": ["string", 5]}),
    closed(a={"oneOf": [TEXT]}),
    closed(a={"allOf": [TEXT]}),
    closed(a={"type": "string", "not": {"const": "b"}}),
    closed(a={"type": "string", "default": "b"}),
    closed(a={"type": "string", "format": "uri"}),
    closed(a={"type": "string", "minLength": 1}),
    closed(a={"anyOf": [TEXT, {"type": "object"}]}),
    {**closed(a={"$ref": "#/$defs/Inner", "description": "how many"}), **INNER},
    closed(a={"$ref": "https://example.com/schema"}),
    {**closed(a={"$ref": "#/$defs/Open"}), "$defs": {"Open": {"type": "object"}}},
    {**closed(), "definitions": {"Open": {"type": "object"}}},
    nested(11),
    closed(**{f"p{i}": TEXT for i in range(5_001)}),
    closed(a={"type": "string", "enum": [str(i) for i in range(1_001)]}),
    closed(a={"type": "string", "enum": ["x" * 120_001]}),
]


@pytest.mark.parametrize("schema", STRICT, ids=lambda schema: str(schema)[:60])
def test_strict_mode_is_asked_for_where_it_fits(schema: dict[str, Any]) -> None:
    """A schema within the subset of strict mode is sent as strict."""
    assert fits_strict_mode(schema)
    assert sent("chat", schema)["json_schema"]["strict"] is True
    assert sent("responses", schema)["strict"] is True


@pytest.mark.parametrize("schema", NOT_STRICT, ids=lambda schema: str(schema)[:60])
def test_strict_mode_is_not_asked_for_elsewhere(schema: dict[str, Any]) -> None:
    """A schema that OpenAI refuses in strict mode is sent without it, unless the caller asks for it."""
    assert sent("chat", schema)["json_schema"]["strict"] is False
    asked = {"type": "json_schema", "json_schema": {"schema": schema, "strict": True}}
    assert sent("chat", asked)["json_schema"]["strict"] is True
    assert sent("responses", asked)["strict"] is True


def test_a_schema_without_end_is_not_strict() -> None:
    """A schema that is nested too deeply to check is not strict. (It is too deep for JSON, too.)"""
    assert not fits_strict_mode(closed(a=deep(5_000)))


@pytest.mark.parametrize("strict", [True, False])
def test_the_caller_decides(strict: bool) -> None:
    """`strict` of the caller is sent, whatever the schema."""
    asked = {"type": "json_schema", "json_schema": {"schema": closed(a=TEXT), "strict": strict}}
    assert sent("chat", asked)["json_schema"]["strict"] is strict
