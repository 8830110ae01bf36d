"""Ollama's own dialects: requests, whole responses, streams, errors, and the official client as a second reader."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.dialects import PARAMETERS, PNG, WEATHER, interrupted, recut, serving, streamed
from support.ollama import last, line, ndjson
from support.recordings import load

from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    NotFound,
    Overloaded,
    ProviderError,
    RateLimitError,
    ServerError,
    StreamProtocolError,
)
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.testing import check_codec
from fluxibly.testing.codec_check import chunks_of
from fluxibly.types import Image, Message, Reasoning, Request, Tool, ToolCall, Usage

CHAT = OllamaCodec()
GENERATE = OllamaCodec(endpoint="generate")


def body_of(codec: OllamaCodec = CHAT, stream: bool = False, **fields: Any) -> dict[str, Any]:
    fields = {"model": "qwen3", "messages": "Hi", **fields}
    return json.loads(codec.encode(Request(**fields), stream=stream).body)


CALLS = [
    {"function": {"name": "weather", "arguments": {"city": "Zürich"}}},
    {"id": "call_x1", "function": {"index": 1, "name": "now", "arguments": {}}},
]


# Requests


def test_plain_request() -> None:
    """A plain request has nothing that was not requested, except `stream`, because the service streams by default."""
    encoded = CHAT.encode(Request(model="qwen3", messages="Hi"), stream=False)
    assert encoded.path == "/api/chat"
    assert json.loads(encoded.body) == {
        "model": "qwen3",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": False,
    }


def test_parameters() -> None:
    """Each parameter is sent under the dialect's name."""
    body = body_of(
        stream=True,
        messages=[Message.system("Be brief."), Message.user(["What?", PNG])],
        **PARAMETERS,
        n=1,
        stop="END",
        tools=[WEATHER],
        tool_choice="auto",
        response_format={"type": "object"},
        reasoning_effort="low",
    )
    assert body == {
        "model": "qwen3",
        "stream": True,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What?", "images": ["iVBORw=="]},
        ],
        "options": {
            "temperature": 0.5,
            "num_predict": 7,
            "top_p": 0.9,
            "top_k": 40,
            "frequency_penalty": 0.1,
            "presence_penalty": 0.2,
            "seed": 3,
            "stop": ["END"],
        },
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "The weather in a city.",
                    "parameters": dict(WEATHER.parameters),
                },
            }
        ],
        "format": {"type": "object"},
        "think": "low",
    }


def test_other_words() -> None:
    """JSON without a schema, thinking off and tools off have their own encodings."""
    body = body_of(response_format="json", reasoning_effort="none", tools=[WEATHER], tool_choice="none")
    assert (body["format"], body["think"], "tools" in body) == ("json", False, False)
    assert "format" not in body_of(response_format="text")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("n", {"n": 2}),
        ("tool_choice", {"tool_choice": "required", "tools": [WEATHER]}),
        ("tool_choice", {"tool_choice": "weather", "tools": [WEATHER]}),
        ("reasoning_effort", {"reasoning_effort": "enormous"}),
        ("strict", {"tools": [Tool("now", strict=True)]}),
        ("data=", {"messages": [Message.user(Image(url="https://x.test/a.png"))]}),
        ("name=", {"messages": [Message.user("Hi"), Message.tool("noon", "call_9")]}),
    ],
)
def test_refused_parameters(name: str, fields: dict[str, Any]) -> None:
    """An unsupported parameter raises an error that names it, rather than being dropped."""
    with pytest.raises(BadRequest, match=name) as caught:
        body_of(**fields)
    assert not caught.value.retryable


def test_extra_wins() -> None:
    """`extra` is merged into the options, and replaces everything else."""
    body = body_of(temperature=0.5, extra={"options": {"num_ctx": 8192}, "keep_alive": "5m", "stream": True})
    assert body["options"] == {"temperature": 0.5, "num_ctx": 8192}
    assert (body["keep_alive"], body["stream"]) == ("5m", True)


def test_generate() -> None:
    """`/api/generate` takes a single message with its system text, images and options."""
    encoded = GENERATE.encode(
        Request(model="llava", messages=[Message.system("Be brief."), Message.user(["What?", PNG])], max_tokens=5),
        stream=True,
    )
    assert encoded.path == "/api/generate"
    assert json.loads(encoded.body) == {
        "model": "llava",
        "stream": True,
        "system": "Be brief.",
        "prompt": "What?",
        "images": ["iVBORw=="],
        "options": {"num_predict": 5},
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [WEATHER]},
        {"tool_choice": "auto"},
        {"messages": [Message.user("a"), Message.assistant("b"), Message.user("c")]},
        {"messages": [Message.system("alone")]},
    ],
)
def test_requests_that_generate_does_not_support(fields: dict[str, Any]) -> None:
    """`/api/generate` rejects conversations and tools; the error names the framework that supports them."""
    with pytest.raises(BadRequest, match="use the framework ollama"):
        body_of(GENERATE, **fields)


def test_tool_conversation() -> None:
    """Calls are sent back with objects as arguments, results with their tools' names, and Ollama's own thinking."""
    response = streamed(CHAT, ndjson(line(thinking="Hm."), line(tool_calls=CALLS), last()))
    messages = [Message.user("Weather?"), Message.assistant(response), Message.tool("sunny", response.tool_calls[0])]
    assert body_of(messages=messages)["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "thinking": "Hm.",
            "tool_calls": [
                {"id": "call_0", "function": {"index": 0, "name": "weather", "arguments": {"city": "Zürich"}}},
                {"id": "call_x1", "function": {"index": 1, "name": "now", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "sunny", "tool_name": "weather", "tool_call_id": "call_0"},
    ]


def test_reasoning_of_other_dialects_stays_behind() -> None:
    """Reasoning of other dialects is not sent."""
    message = Message("assistant", "Hi", reasoning=[Reasoning(text="a", raw={"type": "thinking", "thinking": "a"})])
    assert body_of(messages=[Message.user("x"), message])["messages"][1] == {"role": "assistant", "content": "Hi"}


# Whole responses


def test_whole_answer() -> None:
    """A whole response has text, thinking, calls (with generated ids if missing), finish reason, usage and raw body."""
    whole = last(content="Let me look.", thinking="Hm.", tool_calls=CALLS)
    response = CHAT.decode(ndjson(whole))
    assert (response.text, response.reasoning, response.model) == ("Let me look.", "Hm.", "qwen3")
    assert response.tool_calls == (
        ToolCall("call_0", "weather", {"city": "Zürich"}),
        ToolCall("call_x1", "now", {}),
    )
    assert (response.finish_reason, response.raw_finish_reason) == ("tool_call", "stop")
    assert response.usage == Usage(input_tokens=26, output_tokens=7)
    assert response.raw == whole
    assert streamed(CHAT, ndjson(whole)) == response


def test_whole_answer_of_generate() -> None:
    """The text of `/api/generate` is in `response`."""
    whole = {"model": "m", "response": "Hi", "thinking": "Hm.", "done": True, "done_reason": "length", "context": [1]}
    response = GENERATE.decode(json.dumps(whole).encode())
    assert (response.text, response.reasoning, response.finish_reason, response.usage) == ("Hi", "Hm.", "length", None)


@pytest.mark.parametrize(("raw", "reason"), [("stop", "stop"), ("length", "length"), ("load", "load"), (None, "stop")])
def test_finish_reasons(raw: str | None, reason: str) -> None:
    """Known finish reasons are normalized and others are passed on; old versions omit the reason."""
    response = streamed(CHAT, ndjson(line("a"), last(raw)))
    assert (response.finish_reason, response.raw_finish_reason) == (reason, raw)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"<html>busy</html>", b"{}", b"[]", b"null", b'{"message": null}', b'{"mess'),
        *(b'{"message": [], "done": true}', b'{"message": 3, "response": null}', b'{"response": {"a": 1}}'),
    ],
)
def test_not_an_answer(body: bytes) -> None:
    """A body with neither message nor response never passes as an empty response."""
    with pytest.raises(StreamProtocolError):
        CHAT.decode(body)


def test_unfinished_whole_answer() -> None:
    """A single line of a stream does not pass as a whole response."""
    with pytest.raises(StreamProtocolError, match="done"):
        CHAT.decode(ndjson(line("a")))


# Streams


def test_stream() -> None:
    """A stream decodes the same wherever reads are cut, with CRLF and blank lines, and without the last line end."""
    lines = [
        line("Hé"),
        line("llo "),
        line("", thinking="Hm."),
        line("", tool_calls=CALLS[:1]),
        line("", tool_calls=CALLS[1:]),
        last(),
    ]
    body = ndjson(*lines)
    response = streamed(CHAT, body)
    assert (response.text, response.reasoning, response.finish_reason) == ("Héllo ", "Hm.", "tool_call")
    assert [(call.id, call.name) for call in response.tool_calls] == [("call_0", "weather"), ("call_x1", "now")]
    assert response.usage == Usage(input_tokens=26, output_tokens=7)
    assert recut(CHAT, body) == response
    assert streamed(CHAT, body.replace(b"\n", b"\r\n\r\n")[:-4]) == response


def test_stream_of_generate() -> None:
    """A stream of `/api/generate` has its text in `response`."""
    lines = [{"model": "m", "response": text, "done": False} for text in ("a", "b")]
    body = ndjson(*lines, {"model": "m", "response": "", "done": True, "done_reason": "stop", "eval_count": 2})
    response = streamed(GENERATE, body)
    assert (response.text, response.finish_reason, response.usage) == ("ab", "stop", Usage(output_tokens=2))


def test_chunks_are_pieces_of_the_answer() -> None:
    """Lines without text do not make chunks, except for the last line."""
    chunks = list(chunks_of(CHAT, [ndjson(line(""), line("a"), line(""), last())]))
    assert [(chunk.text, chunk.model, chunk.finish_reason) for chunk in chunks] == [
        ("a", "qwen3", None),
        ("", None, "stop"),
    ]


def test_truncated_stream() -> None:
    """A stream without `done` was cut off, between lines or inside a line."""
    body = ndjson(line("one "), line("two"), last())
    for end in (0, len(ndjson(line("one "))), len(body) - 40):
        partial, error = interrupted(CHAT, body[:end])
        assert isinstance(error, StreamProtocolError)
        assert "one two".startswith(partial.text)


def test_a_stream_that_says_nothing_keeps_the_model() -> None:
    """The partial answer names the model, also if the stream was cut off before its first word."""
    partial, error = interrupted(CHAT, ndjson(line("")))
    assert (partial.text, partial.model, type(error)) == ("", "qwen3", StreamProtocolError)


@pytest.mark.parametrize("before", [[], [line("one")]])
@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        ({"error": "slow", "done": True}, ServerError, "slow"),
        ({**last(content="x"), "error": "slow"}, ServerError, "slow"),
        ({"error": {"message": "slow down", "code": 429}}, RateLimitError, "slow down"),
        ({"detail": "slow"}, ServerError, "slow"),
        ({"errors": [{"message": "slow", "code": 503}], "done": True}, Overloaded, "slow"),
        ({"message": "slow", "done": True}, ServerError, "slow"),
        ({"error": "model 'qwen3' not found"}, NotFound, "ollama pull qwen3"),
    ],
)
def test_errors_in_a_200(
    body: dict[str, Any], kind: type[ProviderError], says: str, before: list[dict[str, Any]]
) -> None:
    """What a gateway says instead of a message is its error, whole and in a stream, and never an empty answer."""
    with pytest.raises(kind, match=says):
        CHAT.decode(ndjson(body))
    partial, error = interrupted(CHAT, ndjson(*before, body))
    assert (partial.text, type(error)) == ("one" if before else "", kind)
    assert says in str(error)


@pytest.mark.parametrize("before", [[], [line("one")]])
def test_error_line(before: list[dict[str, Any]]) -> None:
    """An error is raised, in the middle of a stream or as its first line; earlier output is kept."""
    partial, error = interrupted(CHAT, ndjson(*before, {"error": "an error was encountered while running the model"}))
    assert type(error) is ServerError
    assert error.retryable
    assert "running the model" in str(error)
    assert partial.text == ("one" if before else "")


def test_the_law_of_whole_answers() -> None:
    """Streams cut anywhere give the same response, and streams that end anywhere too early give an error."""
    check_codec(CHAT, [ndjson(line("Hé"), line("llo", thinking="Hm."), line("", tool_calls=CALLS), last())])


# Errors


def test_recorded_missing_model() -> None:
    """The error for a missing model says how to get it."""
    error = CHAT.decode_error(load("39-").status, {}, load("39-").body)
    assert type(error) is NotFound
    assert "ollama pull nonexistent-model:latest" in str(error)
    assert (error.status, error.retryable) == (404, False)


@pytest.mark.parametrize(
    ("status", "said", "kind", "retryable"),
    [
        (400, '"x" does not support tools', BadRequest, False),
        (401, "unauthorized", AuthenticationError, False),
        (404, "page not found", NotFound, False),
        (429, "too many requests", RateLimitError, True),
        (500, "llama runner process has terminated", ServerError, True),
        (500, "model requires more system memory (9.0 GiB) than is available (2.0 GiB)", ServerError, False),
        (503, "server busy, please try again.  maximum pending requests exceeded", Overloaded, True),
    ],
)
def test_errors(status: int, said: str, kind: type[ProviderError], retryable: bool) -> None:
    """The status decides the class, except for failures that a retry cannot fix."""
    error = CHAT.decode_error(status, {}, json.dumps({"error": said}).encode())
    assert (type(error), error.retryable, error.status) == (kind, retryable, status)
    assert " ".join(said.split()) in str(error)


@pytest.mark.parametrize("body", [b"", b"404 page not found", b"<html></html>", b"[1]", b"null"])
def test_errors_in_no_known_shape(body: bytes) -> None:
    """The status decides the class, whatever body a proxy sends."""
    assert type(CHAT.decode_error(404, {}, body)) is NotFound


# The official client reads the same bytes


def test_the_official_client_agrees() -> None:
    """The `ollama` package reads the same text, thinking, tool calls and usage, whole and streamed."""
    ollama = pytest.importorskip("ollama")
    prompt = [{"role": "user", "content": "Hi"}]
    body = ndjson(line("Hé"), line("llo", thinking="Hm."), line("", tool_calls=CALLS), last("length"))
    with serving(body, "application/x-ndjson") as address:
        parts = list(ollama.Client(host=address).chat("m", prompt, stream=True))
    ours = streamed(CHAT, body)
    assert ours.text == "".join(part.message.content or "" for part in parts)
    assert ours.reasoning == "".join(part.message.thinking or "" for part in parts)
    theirs = [call.function for part in parts for call in part.message.tool_calls or ()]
    assert [(call.name, call.arguments) for call in ours.tool_calls] == [(c.name, c.arguments) for c in theirs]
    assert ours.usage == Usage(input_tokens=parts[-1].prompt_eval_count, output_tokens=parts[-1].eval_count)
    assert ours.raw_finish_reason == parts[-1].done_reason

    whole = ndjson(last(content="Hi", tool_calls=CALLS))
    with serving(whole, "application/json") as address:
        answer = ollama.Client(host=address).chat("m", prompt)
    assert CHAT.decode(whole).text == answer.message.content
    assert [call.arguments for call in CHAT.decode(whole).tool_calls] == [
        call.function.arguments for call in answer.message.tool_calls
    ]


def test_the_official_client_agrees_about_generate() -> None:
    """The `ollama` package reads the same response from /api/generate."""
    ollama = pytest.importorskip("ollama")
    body = ndjson(
        {"model": "m", "response": "a", "done": False},
        {"model": "m", "response": "b", "done": True, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": 2},
    )
    with serving(body, "application/x-ndjson") as address:
        parts = list(ollama.Client(host=address).generate("m", "Hi", stream=True))
    ours = streamed(GENERATE, body)
    assert ours.text == "".join(part.response for part in parts)
    assert ours.usage == Usage(input_tokens=parts[-1].prompt_eval_count, output_tokens=parts[-1].eval_count)


@pytest.mark.parametrize("tools", [[], [WEATHER]])
def test_the_official_client_sends_the_same(tools: list[Tool]) -> None:
    """The official client's request model accepts our request, and keeps its values."""
    ollama = pytest.importorskip("ollama")
    body = body_of(messages=[Message.user(["What?", PNG])], temperature=0.5, tools=tools, reasoning_effort="low")
    theirs = ollama._types.ChatRequest(**body).model_dump(exclude_none=True)
    assert theirs["messages"] == body["messages"]
    assert theirs["options"] == body["options"]
    assert [tool["function"]["name"] for tool in theirs.get("tools", [])] == [tool.name for tool in tools]
