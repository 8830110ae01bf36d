"""The limits of one call: those of its leash, and its own in place of the configuration's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import anyio
import httpx
import pytest
from support.misbehaving import HEAD, Peer, Received, Script, serve
from support.tiny import DONE, SERVICE, Caller, TinyCodec, ask, config, event, for_ever, silent, silent_after

from fluxibly.errors import DeadlineExceeded, RequestTimeout, ServerError, StreamStalled
from fluxibly.limits import Leash, Timeouts
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider
from fluxibly.providers.http._limits import LeashedLimits, LimitPassed
from fluxibly.types import Chunk, Request

pytestmark = pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio, about httpcore's generators
SHORT = 0.1
"""A limit that passes, in seconds."""
ENOUGH = 0.25
"""A limit that does not pass while a server answers at once."""
LONG = 0.3
"""Longer than both."""
METHODS = pytest.mark.parametrize("method", ["complete", "stream"])


OVER_HTTPX = pytest.mark.parametrize("over_httpx", [False, True])


def over(caller: Caller, over_httpx: bool, *, exactly: bool = False) -> Caller:
    """Return the caller with the connections that a test asks for, which may have to end each wait exactly."""
    if exactly and over_httpx and caller.mode == "sync":
        pytest.skip("a sync transport of httpx leaves the limit to the drivers")
    caller.over_httpx = over_httpx
    return caller


def leashed(*, deadline: float | None = None, **limits: float) -> Request:
    """Return a request under a leash. Each of its attempts begins `deadline` seconds before the deadline."""
    request = ask()
    request.call.clock = lambda: 100.0
    request.call.leash = Leash(None, deadline=None if deadline is None else 100.0 + deadline, **limits)
    return request


def limited(times: Timeouts) -> Request:
    """Return a request that has time limits of its own."""
    request = ask()
    request.call.timeouts = times
    return request


def slowly(*texts: str, gap: float = LONG) -> Script:
    """Return a script that answers a whole or streamed call, and takes `gap` seconds before each text but the first."""

    def script(peer: Peer, request: Received) -> None:
        if not request.json["stream"]:
            time.sleep(gap)
            peer.answer({"text": "".join(texts)})
            return
        peer.begin_stream()
        for number, text in enumerate(texts):
            time.sleep(gap if number else 0)
            peer.chunk(event(text))
        peer.chunk(DONE)
        peer.chunk("")

    return script


def slow_to_begin(peer: Peer, request: Received) -> None:
    """Answer after a while. A script for a server."""
    time.sleep(LONG)
    slowly("hello", gap=0)(peer, request)


def head_byte_by_byte(peer: Peer, request: Received) -> None:
    peer.trickle(HEAD + b"x-a: 1\r\n" * 1_000)


def body_byte_by_byte(peer: Peer, request: Received) -> None:
    peer.send(HEAD + b"content-length: 100000\r\n\r\n")
    peer.trickle(b" " * 10_000)


class TestDeadline:
    @METHODS
    @pytest.mark.parametrize(
        ("script", "what"),
        [
            (silent, "did not begin its response"),
            (head_byte_by_byte, "did not begin its response"),
            (body_byte_by_byte, "did not finish its response"),
            (for_ever(": ping\n\n"), "did not finish its response"),
        ],
    )
    @OVER_HTTPX
    def test_it_ends_every_wait(self, caller: Caller, method: str, script: Script, what: str, over_httpx: bool) -> None:
        """Whatever the server does, the call ends at its deadline."""
        call = getattr(over(caller, over_httpx, exactly=script is head_byte_by_byte), method)
        with serve(script) as server:
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded, match=f"{what} before the deadline") as caught:
                call(server.url, request=leashed(deadline=SHORT))
            taken = time.monotonic() - began
        error = caught.value
        assert (error.phase, error.retryable, error.provider, error.model) == ("deadline", False, "tiny", "tiny-1")
        assert str(error).startswith("tiny (tiny-1): 127.0.0.1:")
        assert str(error).endswith("; give the call more time")
        assert error.__cause__ is None
        assert SHORT <= taken < 2

    @METHODS
    def test_of_a_handshake(self, caller: Caller, method: str) -> None:
        """A server that accepts the connection, and never agrees on keys."""
        with (
            closing(socket.create_server(("127.0.0.1", 0))) as listener,
            pytest.raises(DeadlineExceeded, match=r": no connection to 127\.0\.0\.1:[0-9]+ before the deadline"),
        ):
            getattr(caller, method)(f"https://127.0.0.1:{listener.getsockname()[1]}", request=leashed(deadline=SHORT))

    @METHODS
    @pytest.mark.parametrize("deadline", [0.0, -1.0])
    def test_that_has_passed(self, caller: Caller, method: str, deadline: float) -> None:
        """Nothing is sent."""
        with (
            serve(silent) as server,
            pytest.raises(DeadlineExceeded, match="the request was not sent before the deadline") as caught,
        ):
            getattr(caller, method)(server.url, request=leashed(deadline=deadline))
        assert (caught.value.phase, caught.value.model, server.connections) == ("deadline", "tiny-1", 0)

    @METHODS
    def test_that_is_far_away(self, caller: Caller, method: str) -> None:
        """The limits of the configuration still apply."""
        times = Timeouts(first_byte=SHORT)
        for deadline in (5.0, float("inf")):
            with serve(silent) as server, pytest.raises(RequestTimeout) as caught:
                getattr(caller, method)(server.url, request=leashed(deadline=deadline), timeout=times)
            assert caught.value.phase == "first_byte"

    def test_includes_the_time_of_the_consumer(self, caller: Caller) -> None:
        """A read after the deadline fails, although its chunk has arrived."""
        caller.got = SlowList()
        with serve(slowly("one", "two", gap=0.05)) as server, pytest.raises(DeadlineExceeded):
            caller.stream(server.url, request=leashed(deadline=ENOUGH))
        assert caller.text == "one"

    @METHODS
    def test_of_an_error_byte_by_byte(self, caller: Caller, method: str) -> None:
        """The error of the service says more than the deadline."""

        def script(peer: Peer, request: Received) -> None:
            peer.send(b"HTTP/1.1 503 No\r\ncontent-length: 1000\r\n\r\nnot now")
            peer.trickle(b"." * 900, 0.01)

        with serve(script) as server, pytest.raises(ServerError, match="status 503: not now"):
            getattr(caller, method)(server.url, request=leashed(deadline=SHORT))


def test_a_wait_for_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline ends the wait for a connection, too."""
    monkeypatch.setattr("fluxibly.providers.http._pool.MAX_CONNECTIONS", 1)
    with (
        serve(silent_after(event("one"))) as server,
        HTTPProvider(TinyCodec(), SERVICE, config(server.url)) as provider,
        closing(provider.stream(ask())) as holder,
    ):
        assert next(holder).text == "one"
        with pytest.raises(DeadlineExceeded, match="no connection to"):
            provider.complete(leashed(deadline=SHORT))
        assert server.connections == 1


class SlowList(list[Chunk]):
    """A list whose owner takes a while over each item."""

    def append(self, item: Chunk) -> None:
        time.sleep(LONG)
        super().append(item)


class Vault:
    """A function that gives keys. From the call with the number `slow` on, it waits until `gate` is open."""

    def __init__(self, slow: int = 1) -> None:
        self.asked = 0
        self.slow = slow
        self.gate = threading.Event()
        self.given = threading.Event()
        """Set when a key was given after a wait."""

    def give(self) -> str:
        self.asked += 1
        number = self.asked
        if number >= self.slow:
            self.gate.wait(10)
            self.given.set()
        return f"key-{number}"

    async def agive(self) -> str:
        self.asked += 1
        if self.asked >= self.slow:
            await anyio.sleep(10)
        return f"key-{self.asked}"


def refusing(peer: Peer, request: Received) -> None:
    peer.answer("no", status="401 Unauthorized")


class TestKeys:
    @METHODS
    @pytest.mark.parametrize("kind", ["give", "agive"])
    @pytest.mark.parametrize("slow", [1, 2])
    def test_a_key_that_takes_too_long(self, caller: Caller, method: str, kind: str, slow: int) -> None:
        """The call waits for its key, or for another key than the refused, until the deadline."""
        vault = Vault(slow)
        try:
            with serve(refusing) as server, pytest.raises(DeadlineExceeded, match="no key came before") as caught:
                getattr(caller, method)(server.url, request=leashed(deadline=SHORT), key=getattr(vault, kind))
        finally:
            vault.gate.set()
        error = caught.value
        assert (error.phase, error.provider, error.model) == ("deadline", "tiny", "tiny-1")
        assert (vault.asked, len(server.requests)) == (slow, slow - 1)

    @METHODS
    def test_a_deadline_that_has_passed(self, caller: Caller, method: str) -> None:
        """Nobody is asked for a key."""
        vault = Vault()
        with serve(refusing) as server, pytest.raises(DeadlineExceeded):
            getattr(caller, method)(server.url, request=leashed(deadline=-1), key=vault.give)
        assert (vault.asked, server.connections) == (0, 0)

    def test_a_key_that_comes_later(self) -> None:
        """A thread that fetches a key for a call goes on after the deadline, and the key serves the next call."""
        vault = Vault()
        key: Any = vault.give
        with (
            serve(slowly("hello", gap=0)) as server,
            HTTPProvider(TinyCodec(), SERVICE, config(server.url, key=key)) as provider,
        ):
            with pytest.raises(DeadlineExceeded):
                provider.complete(leashed(deadline=SHORT))
            vault.gate.set()
            assert vault.given.wait(10)
            assert provider.complete(ask()).text == "hello"
        assert vault.asked == 1

    @METHODS
    def test_a_key_in_time(self, caller: Caller, method: str) -> None:
        """A call with a deadline gets its key, and an error of the function reaches the caller."""
        vault = Vault(slow=9)
        key: Any = vault.give
        with serve(slowly("hello", gap=0)) as server:
            getattr(caller, method)(server.url, request=leashed(deadline=5), key=key)
        assert server.requests[0].headers["authorization"] == "Bearer key-1"

        def broken() -> str:
            raise LookupError("no vault")

        with serve(silent) as server, pytest.raises(LookupError, match="no vault"):
            getattr(caller, method)(server.url, request=leashed(deadline=5), key=broken)

    @METHODS
    def test_the_second_sending(self, caller: Caller, method: str) -> None:
        """A request that is sent again with another key has what is left until the deadline."""
        now = [100.0]
        request = leashed(deadline=5)
        request.call.clock = lambda: now[0]
        vault = Vault(slow=9)

        def give() -> str:
            now[0] += 3
            return vault.give()

        with (
            serve(refusing) as server,
            pytest.raises(DeadlineExceeded, match="the request was not sent before the deadline"),
        ):
            getattr(caller, method)(server.url, request=request, key=give)
        assert (vault.asked, len(server.requests)) == (2, 1)


class TestFirstChunk:
    @pytest.mark.parametrize(
        "script",
        [
            silent,
            silent_after(event("")),
            for_ever(": ping\n\n", event("")),
            for_ever(event("")),
            for_ever("x", event(""), "data: "),
        ],
    )
    @OVER_HTTPX
    def test_no_output(self, caller: Caller, script: Script, over_httpx: bool) -> None:
        """Neither an empty chunk nor anything else but output ends the limit."""
        stream = over(caller, over_httpx, exactly=True).stream
        with serve(script) as server, pytest.raises(RequestTimeout) as caught:
            stream(server.url, request=leashed(first_chunk=SHORT))
        error = caught.value
        assert (type(error), error.phase, error.retryable) == (RequestTimeout, "first_chunk", True)
        assert f"sent no output within {SHORT:g} s (the limit first_chunk of a middleware)" in str(error)
        assert caller.text == ""

    def test_the_time_of_the_consumer_does_not_count(self, caller: Caller) -> None:
        """A consumer may take its time over empty chunks."""
        caller.got = SlowList()
        with serve(slowly("", "", "one", gap=0.05)) as server:
            assert caller.stream(server.url, request=leashed(first_chunk=ENOUGH)) == "one"

    def test_the_waits_count_together(self, caller: Caller) -> None:
        """An empty chunk does not start the limit again."""
        with serve(slowly("", "", "", "one", gap=LONG)) as server, pytest.raises(RequestTimeout) as caught:
            caller.stream(server.url, request=leashed(first_chunk=1.5 * LONG))
        assert caught.value.phase == "first_chunk"

    def test_it_ends_with_output(self, caller: Caller) -> None:
        """Later chunks may take longer."""
        with serve(slowly("one ", "two")) as server:
            assert caller.stream(server.url, request=leashed(first_chunk=ENOUGH)) == "one two"


class TestIdle:
    @pytest.mark.parametrize(
        "script",
        [
            silent_after(event("one")),
            for_ever(": ping\n\n", event("one")),
            for_ever("x", event("one"), "data: "),
        ],
    )
    @OVER_HTTPX
    def test_no_further_chunk(self, caller: Caller, script: Script, over_httpx: bool) -> None:
        """Nothing but a chunk starts the limit again."""
        stream = over(caller, over_httpx, exactly=True).stream
        with serve(script) as server, pytest.raises(StreamStalled) as caught:
            stream(server.url, request=leashed(idle=SHORT))
        error = caught.value
        assert (type(error), error.phase, error.retryable) == (StreamStalled, "idle", True)
        assert f"sent no chunk within {SHORT:g} s (the limit idle of a middleware)" in str(error)
        assert caller.text == "one"

    def test_the_time_of_the_consumer_does_not_count(self, caller: Caller) -> None:
        """A consumer may take its time over each chunk."""
        caller.got = SlowList()
        with serve(slowly("one ", "two ", "three", gap=0.01)) as server:
            assert caller.stream(server.url, request=leashed(idle=ENOUGH)) == "one two three"

    def test_it_begins_with_output(self, caller: Caller) -> None:
        """A model may think for longer, before and after an empty chunk."""
        with serve(slowly("", "one")) as server:
            assert caller.stream(server.url, request=leashed(idle=SHORT)) == "one"

    def test_the_limit_of_the_configuration(self, caller: Caller) -> None:
        """It applies if it is shorter, and is named."""
        with serve(silent_after(event("one"))) as server, pytest.raises(StreamStalled, match=r"limit timeout\.idle"):
            caller.stream(server.url, request=leashed(idle=5, first_chunk=5), timeout=Timeouts(idle=SHORT))


class TestWholeCalls:
    def test_they_have_no_chunks(self, caller: Caller) -> None:
        """A whole call has neither limit of a stream."""
        with serve(slow_to_begin) as server:
            answer = caller.complete(server.url, request=leashed(first_chunk=SHORT, idle=SHORT, deadline=5))
        assert answer.text == "hello"


class TestTimeouts:
    @METHODS
    @OVER_HTTPX
    def test_longer(self, caller: Caller, method: str, over_httpx: bool) -> None:
        """A call may take longer than the configuration says."""
        times = Timeouts(first_byte=SHORT, total=SHORT)
        with serve(slow_to_begin) as server:
            getattr(over(caller, over_httpx), method)(server.url, request=limited(Timeouts()), timeout=times)

    @METHODS
    @pytest.mark.parametrize(
        ("script", "times", "phase"),
        [
            (silent, Timeouts(first_byte=SHORT), "first_byte"),
            (body_byte_by_byte, Timeouts(total=SHORT), "total"),
        ],
    )
    def test_shorter(self, caller: Caller, method: str, script: Script, times: Timeouts, phase: str) -> None:
        """A call may have less time than the configuration says."""
        with serve(script) as server, pytest.raises(RequestTimeout) as caught:
            getattr(caller, method)(server.url, request=limited(times))
        assert (type(caught.value), caught.value.phase) == (RequestTimeout, phase)

    def test_a_total_for_whole_calls(self, caller: Caller) -> None:
        """A total that was not given holds for whole calls alone."""
        times = Timeouts(5, 5, 5)
        assert (times.total, times.stream_total) == (600, None)
        with serve(slowly("one ", "two")) as server:
            assert caller.stream(server.url, request=limited(times), timeout=Timeouts(total=SHORT)) == "one two"

    @METHODS
    def test_under_a_leash(self, caller: Caller, method: str) -> None:
        """The leash tightens the limits of a call too."""
        request = leashed(deadline=SHORT)
        request.call.timeouts = Timeouts(None, None, None, None)
        with serve(silent) as server, pytest.raises(DeadlineExceeded):
            getattr(caller, method)(server.url, request=request)


class TestAfterwards:
    @METHODS
    def test_the_connection(self, caller: Caller, method: str) -> None:
        """The connection of a call with limits serves a later call without them, which may take longer."""
        served: list[Script] = [slowly("hello", gap=0), slow_to_begin]
        request = leashed(deadline=5, first_chunk=ENOUGH, idle=ENOUGH)
        request.call.timeouts = Timeouts(5, 5, 5)

        def unleash() -> None:
            request.call.leash = request.call.timeouts = None

        def script(peer: Peer, received: Received) -> None:
            served.pop(0)(peer, received)

        caller.between = unleash
        with serve(script) as server:
            getattr(caller, method)(server.url, times=2, request=request)
        assert (len(server.requests), server.connections) == (2, 1)


@pytest.mark.parametrize(
    ("make", "obeys"),
    [
        (lambda settings: HTTPProvider(TinyCodec(), SERVICE, settings), True),
        (lambda settings: AsyncHTTPProvider(TinyCodec(), SERVICE, settings), True),
        (
            lambda settings: AsyncHTTPProvider(
                TinyCodec(), SERVICE, settings, transport=httpx.AsyncHTTPTransport(verify=False)
            ),
            True,
        ),
        (
            lambda settings: HTTPProvider(TinyCodec(), SERVICE, settings, transport=httpx.HTTPTransport(verify=False)),
            False,
        ),
    ],
)
def test_who_needs_the_drivers(make: Callable[..., Any], obeys: bool) -> None:
    """A sync transport of httpx ends a wait by its own limits only, which restart with every byte."""
    assert make(config("http://localhost/v1")).obeys is obeys


def test_who_needs_the_drivers_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that speaks TLS is reached through httpx."""
    monkeypatch.setenv("ALL_PROXY", "https://127.0.0.1:1")
    assert not HTTPProvider(TinyCodec(), SERVICE, config("http://example.org/v1")).obeys
    assert AsyncHTTPProvider(TinyCodec(), SERVICE, config("http://example.org/v1")).obeys


class TestLeashedLimits:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr("fluxibly.providers.http._limits.monotonic", lambda: now[0])
        return now

    def limits(self, leash: Leash, **options: Any) -> LeashedLimits:
        limits = LeashedLimits(Timeouts(idle=50), leash, **{"total": None, "deadline": None, **options})
        limits.sent()
        limits.answered()
        return limits

    def test_a_stream(self, clock: list[float]) -> None:
        """Waits until the first output count together, and each later wait alone."""
        limits = self.limits(Leash(first_chunk=10, idle=3))
        assert limits.left() == 10
        clock[0] += 4
        assert (limits.left(), limits.passed, limits.strict, limits.value()) == (6, "first_chunk", True, 10)
        limits.end = None
        limits.came(output=False)
        clock[0] += 1000  # the consumer
        assert limits.left() == 6
        clock[0] += 1
        limits.kept_alive()
        assert limits.left() == 5
        limits.end = None
        limits.came(output=True)
        clock[0] += 1000  # the consumer
        assert (limits.left(), limits.passed, limits.strict, limits.value()) == (3, "idle", True, 3)
        clock[0] += 3
        with pytest.raises(LimitPassed):
            limits.left()

    def test_the_other_limits(self, clock: list[float]) -> None:
        """The shortest limit applies, and the error names it."""
        limits = self.limits(Leash(first_chunk=60), total=70)
        assert (limits.left(), limits.passed, limits.strict, limits.value()) == (50, "idle", False, 50)
        clock[0] += 40
        limits.kept_alive()
        assert (limits.left(), limits.passed, limits.strict) == (20, "first_chunk", True)
        limits.end = None
        limits.came(output=True)
        assert (limits.left(), limits.passed, limits.strict, limits.value()) == (30, "total", False, 70)

    def test_a_deadline_at_the_same_time(self, clock: list[float]) -> None:
        """A deadline that is also the total is the deadline, whose error is not retryable."""
        limits = self.limits(Leash(first_chunk=60), total=5, deadline=5)
        assert (limits.left(), limits.passed) == (5, "deadline")
