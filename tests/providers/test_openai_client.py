"""The official `openai` client reads the same bytes as fluxibly, with the same result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.dialects import PNG, WEATHER, serving, sse, streamed
from support.recordings import load

from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_responses import ResponsesCodec
from fluxibly.testing.codec_check import outcome_of
from fluxibly.types import Message, Request, ToolCall, Usage

openai = pytest.importorskip("openai")
CHAT = OpenAICodec()
RESPONSES = ResponsesCodec()
HELLO: list[Any] = [{"role": "user", "content": "Hi"}]


@contextmanager
def client_of(body: bytes, content_type: str = "text/event-stream") -> Iterator[Any]:
    """Yield the official client, connected to a server that answers with these bytes."""
    with (
        serving(body, content_type) as address,
        openai.OpenAI(api_key="k", base_url=address, max_retries=0) as client,
    ):
        yield client


def counted(usage: Any) -> tuple[int | None, ...]:
    """Return the official client's counts: tokens in and out, from the cache and for reasoning."""
    if usage is None:
        return (None,) * 4
    given, made = usage.prompt_tokens_details, usage.completion_tokens_details
    cached, reasoning = given and given.cached_tokens, made and made.reasoning_tokens
    return usage.prompt_tokens, usage.completion_tokens, cached, reasoning


def ours_counted(usage: Usage | None) -> tuple[int | None, ...]:
    """Return the same counts of fluxibly's usage."""
    usage = usage or Usage()
    return usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens


@pytest.mark.parametrize("name", ["01-", "02-", "04-", "05-", "15-", "18-", "25-"])
def test_streams(name: str) -> None:
    """Recorded streams with text content have the same text, tool calls, finish reason, ids and usage."""
    body = load(name).body
    with client_of(body) as client, client.chat.completions.create(model="m", messages=HELLO, stream=True) as stream:
        chunks = list(stream)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    calls: dict[int, list[str]] = {}
    for fragment in (fragment for choice in choices for fragment in choice.delta.tool_calls or ()):
        call = calls.setdefault(fragment.index, ["", "", ""])
        found = (fragment.id, fragment.function.name, fragment.function.arguments)
        calls[fragment.index] = [had + (new or "") for had, new in zip(call, found, strict=True)]
    ours = streamed(CHAT, body)
    text = "".join((choice.delta.content or "") + (choice.delta.refusal or "") for choice in choices)
    if name == "25-":  # the client leaves the model's reasoning in its text
        assert text == f"<think>\n{ours.reasoning}</think>\n\n{ours.text}"
    else:
        assert ours.text == text
    assert [[call.id, call.name, call.raw_arguments] for call in ours.tool_calls] == list(calls.values())
    assert ours.raw_finish_reason == [choice.finish_reason for choice in choices if choice.finish_reason][-1]
    assert (ours.id, ours.model) == (chunks[-1].id, chunks[-1].model)
    assert ours_counted(ours.usage) == counted([None, *(chunk.usage for chunk in chunks if chunk.usage)][-1])


def test_a_whole_answer() -> None:
    """A whole body, padded in the recording, has the same text, finish reason, ids and usage."""
    body = load("14-").body
    with client_of(body, "application/json") as client:
        theirs = client.chat.completions.create(model="m", messages=HELLO)
    ours = CHAT.decode(body)
    assert ours.text == theirs.choices[0].message.content
    assert ours.raw_finish_reason == theirs.choices[0].finish_reason
    assert (ours.id, ours.model) == (theirs.id, theirs.model)
    assert ours_counted(ours.usage) == counted(theirs.usage)


def test_an_error_in_a_stream() -> None:
    """Both clients raise an error with the same message after the same text."""
    body = load("16-").body
    texts: list[str] = []
    with (
        client_of(body) as client,
        client.chat.completions.create(model="m", messages=HELLO, stream=True) as stream,
        pytest.raises(openai.APIError) as theirs,
    ):
        texts += [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    outcome = outcome_of(CHAT, [body])
    assert outcome.response.text == "".join(texts)
    assert theirs.value.message in str(outcome.failure)


RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "status": "completed",
    "model": "gpt-5",
    "output": [
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Hé", "annotations": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "now", "arguments": '{"at": 1}'},
    ],
    "usage": {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 1},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": 12,
    },
}


@pytest.mark.parametrize("stream", [False, True])
def test_responses(stream: bool) -> None:
    """Responses of the Responses API are the same, whole and streamed."""
    whole = json.dumps(RESPONSE).encode()
    done = sse(
        {"type": "response.output_text.delta", "item_id": "msg_1", "output_index": 1, "content_index": 0,
         "delta": "Hé", "logprobs": [], "sequence_number": 0},
        *({"type": "response.output_item.done", "output_index": n, "item": item, "sequence_number": n + 1}
          for n, item in enumerate(RESPONSE["output"])),
        {"type": "response.completed", "response": RESPONSE, "sequence_number": 4},
    )  # fmt: skip
    body = done if stream else whole
    with client_of(body, "text/event-stream" if stream else "application/json") as client:
        answered = client.responses.create(model="m", input="Hi", stream=stream)
        events = list(answered) if stream else []
    theirs = events[-1].response if stream else answered
    ours = streamed(RESPONSES, body) if stream else RESPONSES.decode(body)
    (call,) = (item for item in theirs.output if item.type == "function_call")
    assert ours.text == theirs.output_text == "Hé"
    assert ours.tool_calls == (ToolCall(call.call_id, call.name, raw_arguments=call.arguments),)
    assert ours.usage == Usage(
        input_tokens=theirs.usage.input_tokens,
        output_tokens=theirs.usage.output_tokens,
        cached_tokens=theirs.usage.input_tokens_details.cached_tokens,
        reasoning_tokens=theirs.usage.output_tokens_details.reasoning_tokens,
    )
    assert (ours.id, ours.model) == (theirs.id, theirs.model)


@pytest.mark.parametrize("stream", [False, True])
def test_requests(stream: bool) -> None:
    """Our request body is valid by the client's own types."""
    from openai.types.chat.completion_create_params import (
        CompletionCreateParamsNonStreaming as Whole,
        CompletionCreateParamsStreaming as Streaming,
    )
    from pydantic import ConfigDict, TypeAdapter

    call = ToolCall("call_1", "weather", {"city": "Rome"})
    request = Request(
        model="gpt-5",
        messages=[
            Message.system("Be brief."),
            Message.user(["Look", PNG]),
            Message.assistant("", tool_calls=[call]),
            Message.tool("sunny", call),
        ],
        temperature=0.5,
        max_tokens=7,
        stop="END",
        seed=3,
        tools=[WEATHER],
        tool_choice="weather",
        response_format={"type": "object"},
        reasoning_effort="low",
    )
    kind: Any = type("Sent", (Streaming if stream else Whole,), {"__pydantic_config__": ConfigDict(extra="forbid")})
    TypeAdapter(kind).validate_json(CHAT.encode(request, stream=stream).body)
