"""OpenAI's chat dialect: requests, and the responses of services."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import pytest
from support import dialects
from support.recordings import load

from fluxibly import errors
from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_request import Quirks
from fluxibly.providers.services import SERVICES
from fluxibly.testing.codec_check import Outcome, check_cuts, outcome_of
from fluxibly.types import Image, Message, Reasoning, Request, Response, Text, Tool, ToolCall, Usage

CODEC = OpenAICodec()
sse = partial(dialects.sse, done=True)
CHAT_STREAMS = ("01-", "02-", "04-", "05-", "15-", "16-", "18-", "21-", "25-")


def sent(request: Request, codec: OpenAICodec = CODEC, *, stream: bool = False) -> dict[str, Any]:
    encoded = codec.encode(request, stream=stream)
    assert encoded.path == codec.quirks.path
    body: dict[str, Any] = json.loads(encoded.body)
    return body


def choice(index: int | None = 0, finish: object = None, /, **delta: object) -> dict[str, Any]:
    made: dict[str, Any] = {"delta": delta, "finish_reason": finish}
    return made if index is None else {"index": index, **made}


def chunk(*choices: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": list(choices), **fields}


def streamed(*events: object, done: bool = True) -> Outcome:
    return check_cuts(CODEC, sse(*events, done=done))


STOP = chunk(choice(0, "stop"))


# Requests


def test_a_request_with_everything() -> None:
    """Each parameter has the dialect's name; `extra` takes precedence; `metadata` and `headers` are not in the body."""
    request = Request(
        model="gpt-4o",
        messages=[Message.system("Be brief."), Message.user("Hi")],
        temperature=0.2,
        max_tokens=10,
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        stop=["END"],
        seed=7,
        n=2,
        tools=[Tool("add", "Adds", {"type": "object", "properties": {"a": {"type": "integer"}}}, strict=True)],
        tool_choice="required",
        response_format="json",
        reasoning_effort="low",
        extra={"top_p": 0.5, "logit_bias": {"1": 2}},
        metadata={"user": "me"},
        headers={"x-trace": "1"},
    )
    assert sent(request, stream=True) == {
        "model": "gpt-4o",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "temperature": 0.2,
        "max_tokens": 10,
        "top_p": 0.5,
        "frequency_penalty": 0.1,
        "presence_penalty": -0.1,
        "stop": ["END"],
        "seed": 7,
        "n": 2,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "add",
                    "description": "Adds",
                    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
                    "strict": True,
                },
            }
        ],
        "tool_choice": "required",
        "response_format": {"type": "json_object"},
        "reasoning_effort": "low",
        "logit_bias": {"1": 2},
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_request_with_nothing() -> None:
    """Unset parameters are not sent."""
    assert sent(Request(model="m", messages="Hi")) == {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def test_messages_of_every_kind() -> None:
    """Messages may have parts, images by URL and by bytes, tool calls and their results."""
    call = ToolCall("call_1", "add", {"a": 1})
    messages = [
        Message.user([Text("Look: "), "this"]),
        Message.user(["What is it?", Image(url="https://x/y.png", detail="low")]),
        Message.user(Image(data=b"\x89PNG", media_type="image/png")),
        Message.assistant(tool_calls=[call]),
        Message.tool("3", call),
        Message.assistant("It is 3."),
    ]
    assert sent(Request(model="m", messages=messages))["messages"] == [
        {"role": "user", "content": "Look: this"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
            ],
        },
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "It is 3."},
    ]


def test_names_and_plain_text() -> None:
    """Names are sent except for tools; "text" is a response format too."""
    messages = [Message("user", "Hi", name="ann"), Message.tool("3", "call_1", name="add")]
    body = sent(Request(model="m", messages=messages, response_format="text"))
    assert [message.get("name") for message in body["messages"]] == ["ann", None]
    assert body["response_format"] == {"type": "text"}


def test_a_tool_is_chosen_by_name() -> None:
    """A tool choice other than the dialect's keywords is a tool's name."""
    request = Request(model="m", messages="Hi", tool_choice="add")
    assert sent(request)["tool_choice"] == {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("quirk", "model", "name"),
    [
        ("max_tokens", "gpt-5", "max_tokens"),
        ("max_completion_tokens", "gpt-4o", "max_completion_tokens"),
        ("by model", "gpt-4o", "max_tokens"),
        ("by model", "gpt-5-mini", "max_completion_tokens"),
        ("by model", "o3", "max_completion_tokens"),
        ("by model", "openai/o4-mini", "max_completion_tokens"),
        ("by model", "olmo", "max_tokens"),
    ],
)
def test_the_name_of_max_tokens(quirk: Any, model: str, name: str) -> None:
    """The name depends on the service and the model: OpenAI's reasoning models reject `max_tokens`."""
    body = sent(Request(model=model, messages="Hi", max_tokens=5), OpenAICodec(Quirks(max_tokens=quirk)))
    assert {key: value for key, value in body.items() if "tokens" in key} == {name: 5}


def test_quirks_of_services() -> None:
    """Mistral gets its own parameter names, without the stream options that it rejects."""
    mistral = OpenAICodec(Quirks(**SERVICES["mistral"].quirks))
    body = sent(Request(model="m", messages="Hi", seed=3), mistral, stream=True)
    assert body["random_seed"] == 3
    assert "seed" not in body
    assert "stream_options" not in body
    assert (
        sent(Request(model="m", messages="Hi", top_k=3), OpenAICodec(Quirks(**SERVICES["vllm"].quirks)))["top_k"] == 3
    )


def test_top_k_without_support() -> None:
    """Unsupported `top_k` is rejected before the request is sent, unless the user passes it in `extra`."""
    with pytest.raises(errors.BadRequest, match="top_k") as caught:
        CODEC.encode(Request(model="m", messages="Hi", top_k=3), stream=False)
    assert not caught.value.retryable
    assert sent(Request(model="m", messages="Hi", extra={"top_k": 3}))["top_k"] == 3


def test_calls_of_other_services() -> None:
    """Mistral only accepts ids of nine letters and digits: its own ids stay unchanged, other ids are replaced."""
    mistral = OpenAICodec(Quirks(**SERVICES["mistral"].quirks))
    calls = [ToolCall("D681PevKs", "add"), ToolCall("call_1", "add"), ToolCall("call_2", "add")]
    results = [Message.tool("3", call) for call in calls]
    turns = [Message.user("Hi"), Message.assistant(tool_calls=calls), *results]
    _, answer, *answers = sent(Request(model="m", messages=turns), mistral)["messages"]
    ids = [call["id"] for call in answer["tool_calls"]]
    assert ids[0] == "D681PevKs"
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", each) for each in ids)
    assert len(set(ids)) == 3
    assert [each["tool_call_id"] for each in answers] == ids


@pytest.mark.parametrize(
    ("preset", "parameter", "says"),
    [
        ("groq", {"n": 2}, "Groq does not support n;"),
        ("deepseek", {"n": 2}, "DeepSeek does not support n;"),
        ("deepseek", {"seed": 1}, "DeepSeek does not support seed;"),
        (
            "perplexity",
            {"response_format": "json"},
            "response_format: expected 'text' or a JSON Schema for Perplexity, got 'json'",
        ),
        ("perplexity", {"seed": 1}, "Perplexity does not support seed;"),
    ],
)
def test_parameters_that_a_service_does_not_support(preset: str, parameter: dict[str, Any], says: str) -> None:
    """An unsupported parameter is rejected rather than silently ignored; a supported parameter is sent."""
    codec = OpenAICodec(Quirks(**SERVICES[preset].quirks), SERVICES[preset].title)
    with pytest.raises(errors.BadRequest, match=says) as caught:
        codec.encode(Request(model="m", messages="Hi", **parameter), stream=False)
    assert not caught.value.retryable
    assert sent(Request(model="m", messages="Hi", n=1, response_format="text", extra=parameter), codec)
    other = OpenAICodec(Quirks(**SERVICES["together"].quirks))
    assert next(iter(parameter)) in sent(Request(model="m", messages="Hi", **parameter), other)


def test_what_json_cannot_hold_is_a_bad_request() -> None:
    """An object in `extra` and a lone surrogate in a message are rejected, without quoting the prompt."""
    for request in (
        Request(model="m", messages="Hi", extra={"x": object()}),
        Request(model="m", messages="secret \ud83d"),
    ):
        with pytest.raises(errors.BadRequest) as caught:
            CODEC.encode(request, stream=False)
        assert "secret" not in str(caught.value)


# Recorded exchanges


@pytest.mark.parametrize("name", CHAT_STREAMS)
def test_recorded_streams_are_the_same_however_cut(name: str) -> None:
    """Every recorded chat stream decodes the same, cut at every byte."""
    outcome = check_cuts(CODEC, load(name).body)
    assert outcome.response.has_output or outcome.response.finish_reason


def test_recorded_parallel_tool_calls() -> None:
    """OpenAI sends two calls by index, and usage in a last chunk without choices."""
    response = outcome_of(CODEC, [load("01-").body]).response
    assert [(call.name, call.arguments) for call in response.tool_calls] == [
        ("add", {"a": 2, "b": 3}),
        ("multiply", {"a": 2, "b": 3}),
    ]
    assert response.tool_calls[0].id == "call_8ElDxJj6u7IUDEwQIrwFbveM"
    assert (response.finish_reason, response.raw_finish_reason) == ("tool_call", "tool_calls")
    assert response.usage == Usage(input_tokens=190, output_tokens=379, cached_tokens=0, reasoning_tokens=320)
    assert response.model == "gpt-5-2025-08-07"


def test_recorded_refusal() -> None:
    """A refusal is text with the finish reason content_filter; the service's raw reason is kept."""
    response = outcome_of(CODEC, [load("02-").body]).response
    assert response.text == "I'm sorry, I can't assist with that request."
    assert (response.finish_reason, response.raw_finish_reason) == ("content_filter", "stop")


def test_recorded_text_with_logprobs() -> None:
    """Log probabilities are details beside the text."""
    outcome = outcome_of(CODEC, [load("04-").body])
    assert outcome.error is None
    assert outcome.response.text.startswith("Why did the OpenTelemetry developer")
    assert outcome.response.finish_reason == "stop"


def test_recorded_azure_filter_results() -> None:
    """Azure sends a first chunk without choices, id and model."""
    response = outcome_of(CODEC, [load("05-").body]).response
    assert (response.finish_reason, response.model) == ("length", "gpt-5-nano-2025-08-07")
    assert response.usage is not None
    assert response.usage.reasoning_tokens == 500


def test_recorded_reasoning_details_go_back_as_they_came() -> None:
    """OpenRouter's fragments of a signed block are joined, and the next request has the block."""
    response = outcome_of(CODEC, [load("15-").body]).response
    (part,) = response.reasoning_parts
    assert part.text == response.reasoning
    assert part.signature
    assert part.signature.startswith("EvsCCkgI")
    openrouter = OpenAICodec(Quirks(**SERVICES["openrouter"].quirks))
    message = sent(Request(model="m", messages=[Message.assistant(response)]), openrouter)["messages"][0]
    assert message["reasoning_details"] == [
        {
            "type": "reasoning.text",
            "text": part.text,
            "format": "anthropic-claude-v1",
            "index": 0,
            "signature": part.signature,
        }
    ]


def test_recorded_error_in_the_middle_of_a_stream() -> None:
    """Output before Groq's `event: error` is kept."""
    outcome = outcome_of(CODEC, [load("16-").body])
    assert outcome.error is not None
    assert outcome.error.startswith("BadRequest: OpenAI answered 400 tool_use_failed: Tool call validation failed")
    assert outcome.response.reasoning.startswith("We need to call the tool")


def test_recorded_groq_usage() -> None:
    """Groq sends a whole call in a single chunk, and usage with the finish reason."""
    response = outcome_of(CODEC, [load("18-").body]).response
    assert response.tool_calls[0].arguments["name"] == "Alice Johnson"
    assert response.usage == Usage(input_tokens=168, output_tokens=33)


def test_recorded_content_lists() -> None:
    """Mistral mixes thinking and text in lists of parts with strings in the same stream."""
    response = outcome_of(CODEC, [load("21-").body]).response
    assert response.text == "144"
    assert response.reasoning.startswith("The user is asking")
    assert response.reasoning.endswith("is 144.")


def test_recorded_think_tags() -> None:
    """From vLLM without a reasoning parser: text between the tags is reasoning, and null arguments are empty so far."""
    response = outcome_of(CODEC, [load("25-").body]).response
    assert response.text == ""
    assert response.reasoning.startswith("Okay, the user is asking")
    assert "think>" not in response.reasoning
    assert response.tool_calls[0].arguments == {"timezone": "UTC"}


def test_recorded_body_after_blank_lines() -> None:
    """Padding of a body, which OpenRouter sends while it waits, is ignored."""
    response = CODEC.decode(load("14-").body)
    assert response == Response(
        "Hello! How are you doing today?",
        finish_reason="stop",
        raw_finish_reason="stop",
        usage=Usage(input_tokens=9, output_tokens=11),
        model="anthropic/claude-3.5-haiku",
        id="gen-1763100319-JJEJM7pKTJ7IYvFUSSsY",
    )
    assert response.raw["provider"] == "Anthropic"


# Whole bodies


def test_a_whole_body() -> None:
    """A whole body may have tool calls, reasoning and several choices; `raw` is the body."""
    body = {
        "id": "x",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {
                    "content": None,
                    "reasoning_content": "Hm.",
                    "tool_calls": [
                        {"id": "a", "function": {"name": "f", "arguments": '{"x": 1}'}},
                        {"id": "", "function": {"name": "g", "arguments": {"y": [2]}}},
                        {"id": "c", "function": {"name": "h", "arguments": None}},
                    ],
                },
                "finish_reason": "tool_calls",
            },
            {"index": 1, "message": {"content": "Or so."}, "finish_reason": "stop"},
        ],
    }
    response = CODEC.decode(json.dumps(body).encode())
    assert [(call.id, call.name, call.arguments) for call in response.tool_calls] == [
        ("a", "f", {"x": 1}),
        ("call_1", "g", {"y": [2]}),
        ("c", "h", {}),
    ]
    assert response.reasoning == "Hm."
    assert [str(other) for other in response.alternatives] == ["Or so."]
    assert response.alternatives[0].finish_reason == "stop"
    assert response.raw == body


@pytest.mark.parametrize(
    ("body", "kind", "retryable"),
    [
        ({"error": {"code": 502, "message": "Bad gateway"}}, errors.ServerError, True),
        ({"error": {"message": "quota", "code": "insufficient_quota"}, "choices": None}, errors.QuotaExceeded, False),
        ({"error": "overloaded", "code": "503"}, errors.Overloaded, True),
        ({"detail": "Not Found"}, errors.ServerError, True),
        (
            {"choices": [{"error": {"code": 429, "message": "slow"}, "message": {"content": ""}}]},
            errors.RateLimitError,
            True,
        ),
        ([{"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}}], errors.BadRequest, False),
    ],
)
def test_an_error_in_a_200(body: object, kind: type[Exception], retryable: bool) -> None:
    """An error in a 200 is raised as it would be with its own status."""
    with pytest.raises(errors.ProviderError) as caught:
        CODEC.decode(json.dumps(body).encode())
    assert type(caught.value) is kind
    assert caught.value.retryable is retryable


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>nope</html>", b'{"choices": []}', b"{}", b"[]", b"null", b'"text"', b'{"choices": [null]}',
     b'{"choices": [{}]}', b'{"choices": 3}', b'{"choices": [{"message": {"content": "cut', b"[" * 100_000],
)  # fmt: skip
def test_invalid_bodies_never_pass_as_responses(body: bytes) -> None:
    """Rubbish, empty bodies, and truncated bodies are errors."""
    with pytest.raises(StreamProtocolError):
        CODEC.decode(body)


def test_json_that_the_specification_forbids() -> None:
    """NaN from a Python server, a lone surrogate, a byte-order mark and invalid UTF-8 are accepted."""
    body = b'\xef\xbb\xbf{"choices": [{"message": {"content": "a\\ud83d"}, "logprobs": {"x": NaN, "y": -Infinity}}]}'
    assert CODEC.decode(body).text == "a\N{REPLACEMENT CHARACTER}"
    assert CODEC.decode(b'{"choices": [{"message": {"content": "a\xff"}}]}').text == "a\N{REPLACEMENT CHARACTER}"


# Streams


def test_chunks_are_pieces_of_the_answer() -> None:
    """Metadata waits for the next chunk with output, or for the last chunk, so that the first chunk has text."""
    decoder = CODEC.decoder()
    events = [
        chunk(choice(role="assistant", content=""), id="x", model="m"),
        chunk(choice(content="a"), id="x", model="m"),
        chunk(choice(content="b"), id="x", model="m"),
        chunk(choice(0, "stop"), id="x", model="m"),
        chunk(usage={"prompt_tokens": 1, "completion_tokens": 2}),
        "[DONE]",
    ]
    from fluxibly.providers.dialects.codec import Event

    chunks = [
        list(decoder.decode_event(Event((event if isinstance(event, str) else json.dumps(event)).encode())))
        for event in events
    ]
    assert [len(some) for some in chunks] == [0, 1, 1, 0, 0, 1]
    assert (chunks[1][0].text, chunks[1][0].id, chunks[1][0].model) == ("a", "x", "m")
    assert (chunks[2][0].text, chunks[2][0].id) == ("b", None)
    assert (chunks[5][0].finish_reason, chunks[5][0].usage) == ("stop", Usage(input_tokens=1, output_tokens=2))
    assert decoder.done
    assert list(decoder.end()) == []


def test_the_end_of_a_stream() -> None:
    """A finish reason or [DONE] ends a stream; without either, it was cut off, and earlier output is kept."""
    text = chunk(choice(content="Hi"))
    assert streamed(text, chunk(choice(0, "stop")), done=False) == Outcome(
        Response("Hi", finish_reason="stop", raw_finish_reason="stop")
    )
    assert streamed(text) == Outcome(Response("Hi"))
    cut = streamed(text, chunk(choice(0, "")), done=False)
    assert cut.response == Response("Hi")
    assert cut.error is not None
    assert cut.error.startswith("StreamProtocolError")
    for nothing in (sse(), sse(done=False), sse(chunk(usage={"prompt_tokens": 1})), b": ping\n\n"):
        assert str(check_cuts(CODEC, nothing).error).startswith("StreamProtocolError")
    one_of_two = streamed(chunk(choice(0, "stop"), choice(1, content="b")), done=False)
    assert str(one_of_two.error).startswith("StreamProtocolError")


def test_an_event_that_was_cut_off() -> None:
    """Half an event at the end of the bytes is an error, and earlier output is kept."""
    outcome = outcome_of(CODEC, [sse(chunk(choice(content="Hi")), chunk(choice(0, "stop")))[:-40]])
    assert outcome.response.text == "Hi"
    assert str(outcome.error).startswith("StreamProtocolError")


@pytest.mark.parametrize(
    ("events", "usage"),
    [
        ([STOP, chunk(usage={"prompt_tokens": 1, "completion_tokens": 2})], Usage(input_tokens=1, output_tokens=2)),
        ([chunk(choice(0, "stop"), usage={"prompt_tokens": 1})], Usage(input_tokens=1)),
        ([chunk(choice(0, "stop"), x_groq={"usage": {"completion_tokens": 2}})], Usage(output_tokens=2)),
        ([chunk({**choice(0, "stop"), "usage": {"prompt_tokens": 3}})], Usage(input_tokens=3)),
        (
            [chunk(choice(content="a"), usage={"completion_tokens": n}) for n in (1, 2, 3)] + [STOP],
            Usage(output_tokens=3),
        ),
        ([chunk(choice(0, "stop"), usage={})], None),
        ([chunk(choice(0, "stop"), usage={"prompt_tokens": None, "completion_tokens": "x"})], None),
        (
            [chunk(choice(0, "stop"), usage={"prompt_tokens": 9, "prompt_cache_hit_tokens": 4, "completion_tokens": 1})],
            Usage(input_tokens=9, output_tokens=1, cached_tokens=4),
        ),
        (
            [
                chunk(
                    choice(0, "stop"),
                    usage={
                        "prompt_tokens": 10,
                        "completion_tokens": 5,
                        "total_tokens": 35,
                        "completion_tokens_details": {"reasoning_tokens": 20},
                    },
                )
            ],
            Usage(input_tokens=10, output_tokens=25, reasoning_tokens=20),
        ),
    ],
)  # fmt: skip
def test_usage_anywhere(events: list[object], usage: Usage | None) -> None:
    """Usage may be in any chunk, or in x_groq; xAI counts reasoning separately."""
    assert streamed(*events).response.usage == usage


@pytest.mark.parametrize(
    ("raw", "finish"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("model_length", "length"),
        ("tool_calls", "tool_call"),
        ("function_call", "tool_call"),
        ("content_filter", "content_filter"),
        ("error", "error"),
        ("something_new", "something_new"),
    ],
)
def test_finish_reasons(raw: str, finish: str) -> None:
    """Known finish reasons are normalized, and the raw reason is kept; a reason may repeat, or be empty."""
    response = streamed(chunk(choice(0, "", content="a")), chunk(choice(0, raw)), chunk(choice(0, raw))).response
    assert (response.finish_reason, response.raw_finish_reason) == (finish, raw)


def test_stop_after_tool_calls() -> None:
    """The finish reason after tool calls is tool_call, even if a server sends "stop"."""
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
    response = streamed(chunk(choice(tool_calls=[call])), STOP).response
    assert (response.finish_reason, response.raw_finish_reason) == ("tool_call", "stop")


def _fragment(
    index: object = ..., call_id: object = ..., name: object = ..., arguments: object = ...
) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not ...}
    fields: dict[str, Any] = {"index": index, "id": call_id, "function": function}
    return {key: value for key, value in fields.items() if value is not ...}


@pytest.mark.parametrize(
    "fragments",
    [
        [[_fragment(0, "a", "f", "")], [_fragment(0, "", ..., '{"x"')], [_fragment(0, None, None, ": 1}")], [_fragment(1, "b", "g", "{}")]],
        [[_fragment(1, "a", "f", None)], [_fragment(1, ..., ..., '{"x": 1}')], [_fragment(2, "b", "g", "")]],
        [[_fragment(-1, "a", "f", '{"x"')], [_fragment(-1, "", "", ": 1}")], [_fragment(-1, "b", "g", "{}")]],
        [[_fragment(..., "a", "f", '{"x": 1}'), _fragment(..., "b", "g", "{}")]],
        [[_fragment(..., "a", "f", '{"x"')], [_fragment(..., "b", "g", "{}")], [_fragment(..., "a", ..., ": 1}")]],
        [[_fragment(0, "a", "f", {"x": 1}), _fragment(1, "b", "g", {})]],
        [[_fragment(0, "a", "f", '{"x": 1}')], [_fragment(0, "b", "g", "{}")]],
        [[_fragment(0, "a", "f", '{"x"'), _fragment(1, "b", "g")], [_fragment(0, ..., ..., ": 1}"), _fragment(1, ..., ..., "{}")]],
    ],
)  # fmt: skip
def test_fragments_of_tool_calls(fragments: list[list[dict[str, Any]]]) -> None:
    """Fragments are joined by index, else by id, else by order; without deltas, arguments are empty."""
    events = [chunk(choice(content=None, tool_calls=some)) for some in fragments]
    response = streamed(*events, chunk(choice(0, "tool_calls"))).response
    assert [(call.id, call.name, call.arguments) for call in response.tool_calls] == [
        ("a", "f", {"x": 1}),
        ("b", "g", {}),
    ]
    assert all(call.error is None for call in response.tool_calls)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_by_either_name(name: str) -> None:
    """Reasoning is read by either name, and once if a service sends both."""
    response = streamed(
        chunk(choice(**{name: "Let me "})), chunk(choice(reasoning="see.", reasoning_content="see.")), STOP
    ).response
    assert response.reasoning == "Let me see."
    assert [part.text for part in response.reasoning_parts] == ["Let me see."]


def test_reasoning_content_goes_back_with_tool_calls() -> None:
    """DeepSeek gets its reasoning back in a conversation with tools; other services never get it."""
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
    response = streamed(chunk(choice(reasoning_content="Hm.", tool_calls=[call])), STOP).response
    assert response.reasoning_parts == (Reasoning(text="Hm.", raw={"reasoning_content": "Hm."}),)
    request = Request(model="m", messages=[Message.assistant(response)])
    assert (
        sent(request, OpenAICodec(Quirks(**SERVICES["deepseek"].quirks)))["messages"][0]["reasoning_content"] == "Hm."
    )
    assert "reasoning_content" not in sent(request)["messages"][0]


def test_content_of_any_kind() -> None:
    """Content may be strings, null, lists of parts, and unknown parts, in the same stream."""
    response = streamed(
        chunk(choice(content="a")),
        chunk(choice(content=None)),
        chunk(choice(content=[{"type": "text", "text": "b"}, {"type": "reference", "reference_ids": [1]}])),
        chunk(choice(content=[{"type": "thinking", "thinking": "Hm"}, "c"])),
        chunk(choice(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "m"}]}])),
        STOP,
    ).response
    assert (response.text, response.reasoning) == ("abc", "Hmm")


def test_messages_in_a_stream() -> None:
    """A message that Perplexity repeats with each delta is ignored; without deltas, the message counts."""
    events = [
        chunk({**choice(content=word), "message": {"content": so_far}}) for word, so_far in (("a", "a"), ("b", "ab"))
    ]
    last = chunk({"index": 0, "message": {"content": "ab"}, "finish_reason": "stop"})
    assert streamed(*events, last, done=False).response.text == "ab"
    assert streamed(last, done=False).response.text == "ab"


def test_choices_interleave() -> None:
    """Choices are sorted by index, or else by position. The first is the response, the others are alternatives."""
    response = streamed(
        chunk(choice(1, content="B")),
        chunk(choice(0, content="A")),
        chunk(choice(0, content="a"), choice(1, content="b"), choice(2, content="C")),
        chunk(choice(None, content="!"), choice(None, content="?")),
        chunk(choice(1, "length")),
        chunk(choice(0, "stop")),
        chunk(choice(2, "stop")),
        done=False,
    ).response
    assert (response.text, response.finish_reason) == ("Aa!", "stop")
    assert [(other.text, other.finish_reason) for other in response.alternatives] == [("Bb?", "length"), ("C", "stop")]


def test_each_choice_has_its_own_reasoning() -> None:
    """Reasoning blocks of different choices do not mix."""
    events = [
        chunk(choice(n, reasoning_details=[{"type": "reasoning.text", "text": text}])) for n, text in enumerate("ab")
    ]
    response = streamed(*events, chunk(choice(0, "stop"), choice(1, "stop"))).response
    assert [part.text for part in response.reasoning_parts] == ["a"]
    assert [part.text for part in response.alternatives[0].reasoning_parts] == ["b"]


def test_the_older_completions_dialect_is_read() -> None:
    """A choice may have its text in `text`, as some servers send it."""
    assert (
        streamed(chunk({"index": 0, "text": "a"}), chunk({"text": "b", "finish_reason": "stop"})).response.text == "ab"
    )


def test_choices_without_anything() -> None:
    """A choice without delta and message, and null instead of a choice, are ignored."""
    assert streamed({"choices": [{"index": 0}]}, {"choices": [None]}, STOP).response.text == ""


@pytest.mark.parametrize(
    ("events", "kind", "text"),
    [
        ([{"error": {"message": "busy", "code": 503}}], "Overloaded", ""),
        ([chunk(choice(content="a")), {"error": "broken"}], "ServerError", "a"),
        ([chunk(choice(content="a")), {**chunk(choice(0, "error", content="b")), "error": {"code": 502}}], "ServerError", "ab"),
        ([chunk(choice(content="a")), {"detail": "Rate limit", "code": "429"}], "RateLimitError", "a"),
        ([chunk(choice(content="a")), {"message": "no", "type": "invalid_request_error"}], "BadRequest", "a"),
        ([chunk(choice(content="a")), chunk({**choice(0, "error"), "error": {"code": 429}})], "RateLimitError", "a"),
        ([chunk(choice(content="a")), {"error": {"code": "insufficient_quota"}}], "QuotaExceeded", "a"),
    ],
)  # fmt: skip
def test_errors_in_a_stream(events: list[object], kind: str, text: str) -> None:
    """Errors are raised early or late, with choices or without; output before and with the error is kept."""
    outcome = streamed(*events)
    assert str(outcome.error).startswith(f"{kind}: OpenAI answered")
    assert outcome.response.text == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("upstream failed", "OpenAI answered with an error: upstream failed."),
        ('{"msg": "what"}', 'OpenAI answered with an error: {"msg": "what"}.'),
        ('{"error": {"message": "what"}}', "OpenAI answered with an error: what."),
    ],
)
def test_an_event_named_error(data: str, message: str) -> None:
    """An event named `error` is an error, whatever its data."""
    outcome = check_cuts(
        CODEC, sse(chunk(choice(content="a")), done=False) + f"event: error\ndata: {data}\n\n".encode()
    )
    assert outcome.response.text == "a"
    assert str(outcome.error).startswith(f"ServerError: {message}")


def test_bare_json_in_a_stream() -> None:
    """Bare JSON is an error, after events or instead of them."""
    error = b'{\n  "error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "slow down"}\n}\n'
    assert str(check_cuts(CODEC, error).error).startswith("RateLimitError: OpenAI answered 429 RESOURCE_EXHAUSTED")
    late = check_cuts(CODEC, sse(chunk(choice(content="a")), done=False) + error)
    assert late.response.text == "a"
    assert str(late.error).startswith("RateLimitError")


def test_unknown_events_are_passed_over() -> None:
    """Objects without choices, and events after the end, are ignored."""
    body = sse({"object": "ping"}, {"choices": None}, chunk(choice(content="a")), STOP) + sse(
        chunk(choice(content="b"))
    )
    assert check_cuts(CODEC, body).response.text == "a"
