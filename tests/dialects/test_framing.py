"""The stream framings: server-sent events, NDJSON, JSON arrays and AWS event streams, wherever the reads cut."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from support import aws

from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.codec import Event, Framing
from fluxibly.providers.dialects.framing import make_framing


def read(framing: Framing, *reads: bytes, limit: int = 1_000_000) -> list[Event]:
    stream = make_framing(framing, limit=limit)
    events = [event for data in reads for event in stream.feed(data)]
    return events + stream.close()


def recut(framing: Framing, body: bytes, limit: int = 1_000_000) -> list[Event]:
    """Return the events of a body, after a check that every cut gives the same events."""
    expected = read(framing, body, limit=limit)
    for place in range(len(body) + 1):
        assert read(framing, body[:place], body[place:], limit=limit) == expected, place
    assert read(framing, *[body[i : i + 1] for i in range(len(body))], limit=limit) == expected
    return expected


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b"data: a\n\ndata: b\n\n", [Event(b"a"), Event(b"b")]),
        (b"data:a\n\ndata:  b\n\n", [Event(b"a"), Event(b" b")]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [Event(b"a"), Event(b"b")]),
        (b"data: a\r\rdata: b\r\r", [Event(b"a"), Event(b"b")]),
        (b"data: a\r\n\ndata: b\n\r\n", [Event(b"a"), Event(b"b")]),
        (b"data: a\ndata: b\ndata\n\n", [Event(b"a\nb\n")]),
        (b"\xef\xbb\xbfdata: a\n\n", [Event(b"a")]),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
        (b": hello\n\n:\n\ndata: a\n: in between\ndata: b\n\n", [Event(b"a\nb")]),
        (b"event: error\ndata: a\n\ndata: b\n\n", [Event(b"a", "error"), Event(b"b")]),
        (b"data: a\nevent: late\n\n", [Event(b"a", "late")]),
        (b"event: alone\n\ndata: a\n\n", [Event(b"a")]),
        (b"event:x\nid: 7\nretry: 10\ndata: a\nunknown: field\n\n", [Event(b"a", "x")]),
        (b"event: one\nevent: two\ndata: a\n\n", [Event(b"a", "two")]),
        (b"data\n\n", [Event(b"")]),
        (b"data: a: b\n\n", [Event(b"a: b")]),
        (b"\n\n\ndata: a\n\n\n\n", [Event(b"a")]),
        (b"data: a\n\ndata: last", [Event(b"a"), Event(b"last")]),
        (b"data: a\n\nevent: e\ndata: last\n", [Event(b"a"), Event(b"last", "e")]),
        ("data: grüße €😀\n\n".encode(), [Event("grüße €😀".encode())]),
        (b"", []),
        (b"\xef\xbb", []),
    ],
)
def test_sse_follows_the_specification(body: bytes, events: list[Event]) -> None:
    """Every rule of WHATWG's section on interpreting an event stream holds, wherever the reads are cut."""
    assert recut("sse", body) == events


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b'data: a\n\n{"error": 1}\n', [Event(b"a"), Event(b'{"error": 1}')]),
        (b'{\n  "error": {\n    "code": 400\n  }\n}\n', [Event(b'{\n  "error": {\n    "code": 400\n  }\n}')]),
        (b'[{"error": 1}]', [Event(b'[{"error": 1}]')]),
        (b'data: a\n{"error": 1}\n\ndata: b\n\n', [Event(b"a"), Event(b'{"error": 1}'), Event(b"b")]),
        (b'{"error": 1}\ndata: b\n\n', [Event(b'{"error": 1}'), Event(b"b")]),
        (b'event: error\n  {"error": 1}\n\n', [Event(b'  {"error": 1}', "error")]),
        (b'{"error":\n: ping\ndata: b\n\n', [Event(b'{"error":'), Event(b"b")]),
    ],
)
def test_json_outside_of_any_field_is_an_event(body: bytes, events: list[Event]) -> None:
    """The codec sees errors that services send without `data:`, after events or instead of them."""
    assert recut("sse", body) == events


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b'data: a\n\nerror: {"b": 1}\n\ndata: c\n\n', [Event(b"a"), Event(b'{"b": 1}', "error"), Event(b"c")]),
        (b"error:{}", [Event(b"{}", "error")]),
        (b"error: no\ndata: c\n\n", [Event(b"no", "error"), Event(b"c")]),
        (b"event: x\ndata: a\nerror: {}\n\n", [Event(b"a", "x"), Event(b"{}", "error")]),
        (b'{"a": 1}\nerror: {}\n\n', [Event(b'{"a": 1}'), Event(b"{}", "error")]),
        (b"event: error\n\ndata: a\n\n", [Event(b"", "error"), Event(b"a")]),
        (b"event: error\ndata:\n\n", [Event(b"", "error")]),
        (b"data: a\n\nevent: error", [Event(b"a"), Event(b"", "error")]),
        (b"errors: {}\n\n", []),
    ],
)
def test_an_error_is_never_dropped(body: bytes, events: list[Event]) -> None:
    """A field `error` is an event of that name, as older llama.cpp sends it, and such an event may lack data."""
    assert recut("sse", body) == events


LINES = st.sampled_from(
    [
        b"data: a",
        b"data:b",
        b"data",
        b"event: e",
        b": c",
        b"",
        b"id: 1",
        b'{"x": 1}',
        b"junk",
        b" ",
        b"error: e",
        b"event: error",
    ]
)


@settings(deadline=None)
@given(st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r", b"\r\n"]))), st.lists(st.integers(0, 200)))
def test_any_sse_is_the_same_however_cut(lines: list[tuple[bytes, bytes]], places: list[int]) -> None:
    """Random lines with random ends give the same events, whatever the cuts and the line ends."""
    body = b"".join(line + end for line, end in lines)
    edges = [0, *sorted(place for place in places if place < len(body)), len(body)]
    reads = [body[a:b] for a, b in pairwise(edges)]
    assert read("sse", *reads) == read("sse", body) == read("sse", body.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b'{"a":1}\n{"b":2}\n', [Event(b'{"a":1}'), Event(b'{"b":2}')]),
        (b'{"a":1}\r\n\r\n  \n{"b":2}', [Event(b'{"a":1}'), Event(b'{"b":2}')]),
        (b'\xef\xbb\xbf{"a":1}\n', [Event(b'{"a":1}')]),
        (b"", []),
    ],
)
def test_ndjson_is_an_event_a_line(body: bytes, events: list[Event]) -> None:
    """Each line is an event. Blank lines are skipped, and the last line may be unterminated."""
    assert recut("ndjson", body) == events


@pytest.mark.parametrize(
    ("framing", "first", "body"),
    [
        ("sse", b"data: a\n\n", b"data: " + b"x" * 200),
        ("sse", b"data: a\n\n", b"data: " + b"x" * 200 + b"\n\n"),
        ("sse", b"data: a\n\n", b"data: 0123456789\n" * 20 + b"\n"),
        ("sse", b"data: a\n\n", b'{"error": 1\n' * 20),
        ("sse", b"data: a\n\n", b": " + b"x" * 200 + b"\n\n"),
        ("sse", b"data: a\n\n", b"event: " + b"x" * 200 + b"\ndata: b\n\n"),
        ("ndjson", b"{}\n", b"x" * 200),
        ("ndjson", b"{}\n", b"x" * 200 + b"\n"),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_a_line_or_event_over_the_limit_is_an_error(framing: Framing, first: bytes, body: bytes, step: int) -> None:
    """Events before an oversized line or event are delivered, and the error is not retryable."""
    stream = make_framing(framing, limit=100)
    events: list[Event] = []
    whole = first + body

    def read_all() -> None:
        for i in range(0, len(whole), step):
            events.extend(stream.feed(whole[i : i + step]))
        events.extend(stream.close())

    with pytest.raises(StreamProtocolError, match="more than 100 bytes") as caught:
        read_all()
    assert not caught.value.retryable
    assert len(events) == 1


@pytest.mark.parametrize(("framing", "first"), [("sse", b"data: a\n\n"), ("ndjson", b"{}\n")])
def test_an_error_stays(framing: Framing, first: bytes) -> None:
    """After an error, every later call raises it again, and no more data is read."""
    stream = make_framing(framing, limit=20)
    assert len(stream.feed(first + b'{"a": "' + b"x" * 20 + b'"}\n')) == 1
    for _ in range(2):
        with pytest.raises(StreamProtocolError):
            stream.feed(first)
        with pytest.raises(StreamProtocolError):
            stream.close()


@pytest.mark.parametrize("size", [101, 200, 500])
def test_a_large_event_among_events(size: int) -> None:
    """The limit also applies in a read that holds whole events only, which are split at once."""
    stream = make_framing("sse", limit=100)
    assert stream.feed(b"data: a\n\n") == [Event(b"a")]
    with pytest.raises(StreamProtocolError, match="more than 100 bytes"):
        stream.feed(b"data: " + b"x" * size + b"\n\n")


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(("framing", "line"), [("sse", b"data: " + b"x" * 94), ("ndjson", b"x" * 100)])
def test_events_up_to_the_limit_pass(framing: Framing, line: bytes, start: bytes) -> None:
    """The limit applies to each line or event rather than to the stream, wherever the reads are cut."""
    body = start + (line + b"\n\n") * 5
    assert recut(framing, body, limit=100) == [Event(line.removeprefix(b"data: "))] * 5


def test_a_long_event_in_small_reads_costs_its_length() -> None:
    """A megabyte in small reads takes memory for itself rather than for a copy per read."""
    body = b"data: " + b"x" * 1_000_000 + b"\n\n"
    stream = make_framing("sse")
    tracemalloc.start()
    events = [event for i in range(0, len(body), 1_000) for event in stream.feed(body[i : i + 1_000])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert events == [Event(b"x" * 1_000_000)]
    assert peak < 6_000_000


@settings(deadline=None)
@given(st.sampled_from(["sse", "ndjson", "aws"]), st.lists(st.binary(max_size=40), max_size=10))
def test_random_bytes_give_events_or_an_error(framing: Framing, reads: list[bytes]) -> None:
    """Random bytes raise only fluxibly's exception, and the result does not depend on the cuts."""

    def outcome(*reads: bytes) -> object:
        stream = make_framing(framing)
        events: list[Event] = []
        try:
            for data in reads:
                events += stream.feed(data)
            events += stream.close()
        except StreamProtocolError:
            return events, "error"
        return events, None

    assert outcome(*reads) == outcome(b"".join(reads))


# AWS event streams

HELLO = aws.stream(("a", {"x": 1}), ("b", {"y": "é"}))
EVENTS = [Event(b'{"x": 1}', "a"), Event(b'{"y": "\\u00e9"}', "b")]


def broken(body: bytes, *cuts: int, limit: int = 1_000_000) -> tuple[list[Event], StreamProtocolError]:
    """Return the events of a body before its error, read in pieces, and the error."""
    stream = make_framing("aws", limit=limit)
    events: list[Event] = []

    def read_all() -> None:
        for a, b in pairwise([0, *cuts, len(body)]):
            events.extend(stream.feed(body[a:b]))
        events.extend(stream.close())

    with pytest.raises(StreamProtocolError) as caught:
        read_all()
    return events, caught.value


def flipped(body: bytes, place: int) -> bytes:
    """Return a body with one bit changed."""
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]


def read_by_botocore(reads: Iterable[bytes]) -> list[Any]:
    """Return the messages that AWS's own reader finds, or raise its error."""
    from botocore.eventstream import EventStreamBuffer

    buffer = EventStreamBuffer()
    messages: list[Any] = []
    for data in reads:
        buffer.add_data(data)
        messages.extend(buffer)
    return messages


def as_event(message: Any) -> Event:
    """Return the event of a message as botocore reads it: strings are str there, and other values are not."""
    headers = {name: value for name, value in message.headers.items() if isinstance(value, str)}
    kind = headers.get(":message-type")
    if kind == "exception":
        return Event(message.payload, f"exception:{headers.get(':exception-type', '')}")
    if kind == "error":
        return Event(headers.get(":error-message", "").encode(), f"error:{headers.get(':error-code', '')}")
    return Event(message.payload, headers.get(":event-type", ""))


@st.composite
def aws_messages(draw: st.DrawFn) -> bytes:
    """Draw a valid message with headers of any type."""
    names = st.sampled_from(
        [":event-type", ":message-type", ":exception-type", ":error-code", ":error-message", "x", ""]
    )
    headers = b""
    for name in draw(st.lists(names, max_size=5, unique=True)):
        kind = draw(st.sampled_from([*aws.TYPES, aws.TEXT, aws.TEXT]))
        size = aws.TYPES[kind]
        data = draw(st.binary(min_size=size or 0, max_size=20 if size is None else size))
        if kind == aws.TEXT:
            data = draw(st.sampled_from(["event", "exception", "error", "throttlingException", "é", ""])).encode()
        headers += aws.header(name, kind, data)
    return aws.framed(headers, draw(st.binary(max_size=30)))


class TestAWSEventStreams:
    def test_each_message_is_an_event(self) -> None:
        """A message is an event with its name and its payload, wherever the reads are cut."""
        assert recut("aws", HELLO) == EVENTS

    def test_no_messages(self) -> None:
        """An empty stream has no events. Whether it may be empty is the codec's matter."""
        assert recut("aws", b"") == []

    def test_exceptions_and_errors(self) -> None:
        """A message that reports an error is an event whose name says so. An error has its text in a header."""
        body = aws.exception("throttlingException", {"message": "slow"}) + aws.error("InternalFailure", "Oops é")
        assert recut("aws", body) == [
            Event(b'{"message": "slow"}', "exception:throttlingException"),
            Event("Oops é".encode(), "error:InternalFailure"),
        ]

    def test_the_smallest_message(self) -> None:
        """A message may have neither headers nor a payload."""
        assert recut("aws", aws.framed(b"", b"") * 2) == [Event(b""), Event(b"")]

    @pytest.mark.parametrize("kind", aws.TYPES)
    def test_headers_of_every_type(self, kind: int) -> None:
        """Headers of other types than strings, and unknown headers, are passed over, before and after the known ones."""
        size = aws.TYPES[kind]
        other = aws.header("x-é", kind, b"\xff" * (3 if size is None else size) if kind != aws.TEXT else b"odd")
        name = aws.header(":event-type", aws.TEXT, b"a")
        assert recut("aws", aws.framed(other + name + other, b"1")) == [Event(b"1", "a")]
        # The name of an event is a string, and a header of another type is no name.
        assert recut("aws", aws.framed(other.replace(b"\x04x-\xc3\xa9", b"\x0b:event-type"), b"")) == [
            Event(b"", "odd" if kind == aws.TEXT else "")
        ]

    @settings(deadline=None)
    @given(st.lists(aws_messages(), max_size=4), st.lists(st.integers(0, 200)))
    def test_botocore_reads_the_same(self, messages: list[bytes], places: list[int]) -> None:
        """AWS's own reader finds the same messages in the same bytes, however the reads are cut."""
        pytest.importorskip("botocore")
        body = b"".join(messages)
        edges = [0, *sorted(place for place in places if place < len(body)), len(body)]
        reads = [body[a:b] for a, b in pairwise(edges)]
        assert read("aws", *reads) == [as_event(each) for each in read_by_botocore(reads)]

    @pytest.mark.parametrize("place", range(len(HELLO)))
    def test_every_changed_bit_is_an_error(self, place: int) -> None:
        """A checksum finds a change anywhere. Events before the message are delivered, and botocore agrees."""
        body = HELLO + flipped(HELLO, place)
        events, error = broken(body)
        second = place >= len(HELLO) - len(aws.event("b", {"y": "é"}))
        assert events == EVENTS + EVENTS[: 1 if second else 0]
        assert "checksum" in str(error)
        assert error.retryable
        botocore = pytest.importorskip("botocore.eventstream")
        with pytest.raises(botocore.ParserError):
            read_by_botocore([body])

    @pytest.mark.parametrize("end", range(1, len(HELLO)))
    def test_the_end_within_a_message(self, end: int) -> None:
        """A stream that ends within a message was cut off. The messages before the end are delivered."""
        first = len(aws.event("a", {"x": 1}))
        if end == first:
            assert read("aws", HELLO[:end]) == EVENTS[:1]
            return
        events, error = broken(HELLO[:end])
        assert events == EVENTS[: end > first]
        assert "cut off" in str(error)

    @pytest.mark.parametrize(
        ("message", "said"),
        [
            (aws.framed(b"", b"", length=15), "headers"),
            (aws.framed(b"", b"", length=0), "headers"),
            (aws.framed(b"", b"1234", room=5), "headers"),
            (aws.framed(b"", b"", room=2**32 - 1), "headers"),
            (aws.framed(b"x" * 131_073, b""), "headers"),
            (aws.framed(b"\x0b", b""), "cut off"),
            (aws.framed(b"\x01a", b""), "cut off"),
            (aws.framed(b"\x01a\x07\x00", b""), "cut off"),
            (aws.framed(b"\x01a\x07\x00\x02b", b""), "cut off"),
            (aws.framed(b"\x01a\x05\x00", b""), "cut off"),
            (aws.framed(b"\x01a\x09" + bytes(15), b"1"), "cut off"),
            (aws.framed(b"\x01a\x0a", b""), "a header type from 0 to 9"),
            (aws.framed(b"\x01a\xff", b""), "a header type from 0 to 9"),
        ],
        ids=repr,
    )
    def test_impossible_messages(self, message: bytes, said: str) -> None:
        """Lengths and headers that cannot be right are errors, although the checksums are right."""
        for cuts in ((), (len(HELLO),), (len(HELLO) + 12,), range(1, len(HELLO) + min(len(message), 40))):
            events, error = broken(HELLO + message + HELLO, *cuts)
            assert events == EVENTS
            assert said in str(error)

    @pytest.mark.parametrize("body", [b"<html><title>busy</title></html>", b'{"message": "busy"}', b"\x00" * 12, b"hi"])
    def test_what_is_no_event_stream(self, body: bytes) -> None:
        """A page or JSON in place of a stream is an error, also if it is shorter than the start of a message."""
        events, error = broken(body, 1, 2)
        assert events == []
        assert error.retryable
        assert "html" not in str(error)

    def test_a_message_up_to_the_limit(self) -> None:
        """The limit applies to each message, with its headers and checksums, rather than to the stream."""
        message = aws.event("a", b"x" * 100)
        assert recut("aws", message * 5, limit=len(message)) == [Event(b"x" * 100, "a")] * 5
        for cuts in ((), (len(message),), (len(message) + 12,)):
            events, error = broken(message + aws.event("a", b"x" * 101), *cuts, limit=len(message))
            assert events == [Event(b"x" * 100, "a")]
            assert f"more than {len(message):,} bytes" in str(error)
            assert not error.retryable

    def test_many_kinds_of_headers(self) -> None:
        """Each message has its own headers, however many kinds there are, and they take no memory after it."""
        names = [f"{number:04d}" + "x" * 400 for number in range(2_000)]
        stream = make_framing("aws")
        assert stream.feed(aws.event("a", 1) * 2) == [Event(b"1", "a")] * 2
        tracemalloc.start()
        for name in names:
            assert stream.feed(aws.event(name, 1) * 2 + aws.exception(name, 2)) == [
                *[Event(b"1", name)] * 2,
                Event(b"2", f"exception:{name}"),
            ]
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert kept < 200_000

    def test_the_limit_applies_before_the_message_is_read(self) -> None:
        """The length that a message claims is refused at once, before anything of the message is kept."""
        stream = make_framing("aws")
        with pytest.raises(StreamProtocolError, match="more than 16,777,216 bytes"):
            stream.feed(aws.framed(b"", b"", length=16 * 1024 * 1024 + 1)[:12])

    def test_an_error_stays(self) -> None:
        """After an error, every later call raises it again, and no more data is read."""
        stream = make_framing("aws")
        assert stream.feed(HELLO + flipped(HELLO, 3)) == EVENTS
        for _ in range(2):
            with pytest.raises(StreamProtocolError, match="checksum"):
                stream.feed(HELLO)
            with pytest.raises(StreamProtocolError, match="checksum"):
                stream.close()

    @pytest.mark.parametrize("step", [1_000, 65_536])
    def test_a_long_message_in_small_reads_costs_its_length(self, step: int) -> None:
        """Four megabytes in small reads take memory for themselves rather than for a copy per read."""
        body = aws.event("a", b"x" * 4_000_000)
        stream = make_framing("aws")
        tracemalloc.start()
        events = [event for i in range(0, len(body), step) for event in stream.feed(body[i : i + step])]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [(event.name, len(event.data)) for event in events] == [("a", 4_000_000)]
        assert peak < 25_000_000
