"""Conformance of captured content to all requirements of the JSON schemas of OpenTelemetry's `gen_ai.*` messages."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator
from support.tracing_tools import ANSWER, CHAT, TOOL, Recorder, remote

from fluxibly.errors import Overloaded
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Audio, Image, Message, Opaque, Reasoning, Request, Response, Text, ToolCall

STRING = {"type": "string"}
STRING_OR_NULL = {"type": ["string", "null"]}
MEDIA = {"modality": {"enum": ["image", "video", "audio", "document"]}, "mime_type": STRING_OR_NULL}
PARTS = {
    "text": {"content": STRING},
    "reasoning": {"content": STRING},
    "tool_call": {"id": STRING_OR_NULL, "name": STRING, "arguments": {}},
    "tool_call_response": {"id": STRING_OR_NULL, "response": {}},
    "blob": {**MEDIA, "content": {**STRING, "contentEncoding": "base64"}},
    "uri": {**MEDIA, "uri": STRING},
    "server_tool_use": {"content": {}},
}
"""The kinds of parts in these tests, with the fields that each must have. No other fields are allowed.

The conventions allow a part of any other type with any fields (`GenericPart`): opaque parts are such.
"""


def only(properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


PART = {"oneOf": [only({"type": {"const": kind}, **properties}) for kind, properties in PARTS.items()]}
MESSAGE = {"role": {"enum": ["system", "user", "assistant", "tool"]}, "parts": {"type": "array", "items": PART}}
INPUT = {**only(MESSAGE), "properties": {**MESSAGE, "name": STRING}}
FINISH_REASON = {"enum": ["stop", "length", "content_filter", "tool_call", "error"]}
SCHEMAS = {
    "gen_ai.system_instructions": {"type": "array", "items": PART},
    "gen_ai.input.messages": {"type": "array", "items": INPUT},
    "gen_ai.output.messages": {"type": "array", "items": only({**MESSAGE, "finish_reason": FINISH_REASON})},
    "gen_ai.tool.definitions": {
        "type": "array",
        "items": only(
            {"type": {"const": "function"}, "name": STRING, "description": STRING, "parameters": {"type": "object"}}
        ),
    },
}
REQUEST = Request(
    model="m-1",
    messages=[
        *CHAT,
        Message.assistant(
            Response(
                "Let me look.",
                tool_calls=[ToolCall("c1", "look", {"word": "life"}), ToolCall("c2", "look", raw_arguments="{")],
                reasoning_parts=[Reasoning(text="They ask for a word."), Reasoning(raw={"data": "x"})],
            )
        ),
        Message.tool("42", "c1", name="look"),
        Message.tool([Image(data=b"ab", media_type="image/png")], "c2", name="look"),
        Message.system("Be brief."),
        Message.user(["And?", Image(url="https://x.test/a.png"), Image(url="data:image/gif;base64,YWI=")]),
    ],
    tools=[TOOL],
)
ANSWERS = {
    "plain": ANSWER,
    "without a reason": Response("hm"),
    "tools": Response("", tool_calls=[ToolCall("c1", "look", {"n": 1})], finish_reason="tool_call"),
    "tools without a reason": Response("", tool_calls=[ToolCall("c1", "look", raw_arguments="{")]),
    "reasoning": Response("b", reasoning="why", finish_reason="length"),
    "parts": Response.from_parts(
        [
            Text("See:"),
            Image(data=b"ab", media_type="image/png"),
            Audio(url="https://x.test/a.wav"),
            Opaque("anthropic", {"type": "server_tool_use", "input": {"query": "life"}}),
            Reasoning(signature="s"),
            Text("So."),
        ]
    ),
    "alternatives": Response("a", finish_reason="stop", alternatives=[Response("b", finish_reason="length")]),
}


def captured(recorder: Recorder) -> dict:
    """Return the content of the only call, and check that its span and its event have the same content."""
    (event,) = recorder.events
    on_span = {key: json.loads(recorder.call.attributes[key]) for key in SCHEMAS if key in recorder.call.attributes}
    assert on_span == {
        key: json.loads(json.dumps(value, default=lambda item: [*item] if isinstance(item, tuple) else dict(item)))
        for key, value in event.attributes.items()
        if key in SCHEMAS
    }
    return on_span


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_captured_content_conforms(answer, mode):
    """Every message, part and tool conforms, and every answer has a finish reason."""
    recorder = Recorder()
    run(mode, remote(mode, answer), [recorder.tracing(capture="both")], REQUEST)
    content = captured(recorder)
    assert content.keys() == SCHEMAS.keys()
    for key, value in content.items():
        Draft202012Validator(SCHEMAS[key]).validate(value)
    assert len(content["gen_ai.output.messages"]) == 1 + len(answer.alternatives)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.streaming], ids=str)
@pytest.mark.parametrize("script", [["a", "b", "c"], ["a", Overloaded("full")]], ids=["given up", "cut"])
def test_part_of_an_answer_conforms_too(script, mode):
    """The finish reason of a partial answer is `error`."""
    recorder = Recorder()
    run(mode, remote(mode, script), [recorder.tracing(capture="both")], REQUEST, stop_after=2)
    (message,) = captured(recorder)["gen_ai.output.messages"]
    Draft202012Validator(SCHEMAS["gen_ai.output.messages"]).validate([message])
    assert message["finish_reason"] == "error"
