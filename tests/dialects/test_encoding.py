"""Helpers that the dialects share: JSON of any shape, and requests that cannot be sent."""

from __future__ import annotations

import copy
import json
import re
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, strategies as st
from support.dialects import interrupted

from fluxibly import _merging as merging
from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    Overloaded,
    ProviderError,
    QuotaExceeded,
    RateLimitError,
    ServerError,
    StreamProtocolError,
)
from fluxibly.providers.dialects import decoding, encoding, json_values, openai_parts
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.codec import Codec
from fluxibly.providers.dialects.cohere import CohereCodec
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_responses import ResponsesCodec
from fluxibly.types import Image, Request, Tool, ToolCall, Usage

CODECS: list[Codec] = [
    OpenAICodec(),
    ResponsesCodec(),
    AnthropicCodec(),
    GeminiCodec(),
    OllamaCodec(),
    CohereCodec(),
]
ANSWERS: list[tuple[Codec, str]] = [
    (
        CohereCodec(),
        '{"message":{"tool_calls":[{"id":"a","function":{"name":"f","arguments":%s}}]},"finish_reason":"TOOL_CALL"}',
    ),
    (AnthropicCodec(), '{"content":[{"type":"tool_use","id":"a","name":"f","input":%s}],"stop_reason":"tool_use"}'),
    (
        GeminiCodec(),
        '{"candidates":[{"content":{"parts":[{"functionCall":{"name":"f","args":%s}}]},"finishReason":"STOP"}]}',
    ),
    (OllamaCodec(), '{"message":{"tool_calls":[{"function":{"name":"f","arguments":%s}}]},"done":true}'),
]


def name_of(codec: object) -> str:
    """Return a codec's class name, for the ids of tests."""
    return type(codec).__name__


def test_arguments_nested_too_deeply() -> None:
    """Arguments nested too deeply raise an error that says so."""
    value: dict[str, object] = {}
    for _ in range(100_000):  # Python 3.13 writes some thousands
        value = {"a": value}
    with pytest.raises(StreamProtocolError, match="nested too deeply"):
        decoding.to_json(value)


@pytest.mark.parametrize(("codec", "answer"), ANSWERS, ids=name_of)
@pytest.mark.parametrize("sent", ['{"a": 1}', '"{\\"a\\": 1}"'])
def test_arguments_as_an_object_or_as_text(codec: Codec, answer: str, sent: str) -> None:
    """Arguments may be an object or JSON text, because servers send either."""
    (call,) = codec.decode((answer % sent).encode()).tool_calls
    assert (call.arguments, call.error) == ({"a": 1}, None)


def test_mappings_of_any_kind_are_json() -> None:
    """A schema may be a mapping other than a dict."""
    request = Request(model="m", messages="Hi")
    assert encoding.write_json({"schema": MappingProxyType({"a": 1})}, request) == b'{"schema":{"a":1}}'


def test_the_request_stays_as_it_was() -> None:
    """Merging `extra` does not change the caller's objects."""
    options = {"b": 2}
    request = Request(model="m", messages="Hi", extra={"options": options})
    assert encoding.write_json({"options": {"a": 1}}, request) == b'{"options":{"a":1,"b":2}}'
    assert options == {"b": 2}


TABLES: list[Any] = [
    ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
    ({"a": 1}, {"a": 2}, {"a": 2}),
    ({"a": {"x": 1, "y": {"z": 1}}}, {"a": {"y": {"w": 2}}}, {"a": {"x": 1, "y": {"z": 1, "w": 2}}}),
    ({"a": {"x": 1}}, {"a": 5}, {"a": 5}),
    ({"a": 5}, {"a": {"x": 1}}, {"a": {"x": 1}}),
    ({"a": [1]}, {"a": [2]}, {"a": [2]}),
    ({"tools": [1]}, {"tools": [2]}, {"tools": [1, 2]}),
    ({"tools": [1]}, {"tools": None}, {}),
    ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
    ({"a": {"x": 1, "y": 2}}, {"a": {"x": None}}, {"a": {"y": 2}}),
    ({}, {"a": {"x": None, "y": 1}, "b": None}, {"a": {"y": 1}}),
]


@pytest.mark.parametrize(("body", "extra", "merged"), TABLES)
def test_extra_is_merged(body: dict[str, Any], extra: dict[str, Any], merged: dict[str, Any]) -> None:
    """Tables are merged, lists replaced, except that tools are added; null removes."""
    before = json.dumps([body, extra])
    merging.merge_into(copy.copy(body), extra)
    assert json.dumps([body, extra]) == before, "the tables inside stay as they were"
    merging.merge_into(body, extra)
    assert body == merged


def patches(leaves: st.SearchStrategy[Any], levels: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """Return patches in which a name always stands for the same kind of value, or for null if `leaves` have it."""
    fields: dict[str, st.SearchStrategy[Any]] = {"a": leaves, "b": leaves, "tools": st.lists(st.integers(), max_size=2)}
    if levels > 1:
        fields["table"] = patches(leaves, levels - 1)
    return st.fixed_dictionaries({}, optional=fields)


@given(patches(st.integers()), patches(st.integers()), patches(st.none() | st.integers()))
def test_two_patches_are_as_good_as_one(body: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> None:
    """Merging the composition of two patches does the same as merging one after the other."""
    one, other = copy.deepcopy(body), copy.deepcopy(body)
    merging.merge_into(one, first)
    merging.merge_into(one, second)
    merging.merge_into(other, merging.composed(first, second))
    assert one == other


@pytest.mark.parametrize(
    ("codec", "extra", "expected"),
    [
        (OpenAICodec(), {"stream_options": {"x": 1}}, {"stream_options": {"include_usage": True, "x": 1}}),
        (ResponsesCodec(), {"text": {"verbosity": "low"}}, {"text": {"format": {"type": "text"}, "verbosity": "low"}}),
        (AnthropicCodec(), {"max_tokens": None}, {}),
        (
            GeminiCodec(),
            {"generationConfig": {"thinkingConfig": {"thinkingBudget": 5}}},
            {
                "generationConfig": {
                    "responseMimeType": "text/plain",
                    "seed": 1,
                    "thinkingConfig": {"thinkingBudget": 5},
                }
            },
        ),
        (OllamaCodec(), {"options": {"num_ctx": 9}}, {"options": {"seed": 1, "num_ctx": 9}}),
        (CohereCodec(), {"response_format": {"x": 1}}, {"response_format": {"type": "text", "x": 1}}),
    ],
    ids=lambda value: name_of(value) if not isinstance(value, dict) else "",
)
def test_extra_is_merged_in_each_dialect(codec: Codec, extra: dict[str, Any], expected: dict[str, Any]) -> None:
    """`extra` is added to the tables that the codec makes, and removes a parameter that it always sends."""
    seed = 1 if codec.__class__ in (GeminiCodec, OllamaCodec) else None
    request = Request(model="m", messages="Hi", response_format="text", seed=seed, extra=extra)
    body = json.loads(codec.encode(request, stream=True).body)
    assert {name: body[name] for name in extra if name in body} == expected


@pytest.mark.parametrize("codec", CODECS, ids=name_of)
def test_tools_in_extra_are_added(codec: Codec) -> None:
    """A service's own tool in `extra` stands beside the tools of the call."""
    request = Request(model="m", messages="Hi", tools=[Tool("tide")], extra={"tools": [{"type": "web_search"}]})
    first, second = json.loads(codec.encode(request, stream=False).body)["tools"]
    assert "tide" in json.dumps(first)
    assert second == {"type": "web_search"}


def test_refusals_name_the_parameter_and_the_way_out() -> None:
    """The error names the parameter and suggests `extra`; `n=1` is accepted everywhere."""
    encoding.reject_unsupported(Request(model="m", messages="Hi", n=1), "X", ("n", "seed"))
    with pytest.raises(BadRequest, match=r"X does not support seed; .* extra="):
        encoding.reject_unsupported(Request(model="m", messages="Hi", seed=0), "X", ("n", "seed"))


@pytest.mark.parametrize("codec", CODECS, ids=name_of)
@pytest.mark.parametrize(
    ("fields", "due"),
    [
        (
            {"tool_choice": {"type": "function"}},
            "tool_choice: expected 'auto', 'none', 'required' or a tool's name, got a dict",
        ),
        (
            {"response_format": "xml"},
            "response_format: expected 'text', 'json' or a JSON Schema (a mapping), got 'xml'",
        ),
        ({"response_format": 5}, "response_format: expected 'text', 'json' or a JSON Schema (a mapping), got 5"),
    ],
)
def test_values_that_no_dialect_takes(codec: Codec, fields: dict[str, Any], due: str) -> None:
    """The error states the expected values."""
    with pytest.raises(BadRequest) as caught:
        codec.encode(Request(model="m", messages="Hi", **fields), stream=False)
    assert due in str(caught.value)


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,QQ==", "data:image/png;charset=x;base64,QQ==", "data:image/png,A"]
)
def test_data_urls(url: str) -> None:
    """Data URLs may use base64 or percent encoding."""
    assert encoding.media_data(Image(url=url)) == ("image/png", "QQ==")


@pytest.mark.parametrize("codec", CODECS, ids=name_of)
@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ({"error": {"message": "busy", "type": "overloaded_error"}, "request_id": "req_1"}, Overloaded, "busy"),
        ({"error": "busy"}, ServerError, "busy"),
        ({"error": {"code": 429, "message": "slow down"}}, RateLimitError, "slow down"),
        ({"code": "insufficient_quota", "error": "no money"}, QuotaExceeded, "no money"),
        ({"detail": "busy"}, ServerError, "busy"),
        ({"detail": [{"loc": ["body"], "msg": "field required"}]}, ServerError, "field required"),
        ({"message": "Unauthorized", "code": "401"}, AuthenticationError, "Unauthorized"),
        ({"errors": [{"message": "busy", "code": 7}]}, ServerError, "busy"),
        ([{"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}], Overloaded, "busy"),
    ],
    ids=str,
)
def test_an_error_in_a_200(codec: Codec, answer: object, kind: type[ProviderError], said: str) -> None:
    """An error of any shape is raised in every dialect, as a whole body, as an event, and as bare JSON in a stream."""
    body = json.dumps(answer).encode()
    event = body if codec.framing == "ndjson" else b"data: " + body + b"\n\n"
    found = [interrupted(codec, event)[1], interrupted(codec, body)[1]]
    with pytest.raises(ProviderError) as caught:
        codec.decode(body)
    for error in (*found, caught.value):
        assert isinstance(error, kind)
        assert said in str(error)
        assert error.request_id == ("req_1" if "request_id" in str(answer) else None)


@pytest.mark.parametrize("codec", [OpenAICodec(), ResponsesCodec(), AnthropicCodec(), CohereCodec()], ids=name_of)
@pytest.mark.parametrize("data", ['{"message": "busy"}', "busy", '{"type": "error"}', '{"type": "busy"}'])
def test_an_event_named_error(codec: Codec, data: str) -> None:
    """An event named `error` is an error, whatever its data."""
    _, error = interrupted(codec, f"event: error\ndata: {data}\n\n".encode())
    assert type(error) is ServerError
    assert re.search("busy|error", str(error))


def test_sums_of_what_is_known() -> None:
    """The sum of unknown counts is None rather than 0."""
    assert (json_values.sum_known(None, None), json_values.sum_known(0, None), json_values.sum_known(1, 2)) == (
        None,
        0,
        3,
    )
    assert [json_values.as_count(value) for value in (3, -1, True, 2.5, "3", None)] == [3, None, None, None, None, None]
    assert json_values.as_count(10**400) is None
    assert openai_parts.usage_of({"prompt_tokens": 10**400, "completion_tokens": 2}) == Usage(output_tokens=2)


def test_arguments_that_are_sent_back() -> None:
    """Text that is not an object is wrapped in an object."""
    assert encoding.sent_arguments(ToolCall("a", "f", raw_arguments="[1]")) == {"INVALID_JSON": "[1]"}
    assert encoding.sent_arguments(ToolCall("a", "f", {"x": 1})) == {"x": 1}
