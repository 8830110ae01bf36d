"""The stream framings: server-sent events, NDJSON and JSON arrays, wherever the reads cut."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

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
@given(st.sampled_from(["sse", "ndjson"]), st.lists(st.binary(max_size=40), max_size=10))
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
