"""JSON Schemas in the form that each service takes: narrowed for Claude, and told in words where there is no form."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest

from fluxibly import Message
from fluxibly._schemas.shapes import shape_of
from fluxibly.errors import BadRequest, ProviderError
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.bedrock import BedrockCodec
from fluxibly.providers.dialects.codec import Learner
from fluxibly.providers.dialects.cohere import CohereCodec
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_request import Quirks
from fluxibly.providers.dialects.openai_responses import ResponsesCodec
from fluxibly.providers.dialects.openai_schema import fits_strict_mode
from fluxibly.providers.dialects.schemas import for_claude, is_recursive, with_schema_in_words
from fluxibly.providers.dialects.vertex import VertexCodec
from fluxibly.types import Request, Text, Tool

WORDS = "Answer with JSON alone, without any other text. It has to match this JSON Schema:\n"
SIMPLE = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
TOOL = Tool("look", "Look.", {"type": "object", "properties": {}})


@attrs.define
class Tree:
    kids: list[Tree]


RECURSIVE = dict(shape_of(Tree).response_format)


def body(codec: Any, schema: Any, model: str = "m", **fields: Any) -> dict[str, Any]:
    request = Request(model=model, messages=fields.pop("messages", "Hi"), response_format=schema, **fields)
    found: dict[str, Any] = json.loads(codec.encode(request, stream=False).body)
    return found


def is_told(sent: dict[str, Any]) -> bool:
    """Whether a body tells the schema in words."""
    return json.dumps(WORDS)[1:-1] in json.dumps(sent)


class TestWords:
    def test_a_system_message_is_made(self) -> None:
        """It stands first, has the whole schema, and takes the place of the response format."""
        request = with_schema_in_words(Request(model="m", messages="Hi", response_format=SIMPLE), SIMPLE)
        assert request.response_format is None
        assert [message.role for message in request.messages] == ["system", "user"]
        words, _, schema = request.messages[0].text.rpartition("\n")
        assert words + "\n" == WORDS
        assert json.loads(schema) == SIMPLE

    def test_a_system_message_is_continued(self) -> None:
        """The conversation has one, because some services allow no second; parts of other libraries stay apart."""
        given = [Message.system("Be brief."), Message.user("Hi")]
        request = with_schema_in_words(Request(model="m", messages=given, response_format=SIMPLE), SIMPLE)
        (part,) = request.messages[0].content
        assert isinstance(part, Text)
        assert part.text.startswith("Be brief.\n\nAnswer with JSON alone")
        cached = Message("system", (Text("Be brief.", raw={"cache_control": {"type": "ephemeral"}}),))
        request = with_schema_in_words(Request(model="m", messages=[cached, Message.user("Hi")]), SIMPLE)
        assert request.messages[0].content[0] == cached.content[0]
        assert len(request.messages[0].content) == 2


class TestRecursion:
    @pytest.mark.parametrize(
        ("schema", "found"),
        [
            (SIMPLE, False),
            (RECURSIVE, True),
            ({"type": "array", "items": {"$ref": "#"}}, True),
            (
                {
                    "$ref": "#/$defs/A",
                    "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/B"}]}, "B": {"items": {"$ref": "#/$defs/A"}}},
                },
                True,
            ),
            ({"$ref": "#/$defs/A", "$defs": {"A": {"items": {"$ref": "#/$defs/B"}}, "B": {"type": "null"}}}, False),
            ({"allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/A"}], "$defs": {"A": {"type": "null"}}}, False),
            ({"$ref": "#/definitions/A", "definitions": {"A": {"$ref": "#/definitions/A"}}}, True),
        ],
        ids=lambda each: str(each)[:50],
    )
    def test_a_schema_that_holds_itself(self, schema: dict[str, Any], found: bool) -> None:
        """Circles of references are found, and a definition that is used twice is none."""
        assert is_recursive(schema) is found


class TestClaude:
    def test_what_is_kept(self) -> None:
        """What is unknown goes into descriptions, and the schema that was given is untouched."""
        given = {
            "type": "object",
            "title": "T",
            "properties": {
                "age": {"type": "integer", "minimum": 0, "maximum": 150, "description": "in years"},
                "name": {"type": "string", "minLength": 1},
                "when": {"type": "string", "format": "date"},
                "odd": {"type": "string", "format": "odd"},
                "tags": {
                    "type": "array",
                    "items": {"type": "string"},
                    "minItems": 1,
                    "maxItems": 3,
                    "uniqueItems": True,
                },
                "one": {"oneOf": [{"$ref": "#/$defs/A"}, {"type": "null"}], "discriminator": {"propertyName": "x"}},
                "kind": {"enum": ["a", 1]},
            },
            "required": ["age"],
            "$defs": {"A": {"type": "object", "properties": {"x": {"const": "a", "default": "a"}}}},
        }
        before = json.dumps(given)
        assert for_claude(given) == {
            "type": "object",
            "title": "T",
            "properties": {
                "age": {"type": "integer", "description": "in years (minimum: 0, maximum: 150)"},
                "name": {"type": "string", "description": "minLength: 1"},
                "when": {"type": "string", "format": "date"},
                "odd": {"type": "string", "description": "format: odd"},
                "tags": {
                    "type": "array",
                    "items": {"type": "string"},
                    "minItems": 1,
                    "description": "maxItems: 3, uniqueItems: True",
                },
                "one": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]},
                "kind": {"enum": ["a", 1]},
            },
            "required": ["age"],
            "$defs": {"A": {"type": "object", "properties": {"x": {"const": "a"}}}},
        }
        assert json.dumps(given) == before

    @pytest.mark.parametrize(
        "schema",
        [
            RECURSIVE,
            {"type": "object", "properties": {"a": {}}},
            {"type": "object", "properties": {"a": True}},
            {"type": "object", "additionalProperties": {"type": "integer"}},
            {"type": "object", "properties": {"a": {"type": "object", "additionalProperties": True}}},
            {"type": "object", "properties": {"a": {"type": "array", "items": {}}}},
        ],
        ids=str,
    )
    def test_what_has_no_form(self, schema: dict[str, Any]) -> None:
        """Schemas that hold themselves, open objects and values of any type are told in words."""
        assert for_claude(schema) is None
        sent = body(AnthropicCodec(), schema, "claude-opus-4-6")
        assert "output_config" not in sent
        assert is_told(sent)

    def test_what_fits_is_unchanged(self) -> None:
        """The schema of a class without constraints is sent as it is."""
        assert for_claude(SIMPLE) == SIMPLE

    @pytest.mark.parametrize("codec", ["anthropic", "vertex"])
    def test_models_before_structured_outputs(self, codec: str) -> None:
        """Claude before 4.5 is told in words. Models of other makers get both, because a server may ignore the schema."""
        made: Any = AnthropicCodec() if codec == "anthropic" else VertexCodec(parent="projects/p/locations/global")
        for name in ("claude-3-5-sonnet-20241022", "claude-sonnet-4-20250514", "claude-opus-4-1"):
            sent = body(made, SIMPLE, name)
            assert is_told(sent)
            assert "output_config" not in sent
        for name in ("claude-sonnet-4-5@20250929", "claude-haiku-4-5", "claude-fable-5"):
            sent = body(made, SIMPLE, name)
            assert not is_told(sent)
            assert sent["output_config"]["format"]["schema"] == SIMPLE
        if codec == "anthropic":
            sent = body(made, SIMPLE, "kimi-k2")
            assert is_told(sent)
            assert sent["output_config"]["format"]["schema"] == SIMPLE

    def test_the_effort_stays(self) -> None:
        """The effort of the reasoning stands beside the schema, and without it."""
        sent = body(AnthropicCodec(), SIMPLE, "claude-opus-4-6", reasoning_effort="low")
        assert sent["output_config"].keys() == {"effort", "format"}
        sent = body(AnthropicCodec(), RECURSIVE, "claude-opus-4-6", reasoning_effort="low")
        assert sent["output_config"].keys() == {"effort"}


class TestServices:
    @pytest.mark.parametrize(("formats", "field"), [(("text", "json"), {"type": "json_object"}), (("text",), None)])
    def test_chat_services_without_schemas(self, formats: tuple[str, ...], field: object) -> None:
        """The service gets its JSON mode if it has one, and the model the schema in words."""
        codec = OpenAICodec(quirks=Quirks(formats=formats))
        sent = body(codec, SIMPLE)
        assert sent.get("response_format") == field
        assert sent["messages"][0]["role"] == "system"
        assert is_told(sent)
        assert not is_told(body(codec, "text"))

    def test_bedrock(self) -> None:
        """Claude's schemas are narrowed or told in words, and those of other models are sent as they are."""
        limited = {**SIMPLE, "properties": {"n": {"type": "integer", "minimum": 0}}}

        def schema(model: str, given: Any) -> Any:
            sent = body(BedrockCodec(), given, model)
            assert is_told(sent) == ("outputConfig" not in sent)
            if is_told(sent):
                return None
            return json.loads(sent["outputConfig"]["textFormat"]["structure"]["jsonSchema"]["schema"])

        assert schema("us.anthropic.claude-haiku-4-5-20251001-v1:0", limited)["properties"]["n"] == {
            "type": "integer",
            "description": "minimum: 0",
        }
        assert schema("qwen.qwen3-32b-v1:0", limited) == limited
        assert schema("arn:aws:bedrock:us-east-1:1:application-inference-profile/x", limited) == limited
        assert schema("anthropic.claude-sonnet-4-5-20250929-v1:0", RECURSIVE) is None

    def test_gemini(self) -> None:
        """A schema that holds itself is told in words, and so is every schema before Gemini 2."""

        def config(schema: Any, model: str) -> Any:
            sent = body(GeminiCodec(), schema, model)
            assert is_told(sent) == ("responseJsonSchema" not in sent.get("generationConfig", {}))
            return sent.get("generationConfig")

        assert config(SIMPLE, "gemini-2.5-flash")["responseJsonSchema"] == SIMPLE
        assert config(RECURSIVE, "gemini-3-pro") == {"responseMimeType": "application/json"}
        assert config(SIMPLE, "gemini-1.5-pro") == {"responseMimeType": "application/json"}

    def test_a_lookaround_is_not_strict(self) -> None:
        """OpenAI's strict mode takes no lookaround in a pattern, as pydantic writes for a Decimal."""
        for pattern, fits in (
            ("^a+$", True),
            ("^(?:a)$", True),
            ("^(?!b)", False),
            ("(?<=a)b", False),
            ("a(?=b)", False),
        ):
            schema = {**SIMPLE, "properties": {"n": {"type": "string", "pattern": pattern}}}
            assert fits_strict_mode(schema) is fits, pattern


CODECS: dict[str, Any] = {
    "chat": OpenAICodec,
    "responses": ResponsesCodec,
    "anthropic": AnthropicCodec,
    "bedrock": BedrockCodec,
    "gemini": GeminiCodec,
    "cohere": CohereCodec,
    "ollama": OllamaCodec,
    "vertex": lambda: VertexCodec(parent="projects/p/locations/global"),
}
REFUSALS = [
    "This model does not support response format `json_schema`. See supported models",
    "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
    "This response_format type is unavailable now",
    "invalid schema for response format: response_format/json_schema/next_step: minItems is not supported",
    "output_config.format: Extra inputs are not permitted",
    "output_format.schema: For 'integer' type, property 'minimum' is not supported",
    "This model doesn't support the outputConfig.textFormat field.",
    "Invalid JSON payload received. Unknown name \"responseJsonSchema\" at 'generation_config'",
    "invalid JSON schema in format",
    "The compiled grammar is too large",
    "Function calling with a response mime type: 'application/json' is unsupported",
    "cannot specify both response_format and tools",
]


def refusal(message: str, status: int = 400) -> ProviderError:
    error = BadRequest(message)
    error.status = status
    return error


@pytest.mark.parametrize("name", CODECS)
class TestLearning:
    @pytest.mark.parametrize("message", REFUSALS)
    def test_a_refused_schema_is_told_in_words(self, name: str, message: str) -> None:
        """After a refusal, this model is told this schema in words, and other models and schemas are sent as before."""
        codec = CODECS[name]()
        assert isinstance(codec, Learner)
        request = Request(
            model="claude-sonnet-4-5" if name == "anthropic" else "m", messages="Hi", response_format=SIMPLE
        )
        sent = codec.encode(request, stream=False).body
        assert not is_told(json.loads(sent))
        assert codec.learn(request, sent, refusal(message)) == "tells the model the JSON Schema in words"
        again = codec.encode(request, stream=False).body
        assert is_told(json.loads(again))
        assert codec.learn(request, again, refusal(message)) is None
        other = {**SIMPLE, "title": "other"}
        assert not is_told(body(codec, other, request.model))
        assert repr(codec) == repr(CODECS[name]())

    def test_other_errors_teach_nothing(self, name: str) -> None:
        """An error about something else, another status, a strict schema and no schema at all change nothing."""
        codec = CODECS[name]()
        refused = refusal(REFUSALS[0])
        strict = {"type": "json_schema", "json_schema": {"name": "n", "schema": SIMPLE, "strict": True}}
        for request, error in (
            (Request(model="m", messages="Hi", response_format=SIMPLE), refusal("the prompt is too long")),
            (Request(model="m", messages="Hi", response_format=SIMPLE), refusal(REFUSALS[0], 429)),
            (Request(model="m", messages="Hi", response_format=strict), refused),
            (Request(model="m", messages="Hi", response_format="text"), refused),
            (Request(model="m", messages="Hi"), refused),
            (
                Request(model="m", messages="Hi", response_format=SIMPLE, tools=[TOOL]),
                refusal("tools.0.custom.input_schema: JSON schema is invalid"),
            ),
        ):
            assert codec.learn(request, b"{}", error) is None
