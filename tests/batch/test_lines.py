"""The lines of a batch's journal."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from fluxibly import LLM
from fluxibly.batch._lines import Line, encoded, line_of
from fluxibly.calls import UNKNOWN, CallRecord, Spent
from fluxibly.errors import BadPrompt, RateLimitError, StreamInterrupted
from fluxibly.types import Request, Response, ToolCall, Usage

NAMES = [
    "row",
    "custom_id",
    "key",
    "text",
    "tool_calls",
    "finish_reason",
    "usage",
    "cost",
    "model",
    "attempts",
    "elapsed",
    "error",
]


def written(line: Line) -> dict[str, Any]:
    """Return a line as readers of the file get it."""
    data = encoded(line)
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    read: dict[str, Any] = json.loads(data)
    assert msgspec.json.decode(data, type=Line)  # which readers of the journal use
    return read


def test_an_answer() -> None:
    """A line of an answer has all fields, in their order, and counts what all attempts have spent."""
    call = CallRecord()
    call.attempts, call.cost, call.model = 2, Decimal("0.0125"), "m"
    call.spent += [
        Spent(UNKNOWN, "m", Usage(input_tokens=3, output_tokens=1)),
        Spent(UNKNOWN, "m", Usage(input_tokens=3, output_tokens=4, cached_tokens=2, reasoning_tokens=1)),
        Spent(UNKNOWN, "m", None),
    ]
    answer = Response("hi", tool_calls=[ToolCall("c1", "look", {"at": 1})], finish_reason="stop", model="m-2026")
    found = written(line_of(7, "x", "k", 1.23456, response=answer, call=call))
    assert [*found] == NAMES
    assert found == {
        "row": 7,
        "custom_id": "x",
        "key": "k",
        "text": "hi",
        "tool_calls": [{"id": "c1", "name": "look", "arguments": '{"at": 1}'}],
        "finish_reason": "stop",
        "usage": {"input_tokens": 6, "output_tokens": 5, "cached_tokens": 2, "reasoning_tokens": 1},
        "cost": 0.0125,
        "model": "m-2026",
        "attempts": 2,
        "elapsed": 1.235,
        "error": None,
    }


def test_an_answer_without_a_record() -> None:
    """Without the record of a call, the tokens are those of the response."""
    line = line_of(0, None, "", 0, response=Response("hi", usage=Usage(input_tokens=1, cache_write_tokens=1)))
    assert line.usage == {"input_tokens": 1, "cache_write_tokens": 1}


def test_an_error() -> None:
    """A line of an error says what the service said, and quotes no content."""
    prompt = "the garden is a secret"
    request = Request(model="m", messages=prompt)
    error = RateLimitError(f"cannot answer {prompt!r}", status=429, code="slow", request_id="r1")
    found = written(line_of(0, "x", "k", 0.5, error=error, call=request.call, request=request))
    assert [*found] == NAMES
    assert found["text"] is None
    assert found["error"] == {
        "type": "RateLimitError",
        "message": "cannot answer '[…]'",
        "retryable": True,
        "status": 429,
        "code": "slow",
        "request_id": "r1",
    }


def test_what_middleware_has_sent_is_masked_too() -> None:
    """An error's message is masked against what was sent, which may be more than was asked."""
    request = Request(model="m", messages="hello there")
    call = CallRecord()
    call.sent_messages = Request(model="m", messages="the garden is a secret").messages
    line = line_of(0, None, "k", 0, error=ValueError("no: the garden is a secret"), call=call, request=request)
    assert line.error is not None
    assert line.error["message"] == "no: […]"
    assert (line.error["type"], line.error["retryable"], line.error["status"]) == ("ValueError", False, None)


def test_an_interrupted_stream() -> None:
    """An interrupted stream has the class and the facts of its cause."""
    cause = RateLimitError("slow down", status=429)
    try:
        raise StreamInterrupted("interrupted", partial=Response("the beginning")) from cause
    except StreamInterrupted as error:
        line = line_of(0, None, "k", 0, error=error)
    assert line.error is not None
    assert (line.error["type"], line.error["status"]) == ("RateLimitError", 429)


def test_a_row_that_makes_no_request() -> None:
    """A prompt that makes no request has a line with its error."""
    with pytest.raises(BadPrompt) as raised:
        LLM("echo:x").request("", {})
    found = written(line_of(0, None, "", 0, error=raised.value))
    assert found["error"]["type"] == "BadPrompt"


@given(st.text() | st.text(st.characters(categories=["Cs"])), st.text(st.characters(categories=["Cs", "L"])))
def test_any_text(text: str, name: str) -> None:
    """Whatever the texts are, they are read as they were, but for halves of surrogate pairs, which UTF-8 cannot say."""
    call = ToolCall(text, text, raw_arguments=text or "{}")
    found = written(line_of(0, name, "k", 0, response=Response(text, tool_calls=[call]), whole=True))
    read = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert found["text"] == read
    assert found["custom_id"] == name.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert found["tool_calls"] == [{"id": read, "name": read, "arguments": read or "{}"}]
    assert found["body"]["choices"][0]["message"]["content"] == (read or None)


@pytest.mark.parametrize("text", ["a", "\ud800"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2**70, 2**70),
        (math.nan, None),
        (1 + 2j, "(1+2j)"),
        ({"b": 1 + 2j, "\udc00": (1, "\ud800")}, {"b": "(1+2j)", "\ufffd": [1, "\ufffd"]}),
        (MappingProxyType({"a": MappingProxyType({"b": "\ud800"})}), {"a": {"b": "\ufffd"}}),
    ],
)
def test_what_json_does_not_have(text: str, value: Any, shown: Any) -> None:
    """What JSON does not have, also beside half of a surrogate pair, costs no row its line, nor the other values theirs."""
    line = line_of(0, None, "k", 0.5, response=Response(text))
    line.tool_calls = [{"id": "c", "raw": {"a": value}}]
    assert written(line)["tool_calls"] == [{"id": "c", "raw": {"a": shown}}]


def test_values_that_are_nested_too_deeply() -> None:
    """Nor does what is nested too deeply."""
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    line = line_of(0, None, "k", 0, response=Response("a"))
    line.tool_calls = deep
    found = written(line)
    assert (found["text"], found["tool_calls"]) == ("a", None)
