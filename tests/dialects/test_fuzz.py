"""Fuzzing: every codec turns any input into a response or a fluxibly error, however the input is cut.

`FLUXIBLY_FUZZ=100` in the environment tries a hundred times as many examples.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support import aws
from support.cohere import stream_of
from support.dialects import sse
from support.recordings import FOLDER, load

from fluxibly.errors import FluxiblyError, ProviderError
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.bedrock import BedrockCodec
from fluxibly.providers.dialects.codec import Codec
from fluxibly.providers.dialects.cohere import CohereCodec
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_responses import ResponsesCodec
from fluxibly.testing.codec_check import Outcome, outcome_of
from fluxibly.types import Response

fuzz = settings(
    deadline=None,
    max_examples=100 * int(os.environ.get("FLUXIBLY_FUZZ") or 1),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


# Samples to damage: for each dialect, a stream and a whole response with every feature


@attrs.frozen
class Dialect:
    """A codec, the events of a stream, a whole response, and the numbers of recorded streams."""

    codec: Codec
    events: list[Any]
    answer: Any
    recorded: tuple[str, ...] = ()

    def stream(self, events: list[Any]) -> bytes:
        if self.codec.framing == "sse":
            return sse(*events)
        if self.codec.framing == "ndjson":
            return b"".join(json.dumps(event).encode() + b"\n" for event in events)
        if self.codec.framing == "aws":
            return b"".join(_aws_message(name, event[name]) for event in events for name in event)
        return json.dumps(events, indent=1).encode()


def _chat(kind: str) -> list[Any]:
    detail = {"type": "reasoning.text", "text": "Hm", "index": 0, "signature": "s1g"}
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    pieces: list[Any] = [
        {"role": "assistant", "content": "Hé", "refusal": None},
        {"content": [{"type": "text", "text": "llo"}, {"type": "thinking", "thinking": [{"text": "Hm"}]}]},
        {"reasoning_content": "Hm", "reasoning_details": [detail]},
        {"tool_calls": [call]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ""}}, {"id": "d", "function": {"name": "x"}}]},
    ]
    choices: list[Any] = [{"index": 0, kind: piece, "finish_reason": None} for piece in pieces]
    choices[-1]["finish_reason"] = "tool_calls"
    events: list[Any] = [{"id": "i", "model": "m", "choices": [choice, {"index": 1, kind: {}}]} for choice in choices]
    return [*events, {"choices": [], "usage": usage, "x_groq": {"usage": usage}}, {"error": {"message": "busy"}}]


def _responses() -> tuple[list[Any], Any]:
    items: list[Any] = [
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Hm"}], "encrypted_content": "x"},
        {"type": "message", "content": [{"type": "output_text", "text": "Hé"}, {"type": "refusal", "refusal": "no"}]},
        {"type": "function_call", "call_id": "c", "name": "now", "arguments": '{"a": 1}'},
    ]
    usage = {"input_tokens": 3, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 1}}
    whole: dict[str, Any] = {"id": "i", "model": "m", "status": "completed", "output": items, "usage": usage}
    events: list[Any] = [
        {"type": "response.created", "response": {**whole, "output": []}},
        {"type": "response.output_item.added", "output_index": 2, "item": items[2]},
        {"type": "response.function_call_arguments.delta", "output_index": 2, "delta": "{}"},
        {"type": "response.reasoning_summary_text.delta", "delta": "Hm"},
        {"type": "response.output_text.delta", "delta": "Hé"},
        *({"type": "response.output_item.done", "output_index": n, "item": item} for n, item in enumerate(items)),
        {"type": "error", "code": "server_error", "message": "busy"},
        {"type": "response.incomplete", "response": {**whole, "incomplete_details": {"reason": "max_output_tokens"}}},
        {"type": "response.failed", "response": {**whole, "status": "failed", "error": {"message": "busy"}}},
        {"type": "response.completed", "response": whole},
    ]
    return events, whole


def _anthropic() -> tuple[list[Any], Any]:
    blocks: list[Any] = [
        {"type": "thinking", "thinking": "Hm", "signature": "s1g"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "Hé"},
        {"type": "tool_use", "id": "c", "name": "now", "input": {"a": 1}},
    ]
    usage = {"input_tokens": 3, "output_tokens": 4, "cache_read_input_tokens": 1, "cache_creation_input_tokens": 0}
    whole: dict[str, Any] = {"id": "i", "model": "m", "content": blocks, "stop_reason": "tool_use", "usage": usage}
    deltas: list[Any] = [
        {"type": "thinking_delta", "thinking": "Hm"},
        {"type": "signature_delta", "signature": "s1g"},
        {"type": "text_delta", "text": "llo"},
        {"type": "input_json_delta", "partial_json": '{"a": 1}'},
    ]
    events: list[Any] = [{"type": "message_start", "message": {**whole, "content": []}}, {"type": "ping"}]
    for index, block in enumerate(blocks):
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        events += ({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas)
        events.append({"type": "content_block_stop", "index": index})
    ends: list[Any] = [
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": usage},
        {"type": "message_stop"},
    ]
    return [*events, *ends], whole


def _gemini() -> tuple[list[Any], Any]:
    parts: list[Any] = [
        {"text": "Hm", "thought": True, "thoughtSignature": "s1g"},
        {"text": "Hé", "thoughtSignature": "s2g"},
        {"functionCall": {"id": "c", "name": "now", "args": {"a": 1}}, "thoughtSignature": "s3g"},
    ]
    usage = {"promptTokenCount": 3, "candidatesTokenCount": 4, "thoughtsTokenCount": 2, "cachedContentTokenCount": 1}
    whole: dict[str, Any] = {
        "candidates": [
            {"content": {"parts": parts, "role": "model"}, "finishReason": "STOP", "index": 0},
            {"content": {"parts": parts[:2]}, "finishReason": "SAFETY", "index": 1},
        ],
        "usageMetadata": usage,
        "modelVersion": "m",
        "responseId": "i",
    }
    first = {"candidates": [{"content": {"parts": [part]}, "index": 0} for part in parts]}
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}}
    return [first, whole, blocked, {"error": {"code": 503, "message": "busy"}}], whole


def _ollama() -> tuple[list[Any], Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "Hé",
        "thinking": "Hm",
        "tool_calls": [{"id": "c", "function": {"index": 0, "name": "now", "arguments": {"a": 1}}}],
    }
    end = {"done": True, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": 4, "total_duration": 5}
    whole = {"model": "m", "message": message, "response": "Hé", **end}
    return [{"model": "m", "message": message, "done": False}, {"error": "busy"}, {"response": "a"}, whole], whole


def _cohere() -> tuple[list[Any], Any]:
    source = {"type": "document", "id": "d", "document": {"text": "Hé"}}
    message: dict[str, Any] = {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm"},
            {"type": "text", "text": "Hé"},
            {"type": "chart", "points": [1, 2], "note": "up"},
        ],
        "tool_plan": "So",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}],
        "citations": [{"start": 0, "end": 2, "text": "Hé", "sources": [source], "content_index": 1, "type": "x"}],
    }
    usage = {"tokens": {"input_tokens": 3, "output_tokens": 4.0}, "cached_tokens": 1, "billed_units": {"x": 1}}
    logprobs = {"text": "Hé", "token_ids": [1], "logprobs": [-0.1]}
    whole = {"id": "i", "message": message, "finish_reason": "TOOL_CALL", "usage": usage, "logprobs": [logprobs]}
    *events, end = stream_of(message, "TOOL_CALL")
    delta = {"type": "content-delta", "index": 1, "delta": {"message": {"content": {"text": "llo"}}}}
    return [*events, {**delta, "logprobs": logprobs}, {"message": "busy", "id": "e"}, end], whole


def _aws_message(name: str, payload: Any) -> bytes:
    name = name.encode(errors="replace").decode()
    return (aws.exception if name.endswith("Exception") else aws.event)(name, payload)


def _bedrock() -> tuple[list[Any], Any]:
    cited = {"title": "T", "sourceContent": [{"text": "Hé"}], "location": {"documentPage": {"start": 1}}}
    blocks: list[dict[str, Any]] = [
        {"reasoningContent": {"reasoningText": {"text": "Hm", "signature": "s1g"}}},
        {"reasoningContent": {"redactedContent": "eHl6"}},
        {"text": "Hé"},
        {"citationsContent": {"content": [{"text": "llo"}], "citations": [cited]}},
        {"toolUse": {"toolUseId": "c", "name": "now", "input": {"a": 1}, "type": "tool_use"}},
        {"toolUse": {"toolUseId": "s", "name": "code", "input": {"a": 1}, "type": "server_tool_use"}},
        {"toolResult": {"toolUseId": "s", "status": "success", "content": [{"text": "ok"}, {"json": {"b": 2}}]}},
        {"image": {"format": "png", "source": {"bytes": "iVBORw=="}}},
        {"chart": {"points": [1, 2], "note": "up"}},
    ]
    usage = {"inputTokens": 3, "outputTokens": 4, "cacheReadInputTokens": 1, "cacheWriteInputTokens": 2}
    more = {"trace": {"promptRouter": {"invokedModelId": "m"}}, "usage": usage}
    events = [{name: payload} for name, payload in aws.events_of(blocks, "tool_use", **more)]
    failure = {"message": "busy", "originalStatusCode": 500, "originalMessage": "busy"}
    return [*events, {"modelStreamErrorException": failure}], aws.whole(blocks, "tool_use", **more)


DIALECTS = {
    "chat": Dialect(
        OpenAICodec(), _chat("delta"), _chat("message")[3], ("01-", "05-", "15-", "16-", "18-", "21-", "25-")
    ),
    "responses": Dialect(ResponsesCodec(), *_responses()),
    "anthropic": Dialect(AnthropicCodec(), *_anthropic(), recorded=("27-", "28-")),
    "gemini": Dialect(GeminiCodec(), *_gemini(), recorded=("32-", "36-")),
    "ollama": Dialect(OllamaCodec(), *_ollama()),
    "cohere": Dialect(CohereCodec(), *_cohere(), recorded=("50-",)),
    "bedrock": Dialect(BedrockCodec(), *_bedrock(), recorded=("41-", "42-")),
}
dialects = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


def read_by(codec: Codec, data: bytes) -> Outcome:
    """Read bytes as a stream, whole and byte by byte, as a body and as an error."""
    outcome = outcome_of(codec, [data])
    if outcome.failure is not None and not isinstance(outcome.failure, FluxiblyError):
        raise outcome.failure
    assert outcome_of(codec, [data[n : n + 1] for n in range(len(data))]) == outcome
    with contextlib.suppress(FluxiblyError):
        assert isinstance(codec.decode(data), Response)
    assert isinstance(codec.decode_error(500, {}, data), ProviderError)
    return outcome


# The damage


@dialects
@fuzz
@given(body=st.binary(max_size=200))
def test_random_bytes(dialect: Dialect, body: bytes) -> None:
    """Random bytes give a response or an error, bare and as the data of an event."""
    read_by(dialect.codec, body)
    read_by(dialect.codec, b"data: " + body + b"\n\n")


BREAKERS = (b"null", b"{}", b"[]", b"-1", b'"', b"\n\n", b"\r", b"\xff", b"\xef\xbb\xbf", b"1e999", b"true", b"{", b"]",
            b'"\\ud800"', b"\x00", b": ping\n", b"data: ", b"event: error\n", b"[DONE]")  # fmt: skip


def damaged(body: bytes, chance: random.Random) -> bytes:
    """Return the body with some bytes changed, doubled, cut out, or replaced by bytes that may break a reader."""
    data = bytearray(body)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                del data[at : at + chance.randint(1, 40)]
            case 1:
                data[at:at] = chance.choice(BREAKERS)
            case 2:
                data[at:at] = data[at : at + chance.randint(1, 60)]
            case _:
                data[at : at + 1] = bytes([chance.randrange(256)])
    return bytes(data)


@dialects
@fuzz
@given(seed=st.integers(0, 2**32))
def test_damaged_bytes(dialect: Dialect, seed: int) -> None:
    """Streams (recorded streams too, if available) and whole bodies with changed bytes give a response or an error."""
    chance = random.Random(seed)  # noqa: S311  # the same seed gives the same test
    recorded = [load(name).body[:3_000] for name in dialect.recorded if FOLDER.is_dir()]
    body = chance.choice([dialect.stream(dialect.events), json.dumps(dialect.answer).encode(), *recorded])
    read_by(dialect.codec, damaged(body, chance))


ODD: tuple[Any, ...] = (None, True, 0, -1, 2**70, 1.5, float("nan"), "", "x", "\ud800", "é", [], [None], {}, {"x": None},
                        "error", [[]], {"type": "text"}, "STOP", '{"a"', {"message": "m"}, "401")  # fmt: skip


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the position of each value in JSON: its object or array, and its key or index in it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield value, key
        yield from nodes(item)


def distorted(value: Any, chance: random.Random) -> Any:
    """Return the value with some of its parts removed, changed to another type, or moved over other parts."""
    value = [json.loads(json.dumps(value))]  # so that no two places share an object
    for _ in range(chance.randint(1, 4)):
        places = list(nodes(value))
        holder, key = chance.choice(places)
        match chance.randrange(4):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1:
                other, at = chance.choice(places)
                holder[key] = copy.deepcopy(other[at])
            case 2:
                holder[key] = [holder[key]] if chance.random() < 0.5 else {"x": holder[key]}
            case _:
                holder[key] = copy.deepcopy(chance.choice(ODD))
    return value[0]


@dialects
@fuzz
@given(seed=st.integers(0, 2**32))
def test_odd_values(dialect: Dialect, seed: int) -> None:
    """Events and whole responses with missing fields or unexpected types give a response or an error."""
    chance = random.Random(seed)  # noqa: S311  # the same seed gives the same test
    events = distorted(chance.sample(dialect.events, chance.randint(1, len(dialect.events))), chance)
    events = events if isinstance(events, list) else [events]
    if dialect.codec.framing == "aws":  # the names of events are not JSON
        events = [event for event in events if isinstance(event, dict)]
    read_by(dialect.codec, dialect.stream(events))
    read_by(dialect.codec, json.dumps(distorted(dialect.answer, chance)).encode())


@fuzz
@given(seed=st.integers(0, 2**32))
def test_damaged_payloads(seed: int) -> None:
    """Messages of an AWS event stream with damaged payloads and valid checksums give a response or an error."""
    chance = random.Random(seed)  # noqa: S311  # the same seed gives the same test
    dialect = DIALECTS["bedrock"]
    messages: list[bytes] = []
    for event in dialect.events[:-1] if chance.random() < 0.8 else chance.sample(dialect.events, len(dialect.events)):
        ((name, payload),) = event.items()
        data = json.dumps(payload).encode()
        messages.append(_aws_message(name, damaged(data, chance) if chance.random() < 0.2 else data))
    read_by(dialect.codec, b"".join(messages))


@dialects
@pytest.mark.parametrize("depth", [50, 900, 5_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"thinking":', "}"), ('{"error":', "}")])
def test_deep_nesting(dialect: Dialect, depth: int, opening: str, closing: str) -> None:
    """Deep nesting in place of any value gives a response or an error, even beyond the interpreter's limit."""
    _read_nested(dialect, opening * depth + "1" * (closing == "}") + closing * depth)


@pytest.mark.parametrize("name", ["chat", "responses", "anthropic", "gemini", "ollama", "cohere", "bedrock"])
def test_nesting_at_the_edge(name: str) -> None:
    """Depths that can just be read, but not written again, give a response or an error."""
    for depth in range(900, 1000, 3):
        _read_nested(DIALECTS[name], '{"a":' * depth + "1" + "}" * depth)


def _read_nested(dialect: Dialect, deep: str) -> None:
    texts = (deep, *_with_in_turn(dialect.answer, deep))
    bodies = [text.encode() for text in texts]
    if dialect.codec.framing == "aws":
        payloads = [(*event.items(),)[0] for event in dialect.events]
        bodies += [_aws_message(name, each.encode()) for name, value in payloads for each in _with_in_turn(value, deep)]
    for data in bodies:
        outcome = outcome_of(dialect.codec, [data])
        assert outcome.failure is None or isinstance(outcome.failure, FluxiblyError)
        with contextlib.suppress(FluxiblyError):
            assert isinstance(dialect.codec.decode(data), Response)
        assert isinstance(dialect.codec.decode_error(500, {}, data), ProviderError)


def _with_in_turn(value: Any, text: str) -> Iterator[str]:
    """Yield the value as JSON, with `text` instead of each value in it, in turn."""
    for n in range(len(list(nodes(value)))):
        changed = json.loads(json.dumps(value))
        holder, key = list(nodes(changed))[n]
        holder[key] = "PLACE"
        yield json.dumps(changed).replace('"PLACE"', text)


@dialects
def test_the_samples(dialect: Dialect) -> None:
    """The undamaged samples decode without errors."""
    assert dialect.codec.decode(json.dumps(dialect.answer).encode()).tool_calls
    assert outcome_of(dialect.codec, [dialect.stream(dialect.events)]).response.text
