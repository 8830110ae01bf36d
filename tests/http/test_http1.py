"""The parser of HTTP/1.1 responses. h11 is the reference, and it makes no difference where reads cut the bytes."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings, strategies as st

from fluxibly.providers.http._http1 import MAX_FIELDS, MAX_HEAD, Answer
from fluxibly.providers.http._limits import ConnectionLost, NotHTTP

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


def parse(pieces: list[bytes]) -> tuple[int, dict[str, str], bytes, bool]:
    """Return the status, the headers, the body, and whether the connection is reusable. Raise as `Answer` does."""
    answer = Answer()
    rest = iter(pieces)
    while not answer.head(piece := next(rest, b"")):
        if not piece:
            answer.eof()
    body = [answer.body(b""), *(answer.body(piece) for piece in rest)]
    if not answer.ended:
        answer.eof()
    return answer.status, answer.headers, b"".join(body), answer.reusable


def reference(data: bytes) -> tuple[int, bytes]:
    """Return the status and the body that h11 reads."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    status, body = 0, b""
    closed = False
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return status, body
        elif event is h11.NEED_DATA:
            if closed:
                raise h11.RemoteProtocolError("cut off")
            closed = True
            connection.receive_data(b"")
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            raise h11.RemoteProtocolError("cut off")


bodies = st.lists(st.binary(min_size=1, max_size=30), max_size=5)


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Generate valid responses of every kind."""
    parts = draw(bodies)
    head = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"])) + draw(
        st.sampled_from([OK, b"HTTP/1.1 404 \r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 204 No Content\r\n"])
    )
    head += b"".join(draw(st.lists(st.sampled_from([b"X-A: b\r\n", b"Connection: close\r\n", b"Server:\r\n"]))))
    if b" 204 " in head:
        return head + b"\r\n"
    how = draw(st.sampled_from(["length", "chunked", "close"]))
    if how == "length":
        return head + b"Content-Length: %d\r\n\r\n" % len(b"".join(parts)) + b"".join(parts)
    if how == "close" or b"HTTP/1.0" in head:
        return head + b"\r\n" + b"".join(parts)
    extension = draw(st.sampled_from([b"", b";a=b", b';a="b"']))
    trailer = draw(st.sampled_from([b"", b"Sum: 1\r\n"]))
    chunks = b"".join([b"%X%b\r\n%b\r\n" % (len(part), extension, part) for part in parts])
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailer + b"\r\n"


class TestAnswer:
    @given(answers())
    def test_it_reads_what_h11_reads(self, data: bytes) -> None:
        """The status and the body are the same."""
        status, _, body, _ = parse([data])
        assert (status, body) == reference(data)

    @given(answers())
    def test_where_reads_cut_makes_no_difference(self, data: bytes) -> None:
        """The result is the same byte by byte, and with a cut at any place."""
        whole = parse([data])
        assert parse([bytes([byte]) for byte in data]) == whole
        for at in range(1, len(data)):
            assert parse([data[:at], data[at:]]) == whole

    @settings(max_examples=300)
    @given(answers(), st.data())
    def test_mutations(self, data: bytes, draw: st.DataObject) -> None:
        """Changed or lost bytes raise an error, or give a response that h11 reads alike or refuses."""
        at = draw.draw(st.integers(0, len(data) - 1))
        mutated = data[:at] + draw.draw(st.binary(max_size=3)) + data[at + draw.draw(st.integers(0, 9)) :]
        try:
            status, _, body, _ = parse([mutated])
        except (NotHTTP, ConnectionLost):
            return
        try:
            expected = reference(mutated)
        except h11.RemoteProtocolError:
            return
        assert (status, body) == expected

    @pytest.mark.parametrize("header", [b"Content-Length: 0", b"Content-Length: 5", b"Transfer-Encoding: chunked"])
    def test_the_headers_of_an_interim_response_are_not_those_of_the_final_one(self, header: bytes) -> None:
        """They neither end nor measure it. Without a final response the connection was lost."""
        interim = b"HTTP/1.1 103 Early Hints\r\n" + header + b"\r\n\r\n"
        answer = Answer()
        assert not answer.head(interim)
        assert not answer.ended
        with pytest.raises(ConnectionLost):
            answer.eof()
        assert parse([interim + OK + b"\r\nuntil the end"])[2] == b"until the end"
        assert parse([interim + OK + b"Content-Length: 2\r\n\r\nhi"]) == (200, {"content-length": "2"}, b"hi", True)

    @given(st.binary(max_size=200))
    def test_random_bytes(self, data: bytes) -> None:
        """Random bytes are refused."""
        with pytest.raises((NotHTTP, ConnectionLost)):
            parse([data])

    @pytest.mark.parametrize(
        "data",
        [
            # the status line
            b"HTTP/2 200 OK\r\n\r\n",
            b"HTTP/1.2 200 OK\r\n\r\n",
            b"http/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1  200 OK\r\n\r\n",
            b"HTTP/1.1 20 OK\r\n\r\n",
            b"HTTP/1.1 2000 OK\r\n\r\n",
            b"HTTP/1.1 +20 OK\r\n\r\n",
            b"HTTP/1.1 099 OK\r\n\r\n",
            b"HTTP/1.1 200\tOK\r\n\r\n",
            b"HTTP/1.1 200 O\rK\r\n\r\n",
            b"\r\nHTTP/1.1 200 OK\r\n\r\n",
            b"<html>HTTP/1.1 200 OK\r\n\r\n",
            # interim responses
            b"HTTP/1.1 101 Switching\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
            b"HTTP/1.1 103 Early Hints\r\nno colon\r\n\r\n" + OK + b"\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\nbody" + OK + b"\r\n",
            # headers
            OK + b"no colon\r\n\r\n",
            OK + b": no name\r\n\r\n",
            OK + b"sp ace: 1\r\n\r\n",
            OK + b"space : 1\r\n\r\n",
            OK + b" folded: into the status line\r\n\r\n",
            OK + b"a: \0\r\n\r\n",
            OK + b"a: b\rc: d\r\n\r\n",
            OK + b"a: b\r\r\n\r\n",
            OK + b"\xe4: b\r\n\r\n",
            OK + b"a: " + b"b" * MAX_HEAD,
            OK + b"a:\r\n" * (MAX_FIELDS + 1) + b"\r\n",
            # the length of the body
            OK + b"content-length: -1\r\n\r\n",
            OK + b"content-length: +5\r\n\r\n12345",
            OK + b"content-length: 0x5\r\n\r\n12345",
            OK + b"content-length: 5.0\r\n\r\n12345",
            OK + b"content-length: 1_0\r\n\r\n1234567890",
            OK + b"content-length: \xb2\r\n\r\n12",
            OK + b"content-length:\r\n\r\n",
            OK + b"content-length: 5,\r\n\r\n12345",
            OK + b"content-length: 1, 2\r\n\r\n",
            OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\n",
            OK + b"content-length: 9999999999999999\r\n\r\n",
            OK + b"transfer-encoding: gzip, chunked\r\n\r\n",
            OK + b"transfer-encoding: chunked, chunked\r\n\r\n",
            OK + b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n",
            OK + b"transfer-encoding: xchunked\r\ncontent-length: 2\r\n\r\nab",
            OK + b"transfer-encoding:\r\ncontent-length: 2\r\n\r\nab",
            # chunks
            CHUNKED + b"xyz\r\n",
            CHUNKED + b"-1\r\n",
            CHUNKED + b"+1\r\na\r\n",
            CHUNKED + b"0x1\r\na\r\n",
            CHUNKED + b"1_0\r\n",
            CHUNKED + b" 1\r\na\r\n",
            CHUNKED + b"1 1\r\na\r\n",
            CHUNKED + b"\r\n",
            CHUNKED + b"1\na\r\n0\r\n\r\n",
            CHUNKED + b"1;a\nb\r\na\r\n",
            CHUNKED + b"1\r\nab\r\n",
            CHUNKED + b"1\r\na\n\n",
            CHUNKED + b"f" * 16 + b"\r\n",
            CHUNKED + b"1" * 20_000,
            CHUNKED + b"1;" + b"a" * 20_000 + b"\r\na\r\n",
            # trailers
            CHUNKED + b"0\r\n" + b"a: b\r\n" * 40_000,
            CHUNKED + b"0\r\na: " + b"b" * MAX_HEAD,
            CHUNKED + b"0\r\n" + OK + b"\r\n",
        ],
    )
    def test_invalid_responses_are_refused(self, data: bytes) -> None:
        """The parser does not guess at a response that is not plainly valid."""
        with pytest.raises(NotHTTP):
            parse([data])

    @pytest.mark.parametrize(
        ("head", "body", "reusable"),
        [
            (b"content-length: 2\r\n", b"ab", True),
            (b"content-length: 2\r\n", b"abc", False),
            (b"content-length: 2\r\nConnection: Close\r\n", b"ab", False),
            (b"content-length: 0\r\n", b"", True),
            (b"content-length: 2, 2\r\n", b"ab", True),
            (b"content-length: 2\r\ncontent-length: 2\r\n", b"ab", True),
            (b"content-length: 2\r\nconnection: x, close\r\n", b"ab", False),
            (b"content-length: 2\r\nconnection: x\r\nconnection: close\r\n", b"ab", False),
            (b"content-length: 2\r\n", b"ab" + OK + b"content-length: 2\r\n\r\nxy", False),
            (b"transfer-encoding: Chunked\r\n", b"2;x=y\r\nab\r\n00\r\na: b\r\n\r\n", True),
            (b"", b"ab", False),
            (b"transfer-encoding: chunked\r\n", b"2\r\nab\r\n0\r\n\r\n", True),
            (b"transfer-encoding: chunked\r\n", b"2\r\nab\r\n0\r\n\r\nHTTP/1.1", False),
            (b"transfer-encoding: chunked\r\ncontent-length: 2\r\n", b"2\r\nab\r\n0\r\n\r\n", False),
        ],
    )
    def test_when_a_connection_is_used_again(self, head: bytes, body: bytes, reusable: bool) -> None:
        """A connection is reusable only after a response whose end is beyond doubt."""
        assert parse([OK + head + b"\r\n" + body])[2:] == (b"ab" if b"ab" in body else b"", reusable)

    def test_repeated_and_folded_headers(self) -> None:
        """Repeated headers are joined. A folded header becomes a single line."""
        _, headers, _, _ = parse([OK + b"A: 1\r\nB: x\r\n\t y \r\na: 2\r\n\r\n"])
        assert headers == {"a": "1, 2", "b": "x y"}

    @pytest.mark.parametrize(
        ("data", "reusable"),
        [
            (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nab", False),
            (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nab", True),
            (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", False),
            (b"HTTP/1.1 204 No Content\r\n\r\n", True),
            (b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\n", False),
            (b"HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n", False),
            (b"HTTP/1.1 304 Not Modified\r\n\r\nab", False),
            (
                b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + CHUNKED + b"0\r\n\r\n",
                True,
            ),
        ],
    )
    def test_old_servers_and_responses_without_a_body(self, data: bytes, reusable: bool) -> None:
        """HTTP/1.0 has to request reuse. A body where HTTP forbids a body prevents reuse."""
        assert parse([data])[3] is reusable

    def test_a_huge_chunk_takes_no_memory(self) -> None:
        """The data of a chunk is returned as it arrives."""
        answer = Answer()
        assert answer.head(CHUNKED)
        assert answer.body(b"fffffffffffffff\r\nabc") == b"abc"
        assert answer.body(b"def") == b"def"
        with pytest.raises(ConnectionLost):
            answer.eof()

    def test_a_cut_response_is_an_error(self) -> None:
        """A response may be cut in a body with a length, in a chunked body, or in the head."""
        for data in (OK + b"content-length: 3\r\n\r\nab", CHUNKED + b"2\r\nab\r\n0\r\n", OK[:-4]):
            with pytest.raises(ConnectionLost) as caught:
                parse([data])
            assert not caught.value.silent
