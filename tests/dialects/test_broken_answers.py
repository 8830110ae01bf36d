"""Answers that are broken in the same way in several dialects: hidden errors, `null` as arguments, wrong numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.anthropic import finish, start, text_block
from support.dialects import interrupted, recut, sse
from support.gemini import answer
from support.ollama import last, ndjson

from fluxibly import errors
from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.codec import Codec
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_responses import ResponsesCodec
from fluxibly.types import Response, ToolCall

CHAT, RESPONSES, ANTHROPIC, GEMINI = OpenAICodec(), ResponsesCodec(), AnthropicCodec(), GeminiCodec()


def delta(finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


def response_event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", **fields}


SAID = {
    "chat": (CHAT, sse(delta(content="Hel"))),
    "responses": (RESPONSES, sse(response_event("output_text.delta", output_index=0, content_index=0, delta="Hel"))),
    "anthropic": (ANTHROPIC, sse(start(), *text_block("Hel")[:-1])),
    "gemini": (GEMINI, sse(answer({"text": "Hel"}))),
}
"""The beginning of a stream that says "Hel", in each dialect that is sent as server-sent events."""
DONE = b"data: [DONE]\n\n"


# Errors that stand where none is expected

OVERFLOW = b'{"code":400,"message":"the request exceeds the available context size","type":"invalid_request_error"}'


@pytest.mark.parametrize("done", [b"", DONE])
@pytest.mark.parametrize("dialect", SAID)
def test_an_error_in_a_field_of_its_own(dialect: str, done: bytes) -> None:
    """`error: {…}` in a stream is the server's error, also if the stream then ends as if it were whole."""
    codec, said = SAID[dialect]
    for before, text in ((b"", ""), (said, "Hel")):
        for field in (b"error: ", b"error:"):
            partial, error = interrupted(codec, before + field + OVERFLOW + b"\n\n" + done)
            assert (partial.text, type(error)) == (text, errors.ContextLengthExceeded)
            assert "available context size" in str(error)


@pytest.mark.parametrize("block", [b"event: error\n\n", b"event: error\ndata:\n\n", b"error:\n\n", b"error: no\n\n"])
@pytest.mark.parametrize("dialect", SAID)
def test_an_error_without_json(dialect: str, block: bytes) -> None:
    """An event named `error` is an error whatever it says, so half an answer before [DONE] does not pass as whole."""
    codec, said = SAID[dialect]
    partial, error = interrupted(codec, said + block + DONE)
    assert (partial.text, type(error)) == ("Hel", errors.ServerError)


def test_gemini_cancels_a_stream() -> None:
    """Gemini's 499 is the service's failure, and may be retried."""
    cancelled = {"error": {"code": 499, "message": "The operation was cancelled.", "status": "CANCELLED"}}
    for before, text in ((b"", ""), (SAID["gemini"][1], "Hel")):
        partial, error = interrupted(GEMINI, before + sse(cancelled))
        assert isinstance(error, errors.ServerError)
        assert (partial.text, error.status, error.code, error.retryable) == (text, 499, "CANCELLED", True)
    assert GEMINI.decode_error(499, {}, json.dumps(cancelled).encode()).retryable


# Answers that a filter stopped


def test_gemini_blocks_a_prompt_with_an_empty_list() -> None:
    """An empty list of candidates with the reason of a block is as good as none, whole, streamed, and after text."""
    blocked = {"candidates": [], "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}
    with pytest.raises(errors.ContentFiltered) as caught:
        GEMINI.decode(json.dumps(blocked).encode())
    assert (caught.value.code, caught.value.retryable) == ("PROHIBITED_CONTENT", False)
    for before, text in ((b"", ""), (SAID["gemini"][1], "Hel")):
        partial, error = interrupted(GEMINI, before + sse(blocked))
        assert (partial.text, type(error)) == (text, errors.ContentFiltered)


@pytest.mark.parametrize("choice", [{}, {"message": None}, {"delta": None}, {"delta": {}}])
def test_azure_filters_an_answer(choice: dict[str, Any]) -> None:
    """A choice without a message whose finish reason is the filter's is an answer, whole and streamed."""
    filtered = {"choices": [{"index": 0, "finish_reason": "content_filter", **choice}]}
    whole = CHAT.decode(json.dumps(filtered).encode())
    for response, text in (
        (whole, ""),
        (recut(CHAT, sse(filtered, done=True)), ""),
        (recut(CHAT, SAID["chat"][1] + sse(filtered, done=True)), "Hel"),
    ):
        assert (response.text, response.finish_reason) == (text, "content_filter")


@pytest.mark.parametrize("text", ["Ten.", "<think>Hm.</think>Ten."])
def test_perplexity_sends_a_message_beside_an_empty_delta(text: str) -> None:
    """The message is the answer, whole and in a stream whose deltas are all empty."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "delta": {"content": ""}}
    body = {"choices": [{**choice, "finish_reason": "stop"}]}
    whole = CHAT.decode(json.dumps(body).encode())
    assert (whole.text, whole.finish_reason) == ("Ten.", "stop")
    deltas = [{**choice, "delta": {"content": piece}} for piece in (text[:9], text[9:])]
    streamed = recut(CHAT, sse(*({"choices": [each]} for each in deltas), body))
    assert (streamed.text, streamed.reasoning) == (whole.text, whole.reasoning)


# Arguments of tool calls


def null_calls() -> list[tuple[Codec, bytes, bytes]]:
    """Return each codec with a call whose arguments are `null` as JSON text, whole and as a stream."""
    function = {"name": "now", "arguments": "null"}
    call = {"index": 0, "id": "c1", "type": "function", "function": function}
    chat = {"choices": [{"index": 0, "message": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]}
    pieces = [{**call, "function": {"name": "now", "arguments": "nu"}}, {"index": 0, "function": {"arguments": "ll"}}]
    old = {"choices": [{"message": {"function_call": function}, "finish_reason": "function_call"}]}
    item = {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "null", "status": "completed"}
    responses = {"status": "completed", "output": [item]}
    block = {"type": "tool_use", "id": "c1", "name": "now", "input": None}
    anthropic = {"type": "message", "content": [block], "stop_reason": "tool_use"}
    ollama = last(tool_calls=[{"id": "c1", "function": function}])
    return [
        (CHAT, json.dumps(chat).encode(), sse(*(delta(tool_calls=[piece]) for piece in pieces), delta("tool_calls"))),
        (CHAT, json.dumps(old).encode(), sse(delta(function_call=function), delta("function_call"))),
        (
            RESPONSES,
            json.dumps(responses).encode(),
            sse(
                response_event("output_item.added", output_index=0, item={**item, "arguments": ""}),
                response_event("function_call_arguments.delta", output_index=0, delta="null"),
                response_event("output_item.done", output_index=0, item=item),
                response_event("completed", response=responses),
            ),
        ),
        (
            ANTHROPIC,
            json.dumps(anthropic).encode(),
            sse(
                start(),
                {"type": "content_block_start", "index": 0, "content_block": block},
                input_delta(0, "null"),
                *finish("tool_use"),
            ),
        ),
        (
            GEMINI,
            json.dumps(answer({"functionCall": {"id": "c1", "name": "now", "args": None}}, reason="STOP")).encode(),
            sse(answer({"functionCall": {"id": "c1", "name": "now", "args": None}}, reason="STOP")),
        ),
        (OllamaCodec(), json.dumps(ollama).encode(), ndjson(ollama)),
    ]


def input_delta(index: int, text: str) -> dict[str, Any]:
    fragment = {"type": "input_json_delta", "partial_json": text}
    return {"type": "content_block_delta", "index": index, "delta": fragment}


@pytest.mark.parametrize(("codec", "whole", "stream"), null_calls())
def test_null_is_no_arguments(codec: Codec, whole: bytes, stream: bytes) -> None:
    """A call whose arguments are `null` has none, and no error."""
    for response in (codec.decode(whole), recut(codec, stream)):
        (call,) = response.tool_calls
        assert (call.name, call.arguments, call.error) == ("now", {}, None)


@pytest.mark.parametrize(
    ("text", "kind"), [("[]", "got a list"), ("3", "got an int"), ('"null"', "got a str"), ("nul", "not JSON")]
)
def test_other_values_are_no_arguments(text: str, kind: str) -> None:
    """Only `null` stands for no arguments; what else is no object is an error."""
    call = ToolCall("c1", "now", raw_arguments=text)
    assert call.arguments == {}
    assert kind in (call.error or "")


def chat_calls(*fragments: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the id, the name and the arguments of each call in a stream of fragments, one in each event."""
    response = recut(CHAT, sse(*(delta(tool_calls=[fragment]) for fragment in fragments), delta("tool_calls")))
    return [(call.id, call.name, call.raw_arguments) for call in response.tool_calls]


def fragment(index: int | None, arguments: str, **fields: Any) -> dict[str, Any]:
    name = {"name": fields.pop("name")} if "name" in fields else {}
    numbered = {} if index is None else {"index": index}
    return {**numbered, **fields, "function": {**name, "arguments": arguments}}


@pytest.mark.parametrize("empty", [{}, {"id": None, "name": None}, {"id": "", "name": ""}])
@pytest.mark.parametrize("first", [0, None])
def test_a_call_that_goes_on_under_another_number(first: int | None, empty: dict[str, Any]) -> None:
    """A fragment with a new number but no id and no name belongs to the call before; a call that begins does not."""
    calls = chat_calls(
        fragment(first, '{"a"', id="a", name="add"),
        fragment(1, ": ", **empty),
        fragment(1, "1}", **empty),
        fragment(1, "", id="b", name="add"),
        fragment(1, '{"b": ', **empty),
        fragment(2, "2}", **empty),
    )
    assert calls == [("a", "add", '{"a": 1}'), ("b", "add", '{"b": 2}')]


def test_calls_that_are_numbered_properly_stay_apart() -> None:
    """Fragments of calls under way interleave; a call may begin with only a name, or only an id."""
    calls = chat_calls(
        fragment(0, "", id="a", name="add"),
        fragment(1, "", name="add"),
        fragment(2, "", id="c"),
        fragment(0, "{}"),
        fragment(1, "[1]"),
        fragment(2, "[2]", name="add"),
        fragment(0, " "),
    )
    assert calls == [("a", "add", "{} "), ("call_1", "add", "[1]"), ("c", "add", "[2]")]


def test_a_call_of_anthropics_that_goes_on_under_another_number() -> None:
    """Input for a block that never began belongs to the last one under way."""
    tool = {"type": "tool_use", "id": "t", "name": "add", "input": {}}
    response = recut(
        ANTHROPIC,
        sse(
            start(),
            *text_block("Hi"),
            {"type": "content_block_start", "index": 1, "content_block": tool},
            input_delta(1, '{"a"'),
            input_delta(2, ": 1}"),
            *finish("tool_use"),
        ),
    )
    assert (response.text, response.tool_calls[0].arguments) == ("Hi", {"a": 1})


# Messages spliced by a gateway


def message_start(message_id: str | None, **usage: int) -> dict[str, Any]:
    return {"type": "message_start", "message": {"id": message_id, "model": f"m-{message_id}", "usage": usage}}


def spliced(*events: dict[str, Any]) -> Response:
    return recut(ANTHROPIC, sse(*events, *text_block("Hello"), *finish("end_turn", output_tokens=2)))


def test_a_second_message_before_any_content_takes_the_place_of_the_first() -> None:
    """A gateway may turn to another service before the first has said anything."""
    first = message_start("a", input_tokens=7, cache_read_input_tokens=3)
    response = spliced(first, {"type": "ping"}, message_start("b", input_tokens=5))
    assert (response.text, response.id, response.model) == ("Hello", "b", "m-b")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.cached_tokens, response.usage.output_tokens) == (5, None, 2)


@pytest.mark.parametrize("ids", [("a", "b"), (None, None), ("a", None)])
def test_a_second_message_after_content_is_an_error(ids: tuple[str | None, str | None]) -> None:
    """Two halves of different answers are no answer; the first half is kept."""
    first, second = map(message_start, ids)
    stream = sse(first, *text_block("Hel"), second, *text_block("Hello"), *finish("end_turn"))
    partial, error = interrupted(ANTHROPIC, stream)
    assert (partial.text, type(error)) == ("Hel", StreamProtocolError)


def test_a_message_that_begins_twice() -> None:
    """The beginning of the same message again changes nothing."""
    response = spliced(message_start("a"), *text_block(), message_start("a", input_tokens=5))
    assert (response.text, response.id) == ("Hello", "a")
