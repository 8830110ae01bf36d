"""Anthropic's dialect: requests, whole responses, streams, errors, and the official client as a second reader."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, strategies as st
from support.anthropic import finish, start, text_block
from support.dialects import WEATHER, interrupted, recut, serving, sse, streamed
from support.recordings import load

from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ContextLengthExceeded,
    NotFound,
    Overloaded,
    ProviderError,
    QuotaExceeded,
    RateLimitError,
    RequestTimeout,
    ServerError,
    StreamProtocolError,
)
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.testing import check_codec
from fluxibly.types import (
    Audio,
    Document,
    Image,
    Message,
    Opaque,
    Reasoning,
    Request,
    Response,
    Text,
    Tool,
    ToolCall,
    Usage,
)

CODEC = AnthropicCodec()


def body_of(stream: bool = False, **fields: Any) -> dict[str, Any]:
    fields = {"model": "claude-sonnet-4-5", "messages": "Hi", **fields}
    return json.loads(CODEC.encode(Request(**fields), stream=stream).body)


def block_start(index: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": {"type": kind, **fields}}


# Requests


def test_plain_request() -> None:
    """A plain request has its path and the required max_tokens, and nothing that was not requested."""
    encoded = CODEC.encode(Request(model="claude-haiku-4-5", messages="Hi"), stream=False)
    assert encoded.path == "/messages"
    assert json.loads(encoded.body) == {
        "model": "claude-haiku-4-5",
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    }


def test_parameters() -> None:
    """Each parameter is sent under the dialect's name."""
    body = body_of(
        stream=True,
        temperature=0.5,
        max_tokens=7,
        top_p=0.9,
        top_k=40,
        stop="END",
        n=1,
        tools=[WEATHER, Tool("now", strict=True)],
        tool_choice="required",
        response_format={"type": "object"},
    )
    del body["messages"]
    assert body == {
        "model": "claude-sonnet-4-5",
        "stream": True,
        "temperature": 0.5,
        "max_tokens": 7,
        "top_p": 0.9,
        "top_k": 40,
        "stop_sequences": ["END"],
        "tools": [
            {"name": "weather", "description": "The weather in a city.", "input_schema": dict(WEATHER.parameters)},
            {"name": "now", "input_schema": {"type": "object", "properties": {}}, "strict": True},
        ],
        "tool_choice": {"type": "any"},
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    }


@pytest.mark.parametrize(
    ("choice", "sent"),
    [("auto", {"type": "auto"}), ("none", {"type": "none"}), ("weather", {"type": "tool", "name": "weather"})],
)
def test_tool_choice(choice: str, sent: dict[str, str]) -> None:
    """A tool choice other than the keywords is a tool's name."""
    assert body_of(tools=[WEATHER], tool_choice=choice)["tool_choice"] == sent


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1),
        ("frequency_penalty", 0.1),
        ("presence_penalty", 0.1),
        ("n", 2),
        ("response_format", "json"),
        ("reasoning_effort", "enormous"),
    ],
)
def test_refused_parameters(name: str, value: object) -> None:
    """An unsupported parameter raises an error that names it, rather than being dropped."""
    with pytest.raises(BadRequest, match=name) as caught:
        body_of(**{name: value})
    assert not caught.value.retryable


def test_extra_wins() -> None:
    """`extra` replaces values in the body; only objects that hold parameters are merged."""
    body = body_of(
        temperature=0.5,
        response_format={"type": "object"},
        extra={"temperature": 1, "metadata": {"user_id": "u"}, "output_config": {"effort": "low"}},
    )
    assert body["temperature"] == 1
    assert body["metadata"] == {"user_id": "u"}
    assert body["output_config"] == {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}}


def test_values_that_json_cannot_represent() -> None:
    """A value that JSON cannot represent is rejected before the request is sent, without quoting the prompt."""
    with pytest.raises(BadRequest, match="object"):
        body_of(extra={"thing": object()})
    with pytest.raises(BadRequest, match="surrogate") as caught:
        body_of(messages="a secret \ud83d")
    assert "secret" not in str(caught.value)


def test_thinking_by_budget() -> None:
    """Models before 4.6 take a budget, and max_tokens must leave room for it."""
    body = body_of(model="claude-haiku-4-5-20251001", reasoning_effort="low")
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 2048}
    assert body["max_tokens"] == 2048 + 4096
    with pytest.raises(BadRequest, match="raise max_tokens"):
        body_of(reasoning_effort="high", max_tokens=100)


@pytest.mark.parametrize("model", ["claude-opus-4-6", "claude-sonnet-5-20260301", "anthropic/claude-opus-4.7"])
def test_thinking_by_effort(model: str) -> None:
    """Newer models take the effort itself."""
    body = body_of(model=model, reasoning_effort="xhigh")
    assert body["thinking"]["type"] == "adaptive"
    assert body["output_config"] == {"effort": "xhigh"}


@pytest.mark.parametrize("model", ["claude-opus-4-20250514", "claude-3-7-sonnet-latest", "claude-opus-4-5", "smollm2"])
def test_models_that_take_budgets(model: str) -> None:
    """Older models, and models of other makers, take a budget."""
    assert body_of(model=model, reasoning_effort="minimal")["thinking"]["budget_tokens"] == 1024


def test_thinking_off() -> None:
    """The effort "none" switches thinking off."""
    assert body_of(model="claude-opus-4-6", reasoning_effort="none")["thinking"] == {"type": "disabled"}


def test_system_messages() -> None:
    """System messages are sent in a separate field."""
    body = body_of(messages=[Message.system("Be brief."), Message.user("Hi"), Message.system("Rhyme.")])
    assert body["system"] == "Be brief.\n\nRhyme."
    assert [turn["role"] for turn in body["messages"]] == ["user"]
    with pytest.raises(BadRequest, match="system message"):
        body_of(messages=[Message("system", Image(url="https://x.test/a.png")), Message.user("Hi")])
    with pytest.raises(BadRequest, match="besides the system"):
        body_of(messages=[Message.system("alone")])


def test_parts_that_are_to_be_cached() -> None:
    """`cache_control` beside a part goes out with its block, and makes the system messages blocks."""
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    image = Image(data=b"\x89PNG", media_type="image/png", raw=cached)
    document = Document(data=b"%PDF", media_type="application/pdf", raw=cached)
    rules = [Message.system("Be brief."), Message("system", [Text("Rules …", raw=cached)])]
    body = body_of(messages=[*rules, Message.user([image, document, Text("Hi", raw=cached), "there"])])
    assert body["system"] == [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Rules …", **cached}]
    *blocks, last = body["messages"][0]["content"]
    assert [(block["type"], block["cache_control"]) for block in blocks] == [
        (kind, cached["cache_control"]) for kind in ("image", "document", "text")
    ]
    assert last == {"type": "text", "text": "there"}
    assert body_of(messages=[rules[0], Message.user("Hi")])["system"] == "Be brief."


def test_images() -> None:
    """Images are sent by URL, as bytes, and as data URLs."""
    message = Message.user(
        [
            "What is it?",
            Image(url="https://x.test/a.png"),
            Image(data=b"\x89PNG", media_type="image/png"),
            Image(url="data:image/gif;base64,R0lG"),
            Image(url="data:image/svg+xml,%3Csvg%3E"),
        ]
    )
    assert [block.get("source") for block in body_of(messages=[message])["messages"][0]["content"]] == [
        None,
        {"type": "url", "url": "https://x.test/a.png"},
        {"type": "base64", "media_type": "image/png", "data": "iVBORw=="},
        {"type": "base64", "media_type": "image/gif", "data": "R0lG"},
        {"type": "base64", "media_type": "image/svg+xml", "data": "PHN2Zz4="},
    ]


def test_tool_conversation() -> None:
    """Calls, signed reasoning and results are sent back; results share a turn with the user's next message."""
    calls = [ToolCall("toolu_1", "weather", {"city": "Rome"}), ToolCall("functions.now:0", "now")]
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "s1g"}
    redacted = {"type": "redacted_thinking", "data": "xyz"}
    answer = Response(
        "Let me look.",
        tool_calls=calls,
        reasoning_parts=[Reasoning(text="Hm.", signature="s1g", raw=thinking), Reasoning(raw=redacted)],
    )
    body = body_of(
        messages=[
            Message.user("Weather?"),
            Message.assistant(answer),
            Message.tool("sunny", calls[0]),
            Message.tool(Image(data=b"\x89PNG", media_type="image/png"), calls[1]),
            Message.user("And then?"),
        ]
    )
    assert body["messages"][1:] == [
        {
            "role": "assistant",
            "content": [
                thinking,
                redacted,
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
                {"type": "tool_use", "id": "functions_now_0", "name": "now", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]},
                {
                    "type": "tool_result",
                    "tool_use_id": "functions_now_0",
                    "content": [
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}}
                    ],
                },
                {"type": "text", "text": "And then?"},
            ],
        },
    ]


def test_calls_of_other_services() -> None:
    """Ids that repeat from turn to turn become unique, and each result keeps the id of its call."""
    turns = [Message.user("Hi")]
    for call_id in ("call_0", "call_0", "call_0_1", "a.b", "a_b", ""):
        call = ToolCall(call_id, "now")
        turns += [Message.assistant(tool_calls=[call]), Message.tool("noon", call)]
    blocks = [turn["content"][0] for turn in body_of(messages=turns)["messages"][1:]]
    ids = [block["id"] for block in blocks[::2]]
    assert ids[0] == "call_0"
    assert len(set(ids)) == 6
    assert all(re.fullmatch("[a-zA-Z0-9_-]+", each) for each in ids)
    assert [block["tool_use_id"] for block in blocks[1::2]] == ids


def test_reasoning_of_other_dialects_stays_behind() -> None:
    """Blocks of other services or without proof of origin, which would be rejected, are not sent; signed blocks are."""
    message = Message(
        "assistant",
        "Hi",
        reasoning=[
            Reasoning(text="a", raw={"type": "reasoning.text", "text": "a"}),
            Reasoning(text="b"),
            Reasoning(text="c", signature="s"),
        ],
    )
    body = body_of(messages=[Message.user("x"), message, Message.user("y")])
    assert body["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "c", "signature": "s"},
        {"type": "text", "text": "Hi"},
    ]


def test_empty_texts_are_not_sent() -> None:
    """Empty blocks and empty turns, which the service rejects, are not sent."""
    body = body_of(messages=[Message.user(["Hi", Text("")]), Message.assistant(""), Message.user("again")])
    assert body["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "again"}]}
    ]


def test_broken_arguments_go_back() -> None:
    """Arguments that are not an object are wrapped in an object, so that the model sees its own output."""
    call = ToolCall("toolu_1", "weather", raw_arguments='{"city": ')
    body = body_of(messages=[Message.user("x"), Message.assistant("", tool_calls=[call]), Message.tool("bad", call)])
    assert body["messages"][1]["content"][0]["input"] == {"INVALID_JSON": '{"city": '}


# Whole responses

WHOLE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-x",
    "content": [
        {"type": "thinking", "thinking": "Hm.", "signature": "sig"},
        {"type": "redacted_thinking", "data": "zzz"},
        {"type": "text", "text": "Let me ", "citations": None},
        {"type": "server_tool_use", "id": "srv", "name": "web_search", "input": {"query": "x"}},
        {"type": "text", "text": "look."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Zürich"}},
    ],
    "stop_reason": "tool_use",
    "usage": {
        "input_tokens": 10,
        "cache_read_input_tokens": 5,
        "cache_creation_input_tokens": 3,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 4},
    },
    "new_field": [1],
}


def test_whole_answer() -> None:
    """A whole response has its text, reasoning, tool calls, finish reason, usage, id, model and raw body."""
    response = CODEC.decode(b"\n\n  " + json.dumps(WHOLE).encode())
    assert response.text == "Let me look."
    assert response.reasoning == "Hm."
    assert [part.raw for part in response.reasoning_parts] == WHOLE["content"][:2]
    assert response.tool_calls == (ToolCall("toolu_1", "weather", {"city": "Zürich"}),)
    assert (response.finish_reason, response.raw_finish_reason) == ("tool_call", "tool_use")
    assert response.usage == Usage(
        input_tokens=18, output_tokens=7, cached_tokens=5, cache_write_tokens=3, reasoning_tokens=4
    )
    assert (response.id, response.model, response.raw) == ("msg_1", "claude-x", WHOLE)


def test_whole_answer_goes_back() -> None:
    """A decoded response is encoded to the same blocks."""
    response = CODEC.decode(json.dumps(WHOLE).encode())
    body = body_of(
        messages=[Message.user("x"), Message.assistant(response), Message.tool("ok", response.tool_calls[0])]
    )
    came = [{name: value for name, value in block.items() if value is not None} for block in WHOLE["content"]]
    assert body["messages"][1]["content"] == came


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("pause_turn", "pause_turn"),
        ("something_new", "something_new"),
    ],
)
def test_finish_reasons(raw: str, reason: str) -> None:
    """Known finish reasons are normalized and others are passed on, alike in both modes."""
    whole = CODEC.decode(json.dumps({**WHOLE, "stop_reason": raw}).encode())
    stream = streamed(CODEC, sse(start(), *text_block("a"), *finish(raw)))
    assert (whole.finish_reason, whole.raw_finish_reason) == (reason, raw)
    assert (stream.finish_reason, stream.raw_finish_reason) == (reason, raw)


@pytest.mark.parametrize("body", [b"", b"<html>busy</html>", b"{}", b"[]", b"null", b'{"content": null}', b'{"content'])
def test_not_an_answer(body: bytes) -> None:
    """A body that is not a message never passes as an empty message."""
    with pytest.raises(StreamProtocolError):
        CODEC.decode(body)


def test_error_in_a_200() -> None:
    """An error in the body of a 200 is raised."""
    with pytest.raises(Overloaded, match="Overloaded"):
        CODEC.decode(b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}')


# Streams


def test_recorded_parallel_tool_calls() -> None:
    """A stream with two tool calls decodes the same wherever its reads are cut."""
    body = load("27-").body
    response = streamed(CODEC, body)
    assert response.tool_calls == (
        ToolCall("toolu_01NW9V1YCeF2aaDjiUnTSUH1", "secret_retrieval_tool", raw_arguments='{"password": "mellon"}'),
        ToolCall("toolu_015k2gzpZWrWT7ZKrmd1sPRg", "secret_retrieval_tool", raw_arguments='{"password": "radiance"}'),
    )
    assert response.finish_reason == "tool_call"
    assert response.usage == Usage(input_tokens=601, output_tokens=98, cached_tokens=0, cache_write_tokens=0)
    assert (response.id, response.model) == ("msg_01Stq1fKtevWmBQZTnfyKzJo", "claude-haiku-4-5-20251001")
    assert recut(CODEC, body) == response


def test_recorded_thinking() -> None:
    """Signed thinking and UTF-8 text decode the same wherever the reads are cut."""
    body = load("28-").body
    response = streamed(CODEC, body)
    assert response.reasoning.startswith("The user wants two names")
    assert response.text.startswith("1. **Pouch**")
    (part,) = response.reasoning_parts
    assert part.text == response.reasoning
    assert part.signature is not None
    assert part.raw == {"type": "thinking", "thinking": part.text, "signature": part.signature}
    assert response.finish_reason == "stop"
    assert recut(CODEC, body) == response


def test_recorded_requests_are_made_again() -> None:
    """The codec encodes the recorded call as the recorded client did."""
    sent = load("28-").request
    assert sent == {
        **body_of(stream=True, model=sent["model"], messages="Two names for a pet pelican, be brief", temperature=1.0),
        "max_tokens": 8192,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }


def test_usage_is_cumulative() -> None:
    """Later counts replace earlier counts, and counts that later events omit stay."""
    response = streamed(
        CODEC,
        sse(
            start(input_tokens=10, cache_read_input_tokens=90, output_tokens=1),
            *text_block("a"),
            {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 5}},
            *finish("end_turn", output_tokens=9),
        ),
    )
    assert response.usage == Usage(input_tokens=100, output_tokens=9, cached_tokens=90)


def test_tool_calls_without_deltas() -> None:
    """A call may have no arguments, or its whole input in the start event."""
    response = streamed(
        CODEC,
        sse(
            start(),
            block_start(0, "tool_use", id="a", name="now"),
            {"type": "content_block_stop", "index": 0},
            block_start(1, "tool_use", id="b", name="weather", input={"city": "Rome"}),
            {"type": "content_block_stop", "index": 1},
            *finish("tool_use"),
        ),
    )
    assert [(call.id, call.name, dict(call.arguments)) for call in response.tool_calls] == [
        ("a", "now", {}),
        ("b", "weather", {"city": "Rome"}),
    ]


def test_ignored_events() -> None:
    """Pings, comments, unknown events, blocks and deltas, citations, and a [DONE] after the end are ignored."""
    body = b": ping - now\n\n" + sse(
        {"type": "ping"},
        start(),
        block_start(0, "server_tool_use", id="s", name="w"),
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '{"q":1}'}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_delta", "index": 9, "delta": {"type": "input_json_delta", "partial_json": "{"}},
        {"type": "content_block_stop", "index": 9},
        *text_block("Hi", index=1)[:-1],
        {"type": "content_block_delta", "index": 1, "delta": {"type": "citations_delta", "citation": {"x": 1}}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "new_delta"}},
        {"type": "content_block_stop", "index": 1},
        {"type": "brand_new_event", "x": 1},
        *finish("end_turn"),
        "[DONE]",
    )
    response = streamed(CODEC, body)
    assert (response.text, response.tool_calls, response.finish_reason) == ("Hi", (), "stop")


def test_done_mark_without_message_stop() -> None:
    """[DONE] ends a stream only after its stop reason."""
    events = [start(), *text_block("Hi"), finish("end_turn")[0]]
    assert streamed(CODEC, sse(*events, "[DONE]")).text == "Hi"
    partial, error = interrupted(CODEC, sse(*events[:-1], "[DONE]"))
    assert partial.text == "Hi"
    assert isinstance(error, StreamProtocolError)


@pytest.mark.parametrize("kept", [0, 1, 3, -1])
def test_truncated_stream(kept: int) -> None:
    """A stream without message_stop was cut off, wherever it ends."""
    events = [start(), *text_block("one ", "two"), *finish("end_turn")][:kept]
    partial, error = interrupted(CODEC, sse(*events))
    assert isinstance(error, StreamProtocolError)
    assert "message_stop" in str(error)
    assert "one two".startswith(partial.text)


def test_tool_call_cut_off_by_the_length_limit() -> None:
    """A truncated tool call has no block stop, and reports that its arguments are broken."""
    response = streamed(
        CODEC,
        sse(
            start(),
            block_start(0, "tool_use", id="a", name="now"),
            {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '{"ci'}},
            *finish("max_tokens"),
        ),
    )
    (call,) = response.tool_calls
    assert (response.finish_reason, call.raw_arguments) == ("length", '{"ci')
    assert call.error is not None


def test_redacted_thinking_in_a_stream() -> None:
    """A redacted block arrives whole in its start event, and is sent back unchanged."""
    block = {"type": "redacted_thinking", "data": "EmwK"}
    response = streamed(
        CODEC,
        sse(
            start(),
            {"type": "content_block_start", "index": 0, "content_block": block},
            {"type": "content_block_stop", "index": 0},
            *text_block("Hi", index=1),
            *finish("end_turn"),
        ),
    )
    assert response.reasoning == ""
    assert body_of(messages=[Message.user("x"), Message.assistant(response)])["messages"][1]["content"] == [
        block,
        {"type": "text", "text": "Hi"},
    ]


@pytest.mark.parametrize("before", [0, 1, 3])
def test_error_event(before: int) -> None:
    """An error event is raised, in the middle of a stream or as its only event; earlier output is kept."""
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}, "request_id": "req_9"}
    partial, raised = interrupted(CODEC, sse(*[start(), *text_block("one ", "two")][:before], error))
    assert isinstance(raised, Overloaded)
    assert (raised.code, raised.retryable, raised.request_id) == ("overloaded_error", True, "req_9")
    assert partial.text == ("one " if before == 3 else "")


def test_the_law_of_whole_answers() -> None:
    """Streams cut anywhere give the same response, and streams that end anywhere too early give an error."""
    check_codec(CODEC, [load("27-").body, load("28-").body])


# Errors


@pytest.mark.parametrize(
    ("status", "kind", "message", "error", "retryable"),
    [
        (400, "invalid_request_error", "max_tokens: required", BadRequest, False),
        (400, "invalid_request_error", "prompt is too long: 210 tokens > 200 maximum", ContextLengthExceeded, False),
        (400, "invalid_request_error", "Your credit balance is too low to access the API.", QuotaExceeded, False),
        (401, "authentication_error", "invalid x-api-key", AuthenticationError, False),
        (402, "billing_error", "no", QuotaExceeded, False),
        (404, "not_found_error", "model: claude-0", NotFound, False),
        (413, "request_too_large", "Request exceeds the maximum size", BadRequest, False),
        (429, "rate_limit_error", "slow down", RateLimitError, True),
        (500, "api_error", "Internal server error", ServerError, True),
        (504, "timeout_error", "took too long", RequestTimeout, True),
        (529, "overloaded_error", "Overloaded", Overloaded, True),
    ],
)
def test_errors(status: int, kind: str, message: str, error: type[ProviderError], retryable: bool) -> None:
    """Each error type of the service becomes its error class."""
    body = json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()
    raised = CODEC.decode_error(status, {"retry-after": "7", "request-id": "req_1"}, body)
    assert type(raised) is error
    assert (raised.status, raised.code, raised.retryable, raised.retry_after) == (status, kind, retryable, 7.0)
    assert raised.request_id == "req_1"
    assert message.rstrip(".") in str(raised)


def test_error_of_llama_cpp() -> None:
    """llama.cpp sends its own shape of errors on this path too."""
    body = b'{"error":{"code":400,"message":"request (900 tokens) is too big","type":"exceed_context_size_error"}}'
    assert type(CODEC.decode_error(400, {}, body)) is ContextLengthExceeded


@pytest.mark.parametrize("body", [b"", b"Bad Gateway", b"<html><title>502</title></html>", b"[1]", b"null"])
def test_errors_in_no_known_shape(body: bytes) -> None:
    """The status decides the class, whatever body a proxy sends."""
    assert type(CODEC.decode_error(502, {}, body)) is ServerError


# The official client reads the same bytes


@pytest.mark.parametrize("name", ["27-", "28-"])
def test_the_official_client_agrees(name: str) -> None:
    """The `anthropic` package reads the same text, tool calls, reasoning and usage."""
    anthropic = pytest.importorskip("anthropic")
    body = load(name).body
    prompt = [{"role": "user", "content": "Hi"}]
    with (
        serving(body, "text/event-stream") as address,
        anthropic.Anthropic(api_key="k", base_url=address, max_retries=0) as client,
        client.messages.stream(max_tokens=10, model="m", messages=prompt) as stream,
    ):
        theirs = stream.get_final_message()
    ours = streamed(CODEC, body)
    assert ours.text == "".join(block.text for block in theirs.content if block.type == "text")
    assert ours.reasoning == "".join(block.thinking for block in theirs.content if block.type == "thinking")
    assert [(call.id, call.name, call.arguments) for call in ours.tool_calls] == [
        (block.id, block.name, block.input) for block in theirs.content if block.type == "tool_use"
    ]
    assert ours.raw_finish_reason == theirs.stop_reason
    assert ours.usage is not None
    assert (ours.usage.input_tokens, ours.usage.output_tokens) == (
        theirs.usage.input_tokens,
        theirs.usage.output_tokens,
    )


def test_the_official_client_agrees_about_whole_answers() -> None:
    """The `anthropic` package reads the same whole response."""
    anthropic = pytest.importorskip("anthropic")
    with (
        serving(json.dumps(WHOLE).encode(), "application/json") as address,
        anthropic.Anthropic(api_key="k", base_url=address, max_retries=0) as client,
    ):
        theirs = client.messages.create(max_tokens=10, model="m", messages=[{"role": "user", "content": "Hi"}])
    ours = CODEC.decode(json.dumps(WHOLE).encode())
    assert ours.text == "".join(block.text for block in theirs.content if block.type == "text")
    assert ours.tool_calls[0].arguments == theirs.content[-1].input
    assert (ours.id, ours.model) == (theirs.id, theirs.model)


# What goes back is what came: the blocks of an answer, in their order.

SIGNED = {"type": "thinking", "thinking": "First the port.", "signature": "S1"}
REDACTED = {"type": "redacted_thinking", "data": "R1"}
CITED = {"type": "text", "text": "High at noon.", "citations": [{"type": "char_location", "cited_text": "noon"}]}
CALLED = {"type": "tool_use", "id": "u1", "name": "tide", "input": {"port": "Ostend"}}
BY_CODE = {"type": "tool_use", "id": "u2", "name": "tide", "input": {}, "caller": {"type": "code_execution"}}
SEARCH = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "tides"}}
FOUND = {
    "type": "web_search_tool_result",
    "tool_use_id": "s1",
    "content": [{"type": "web_search_result", "url": "https://x.test", "encrypted_content": "ENC"}],
}
COMPACTED = {"type": "compaction", "content": "They asked for tides."}
BLOCKS = [SIGNED, REDACTED, CITED, CALLED, BY_CODE, SEARCH, FOUND, COMPACTED, {"type": "text", "text": "So."}]


def whole_of(blocks: list[dict[str, Any]]) -> bytes:
    return json.dumps({"type": "message", "content": blocks, "stop_reason": "end_turn"}).encode()


def stream_of(blocks: list[dict[str, Any]]) -> bytes:
    """Return the events of an answer, with the fields that the service streams in two deltas each."""
    events: list[dict[str, Any]] = [{"type": "message_start", "message": {"id": "m"}}]
    for index, block in enumerate(blocks):
        fields, deltas = dict(block), []
        for name, kind in (("text", "text_delta"), ("thinking", "thinking_delta"), ("content", "compaction_delta")):
            if isinstance(text := fields.get(name), str):
                fields[name] = ""
                deltas += [{"type": kind, name: piece} for piece in (text[:3], text[3:])]
        if "signature" in fields:
            deltas.append({"type": "signature_delta", "signature": fields["signature"]})
            fields["signature"] = ""
        if "input" in fields:
            text = json.dumps(fields["input"])
            deltas += [{"type": "input_json_delta", "partial_json": piece} for piece in ("", text[:4], text[4:])]
            fields["input"] = {}
        for citation in fields.pop("citations", []):
            deltas.append({"type": "citations_delta", "citation": citation})
        events.append({"type": "content_block_start", "index": index, "content_block": fields})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    events += [{"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, {"type": "message_stop"}]
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def sent_back(response: Response) -> list[dict[str, Any]]:
    """Return the blocks that the next request has for an answer, and check that storing it changes nothing."""
    stored = Message.from_dict(json.loads(json.dumps(response.message.to_dict())))
    bodies = [
        body_of(messages=[Message.user("x"), message, Message.user("y")]) for message in (response.message, stored)
    ]
    assert bodies[0] == bodies[1]
    turns = bodies[0]["messages"]
    return turns[1]["content"] if len(turns) == 3 else []


some_blocks = st.lists(st.sampled_from(BLOCKS), max_size=6).map(
    lambda blocks: [block | ({"id": f"{block['id']}_{n}"} if "id" in block else {}) for n, block in enumerate(blocks)]
)


@given(some_blocks)
def test_blocks_go_back_in_any_order(blocks: list[dict[str, Any]]) -> None:
    """A whole answer goes back block for block."""
    assert sent_back(CODEC.decode(whole_of(blocks))) == blocks


@given(some_blocks)
def test_streamed_blocks_go_back_in_any_order(blocks: list[dict[str, Any]]) -> None:
    """A streamed answer has the same parts as the whole one, and goes back block for block."""
    response = streamed(CODEC, stream_of(blocks))
    whole = CODEC.decode(whole_of(blocks))
    assert response.parts == whole.parts
    assert response.details == whole.details
    assert sent_back(response) == blocks


def test_interleaved_blocks_wherever_the_reads_are_cut() -> None:
    """Cuts change nothing."""
    assert sent_back(recut(CODEC, stream_of(BLOCKS[:5]))) == BLOCKS[:5]


def test_opaque_blocks_go_to_no_other_dialect() -> None:
    """Blocks and fields that came from another dialect stay behind."""
    answer = Message.assistant(
        [
            Opaque("gemini", {"executableCode": {}}),
            Text("Hi", raw={"thoughtSignature": "S"}),
            ToolCall("c", "f", raw={"type": "custom"}),
        ]
    )
    sent = body_of(messages=[Message.user("x"), answer, Message.tool("1", "c")])["messages"][1]["content"]
    assert sent == [{"type": "text", "text": "Hi"}, {"type": "tool_use", "id": "c", "name": "f", "input": {}}]


def test_an_unfinished_input_of_a_server_tool() -> None:
    """Text that is no JSON goes back under a name that says so."""
    events = [
        {"type": "content_block_start", "index": 0, "content_block": SEARCH | {"input": {}}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '{"qu'}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}},
        {"type": "message_stop"},
    ]
    response = streamed(CODEC, b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))
    assert sent_back(response) == [SEARCH | {"input": {"INVALID_JSON": '{"qu'}}]


def test_white_space_is_no_block() -> None:
    """The service refuses texts of only white space, in a turn and in a tool's result."""
    call = ToolCall("c1", "tide")
    body = body_of(
        messages=[
            Message.user("When?"),
            Message.assistant(["\n\n", call]),
            Message.tool(" \n", call),
            Message.assistant("\n"),
            Message.system(" "),
            Message.user([" ", "Well?"]),
        ]
    )
    assert "system" not in body
    assert [turn["content"] for turn in body["messages"][1:]] == [
        [{"type": "tool_use", "id": "c1", "name": "tide", "input": {}}],
        [{"type": "tool_result", "tool_use_id": "c1", "content": []}, {"type": "text", "text": "Well?"}],
    ]


def test_a_last_message_of_white_space() -> None:
    """Left out, it would make the service go on with the answer before it."""
    with pytest.raises(BadRequest, match="expected the last message to say something"):
        body_of(messages=[Message.user("Hi"), Message.assistant("Hello"), Message.user(" \n")])


def test_media_of_another_service() -> None:
    """A model's image goes back to no service that has no place for it."""
    picture = Image(data=b"png", media_type="image/png", raw={"thoughtSignature": "s"})
    with pytest.raises(BadRequest, match="got an Image in an assistant's message; leave it out"):
        body_of(messages=[Message.user("Hi"), Message.assistant(["See:", picture]), Message.user("And?")])


def test_a_tool_that_failed() -> None:
    """`is_error` goes out with the content, which the service then requires."""
    call = ToolCall("c1", "tide")
    for content, sent in (("no such port", "no such port"), ("", "error")):
        messages = [Message.user("x"), Message.assistant([call]), Message.tool(content, call, is_error=True)]
        assert body_of(messages=messages)["messages"][2]["content"] == [
            {
                "type": "tool_result",
                "tool_use_id": "c1",
                "content": [{"type": "text", "text": sent}],
                "is_error": True,
            }
        ]


def test_documents() -> None:
    """Documents go out as bytes, as plain text or by their address, with their name."""
    documents = [
        Document(data=b"%PDF", media_type="application/pdf", name="Tides"),
        Document(data=b"High at noon.", media_type="text/markdown; charset=utf-8"),
        Document(url="https://x.test/a.pdf"),
    ]
    assert body_of(messages=[Message.user(documents)])["messages"][0]["content"] == [
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="},
            "title": "Tides",
        },
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "High at noon."}},
        {"type": "document", "source": {"type": "url", "url": "https://x.test/a.pdf"}},
    ]


def test_other_documents_are_refused() -> None:
    """The service reads PDF and text."""
    document = Document(data=b"PK", media_type="application/vnd.ms-excel")
    with pytest.raises(BadRequest, match="expected a PDF or text for Anthropic, got"):
        body_of(messages=[Message.user([document])])


def test_audio_is_refused() -> None:
    """The service takes no audio."""
    audio = Audio(data=b"RIFF", media_type="audio/wav")
    with pytest.raises(BadRequest, match="expected text, images and documents for Anthropic, got an Audio"):
        body_of(messages=[Message.user([audio])])


def test_details() -> None:
    """Citations, the container of code and the stop sequence are on the response, whole and streamed."""
    blocks = [CITED, {"type": "text", "text": "So."}, CITED]
    whole = json.loads(whole_of(blocks)) | {"container": {"id": "c"}, "stop_sequence": "X"}
    events = stream_of(blocks).replace(
        b'"delta": {"stop_reason": "end_turn"}',
        b'"delta": {"stop_reason": "end_turn", "container": {"id": "c"}, "stop_sequence": "X"}',
    )
    wanted = {"citations": CITED["citations"] * 2, "container": {"id": "c"}, "stop_sequence": "X"}
    assert CODEC.decode(json.dumps(whole).encode()).details == wanted
    assert streamed(CODEC, events).details == wanted
