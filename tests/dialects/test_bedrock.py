"""Bedrock's dialect: whole answers, streams, errors, and boto3 as a second reader."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import given, strategies as st
from support import aws
from support.aws import delta, ends, events_of, exception, said, start, stop, stream, whole
from support.clients import bedrock_client, message_of_events
from support.dialects import interrupted, recut, serving, streamed
from support.recordings import load
from support.synthetic import ANSWERS

from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ContextLengthExceeded,
    NotFound,
    Overloaded,
    PermissionDenied,
    ProviderError,
    QuotaExceeded,
    RateLimitError,
    RequestTimeout,
    ServerError,
    StreamProtocolError,
)
from fluxibly.providers.dialects.bedrock import BedrockCodec
from fluxibly.testing import check_codec
from fluxibly.testing.codec_check import chunks_of
from fluxibly.types import (
    Image,
    Message,
    Opaque,
    Reasoning,
    Request,
    Response,
    Text,
    ToolCall,
    Usage,
)

CODEC = BedrockCodec()
EVENTS = "application/vnd.amazon.eventstream"


# Whole answers

SIGNED = {"reasoningContent": {"reasoningText": {"text": "Hm.", "signature": "s1g"}}}
REDACTED = {"reasoningContent": {"redactedContent": "eHl6"}}
CITATION = {"title": "Tides", "location": {"documentPage": {"documentIndex": 0, "start": 1, "end": 2}}}
CITED = {"citationsContent": {"content": [{"text": "High at "}, {"text": "noon."}], "citations": [CITATION, CITATION]}}
JOINED = {"citationsContent": {**CITED["citationsContent"], "content": [{"text": "High at noon."}]}}
BLOCKS: list[dict[str, Any]] = [
    SIGNED,
    REDACTED,
    {"text": "Let me "},
    {"text": "look."},
    CITED,
    {"toolUse": {"toolUseId": "tooluse_1", "name": "weather", "input": {"city": "Zürich"}}},
    {"toolUse": {"toolUseId": "srv_1", "name": "search", "input": {"q": "x"}, "type": "server_tool_use"}},
    {"toolResult": {"toolUseId": "srv_1", "content": [{"json": {"x": 1}}], "status": "success"}},
    {"chart": {"points": [1, 2]}},
]
USAGE = {"inputTokens": 10, "outputTokens": 7, "totalTokens": 25, "cacheReadInputTokens": 5, "cacheWriteInputTokens": 3}
MORE: dict[str, Any] = {
    "usage": USAGE,
    "metrics": {"latencyMs": 5},
    "trace": {"promptRouter": {"invokedModelId": "arn:aws:bedrock:us-east-1::foundation-model/m.n"}},
    "performanceConfig": {"latency": "standard"},
    "serviceTier": {"type": "default"},
}
FIELDS = {"additionalModelResponseFields": {"stop_sequence": "END"}}


def test_whole_answer() -> None:
    """A whole answer has its text, reasoning, tool calls, finish reason, usage, model, details and raw body."""
    body = whole(BLOCKS, "tool_use", **MORE, **FIELDS)
    response = CODEC.decode(b"\n\n  " + json.dumps(body).encode())
    assert response.text == "Let me look.High at noon."
    assert response.reasoning == "Hm."
    assert [part.raw for part in response.reasoning_parts] == [SIGNED, REDACTED]
    assert response.tool_calls == (ToolCall("tooluse_1", "weather", {"city": "Zürich"}),)
    assert [part.raw for part in response.opaque] == BLOCKS[6:]
    assert (response.finish_reason, response.raw_finish_reason) == ("tool_call", "tool_use")
    assert response.usage == Usage(input_tokens=18, output_tokens=7, cached_tokens=5, cache_write_tokens=3)
    assert (response.id, response.model, response.raw) == (None, MORE["trace"]["promptRouter"]["invokedModelId"], body)
    named = ("metrics", "trace", "performanceConfig", "serviceTier")
    assert response.details == {**{name: MORE[name] for name in named}, **FIELDS, "citations": [CITATION, CITATION]}


def test_a_streamed_answer_is_the_same() -> None:
    """A streamed answer equals the whole one, in its parts, their order and its details, wherever the reads are cut."""
    blocks = [JOINED if block is CITED else block for block in BLOCKS]
    events = [
        (name, {**payload, **FIELDS} if name == "messageStop" else payload)
        for name, payload in events_of(blocks, "tool_use", **MORE)
    ]
    response = recut(CODEC, stream(*events))
    expected = CODEC.decode(json.dumps(whole(blocks, "tool_use", **MORE, **FIELDS)).encode())
    assert response == expected
    assert response.parts == expected.parts
    assert response.details == expected.details


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_call"),
        ("guardrail_intervened", "content_filter"),
        ("content_filtered", "content_filter"),
        ("malformed_model_output", "error"),
        ("malformed_tool_use", "error"),
        ("something_new", "something_new"),
        (None, None),
        (7, None),
    ],
)
def test_finish_reasons(raw: Any, reason: str | None) -> None:
    """Known finish reasons are normalized and others are passed on, alike in both modes."""
    for response in (
        CODEC.decode(json.dumps(whole([{"text": "a"}], raw)).encode()),
        streamed(CODEC, stream(*said("a"), *ends(raw))),
    ):
        assert response.finish_reason == reason
        assert response.raw_finish_reason == (raw if isinstance(raw, str) else None)


def test_every_finish_reason_of_the_service_is_known() -> None:
    """The words of the service's model are all normalized."""
    pytest.importorskip("botocore")
    from botocore.session import Session

    from fluxibly.types import FINISH_REASONS

    for word in Session().get_service_model("bedrock-runtime").shape_for("StopReason").enum:
        response = CODEC.decode(json.dumps(whole([], word)).encode())
        assert response.finish_reason in FINISH_REASONS, word


@pytest.mark.parametrize(
    ("counts", "usage"),
    [
        ({"inputTokens": 1, "outputTokens": 2, "totalTokens": 3}, Usage(input_tokens=1, output_tokens=2)),
        ({"inputTokens": 1, "cacheReadInputTokens": 2}, Usage(input_tokens=3, cached_tokens=2)),
        ({"inputTokens": 1, "cacheWriteInputTokens": 2}, Usage(input_tokens=3, cache_write_tokens=2)),
        (
            {"cacheReadInputTokens": 0, "cacheWriteInputTokens": 0},
            Usage(input_tokens=0, cached_tokens=0, cache_write_tokens=0),
        ),
        ({"inputTokens": "1", "outputTokens": -2, "cacheReadInputTokens": True}, Usage()),
        ({}, None),
        (None, None),
        ([1], None),
    ],
)
def test_usage(counts: Any, usage: Usage | None) -> None:
    """Cached tokens are added to the input, of which the service counts only the rest, alike in both modes."""
    assert CODEC.decode(json.dumps(whole([{"text": "a"}], usage=counts)).encode()).usage == usage
    assert streamed(CODEC, stream(*said("a"), *ends(usage=counts))).usage == usage


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>busy</html>", b"{}", b"[]", b"null", b'{"output": null}', b'{"output": {"message": []}}', b'{"out'],
)
def test_not_an_answer(body: bytes) -> None:
    """A body without a message never passes as an empty answer."""
    with pytest.raises(StreamProtocolError):
        CODEC.decode(body)


def test_an_answer_without_content() -> None:
    """A message may be empty, as a model's that says nothing after a tool's result."""
    for blocks in ([], [{}], [{"text": ""}], [None], None):
        response = CODEC.decode(json.dumps(whole(blocks)).encode())  # type: ignore[arg-type]
        assert (response.parts, response.finish_reason) == ((), "stop")


def test_empty_texts() -> None:
    """Empty texts between others are no parts, alike in both modes."""
    blocks = [{"text": text} for text in ("", "a", "", "b", "")]
    for response in (CODEC.decode(json.dumps(whole(blocks)).encode()), streamed(CODEC, stream(*events_of(blocks)))):
        assert response.parts == (Text("a"), Text("b"))


def test_error_in_a_200() -> None:
    """An error in the body of a 200 is raised."""
    with pytest.raises(RateLimitError, match="slow down"):
        CODEC.decode(b'{"__type": "com.amazon.coral.service#ThrottlingException", "message": "slow down"}')
    with pytest.raises(ProviderError, match="busy"):
        CODEC.decode(b'{"message": "busy"}')


def test_calls_with_a_type() -> None:
    """Some models name the type of each call: a "tool_use" is for the caller, and any other is the service's own."""
    call = {"toolUseId": "1", "name": "now", "input": {"a": 1}}
    for kind, for_caller in (("tool_use", True), (None, True), ("", True), ("server_tool_use", False), ("new", False)):
        block = {"toolUse": {**call, "type": kind}}
        for response in (
            CODEC.decode(json.dumps(whole([block])).encode()),
            streamed(CODEC, stream(*events_of([block]))),
        ):
            assert response.tool_calls == ((ToolCall("1", "now", {"a": 1}),) if for_caller else ())
            assert response.opaque == (() if for_caller else (Opaque("bedrock", block),))
            assert sent_back(response) == [block]


# Answers that go back


def turn_of(message: Message) -> list[dict[str, Any]]:
    """Return the blocks that a request has for an assistant's message."""
    request = Request(model="anthropic.claude-x", messages=[Message.user("x"), message, Message.user("y")])
    turns = json.loads(CODEC.encode(request, stream=False).body)["messages"]
    return turns[1]["content"] if len(turns) == 3 else []


def sent_back(response: Response) -> list[dict[str, Any]]:
    """Return the blocks that the next request has for an answer, and check that storing it changes nothing."""
    stored = Message.from_dict(json.loads(json.dumps(response.message.to_dict())))
    assert turn_of(stored) == turn_of(response.message)
    return turn_of(stored)


some_blocks = st.lists(st.sampled_from(BLOCKS), max_size=7).map(
    lambda blocks: [json.loads(json.dumps(block).replace("_1", f"_{number}")) for number, block in enumerate(blocks)]
)


def expected_back(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return blocks if any("reasoningContent" not in block for block in blocks) else []


@given(some_blocks)
def test_blocks_go_back_in_any_order(blocks: list[dict[str, Any]]) -> None:
    """A whole answer goes back block for block: signed and redacted reasoning unchanged, between calls too."""
    assert sent_back(CODEC.decode(json.dumps(whole(blocks)).encode())) == expected_back(blocks)


@given(some_blocks)
def test_streamed_blocks_go_back_in_any_order(blocks: list[dict[str, Any]]) -> None:
    """A streamed answer has the same parts and details as the whole one, and goes back block for block."""
    blocks = [JOINED if block == CITED else block for block in blocks]
    response = streamed(CODEC, stream(*events_of(blocks)))
    expected = CODEC.decode(json.dumps(whole(blocks)).encode())
    assert response == expected
    assert response.parts == expected.parts
    assert response.details == expected.details
    assert sent_back(response) == expected_back(blocks)


def test_a_cited_text_that_was_changed() -> None:
    """A text keeps its citations if a middleware changes it."""
    response = CODEC.decode(json.dumps(whole([CITED])).encode())
    (text,) = response.parts
    assert isinstance(text, Text)
    assert turn_of(Message.assistant([Text("High at 12.", raw=text.raw)])) == [
        {"citationsContent": {**CITED["citationsContent"], "content": [{"text": "High at 12."}]}}
    ]


def test_recorded_reasoning_goes_back() -> None:
    """The signed reasoning of a recorded stream goes back unchanged."""
    response = streamed(CODEC, load("42-").body)
    (part,) = response.reasoning_parts
    assert part.signature is not None
    assert sent_back(response) == [
        {"reasoningContent": {"reasoningText": {"text": part.text, "signature": part.signature}}},
        {"text": response.text},
    ]


# Streams


def test_recorded_streams() -> None:
    """A call, signed reasoning, and an answer at its length limit decode the same wherever the reads are cut."""
    response = recut(CODEC, load("41-").body)
    assert response.tool_calls == (
        ToolCall("tooluse_yypYDr71TwCwByoyao4-Vg", "get_weather", {"location": "Barcelona"}),
    )
    assert response.text.startswith("Okay, let me check the weather")
    assert (response.finish_reason, response.usage) == ("tool_call", Usage(input_tokens=236, output_tokens=58))
    response = recut(CODEC, load("42-").body)
    assert response.reasoning.startswith("The user has greeted me")
    assert response.text.startswith("Hello! It's nice")
    assert (response.finish_reason, response.usage) == ("stop", Usage(input_tokens=36, output_tokens=73))
    response = recut(CODEC, load("45-").body)
    assert (response.text, response.finish_reason) == ("Sure, how can I help you", "length")
    assert response.details == {"metrics": {"latencyMs": 613}}


def test_recorded_whole_answer() -> None:
    """A recorded answer has its text and two calls."""
    response = CODEC.decode(load("40-").body)
    assert [(call.name, dict(call.arguments)) for call in response.tool_calls] == [
        ("get_current_weather", {"location": "Seattle"}),
        ("get_current_weather", {"location": "San Francisco"}),
    ]
    assert response.text.startswith("<thinking> To provide")
    assert (response.finish_reason, response.usage) == ("tool_call", Usage(input_tokens=415, output_tokens=190))


def test_the_law_of_whole_answers() -> None:
    """Streams cut anywhere give the same response, and streams that end anywhere too early give an error."""
    made = [answer.body for answer in ANSWERS if answer.dialect == "bedrock" and answer.streaming]
    check_codec(CODEC, [*made, load("41-").body, load("42-").body, load("45-").body])


def test_no_block_ends() -> None:
    """A stream without the ends of its blocks gives the same answer, because the next block ends the one before."""
    blocks = [
        JOINED,
        {"text": "So."},
        SIGNED,
        REDACTED,
        {"text": "And"},
        BLOCKS[6],
        {"image": IMAGE},
        BLOCKS[5],
        JOINED,
    ]
    events = events_of(blocks)
    bare = [event for event in events if event[0] != "contentBlockStop"]
    response, expected = streamed(CODEC, stream(*bare)), streamed(CODEC, stream(*events))
    assert response == expected
    assert response.parts == expected.parts


IMAGE = {"format": "png", "source": {"bytes": "iVBORw0KGgo="}}


def test_usage_after_the_end() -> None:
    """`metadata` follows the end. Without it an answer is whole, and has no usage; it may also come before the end."""
    stop_message, metadata = ends()
    for body, usage in (
        (stream(*said("a"), stop_message), None),
        (stream(*said("a"), metadata, stop_message), Usage(input_tokens=10, output_tokens=7)),
        (stream(*said("a"), stop_message, metadata, *said("b")), Usage(input_tokens=10, output_tokens=7)),
    ):
        response = recut(CODEC, body)
        assert (response.text, response.finish_reason, response.usage) == ("a", "stop", usage)


def test_done() -> None:
    """Reading stops after `metadata`, which is the last event."""
    decoder = CODEC.decoder()
    done = []
    for name, payload in events_of([{"text": "a"}]):
        list(decoder.decode_event(aws_event(name, payload)))
        done.append(decoder.done)
    assert done == [False] * (len(done) - 1) + [True]


def aws_event(name: str, payload: Any) -> Any:
    from fluxibly.providers.dialects.codec import Event

    return Event(json.dumps(payload).encode(), name)


@pytest.mark.parametrize("kept", range(6))
def test_a_stream_without_its_end(kept: int) -> None:
    """A stream without `messageStop` was cut off, wherever it ends; what came before is the partial answer."""
    events = [("messageStart", {"role": "assistant"}), *said("one ", "two"), ends()[1]][:kept]
    partial, error = interrupted(CODEC, stream(*events))
    assert isinstance(error, StreamProtocolError)
    assert "messageStop" in str(error)
    assert error.retryable
    assert partial.text == ("", "", "one ", "one two", "one two", "one two")[kept]


def test_a_stream_that_ends_within_a_message() -> None:
    """A stream that ends within a message was cut off, also right before its last byte."""
    body = stream(*said("one"), ends()[0])
    partial, error = interrupted(CODEC, body[:-1])
    assert isinstance(error, StreamProtocolError)
    assert (partial.text, partial.finish_reason) == ("one", None)


def test_calls_that_interleave() -> None:
    """Pieces of calls belong to the call with their number, whatever comes between."""
    calls = [{"toolUse": {"toolUseId": f"c{n}", "name": f"f{n}", "input": {"n": n, "m": "é" * n}}} for n in range(3)]
    events = [list(aws.block_events(number, block)) for number, block in enumerate([*calls, {"text": "ab"}])]
    mixed = [event for turn in zip_longest(*events) for event in turn if event is not None]
    response = recut(CODEC, stream(*mixed, *ends("tool_use")))
    assert [(call.id, dict(call.arguments)) for call in response.tool_calls] == [
        (f"c{n}", {"n": n, "m": "é" * n}) for n in range(3)
    ]
    assert response.text == "ab"


def test_texts_that_interleave() -> None:
    """Text goes out as it arrives, so texts that interleave are as many texts as there are turns between them."""
    turns = [delta(0, "text", "a"), delta(1, "text", "b"), delta(0, "text", "c"), delta(0, "citation", CITATION)]
    response = streamed(CODEC, stream(*turns, *ends()))
    assert [(part.text, part.raw) for part in response.parts if isinstance(part, Text)] == [
        ("a", None),
        ("b", None),
        ("c", {"citationsContent": {"content": [{"text": "c"}], "citations": [CITATION]}}),
    ]


def test_blocks_that_share_a_number() -> None:
    """A gateway that numbers all blocks 0 loses none of them."""
    events = [event for block in [SIGNED, REDACTED, *BLOCKS[4:]] for event in aws.block_events(0, block)]
    bare = [event for event in events if event[0] != "contentBlockStop"]
    whole_blocks = [{"text": "a"}, SIGNED, REDACTED, *BLOCKS[4:]]
    expected = streamed(CODEC, stream(*events_of(whole_blocks)))
    for each in (events, bare):
        response = streamed(CODEC, stream(delta(0, "text", "a"), *each, *ends()))
        assert response.parts == expected.parts


def test_pieces_without_content() -> None:
    """Empty pieces, of which real streams have many, change nothing, and make no chunks."""
    empty: list[tuple[str, Any]] = [
        delta(0, "text", ""),
        ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {}}),
        ("contentBlockDelta", {"contentBlockIndex": 0}),
        ("contentBlockDelta", {}),
        ("contentBlockStart", {"contentBlockIndex": 0, "start": {}}),
        delta(0, "reasoningContent", {}),
        delta(0, "citation", {}),
        delta(0, "image", {}),
        delta(0, "new", None),
    ]
    body = stream(*empty, delta(0, "text", "a"), *empty, delta(0, "text", "b"), *empty, stop(0), *empty, *ends())
    assert [chunk.text for chunk in chunks_of(CODEC, [body])] == ["a", "b", ""]
    response = recut(CODEC, body)
    assert (response.parts, response.details) == ((Text("ab"),), {"metrics": {"latencyMs": 5}})


def test_chunks_are_pieces_of_the_answer() -> None:
    """A block's beginning and end make no chunks, and the last chunk has the finish reason and the usage."""
    begun = [start(2, "toolUse", {"toolUseId": "c", "name": "now"}), delta(2, "toolUse", {"input": ""})]
    blocks = aws.block_events(0, SIGNED), said("a", "b", index=1), begun, said("c", index=3)
    chunks = list(chunks_of(CODEC, [stream(*(event for block in blocks for event in block), *ends())]))
    assert [(chunk.reasoning, chunk.text, len(chunk.tool_calls), len(chunk.parts)) for chunk in chunks] == [
        ("H", "", 0, 0),
        ("m.", "", 0, 0),
        ("", "a", 0, 1),  # the signature of the reasoning before it
        ("", "b", 0, 0),
        ("", "", 1, 0),
        ("", "c", 0, 0),
        ("", "", 0, 0),
    ]
    assert (chunks[-1].finish_reason, chunks[-1].usage) == ("stop", Usage(input_tokens=10, output_tokens=7))


def test_a_plain_answer_is_plain_chunks() -> None:
    """The chunks of a text, except for the last, have nothing but text, which all layers pass on fastest."""
    chunks = list(chunks_of(CODEC, [stream(*events_of([{"text": "abcd"}]))]))
    assert [chunk.text_only for chunk in chunks] == [True, True, False]


def test_what_is_whole_is_delivered_at_once() -> None:
    """An image, and a block that only the service reads, are part of the answer as soon as they are complete."""
    events = [
        event for number, block in enumerate([{"image": IMAGE}, BLOCKS[7]]) for event in aws.block_events(number, block)
    ]
    partial, error = interrupted(CODEC, stream(*events) + exception("internalServerException", {}))
    assert isinstance(error, ServerError)
    assert (len(partial.media), [part.raw for part in partial.opaque]) == (1, [BLOCKS[7]])


def test_what_is_unknown_is_passed_over() -> None:
    """Unknown events, and unknown pieces of known blocks, change nothing."""
    body = stream(
        ("initial-response", {}),
        ("messageStart", {"role": "assistant"}),
        ("brandNew", {"x": 1}),
        ("", {"x": 1}),
        start(0, "text", ""),
        delta(0, "text", "Hi"),
        ("contentBlockDelta", {"contentBlockIndex": 9, "delta": {"toolUse": {"input": '{"a":1}'}}}),
        stop(9),
        stop(0),
        ("brandNew", [1]),
        *ends(),
    )
    body += aws.event("brandNew", b"no JSON")
    response = recut(CODEC, body)
    assert (response.text, response.tool_calls, response.opaque, response.finish_reason) == ("Hi", (), (), "stop")


def test_unknown_blocks() -> None:
    """A block of a new kind stays opaque, with the fields of its pieces joined, and goes back."""
    body = stream(
        start(0, "chart", {"kind": "line", "points": [1]}),
        delta(0, "chart", {"note": "u", "points": [2]}),
        delta(0, "chart", {"note": "p", "kind": None}),
        stop(0),
        delta(1, "map", {"tiles": ["a"]}),
        *ends(),
    )
    blocks = [{"chart": {"kind": "line", "points": [1, 2], "note": "up"}}, {"map": {"tiles": ["a"]}}]
    response = recut(CODEC, body)
    assert response.opaque == tuple(Opaque("bedrock", block) for block in blocks)
    assert sent_back(response) == blocks


def test_a_call_without_input() -> None:
    """A call may have no arguments, and no id."""
    events = [start(0, "toolUse", {"toolUseId": "c", "name": "now"}), stop(0), start(1, "toolUse", {"name": "then"})]
    response = recut(CODEC, stream(*events, *ends("tool_use")))
    assert [(call.id, call.name, dict(call.arguments)) for call in response.tool_calls] == [
        ("c", "now", {}),
        ("call_1", "then", {}),
    ]
    same = CODEC.decode(
        json.dumps(whole([{"toolUse": {"toolUseId": "c", "name": "now"}}, {"toolUse": {"name": "then"}}])).encode()
    )
    assert same.tool_calls == response.tool_calls


def test_calls_that_were_cut_off() -> None:
    """A call at the length limit reports that its arguments are broken; the service's own goes back with its text."""
    cut = [delta(0, "toolUse", {"input": '{"ci'}), *ends("max_tokens")]
    response = streamed(CODEC, stream(start(0, "toolUse", {"toolUseId": "c", "name": "now"}), *cut))
    (call,) = response.tool_calls
    assert (response.finish_reason, call.raw_arguments) == ("length", '{"ci')
    assert call.error is not None
    own = {"toolUseId": "s", "name": "search", "type": "server_tool_use"}
    response = streamed(CODEC, stream(start(0, "toolUse", own), *cut))
    assert sent_back(response) == [{"toolUse": {**own, "input": {"INVALID_JSON": '{"ci'}}}]


def test_data_in_pieces() -> None:
    """Each piece of an image or of redacted reasoning is base64 of its own. Other text is joined as it is."""
    redacted = [delta(0, "reasoningContent", {"redactedContent": piece}) for piece in ("eA==", "eXo=", "dw==")]
    image = [start(1, "image", {"format": "png"})]
    image += [delta(1, "image", {"source": {"bytes": piece}}) for piece in ("iVBO", "", "Rw==")]
    odd = [delta(2, "reasoningContent", {"redactedContent": piece}) for piece in ("a-", "b_")]
    response = recut(CODEC, stream(*redacted, stop(0), *image, stop(1), *odd, *ends()))
    assert sent_back(response) == [
        {"reasoningContent": {"redactedContent": "eHl6dw=="}},
        {"image": {"format": "png", "source": {"bytes": "iVBORw=="}}},
        {"reasoningContent": {"redactedContent": "a-b_"}},
    ]
    assert response.media == (Image(data=b"\x89PNG", media_type="image/png", raw={"image": {"format": "png"}}),)


def test_redacted_reasoning_is_not_written_anew() -> None:
    """Base64 that another writer would write otherwise goes back as it came."""
    block = {"reasoningContent": {"redactedContent": "eB=="}}
    for response in (
        CODEC.decode(json.dumps(whole([block, {"text": "a"}])).encode()),
        streamed(CODEC, stream(delta(0, "reasoningContent", block["reasoningContent"]), *said("a", index=1), *ends())),
    ):
        assert sent_back(response) == [block, {"text": "a"}]


@pytest.mark.parametrize(
    "image",
    [
        {"format": "png", "error": {"message": "It failed."}},
        {"format": "png", "source": {"s3Location": {"uri": "s3://tides-bucket/a.png"}}},
        {"format": "png", "source": {"bytes": "no base64"}},
    ],
)
def test_images_without_bytes(image: dict[str, Any]) -> None:
    """An image that failed, or that lies elsewhere, stays opaque."""
    begun = start(0, "image", {"format": "png"})
    fields = {name: value for name, value in image.items() if name != "format"}
    for response in (
        CODEC.decode(json.dumps(whole([{"image": image}])).encode()),
        streamed(CODEC, stream(begun, delta(0, "image", fields), *ends())),
    ):
        assert response.opaque == (Opaque("bedrock", {"image": image}),)


def test_texts_of_a_result_in_pieces() -> None:
    """A text of the service's own tool that came in pieces is one text again."""
    pieces = [[{"text": "Fo"}], [{"text": "ur"}, {"json": {"a": 1}}], [{"text": "."}]]
    body = stream(
        start(0, "toolResult", {"toolUseId": "s"}), *(delta(0, "toolResult", each) for each in pieces), *ends()
    )
    assert sent_back(streamed(CODEC, body)) == [
        {"toolResult": {"toolUseId": "s", "content": [{"text": "Four"}, {"json": {"a": 1}}, {"text": "."}]}}
    ]


def test_long_data_costs_its_length() -> None:
    """Ten thousand pieces of an image take time for themselves rather than for a copy per piece."""
    piece = delta(0, "image", {"source": {"bytes": "iVBO" * 100}})
    body = stream(start(0, "image", {"format": "png"}), *[piece] * 10_000, *ends())
    began = time.perf_counter()
    (image,) = streamed(CODEC, body).media
    assert image.data is not None
    assert len(image.data) == 3_000_000
    assert time.perf_counter() - began < 5


# Errors in a stream

EXCEPTIONS: list[tuple[str, str, type[ProviderError], bool]] = [
    ("throttlingException", "Too many tokens, please wait before trying again.", RateLimitError, True),
    ("throttlingException", "Too many tokens per day, please wait before trying again.", QuotaExceeded, False),
    ("modelStreamErrorException", "The model stopped.", ServerError, True),
    ("internalServerException", "Oops.", ServerError, True),
    ("serviceUnavailableException", "Bedrock is unable to process your request.", Overloaded, True),
    ("validationException", "Malformed input request.", BadRequest, False),
    ("validationException", "Input is too long for requested model.", ContextLengthExceeded, False),
    ("validationException", "The model returned the following errors: prompt is too long: 9 tokens > 8 maximum", ContextLengthExceeded, False),
    ("modelTimeoutException", "The request took too long.", RequestTimeout, True),
    ("brandNewException", "No.", ServerError, True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "said_", "kind", "retryable"), EXCEPTIONS)
@pytest.mark.parametrize("before", [0, 2])
def test_exceptions(name: str, said_: str, kind: type[ProviderError], retryable: bool, before: int) -> None:
    """An exception is raised, in the middle of a stream or as its first message; earlier output is kept."""
    body = stream(*said("one ", "two")[:before])
    for message in (exception(name, {"message": said_}), aws.error(name, said_)):
        partial, error = interrupted(CODEC, body + message + stream(*ends()))
        assert type(error) is kind
        assert isinstance(error, ProviderError)
        assert (error.code, error.retryable, error.status) == (name[0].upper() + name[1:], retryable, None)
        assert said_ in str(error)
        assert partial.text == ("one two" if before else "")


def test_the_cause_of_a_model_error() -> None:
    """A model's own error may come with the status and the words of the model's server."""
    fields = {"originalStatusCode": 503, "originalMessage": "Model down.", "message": ""}
    _, error = interrupted(CODEC, exception("modelStreamErrorException", fields))
    assert isinstance(error, ServerError)
    assert (error.status, error.retryable) == (503, True)
    assert "Model down." in str(error)


@pytest.mark.parametrize("data", [b"", b"busy", b"null", b"[]", b'{"message": 7}', b'{"message": {"a": 1}}', b"\xff"])
def test_exceptions_without_words(data: bytes) -> None:
    """An exception whose payload is no JSON, or has no message, is still an error of its class."""
    partial, error = interrupted(CODEC, stream(*said("a")) + exception("throttlingException", data))
    assert type(error) is RateLimitError
    assert partial.text == "a"


def test_errors_without_a_name() -> None:
    """An error message that names nothing is still an error."""
    for message in (
        aws.error("", ""),
        aws.exception("", {}),
        aws.message([(":message-type", "error")], b""),
        aws.message([(":message-type", "exception")], b"{}"),
    ):
        _, error = interrupted(CODEC, message)
        assert type(error) is ServerError


def test_broken_payloads() -> None:
    """A known event whose payload is no JSON is an error, and the answer before it is kept."""
    for name in ("contentBlockStart", "contentBlockDelta", "contentBlockStop", "messageStop", "metadata"):
        partial, error = interrupted(CODEC, stream(*said("a")) + aws.event(name, b'{"contentBlock'))
        assert isinstance(error, StreamProtocolError)
        assert partial.text == "a"


ODD: tuple[Any, ...] = (None, True, 0, -1, 2**70, 1.5, "", "x", [], [None], {}, {"x": None}, {"text": "x"},
                        {"toolUse": {}}, {"citation": 1}, {"image": {"source": 1}})  # fmt: skip


@pytest.mark.parametrize("field", ["contentBlockIndex", "delta", "start", "stopReason", "usage", "metrics", "trace"])
def test_fields_of_any_type(field: str) -> None:
    """A field of another type than the documented one breaks no stream, in whatever event it is."""
    events = events_of([*BLOCKS, {"image": IMAGE}], "tool_use", **MORE)
    for number, (name, payload) in enumerate(events):
        for odd in ODD if field in payload else ():
            changed = [*events[:number], (name, {**payload, field: odd}), *events[number + 1 :]]
            response = streamed(CODEC, stream(*changed))
            reason = ("x" if odd == "x" else None) if field == "stopReason" else "tool_call"
            assert response.finish_reason == reason
            sent_back(response)


# HTTP errors


def failure(status: int, body: object, **headers: str) -> ProviderError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return CODEC.decode_error(status, {name.replace("_", "-"): value for name, value in headers.items()}, data)


def test_recorded_context_length() -> None:
    """A recorded prompt that was too long. The id of the request is in a header."""
    recorded = load("43-")
    error = CODEC.decode_error(recorded.status, recorded.headers, recorded.body)
    assert type(error) is ContextLengthExceeded
    assert (error.status, error.code, error.retryable) == (400, "ValidationException", False)
    assert error.request_id == "8090a430-9830-442b-a193-749569a08e0f"


def test_recorded_bad_key() -> None:
    """A recorded call with wrong credentials."""
    recorded = load("44-")
    error = CODEC.decode_error(recorded.status, recorded.headers, recorded.body)
    assert type(error) is AuthenticationError
    assert (error.status, error.code, error.retryable) == (403, "UnrecognizedClientException", False)


HTTP: list[tuple[int, str, str, type[ProviderError], bool]] = [
    (400, "ValidationException", "Malformed input request.", BadRequest, False),
    (400, "ValidationException", "The provided model identifier is invalid.", NotFound, False),
    (400, "ValidationException", "Too many input tokens. Max input tokens: 8, request input token count: 9", ContextLengthExceeded, False),
    (400, "ValidationException", "The maximum tokens you requested exceeds the model limit of 4096.", BadRequest, False),
    (400, "ServiceQuotaExceededException", "Your account has no quota.", QuotaExceeded, False),
    (403, "AccessDeniedException", "You don't have access to the model with the specified model ID.", PermissionDenied, False),
    (403, "AccessDeniedException", "User: arn:aws:iam::1:user/x is not authorized to perform: bedrock:InvokeModel", PermissionDenied, False),
    (403, "AccessDeniedException", "Authentication failed: Please make sure your API Key is valid.", AuthenticationError, False),
    (403, "AccessDeniedException", "Bearer Token has expired", AuthenticationError, False),
    (403, "ExpiredTokenException", "The security token included in the request is expired", AuthenticationError, False),
    (403, "InvalidSignatureException", "The request signature we calculated does not match", AuthenticationError, False),
    (403, "MissingAuthenticationTokenException", "Missing Authentication Token", AuthenticationError, False),
    (404, "ResourceNotFoundException", "This model version has reached the end of its life.", NotFound, False),
    (408, "ModelTimeoutException", "The model took too long.", RequestTimeout, True),
    (424, "ModelErrorException", "The model failed.", ServerError, True),
    (429, "ThrottlingException", "Too many requests, please wait before trying again.", RateLimitError, True),
    (429, "ThrottlingException", "Too many tokens per day, please wait before trying again.", QuotaExceeded, False),
    (429, "ModelNotReadyException", "Model is not ready for inference.", Overloaded, True),
    (500, "InternalServerException", "Oops.", ServerError, True),
    (500, "InternalFailure", "Oops.", ServerError, True),
    (503, "ServiceUnavailableException", "Too many connections.", Overloaded, True),
]  # fmt: skip


@pytest.mark.parametrize(("status", "name", "message", "kind", "retryable"), HTTP)
def test_errors(status: int, name: str, message: str, kind: type[ProviderError], retryable: bool) -> None:
    """Each error is of its class, wherever its name stands and however its fields are written, as boto3 reads it."""
    for body, headers in (
        ({"message": message}, {"x_amzn_errortype": name}),
        ({"message": message}, {"x_amzn_errortype": f"{name}:http://internal.amazon.com/coral/com.amazon.bedrock/"}),
        ({"Message": message}, {"x_amzn_errortype": f"{name}:"}),
        ({"message": message, "__type": f"com.amazon.coral.service#{name}"}, {}),
        ({"Message": message, "__type": name}, {}),
        ({"message": message, "code": name}, {}),
    ):
        error = failure(status, body, **headers)
        assert type(error) is kind, (body, headers)
        assert (error.status, error.code, error.retryable) == (status, name, retryable)
        assert message in str(error)
        assert code_by_boto3(status, headers, body) == (name, message)


def code_by_boto3(status: int, headers: dict[str, str], body: dict[str, Any]) -> tuple[str, str]:
    """Return the name and the message of an error as botocore reads them."""
    parsers = pytest.importorskip("botocore.parsers")
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    parser = parsers.create_parser("rest-json")
    found = parser.parse({"status_code": status, "headers": given, "body": json.dumps(body).encode()}, None)["Error"]
    return found["Code"].rpartition("#")[2], found["Message"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (401, AuthenticationError),
        (403, PermissionDenied),
        (404, NotFound),
        (408, RequestTimeout),
        (413, BadRequest),
        (424, BadRequest),
        (429, RateLimitError),
        (500, ServerError),
        (502, ServerError),
        (503, Overloaded),
        (504, RequestTimeout),
    ],
)
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "answered"),
        (b"busy now", "busy now"),
        (b"<html><title>Bad gateway</title>" + b"x" * 5_000, "an HTML page titled 'Bad gateway'"),
        (b"null", "answered"),
        (b"[1]", "answered"),
        (b'{"message": 5}', "answered"),
        (b'{"error": {"message": "from a proxy"}}', "from a proxy"),
        (b'{"message": "no name"}', "no name"),
        (b'{"Message": "no name"}', "no name"),
    ],
)
def test_errors_without_a_service_name(status: int, kind: type[ProviderError], body: bytes, said: str) -> None:
    """An error that names no exception, such as a proxy's, is of the class of its status, and says what it says."""
    error = failure(status, body)
    assert type(error) is kind
    assert said in str(error)
    assert "xxx" not in str(error)


def test_a_key_that_is_refused_without_a_name() -> None:
    """A 403 about the key is an authentication error, also if no exception is named."""
    for message in ("Authentication failed: Please make sure your API Key is valid.", "Missing Authentication Token"):
        assert type(failure(403, {"Message": message})) is AuthenticationError


def test_a_name_without_words() -> None:
    """The name in the header decides, whatever the body is."""
    for body in (b"", b"<UnknownOperationException/>", b"{}"):
        error = failure(429, body, x_amzn_errortype="ThrottlingException")
        assert type(error) is RateLimitError
        assert error.code == "ThrottlingException"


def test_when_to_try_again() -> None:
    """The service's own hint counts."""
    assert failure(429, {"message": "slow"}, x_amzn_errortype="ThrottlingException", retry_after="7").retry_after == 7


# boto3 as a second reader

READ = [pytest.param(answer, id=answer.name) for answer in ANSWERS if answer.dialect == "bedrock"]
RECORDED = ("40-", "41-", "42-", "45-")


def read_by_boto3(body: bytes, *, streaming: bool) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return the message, the stop reason and the usage that boto3 reads."""
    with (
        serving(body, EVENTS if streaming else "application/json") as address,
        closing(bedrock_client(address)) as client,
    ):
        hello: Any = [{"role": "user", "content": [{"text": "Hi"}]}]
        if not streaming:
            answer = client.converse(modelId="m", messages=hello)
            return answer["output"]["message"], answer["stopReason"], answer["usage"]
        events = list(client.converse_stream(modelId="m", messages=hello)["stream"])
        facts = {name: value for event in events for name, value in event.items()}
        return message_of_events(events), facts["messageStop"]["stopReason"], facts["metadata"]["usage"]


def check_against_boto3(body: bytes, *, streaming: bool) -> None:
    response = streamed(CODEC, body) if streaming else CODEC.decode(body)
    message, reason, usage = read_by_boto3(body, streaming=streaming)
    blocks = message["content"]
    texts = [block["text"] for block in blocks if "text" in block]
    cited = [block["citationsContent"] for block in blocks if "citationsContent" in block]
    thoughts = [block["reasoningContent"] for block in blocks if "reasoningContent" in block]
    calls = [block["toolUse"] for block in blocks if "toolUse" in block]
    ours = [(part.text, "citationsContent" in (part.raw or {})) for part in response.parts if isinstance(part, Text)]
    assert [text for text, is_cited in ours if not is_cited] == [text for text in texts if text]
    assert [text for text, is_cited in ours if is_cited] == [
        "".join(c["text"] for c in each["content"]) for each in cited
    ]
    assert response.details.get("citations", []) == [each for block in cited for each in block["citations"]]
    assert [(part.text, part.signature) for part in response.reasoning_parts or plain_reasoning(response)] == [
        (each.get("reasoningText", {}).get("text", ""), each.get("reasoningText", {}).get("signature"))
        for each in thoughts
    ]
    assert [(call.id, call.name, dict(call.arguments)) for call in response.tool_calls] == [
        (each["toolUseId"], each["name"], each["input"]) for each in calls if each.get("type") != "server_tool_use"
    ]
    assert response.raw_finish_reason == reason
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (usage["inputTokens"], usage["outputTokens"])


def plain_reasoning(response: Response) -> Iterator[Reasoning]:
    if response.reasoning:
        yield Reasoning(text=response.reasoning)


@pytest.mark.parametrize("answer", READ)
def test_boto3_reads_the_same(answer: Any) -> None:
    """boto3 finds the same texts, reasoning, calls, citations, stop reason and usage in the same bytes."""
    check_against_boto3(answer.body, streaming=answer.streaming)


@pytest.mark.parametrize("number", RECORDED)
def test_boto3_reads_the_same_recordings(number: str) -> None:
    """boto3 finds the same in recorded answers."""
    recorded = load(number)
    check_against_boto3(recorded.body, streaming=recorded.streaming)
