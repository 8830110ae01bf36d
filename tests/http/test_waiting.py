"""How long a stream may keep its reader waiting, over the library's own connections and over httpx's."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from support.misbehaving import HEAD, Peer, Received, serve
from support.tiny import DONE, SERVICE, Caller, TinyCodec, config, event

from fluxibly.config import Timeouts
from fluxibly.errors import RequestTimeout, ServerError, StreamProtocolError, StreamStalled
from fluxibly.providers.http._endpoint import Endpoint
from fluxibly.providers.http._limits import LimitPassed, Limits
from fluxibly.providers.http._reader import ReplyReader

pytestmark = pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio, about httpcore's generators
IDLE = 0.3


@pytest.fixture(params=["sync", "asyncio", "trio", "sync, httpx", "asyncio, httpx", "trio, httpx"])
def caller(request: pytest.FixtureRequest) -> Caller:
    """A caller of each shell, with each kind of connections."""
    mode, _, transport = request.param.partition(", ")
    return Caller(mode, over_httpx=bool(transport))


def for_ever(piece: bytes, *before: str, gap: float = 0.02) -> Callable[[Peer, Received], None]:
    """Return a script that streams the texts `before`, and then `piece` again and again."""

    def script(peer: Peer, request: Received) -> None:
        peer.begin_stream()
        for text in before:
            peer.chunk(text)
        while not peer.server.over.is_set():
            peer.chunk(piece)
            time.sleep(gap)

    return script


class TestTrickles:
    """Bytes that complete no event do not keep a stream alive."""

    @pytest.mark.parametrize("before", [[event("one"), "data: "], []])
    def test_half_an_event(self, caller: Caller, before: list[str]) -> None:
        """The stream stalls, however many bytes of the next event arrive."""
        with serve(for_ever(b"x", *before)) as server, pytest.raises(StreamStalled) as caught:
            caller.stream(server.url, timeout=Timeouts(idle=IDLE))
        assert f"sent no event within {IDLE:g} s (the limit timeout.idle)" in str(caught.value)
        assert (caught.value.phase, caller.text) == ("idle", "one" if before else "")

    def test_chunk_extensions(self, caller: Caller) -> None:
        """Nor do bytes that HTTP drops."""
        if caller.mode == "sync" and caller.over_httpx:
            pytest.skip("httpx reads on, and blocks, until it has a part of the body")

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("one"))
            peer.send(b"5;")
            peer.trickle(b"x" * 10_000)

        with serve(script) as server, pytest.raises(StreamStalled):
            caller.stream(server.url, timeout=Timeouts(idle=IDLE))
        assert caller.text == "one"

    def test_an_event_byte_by_byte_in_time(self, caller: Caller) -> None:
        """An event may take any number of reads."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            for text in (event("one "), event("two"), DONE):
                for byte in text.encode():
                    peer.chunk(bytes([byte]))
            peer.chunk("")

        with serve(script) as server:
            assert caller.stream(server.url, timeout=Timeouts(idle=5)) == "one two"

    def test_json_instead_of_events(self, caller: Caller) -> None:
        """A whole answer in place of a stream has as long as its first chunk."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream("application/json")
            while not peer.server.over.is_set():
                peer.chunk('{"text": ')
                time.sleep(0.02)

        with serve(script) as server, pytest.raises(StreamStalled):
            caller.stream(server.url, timeout=Timeouts(idle=IDLE))


KEEP_ALIVES = [b": ping\n\n", b": ping\n", b"\n", b"event: ping\n\n", b"data:\n\n", b'data: {"ping": 1}\n\n']


class TinyWithPings(TinyCodec):
    """The tiny dialect, with events that carry no text."""

    def decoder(self):
        decoder = super().decoder()
        decode = decoder.decode_event

        def decode_event(event):
            return () if not event.data or b"ping" in event.data else decode(event)

        decoder.decode_event = decode_event
        return decoder


class TestKeepAlives:
    def test_a_slow_model(self, caller: Caller) -> None:
        """Keep-alives let the first chunk and the next take longer than the idle limit."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            for text in (event("one "), event("two") + DONE):
                for piece in KEEP_ALIVES:
                    peer.chunk(piece)
                    time.sleep(IDLE / 4)
                peer.chunk(text)
            peer.chunk("")

        with serve(script) as server:
            assert caller.stream(server.url, codec=TinyWithPings(), timeout=Timeouts(idle=IDLE)) == "one two"

    def test_nothing_but_keep_alives(self, caller: Caller) -> None:
        """A wait for one chunk ends at ten times the idle limit."""
        script = for_ever(KEEP_ALIVES[-1], event("one"), gap=0.01)
        with serve(script) as server, pytest.raises(StreamStalled) as caught:
            caller.stream(server.url, codec=TinyWithPings(), timeout=Timeouts(idle=0.1))
        assert "sent only keep-alives for 1 s (10 times the limit timeout.idle)" in str(caught.value)
        assert (caught.value.phase, caller.text) == ("idle", "one")

    def test_the_first_byte_does_not_count(self, caller: Caller) -> None:
        """The idle limit begins with the head of the answer."""

        def script(peer: Peer, request: Received) -> None:
            time.sleep(3 * IDLE)
            peer.begin_stream()
            peer.chunk(event("hello") + DONE)
            peer.chunk("")

        with serve(script) as server:
            assert caller.stream(server.url, timeout=Timeouts(idle=IDLE)) == "hello"


class SlowList(list):
    """A list whose owner takes a while over each item."""

    def append(self, item):
        time.sleep(2 * IDLE)
        super().append(item)


class TestConsumers:
    def test_the_time_of_the_consumer_does_not_count(self, caller: Caller) -> None:
        """A consumer may take longer than the idle limit, also if a part of the next event has arrived meanwhile."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            for text in ("one ", "two ", "three"):
                whole = event(text)
                peer.chunk(whole[:-5])
                time.sleep(IDLE / 5)
                peer.chunk(whole[-5:])
            peer.chunk(DONE)
            peer.chunk("")

        caller.got = SlowList()
        with serve(script) as server:
            assert caller.stream(server.url, timeout=Timeouts(idle=IDLE)) == "one two three"


class TestSilence:
    """A server that takes the request, and says nothing or not enough."""

    @pytest.mark.parametrize("head", [b"", HEAD + b"content-length: 100\r\n\r\n{"])
    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_only_a_total(self, caller: Caller, method: str, head: bytes) -> None:
        """A total alone ends each wait, although no phase has a limit."""

        def script(peer: Peer, request: Received) -> None:
            peer.send(head)
            peer.wait_for_end()

        times = Timeouts(connect=None, first_byte=None, idle=None, total=IDLE)
        with serve(script) as server, pytest.raises(RequestTimeout) as caught:
            getattr(caller, method)(server.url, timeout=times)
        assert caught.value.phase == "total"
        assert f"did not finish its response within {IDLE:g} s (the limit timeout.total)" in str(caught.value)

    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_the_first_byte(self, caller: Caller, method: str) -> None:
        """The error names the limit that has passed, and not that of connecting, which succeeded."""
        times = Timeouts(connect=5, first_byte=IDLE)
        with serve(lambda peer, request: peer.wait_for_end()) as server, pytest.raises(RequestTimeout) as caught:
            getattr(caller, method)(server.url, timeout=times)
        assert f"did not begin its response within {IDLE:g} s (the limit timeout.first_byte)" in str(caught.value)
        assert caught.value.phase == "first_byte"


class TestWholeAnswers:
    def test_an_answer_byte_by_byte(self, caller: Caller) -> None:
        """In a whole answer, the idle limit is between two reads of the body."""

        def script(peer: Peer, request: Received) -> None:
            body = b'{"text": "hello"}'
            peer.send(HEAD + b"content-length: %d\r\n\r\n" % len(body))
            peer.trickle(body, IDLE / 5)

        with serve(script) as server:
            assert caller.complete(server.url, timeout=Timeouts(idle=IDLE)).text == "hello"

    def test_an_idle_body(self, caller: Caller) -> None:
        """A body that stops half-way is not a stalled stream. httpx holds the limit too."""

        def script(peer: Peer, request: Received) -> None:
            peer.send(HEAD + b"content-length: 100\r\n\r\n{")
            peer.wait_for_end()

        with serve(script) as server, pytest.raises(RequestTimeout) as caught:
            caller.complete(server.url, timeout=Timeouts(idle=IDLE))
        assert (type(caught.value), caught.value.phase) == (RequestTimeout, "idle")
        assert f"within {IDLE:g} s" in str(caught.value)

    def test_the_total(self, caller: Caller) -> None:
        """The total bounds an answer that never stops trickling."""
        with serve(for_ever(b" ")) as server, pytest.raises(RequestTimeout) as caught:
            caller.complete(server.url, timeout=Timeouts(total=IDLE))
        assert caught.value.phase == "total"

    def test_an_error_byte_by_byte(self, caller: Caller) -> None:
        """An error whose body trickles is raised after the idle limit, with what has arrived."""

        def script(peer: Peer, request: Received) -> None:
            peer.send(b"HTTP/1.1 503 No\r\ncontent-length: 1000\r\n\r\nnot now")
            peer.trickle(b"." * 900, 0.01)

        for method in (caller.complete, caller.stream):
            with serve(script) as server, pytest.raises(ServerError, match="status 503: not now"):
                method(server.url, timeout=Timeouts(idle=IDLE))

    def test_interim_responses_without_end(self, caller: Caller) -> None:
        """A server that answers with 103 for ever holds no call."""
        if caller.mode == "sync" and caller.over_httpx:
            pytest.skip("httpx reads on, and blocks, until it has a final response")

        def script(peer: Peer, request: Received) -> None:
            while True:
                peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
                time.sleep(0.01)

        with serve(script) as server, pytest.raises((RequestTimeout, StreamProtocolError)):
            caller.complete(server.url, timeout=Timeouts(connect=IDLE, first_byte=IDLE))


def reader_of(framing: str, content_type: str) -> tuple[ReplyReader, Limits]:
    """Return a reader whose consumer waits for a chunk."""
    endpoint = Endpoint(TinyWithPings(framing=framing), SERVICE, config("http://localhost/v1"), name="Tiny")
    limits = Limits(Timeouts(), total=None, streaming=True)
    limits.answered()
    limits.left()
    return ReplyReader(endpoint, {"content-type": content_type}, limits), limits


SSE, LINES, JSON = ("sse", "text/event-stream"), ("ndjson", "application/x-ndjson"), ("sse", "application/json")


class TestReader:
    @pytest.mark.parametrize(
        ("kind", "data"),
        [
            *[(SSE, piece) for piece in KEEP_ALIVES],
            (SSE, b": ping\r"),
            (LINES, b"\n"),
            (LINES, b" \r\n"),
            (JSON, b"\n"),
        ],
    )
    @pytest.mark.parametrize("before", [b": comment\n\n", b": comment\n"])
    def test_what_keeps_a_stream_alive(self, kind, data, before, monkeypatch):
        """Comments, blank lines, and events without output do, each once it is complete."""
        reader, limits = reader_of(*kind)
        reader.feed(before if kind == SSE else b"\n")
        kept = []

        def keep(self):
            kept.append(self)

        monkeypatch.setattr(Limits, "kept_alive", keep)
        for n in range(len(data)):
            assert kept == []
            reader.feed(data[n : n + 1])
            if kept:
                break
        assert kept == [limits]
        assert n >= data.find(b"\n") - 1

    @pytest.mark.parametrize(
        ("kind", "data"),
        [
            (SSE, b"data: x\n" * 9),
            (SSE, b"event: ping\n"),
            (SSE, b"id: 1\nretry: 5\n"),
            (SSE, b": ping without an end"),
            (SSE, b'{"text": \n"' * 3),
            (LINES, b'{"text": "'),
            (LINES, b"   "),
            (JSON, b'{"text": '),
        ],
    )
    def test_what_does_not(self, kind, data, monkeypatch):
        """Bytes that complete no event do not, even after a read with both a comment and a chunk."""
        reader, limits = reader_of(*kind)
        monkeypatch.setattr(Limits, "kept_alive", lambda self: pytest.fail("the stream was kept alive"))
        if kind == SSE:
            reader.feed(b": ping\n\n" + event("one").encode())
        elif kind == LINES:
            reader.feed(b'\n{"text": "one"}\n')
        if kind != JSON:
            assert limits.end is None
            limits.left()
            assert reader.chunks.popleft().text == "one"
        for n in range(len(data)):
            reader.feed(data[n : n + 1])
        assert limits.end is not None


class TestLimits:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr("fluxibly.providers.http._limits.monotonic", lambda: now[0])
        return now

    def waiting(self, **times: float) -> Limits:
        limits = Limits(Timeouts(**times), total=times.get("total"), streaming=True)
        limits.sent()
        limits.answered()
        return limits

    def test_a_wait(self, clock: list[float]) -> None:
        """Each read of a wait has what is left of it, and the next wait has the whole limit again."""
        limits = self.waiting(idle=10)
        assert limits.left() == 10
        clock[0] += 4
        assert limits.left() == 6
        limits.end = None  # a chunk
        clock[0] += 1000  # the consumer
        assert limits.left() == 10

    def test_a_keep_alive(self, clock: list[float]) -> None:
        """A keep-alive gives the wait the whole limit again, up to ten times the limit."""
        limits = self.waiting(idle=10)
        limits.left()
        for _ in range(11):
            clock[0] += 8
            limits.kept_alive()
            assert limits.left() == 10
            assert not limits.only_kept_alive
        clock[0] += 8  # 96 seconds of 100 have passed
        limits.kept_alive()
        assert (limits.left(), limits.only_kept_alive) == (4, True)

    def test_a_total(self, clock: list[float]) -> None:
        """The total is the limit as soon as it leaves less than the wait."""
        limits = self.waiting(idle=10, total=25)
        assert (limits.left(), limits.passed) == (10, "idle")
        clock[0] += 8
        limits.kept_alive()
        clock[0] += 8
        assert (limits.left(), limits.passed) == (2, "idle")
        limits.kept_alive()
        assert (limits.left(), limits.passed) == (9, "total")

    def test_connecting(self, clock: list[float]) -> None:
        """The time to connect begins after the wait for a turn, and ends exactly at its limit."""
        limits = Limits(Timeouts(connect=10), total=None)
        clock[0] += 8
        assert limits.left() == 2
        limits.connecting()
        assert limits.left() == 10
        clock[0] += 10
        with pytest.raises(LimitPassed):
            limits.left()

    @pytest.mark.parametrize(("total", "left"), [(None, 10), (5, 1), (100, 10)])
    def test_an_error(self, clock: list[float], total: float | None, left: float) -> None:
        """The body of an error has the idle limit, and not more than the total leaves."""
        limits = Limits(Timeouts(idle=10), total=total)
        limits.answered()
        clock[0] += 4
        limits.refused()
        assert limits.left() == left

    @pytest.mark.parametrize(
        ("connect", "first_byte", "total", "to_connect", "to_read"),
        [
            (None, None, None, None, None),
            (3, 4, None, 3, 4),
            (None, None, 5, 5, 5),
            (3, None, 5, 3, 5),
            (None, 4, 5, 5, 4),
            (7, 8, 5, 5, 5),
        ],
    )
    def test_what_httpx_is_told(
        self,
        connect: float | None,
        first_byte: float | None,
        total: float | None,
        to_connect: float | None,
        to_read: float | None,
    ) -> None:
        """Each limit of httpx is the shorter of the phase's and the total, whichever of the two is None."""
        limits = Limits(Timeouts(connect=connect, first_byte=first_byte), total=total)
        expected = {"connect": to_connect, "pool": to_connect, "read": to_read, "write": to_read}
        assert limits.for_httpx() == expected

    @pytest.mark.parametrize(
        ("idle", "total", "to_read"), [(None, None, None), (10, None, 10), (None, 30, 28), (10, 30, 10), (50, 30, 28)]
    )
    def test_what_httpx_is_told_of_a_body(
        self, clock: list[float], idle: float | None, total: float | None, to_read: float | None
    ) -> None:
        """A read of the body has the idle limit, or what is left of the total if that is less."""
        limits = Limits(Timeouts(idle=idle), total=total)
        clock[0] += 2
        assert limits.body_for_httpx() == to_read

    @pytest.mark.parametrize(("connect", "first_byte", "left"), [(3, 4, 7), (None, 4, None), (3, None, None)])
    def test_a_transport_that_connects_and_sends_in_one(
        self, clock: list[float], connect: float | None, first_byte: float | None, left: float | None
    ) -> None:
        """It has both limits together, or none if one of them is None."""
        limits = Limits(Timeouts(connect=connect, first_byte=first_byte), total=None)
        limits.handed_over()
        assert limits.left() == left

    def test_no_limit(self, clock: list[float]) -> None:
        """Without an idle limit, no read of a stream has one."""
        limits = self.waiting(idle=None)
        assert limits.left() is None
        clock[0] += 1000
        limits.kept_alive()
        assert limits.left() is None
