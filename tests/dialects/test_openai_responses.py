"""OpenAI's Responses API: requests, whole responses, and streams of events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.dialects import sse as events

from fluxibly import errors
from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.openai_responses import ResponsesCodec
from fluxibly.testing.codec_check import Outcome, check_cuts
from fluxibly.types import Image, Message, Reasoning, Request, Response, Tool, ToolCall, Usage

CODEC = ResponsesCodec()
USAGE = {
    "input_tokens": 10,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 20,
    "output_tokens_details": {"reasoning_tokens": 8},
    "total_tokens": 30,
}
REASONING = {
    "id": "rs_1",
    "type": "reasoning",
    "status": "completed",
    "summary": [{"type": "summary_text", "text": "I think."}],
    "encrypted_content": "gAAAA",
}
CALL = {"id": "fc_1", "type": "function_call", "status": "completed", "call_id": "call_1", "name": "add",
        "arguments": '{"a": 1}'}  # fmt: skip
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
           "content": [{"type": "output_text", "text": "Hello", "annotations": []}]}  # fmt: skip


def answer(*output: dict[str, Any], status: str = "completed", **fields: object) -> dict[str, Any]:
    return {"id": "resp_1", "object": "response", "status": status, "model": "gpt-5-2025", "error": None,
            "output": list(output), "usage": USAGE, **fields}  # fmt: skip


def streamed(*bodies: dict[str, Any]) -> Outcome:
    return check_cuts(CODEC, events(*bodies))


def sent(request: Request, *, stream: bool = False) -> dict[str, Any]:
    encoded = CODEC.encode(request, stream=stream)
    assert encoded.path == "/responses"
    body: dict[str, Any] = json.loads(encoded.body)
    return body


def test_a_request_with_everything() -> None:
    """Each parameter has this API's name; encrypted reasoning is requested, because nothing is stored."""
    request = Request(
        model="gpt-5",
        messages=[
            Message.system("Be brief."),
            Message.user(["Look", Image(data=b"\x89PNG", media_type="image/png")]),
            Message.assistant("Calling.", tool_calls=[ToolCall("call_1", "add", {"a": 1})]),
            Message.tool("3", "call_1", name="add"),
        ],
        temperature=0.2,
        max_tokens=10,
        top_p=0.9,
        tools=[Tool("add", "Adds")],
        tool_choice="add",
        response_format={"title": "T", "type": "string"},
        reasoning_effort="low",
        extra={"store": True},
    )
    assert sent(request, stream=True) == {
        "model": "gpt-5",
        "input": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "Look"},
                    {"type": "input_image", "image_url": "data:image/png;base64,iVBORw==", "detail": "auto"},
                ],
            },
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Calling."}]},
            {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "call_1", "output": "3"},
        ],
        "temperature": 0.2,
        "max_output_tokens": 10,
        "top_p": 0.9,
        "tools": [
            {
                "type": "function",
                "name": "add",
                "description": "Adds",
                "parameters": {"type": "object", "properties": {}},
                "strict": False,
            }
        ],
        "tool_choice": {"type": "function", "name": "add"},
        "text": {
            "format": {"type": "json_schema", "name": "T", "schema": {"title": "T", "type": "string"}, "strict": False}
        },
        "reasoning": {"effort": "low"},
        "store": True,
        "include": ["reasoning.encrypted_content"],
        "stream": True,
    }


def test_a_request_to_a_model_that_does_not_reason() -> None:
    """Encrypted reasoning is not requested from models that do not reason, because they reject the request."""
    request = Request(model="gpt-4o", messages="Hi", response_format="json", tool_choice="none")
    assert sent(request) == {
        "model": "gpt-4o",
        "input": [{"role": "user", "content": "Hi"}],
        "store": False,
        "text": {"format": {"type": "json_object"}},
        "tool_choice": "none",
    }


@pytest.mark.parametrize(
    "parameter", [{"top_k": 3}, {"seed": 1}, {"n": 2}, {"stop": "END"}, {"frequency_penalty": 0.5}]
)
def test_parameters_that_this_api_does_not_support(parameter: dict[str, Any]) -> None:
    """Unsupported parameters are rejected before the request is sent."""
    with pytest.raises(errors.BadRequest, match=next(iter(parameter))):
        CODEC.encode(Request(model="m", messages="Hi", **parameter), stream=False)


def test_a_whole_response() -> None:
    """A whole response has reasoning, text and tool calls; reasoning is sent back without its status."""
    response = CODEC.decode(json.dumps(answer(REASONING, MESSAGE, CALL)).encode())
    assert response == Response(
        "Hello",
        tool_calls=[ToolCall("call_1", "add", {"a": 1}, raw={"item": {"id": "fc_1", "status": "completed"}})],
        reasoning="I think.",
        reasoning_parts=[
            Reasoning(
                text="I think.",
                signature="gAAAA",
                raw={key: value for key, value in REASONING.items() if key != "status"},
            )
        ],
        finish_reason="tool_call",
        raw_finish_reason="completed",
        usage=Usage(input_tokens=10, output_tokens=20, cached_tokens=4, reasoning_tokens=8),
        model="gpt-5-2025",
        id="resp_1",
    )
    items = sent(Request(model="gpt-5", messages=[Message.assistant(response)]))["input"]
    assert items == [{key: value for key, value in REASONING.items() if key != "status"}, MESSAGE, CALL]


def test_reasoning_that_is_not_encrypted_does_not_go_back() -> None:
    """Unencrypted reasoning is not sent back, because its id is useless if the service stored nothing."""
    bare = {key: value for key, value in REASONING.items() if key != "encrypted_content"}
    response = CODEC.decode(json.dumps(answer(bare, MESSAGE)).encode())
    assert response.reasoning == "I think."
    assert sent(Request(model="gpt-5", messages=[Message.assistant(response)]))["input"] == [MESSAGE]


@pytest.mark.parametrize(
    ("fields", "finish", "raw"),
    [
        (
            {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
            "length",
            "max_output_tokens",
        ),
        (
            {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}},
            "content_filter",
            "content_filter",
        ),
        ({"status": "incomplete"}, "incomplete", "incomplete"),
        ({}, "stop", "completed"),
    ],
)
def test_finish_reasons(fields: dict[str, Any], finish: str, raw: str) -> None:
    """The finish reason is the same for whole and streamed responses."""
    body = answer(MESSAGE, **fields)
    whole = CODEC.decode(json.dumps(body).encode())
    assert (whole.finish_reason, whole.raw_finish_reason) == (finish, raw)
    last = streamed({"type": f"response.{body['status']}", "response": body}).response
    assert (last.finish_reason, last.raw_finish_reason, last.text) == (finish, raw, "Hello")


def test_a_refusal() -> None:
    """A refusal is text with the finish reason content_filter."""
    refusal = {"type": "message", "content": [{"type": "refusal", "refusal": "No."}]}
    whole = CODEC.decode(json.dumps(answer(refusal)).encode())
    assert (whole.text, whole.finish_reason) == ("No.", "content_filter")
    last = streamed(
        {"type": "response.refusal.delta", "output_index": 0, "delta": "No."},
        {"type": "response.completed", "response": answer(refusal)},
    ).response
    assert (last.text, last.finish_reason) == ("No.", "content_filter")


FULL = (
    {"type": "response.created", "response": answer(status="in_progress")},
    {"type": "response.output_item.added", "output_index": 0, "item": {"type": "reasoning", "id": "rs_1"}},
    {"type": "response.reasoning_summary_text.delta", "output_index": 0, "delta": "I "},
    {"type": "response.reasoning_summary_text.delta", "output_index": 0, "delta": "think."},
    {"type": "response.output_item.done", "output_index": 0, "item": REASONING},
    {"type": "response.output_item.added", "output_index": 1, "item": {"type": "message", "content": []}},
    {"type": "response.output_text.delta", "output_index": 1, "content_index": 0, "delta": "Hel"},
    {"type": "response.output_text.delta", "output_index": 1, "content_index": 0, "delta": "lo"},
    {"type": "response.output_text.done", "output_index": 1, "text": "Hello"},
    {"type": "response.output_item.done", "output_index": 1, "item": MESSAGE},
    {"type": "response.output_item.added", "output_index": 2, "item": {**CALL, "arguments": ""}},
    {"type": "response.function_call_arguments.delta", "output_index": 2, "delta": '{"a"'},
    {"type": "response.function_call_arguments.delta", "output_index": 2, "delta": ": 1}"},
    {"type": "response.function_call_arguments.done", "output_index": 2, "arguments": '{"a": 1}'},
    {"type": "response.output_item.done", "output_index": 2, "item": CALL},
    {"type": "response.something_new", "delta": "?"},
    {"type": "response.completed", "response": answer(REASONING, MESSAGE, CALL)},
)


def test_a_stream_comes_to_the_whole_response() -> None:
    """The deltas of text, reasoning and tool calls add up to the whole response."""
    assert streamed(*FULL) == Outcome(CODEC.decode(json.dumps(answer(REASONING, MESSAGE, CALL)).encode()))


def test_reasoning_without_deltas() -> None:
    """Reasoning without deltas comes from the finished item, once, even next to an item with deltas."""
    late = {**REASONING, "summary": [{"type": "summary_text", "text": " Again."}]}
    response = streamed(
        {"type": "response.reasoning_summary_text.delta", "delta": "I think."},
        {"type": "response.output_item.done", "output_index": 0, "item": REASONING},
        {"type": "response.output_item.done", "output_index": 1, "item": late},
        {"type": "response.completed", "response": answer(REASONING, late)},
    ).response
    assert response.reasoning == "I think. Again."
    assert [part.text for part in response.reasoning_parts] == ["I think.", " Again."]


def test_a_tool_call_without_deltas() -> None:
    """A tool call without deltas comes from the finished item, or from the added item."""
    done = {"type": "response.completed", "response": answer(CALL)}
    for given in (
        [{"type": "response.output_item.done", "output_index": 0, "item": CALL}],
        [{"type": "response.output_item.added", "output_index": 0, "item": CALL},
         {"type": "response.output_item.done", "output_index": 0, "item": CALL}],
        [{"type": "response.output_item.added", "output_index": 0, "item": {**CALL, "arguments": ""}},
         {"type": "response.output_item.done", "output_index": 0, "item": CALL}],
    ):  # fmt: skip
        (call,) = streamed(*given, done).response.tool_calls
        assert call == ToolCall("call_1", "add", {"a": 1}, raw={"item": {"id": "fc_1", "status": "completed"}})


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"type": "error", "code": "server_error", "message": "broken", "param": None}, "ServerError"),
        ({"type": "error", "error": {"type": "insufficient_quota", "code": "insufficient_quota", "message": "pay"}}, "QuotaExceeded"),
        ({"type": "response.failed", "response": answer(status="failed", error={"code": "insufficient_quota", "message": "pay"})}, "QuotaExceeded"),
        ({"type": "response.failed", "response": answer(status="failed", error={"code": "rate_limit_exceeded", "message": "slow"})}, "RateLimitError"),
        ({"type": "response.failed", "response": answer(status="failed")}, "ServerError"),
    ],
)  # fmt: skip
def test_errors_in_a_stream(event: dict[str, Any], kind: str) -> None:
    """Error events and failed responses raise errors; earlier output is kept."""
    outcome = streamed(*FULL[:7], event)
    assert str(outcome.error).startswith(f"{kind}: OpenAI answered")
    assert outcome.response.text == "Hel"


def test_an_event_named_error() -> None:
    """An event named `error` is an error, whatever its data, and so is an event without a type."""
    outcome = check_cuts(CODEC, events(*FULL[:7]) + b"event: error\ndata: broken\n\n")
    assert str(outcome.error).startswith("ServerError: OpenAI answered with an error: broken.")
    assert str(check_cuts(CODEC, b'data: {"a": 1}\n\n').error).startswith("StreamProtocolError")


def test_an_error_status() -> None:
    """A non-2xx response becomes its error class."""
    assert type(CODEC.decode_error(401, {}, b'{"error": {"message": "no"}}')) is errors.AuthenticationError


def test_bare_json_is_an_error() -> None:
    """Bare JSON instead of a stream is an error."""
    outcome = check_cuts(CODEC, b'{"error": {"message": "no", "type": "invalid_request_error"}}')
    assert str(outcome.error).startswith("BadRequest")


def test_a_stream_that_was_cut_off() -> None:
    """A stream without the event that completes the response was cut off."""
    outcome = streamed(*FULL[:8])
    assert str(outcome.error).startswith("StreamProtocolError")
    assert outcome.response.text == "Hello"
    assert str(check_cuts(CODEC, events(*FULL)[:-30]).error).startswith("StreamProtocolError")


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"<html>", b'{"output": 3}', b'{"status": "completed"}'])
def test_invalid_bodies_never_pass_as_responses(body: bytes) -> None:
    """Rubbish and empty bodies are errors."""
    with pytest.raises(StreamProtocolError):
        CODEC.decode(body)


def test_a_whole_response_that_failed() -> None:
    """A failed response is raised, although its status is 200."""
    body = answer(status="failed", error={"code": "server_error", "message": "broken"})
    with pytest.raises(errors.ServerError, match="broken") as caught:
        CODEC.decode(json.dumps(body).encode())
    assert caught.value.retryable
