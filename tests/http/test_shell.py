"""Both HTTP providers against a local server that misbehaves, on real sockets."""

from __future__ import annotations

import gzip
import socket
import threading
import time
import zlib
from typing import Any

import brotli
import pytest
from support.misbehaving import HEAD, Peer, Received, serve
from support.tiny import DONE, KEY, Caller, TinyCodec, ask, event

from fluxibly.config import Timeouts
from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ConnectionFailed,
    ProviderError,
    RateLimitError,
    RequestTimeout,
    ServerError,
    StreamProtocolError,
    StreamStalled,
)

SHORT = 0.2


def whole(peer: Peer, request: Received) -> None:
    peer.answer({"text": "hello"}, x_request_id="req-1", x_ratelimit_remaining_requests="9")


def streamed(peer: Peer, request: Received) -> None:
    peer.begin_stream(x_request_id="req-1", anthropic_ratelimit_tokens_remaining="7")
    peer.chunk(event("one ") + event("two "))
    peer.chunk(event("three") + DONE)
    peer.chunk("")


class TestResponses:
    def test_a_whole_response_has_the_ids_and_limits_of_its_headers(self, caller: Caller) -> None:
        """The request is sent as the codec encodes it, and the response has the facts of the headers."""
        with serve(whole) as server:
            response = caller.complete(server.url)
        assert response.text == "hello"
        assert response.request_id == "req-1"
        assert response.rate_limits == {"x-ratelimit-remaining-requests": "9"}
        request = server.requests[0]
        assert (request.method, request.target, request.json["prompt"]) == ("POST", "/v1/chat", "hi")
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.headers["content-type"] == "application/json"

    def test_the_first_chunk_has_the_ids_and_limits_of_the_headers(self, caller: Caller) -> None:
        """Only the first chunk of a stream has the facts of the headers."""
        with serve(streamed) as server:
            assert caller.stream(server.url) == "one two three"
        assert [chunk.request_id for chunk in caller.got] == ["req-1", None, None]
        assert caller.got[0].rate_limits == {"anthropic-ratelimit-tokens-remaining": "7"}

    def test_calls_share_a_connection(self, caller: Caller) -> None:
        """Calls one after the other, whole or streamed, need a single connection."""
        with serve(streamed) as server:
            caller.stream(server.url, times=4)
            assert (server.connections, len(server.requests)) == (1, 4)
        with serve(whole) as server:
            caller.complete(server.url, times=4)
            assert (server.connections, len(server.requests)) == (1, 4)

    def test_a_response_that_ends_with_the_connection(self, caller: Caller) -> None:
        """Without a length and without chunks, the end of the connection is the end of the body."""

        def script(peer: Peer, request: Received) -> None:
            peer.send(HEAD + b'\r\n{"text": "hello"}')
            peer.close()

        with serve(script) as server:
            assert caller.complete(server.url, times=2).text == "hello"

    @pytest.mark.usefixtures("patient")
    def test_interim_responses_and_trailers_are_skipped(self, caller: Caller) -> None:
        """The responses 100 and 103 before the response are skipped, and so are the trailers after it."""

        def script(peer: Peer, request: Received) -> None:
            peer.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
            peer.begin_stream()
            peer.chunk(event("hello") + DONE)
            peer.send(b"0\r\nchecksum: 1\r\n\r\n")

        with serve(script) as server:
            assert caller.stream(server.url, times=2) == "hello"
            assert server.connections == 1

    def test_headers_of_the_request_are_added(self, caller: Caller) -> None:
        """The request's headers are sent, and replace the provider's headers of the same name."""
        request = ask(headers={"Traceparent": "00-1-2-01", "User-Agent": "mine"})
        with serve(whole) as server:
            caller.complete(server.url, request=request)
        assert server.requests[0].headers["traceparent"] == "00-1-2-01"
        assert server.requests[0].headers["user-agent"] == "mine"

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("x-a", "1\r\nx-b: 2"),
            ("x-a", "1\nx-b: 2"),
            ("x-a", "1\r"),
            ("x-a", "\0"),
            ("x-a", "\x7f"),
            ("x-a", "\u4e2d"),
            ("x-a", "a\u010db"),  # its low byte alone would be a carriage return
            ("x a", "1"),
            ("x-a\r\nx-b", "1"),
            ("x-ä", "1"),
            ("", "1"),
            ("Content-Length", "5"),
            ("transfer-encoding", "chunked"),
        ],
    )
    def test_headers_that_are_refused(self, caller: Caller, name: str, value: str) -> None:
        """A header cannot start a second header, and cannot set where the request ends. Nothing is sent."""
        with serve(whole) as server:
            with pytest.raises(BadRequest, match=r"cannot be se[nt]"):
                caller.complete(server.url, request=ask(headers={name: value}))
            assert server.connections == 0

    def test_a_header_outside_ascii(self, caller: Caller) -> None:
        """Characters of latin-1 are sent as latin-1."""
        with serve(whole) as server:
            caller.complete(server.url, request=ask(headers={"x-title": " café "}))
            assert server.requests[0].headers["x-title"] == "café"

    def test_json_instead_of_a_stream(self, caller: Caller) -> None:
        """The whole response of a server that does not stream arrives as a single chunk."""

        def script(peer: Peer, request: Received) -> None:
            peer.answer({"text": "hello"}, content_type="application/json; charset=utf-8")

        with serve(script) as server:
            assert caller.stream(server.url) == "hello"
            assert len(caller.got) == 1

    def test_events_with_the_content_type_of_json(self, caller: Caller) -> None:
        """A wrong content type does not hide the events."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream("application/json")
            peer.chunk("\n")
            peer.chunk(event("hello") + DONE)
            peer.chunk("")

        with serve(script) as server:
            assert caller.stream(server.url) == "hello"

    def test_chunks_before_an_error_are_delivered(self, caller: Caller) -> None:
        """The chunks are delivered even if they arrive in the same read as the error."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("one ") + event("two") + 'data: {"error": "overloaded"}\n\n' + event("never"))

        with serve(script) as server, pytest.raises(ServerError, match="overloaded") as caught:
            caller.stream(server.url)
        assert caller.text == "one two"
        assert (caught.value.provider, caught.value.model) == ("tiny", "tiny-1")


class TestLimits:
    def check(self, caught: pytest.ExceptionInfo[RequestTimeout], phase: str) -> None:
        assert caught.value.phase == phase
        assert f"within {SHORT:g} s" in str(caught.value)
        assert f"timeout.{phase}" in str(caught.value)
        assert isinstance(caught.value, TimeoutError)
        assert (caught.value.provider, caught.value.retryable) == ("tiny", True)

    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_no_head(self, caller: Caller, method: str) -> None:
        """A silent server exceeds the limit on the first byte."""
        with (
            serve(lambda peer, request: peer.wait_for_end()) as server,
            pytest.raises(RequestTimeout) as caught,
        ):
            getattr(caller, method)(server.url, timeout=Timeouts(first_byte=SHORT))
        self.check(caught, "first_byte")

    def test_a_head_byte_by_byte(self, caller: Caller) -> None:
        """The limit applies however many reads the head takes."""
        with (
            serve(lambda peer, request: peer.trickle(HEAD + b"x-a: b\r\n" * 100)) as server,
            pytest.raises(RequestTimeout) as caught,
        ):
            caller.complete(server.url, timeout=Timeouts(first_byte=SHORT))
        self.check(caught, "first_byte")

    def test_an_idle_stream(self, caller: Caller) -> None:
        """A stream that stops raises an error of its own class."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("one"))
            peer.wait_for_end()

        with serve(script) as server, pytest.raises(StreamStalled) as caught:
            caller.stream(server.url, timeout=Timeouts(idle=SHORT))
        self.check(caught, "idle")
        assert caller.text == "one"

    def test_an_idle_body(self, caller: Caller) -> None:
        """A whole response that stops half-way is not a stalled stream."""

        def script(peer: Peer, request: Received) -> None:
            peer.send(HEAD + b"content-length: 100\r\n\r\n{")
            peer.wait_for_end()

        with serve(script) as server, pytest.raises(RequestTimeout) as caught:
            caller.complete(server.url, timeout=Timeouts(idle=SHORT))
        self.check(caught, "idle")
        assert type(caught.value) is RequestTimeout

    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_a_body_byte_by_byte(self, caller: Caller, method: str) -> None:
        """A byte now and then does not extend the total limit."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            while True:
                peer.trickle(b"1\r\n \r\n")

        with serve(script) as server, pytest.raises(RequestTimeout) as caught:
            getattr(caller, method)(server.url, timeout=Timeouts(total=SHORT, idle=5))
        self.check(caught, "total")

    def test_a_number_limits_a_whole_response_but_not_a_stream(self, caller: Caller) -> None:
        """`timeout=0.2` is the total limit of a whole response. A stream may take longer."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            for _ in range(6):
                peer.trickle(b"1\r\n\n\r\n", 0.01)
            peer.chunk(event("hello") + DONE if request.json["stream"] else '{"text": "hello"}')
            peer.chunk("")

        with serve(script) as server:
            assert caller.stream(server.url, timeout=SHORT) == "hello"
            with pytest.raises(RequestTimeout) as caught:
                caller.complete(server.url, timeout=SHORT)
        self.check(caught, "total")

    def test_an_error_whose_body_comes_byte_by_byte(self, caller: Caller) -> None:
        """The error has the part of the body that arrived within the idle limit."""

        def script(peer: Peer, request: Received) -> None:
            peer.send(b"HTTP/1.1 503 No\r\ncontent-length: 1000\r\n\r\nnot now")
            peer.trickle(b"." * 900, 0.01)

        with serve(script) as server, pytest.raises(ServerError, match="status 503: not now"):
            caller.stream(server.url, timeout=Timeouts(idle=SHORT))

    def test_a_slow_handshake(self, caller: Caller) -> None:
        """TLS counts as connecting."""
        with socket.create_server(("127.0.0.1", 0)) as listener:  # it accepts connections, and sends nothing
            port = listener.getsockname()[1]
            with pytest.raises(RequestTimeout) as caught:
                caller.complete(f"https://127.0.0.1:{port}", timeout=Timeouts(connect=SHORT))
        self.check(caught, "connect")


class TestCutOff:
    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_a_wrong_content_length(self, caller: Caller, method: str) -> None:
        """A body shorter than its content-length is an error."""

        def script(peer: Peer, request: Received) -> None:
            peer.send(HEAD + b'content-length: 1000\r\n\r\n{"text": "hello"}')
            peer.close()

        with serve(script) as server, pytest.raises(StreamProtocolError, match="in the middle of its response"):
            getattr(caller, method)(server.url)

    @pytest.mark.parametrize("length", [5, 500])
    def test_a_content_length_beside_chunks(self, caller: Caller, length: int) -> None:
        """The chunks say where the body ends, whatever the length says."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream("application/json", content_length=str(length))
            peer.chunk('{"text": "hello"}')
            peer.chunk("")

        with serve(script) as server:
            assert caller.complete(server.url).text == "hello"

    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_chunks_without_an_end(self, caller: Caller, method: str) -> None:
        """A chunked body has to end with its last chunk."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("hello") if request.json["stream"] else '{"text": "hello"}')
            peer.close()

        with serve(script) as server, pytest.raises(StreamProtocolError, match="in the middle of its response"):
            getattr(caller, method)(server.url)

    def test_a_reset_within_a_chunk(self, caller: Caller) -> None:
        """A reset is a failed connection. The chunks before it are delivered."""
        came = threading.Event()

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("one"))
            came.wait(5)
            peer.send(b"40\r\ndata: ")
            peer.reset()

        with serve(script) as server:
            caller.got = Noting(came)
            with pytest.raises((ConnectionFailed, StreamProtocolError)):
                caller.stream(server.url)
        assert caller.text == "one"

    def test_a_connection_closed_without_a_response(self, caller: Caller) -> None:
        """On a new connection that is an error, and the request is not sent again."""
        with serve(lambda peer, request: peer.close()) as server:
            with pytest.raises(ConnectionFailed, match="without a response"):
                caller.complete(server.url)
            assert len(server.requests) == 1

    def test_a_connection_closed_between_calls(self, caller: Caller) -> None:
        """An idle connection that the server has closed is replaced."""

        def script(peer: Peer, request: Received) -> None:
            whole(peer, request)
            peer.close()

        with serve(script) as server:
            assert caller.complete(server.url, times=3).text == "hello"
            assert (server.connections, len(server.requests)) == (3, 3)

    def test_a_connection_closed_under_the_next_request(self, caller: Caller) -> None:
        """The request is sent again, on a new connection, because no byte of a response had arrived."""

        def script(peer: Peer, request: Received) -> None:
            if len(server.requests) == 2:
                peer.close()
            else:
                whole(peer, request)

        with serve(script) as server:
            assert caller.complete(server.url, times=2).text == "hello"
            assert (server.connections, len(server.requests)) == (2, 3)

    @pytest.mark.parametrize("together", [True, False])
    def test_a_second_response_is_discarded(self, caller: Caller, together: bool) -> None:
        """After a second response, in the same read or later, the next call uses another connection."""
        sent = threading.Event()

        def script(peer: Peer, request: Received) -> None:
            smuggled = HEAD + b'content-length: 17\r\n\r\n{"text": "wrong"}'
            answer = HEAD + b'content-length: 17\r\n\r\n{"text": "hello"}'
            peer.send(answer + smuggled if together else answer)
            peer.send(b"" if together else smuggled)
            sent.set()

        caller.between = lambda: sent.wait(5)
        with serve(script) as server:
            assert caller.complete(server.url, times=2).text == "hello"
            assert (server.connections, len(server.requests)) == (2, 2)

    def test_a_request_is_sent_again_only_once(self, caller: Caller) -> None:
        """A server that closes the new connection as well causes an error."""

        def script(peer: Peer, request: Received) -> None:
            if len(server.requests) > 1:
                peer.close()
            else:
                whole(peer, request)

        with serve(script) as server:
            with pytest.raises(ConnectionFailed):
                caller.complete(server.url, times=2)
            assert len(server.requests) == 3

    def test_a_request_is_not_sent_again_after_a_byte_of_a_response(self, caller: Caller) -> None:
        """A reused connection that ends within the head is an error."""

        def script(peer: Peer, request: Received) -> None:
            if len(server.requests) > 1:
                peer.send(b"HTTP/1.1 2")
                peer.close()
            else:
                whole(peer, request)

        with serve(script) as server:
            with pytest.raises(StreamProtocolError):
                caller.complete(server.url, times=2)
            assert len(server.requests) == 2


class Noting(list[Any]):
    """A list that sets an event when an item is appended."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def append(self, item: Any) -> None:
        super().append(item)
        self.event.set()


COMPRESS = {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress}


class TestEncodings:
    @pytest.mark.parametrize("encoding", COMPRESS)
    def test_a_whole_response(self, caller: Caller, encoding: str) -> None:
        """The encoding is accepted in the request, and the response is decompressed."""

        def script(peer: Peer, request: Received) -> None:
            assert encoding in request.headers["accept-encoding"]
            peer.answer(COMPRESS[encoding](b'{"text": "hello"}'), content_encoding=encoding)

        with serve(script) as server:
            assert caller.complete(server.url).text == "hello"

    def test_a_stream_arrives_as_it_is_flushed(self, caller: Caller) -> None:
        """Each event is delivered before the server sends the next event."""
        came = threading.Event()

        def script(peer: Peer, request: Received) -> None:
            packer = zlib.compressobj(wbits=31)
            peer.begin_stream(content_encoding="gzip")
            peer.chunk(packer.compress(event("one ").encode()) + packer.flush(zlib.Z_SYNC_FLUSH))
            assert came.wait(5)
            peer.chunk(packer.compress((event("two") + DONE).encode()) + packer.flush())
            peer.chunk("")

        with serve(script) as server:
            caller.got = Noting(came)
            assert caller.stream(server.url) == "one two"

    @pytest.mark.parametrize("encoding", COMPRESS)
    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_data_that_is_cut_short(self, caller: Caller, method: str, encoding: str) -> None:
        """Missing compressed data is an error even if the content-length is right."""
        text = event("hello " * 9) if method == "stream" else '{"text": "hello"}'
        packed = COMPRESS[encoding](text.encode())[:-3]
        with (
            serve(lambda peer, request: peer.answer(packed, content_encoding=encoding)) as server,
            pytest.raises(StreamProtocolError, match="cut short"),
        ):
            getattr(caller, method)(server.url)

    @pytest.mark.parametrize("encoding", COMPRESS)
    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_a_bomb(self, caller: Caller, method: str, encoding: str) -> None:
        """A small body that expands to a huge body exceeds the limit."""
        packed = BOMBS[encoding]
        with (
            serve(lambda peer, request: peer.answer(packed, content_encoding=encoding)) as server,
            pytest.raises(StreamProtocolError, match="bytes"),
        ):
            getattr(caller, method)(server.url)

    @pytest.mark.parametrize(
        ("encoding", "pieces"),
        [
            ("gzip", [gzip.compress(b'{"text": '), gzip.compress(b'"hello"}')]),
            ("gzip", [gzip.compress(b'{"text": "hello"}') + bytes(9), bytes(9)]),
            ("deflate", [b"", *[bytes([byte]) for byte in zlib.compress(b'{"text": "hello"}')], b"rest"]),
            ("deflate", [zlib.compress(b'{"text": "hello"}', wbits=-15)]),
            ("deflate, gzip", [gzip.compress(zlib.compress(b'{"text": "hello"}'))]),
            ("gzip, identity, x-gzip, br", [brotli.compress(gzip.compress(gzip.compress(b'{"text": "hello"}')))]),
        ],
    )
    def test_what_servers_send(self, caller: Caller, encoding: str, pieces: list[bytes]) -> None:
        """Several members, padding, deflate with and without its header, and up to three encodings are read."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream("application/json", content_encoding=encoding)
            for piece in filter(None, pieces):
                peer.chunk(piece)
            peer.chunk("")

        with serve(script) as server:
            assert caller.complete(server.url).text == "hello"

    @pytest.mark.parametrize("first", [b"\x78", b"\x1f"])
    def test_a_single_byte(self, caller: Caller, first: bytes) -> None:
        """It is data that was cut short, rather than an empty body."""
        encoding = "gzip" if first == b"\x1f" else "deflate"
        with (
            serve(lambda peer, request: peer.answer(first, content_encoding=encoding)) as server,
            pytest.raises(StreamProtocolError, match="cut short"),
        ):
            caller.complete(server.url)

    def test_the_total_ends_a_bomb(self, caller: Caller) -> None:
        """A few bytes that hold very many events are no way around the total, although nothing is waited for."""

        class Slow(list[Any]):
            def append(self, item: Any) -> None:
                super().append(item)
                if len(self) == 1:
                    time.sleep(2 * SHORT)

        packed = gzip.compress((event("x" * 1000) * 1000 + DONE).encode())
        caller.got = Slow()
        with (
            serve(lambda peer, request: peer.answer(packed, content_encoding="gzip")) as server,
            pytest.raises(RequestTimeout) as caught,
        ):
            caller.stream(server.url, timeout=Timeouts(total=SHORT))
        assert caught.value.phase == "total"
        assert 0 < len(caller.got) < 200

    @pytest.mark.parametrize("encoding", ["zstd", "gzip, gzip, gzip, gzip", "gzip"])
    def test_invalid_encodings(self, caller: Caller, encoding: str) -> None:
        """An encoding that the request did not accept, too many encodings, and invalid data are errors."""
        with (
            serve(lambda peer, request: peer.answer("garbage", content_encoding=encoding)) as server,
            pytest.raises(StreamProtocolError),
        ):
            caller.complete(server.url)


BOMBS = {
    "gzip": gzip.compress(bytes(100_000_000), 9),
    "deflate": zlib.compress(bytes(100_000_000), 9),
    "br": brotli.compress(bytes(100_000_000), quality=1),
}


class TestBounds:
    def test_a_line_without_end(self, caller: Caller) -> None:
        """The limit on a line ends a gigabyte in a single line early."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk("data: ")
            for _ in range(1000):
                peer.chunk(b"x" * 1_000_000)
            server.requests.clear()  # never reached: the client has closed the connection by then

        with serve(script) as server:
            with pytest.raises(StreamProtocolError, match="bytes"):
                caller.stream(server.url)
            assert server.requests

    def test_a_body_without_end(self, caller: Caller) -> None:
        """The limit on a whole body ends a body without end."""

        def script(peer: Peer, request: Received) -> None:
            peer.send(HEAD + b"\r\n")
            for _ in range(1000):
                peer.send(b"x" * 1_000_000)

        with serve(script) as server, pytest.raises(StreamProtocolError, match="at most 67,108,864 bytes"):
            caller.complete(server.url)

    def test_a_head_without_end(self, caller: Caller) -> None:
        """The limit on the head ends headers without end."""

        def script(peer: Peer, request: Received) -> None:
            peer.send(HEAD)
            while True:
                peer.send(b"x-a: b\r\n" * 1000)

        with serve(script) as server, pytest.raises(StreamProtocolError, match="head is larger"):
            caller.complete(server.url)

    def test_an_error_without_end(self, caller: Caller) -> None:
        """At most a megabyte of an error's body is read. The buffers of the two sockets hold some more."""
        sent = 0

        def script(peer: Peer, request: Received) -> None:
            nonlocal sent
            peer.send(b"HTTP/1.1 500 No\r\n\r\n")
            while True:
                peer.send(b"x" * 100_000)
                sent += 100_000

        with serve(script) as server, pytest.raises(ServerError) as caught:
            caller.complete(server.url)
        assert caught.value.body is not None
        assert sent < 32_000_000


class TestErrors:
    def test_the_key_is_masked_where_the_server_echoes_it(self, caller: Caller) -> None:
        """The key is masked in the message, in the body, and in every form of the exception."""

        def script(peer: Peer, request: Received) -> None:
            key = request.headers["authorization"].removeprefix("Bearer ")
            peer.answer({"error": f"Incorrect API key: {key}"}, "401 Unauthorized", x_request_id="req-9")

        for method in ("complete", "stream"):
            with serve(script) as server, pytest.raises(AuthenticationError) as caught:
                getattr(caller, method)(server.url)
            error = caught.value
            assert KEY not in f"{error} {error!r} {error.body} {error.__dict__}"
            assert (error.status, error.request_id, error.provider, error.model) == (401, "req-9", "tiny", "tiny-1")

    def test_the_key_is_masked_within_a_stream(self, caller: Caller) -> None:
        """The key is masked in the error of an event too."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(f'data: {{"error": "bad key {KEY}"}}\n\n')

        with serve(script) as server, pytest.raises(ServerError) as caught:
            caller.stream(server.url)
        assert str(caught.value) == "tiny (tiny-1): bad key ***"

    def test_a_rate_limit(self, caller: Caller) -> None:
        """The connection is used again after an error."""

        def script(peer: Peer, request: Received) -> None:
            if len(server.requests) == 1:
                peer.answer("slow down", "429 Too Many Requests")
            else:
                whole(peer, request)

        from support.tiny import SERVICE, config

        from fluxibly.providers.http import HTTPProvider

        with serve(script) as server, HTTPProvider(TinyCodec(), SERVICE, config(server.url)) as provider:
            with pytest.raises(RateLimitError):
                provider.complete(ask())
            assert provider.complete(ask()).text == "hello"
            assert server.connections == 1

    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_a_redirect_is_not_followed(self, caller: Caller, method: str) -> None:
        """No other server gets the key. The error names the target of the redirect."""

        def script(peer: Peer, request: Received) -> None:
            peer.answer("", "307 Temporary Redirect", location=f"{server.url}/other?key=1")

        with serve(script) as server:
            with pytest.raises(ProviderError, match=r"redirects to http://.*/other .*set api_base") as caught:
                getattr(caller, method)(server.url)
            assert len(server.requests) == 1
        assert (caught.value.status, caught.value.retryable) == (307, False)

    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_a_web_page(self, caller: Caller, method: str) -> None:
        """A 200 with HTML is an error."""
        with (
            serve(lambda peer, request: peer.answer("<html>", content_type="text/html; charset=utf-8")) as server,
            pytest.raises(StreamProtocolError, match="web page"),
        ):
            getattr(caller, method)(server.url)

    def test_another_protocol_than_http(self, caller: Caller) -> None:
        """The first bytes show that the server does not speak HTTP."""
        with (
            serve(lambda peer, request: peer.send(b"SSH-2.0-OpenSSH_9.6\r\n")) as server,
            pytest.raises(StreamProtocolError, match="invalid HTTP response: it does not begin with HTTP"),
        ):
            caller.complete(server.url)

    def test_a_host_that_does_not_exist(self, caller: Caller) -> None:
        """The message names the host."""
        with pytest.raises(ConnectionFailed, match=r"host nowhere\.invalid was not found"):
            caller.complete("http://nowhere.invalid/v1")

    def test_plain_http_behind_https(self, caller: Caller) -> None:
        """A server without TLS ends the handshake."""
        with serve(lambda peer, request: None) as server:
            server.over.set()
            with pytest.raises(ConnectionFailed):
                caller.complete(server.url.replace("http:", "https:"), timeout=Timeouts(connect=5, total=5))
