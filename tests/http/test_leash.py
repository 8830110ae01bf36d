"""A call whose leash is stopped in another thread ends at once, and takes no other call with it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from support.misbehaving import HEAD, Peer, Received, Script, serve
from support.tiny import DONE, SERVICE, Caller, TinyCodec, ask, config, event, whole

from fluxibly.errors import ConnectionFailed, ProviderError
from fluxibly.limits import Leash
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider, _pool
from fluxibly.providers.http._limits import HeldLimits, Limits
from fluxibly.types import Request

SOON = 0.1
"""Seconds until the leash is stopped."""
AT_ONCE = 3.0
"""Seconds within which a call ends then, on a busy machine. The limits of the calls are longer."""
STOPPED = "given up elsewhere"


@pytest.fixture(params=["sync", "asyncio", "trio"])
def caller(request: pytest.FixtureRequest) -> Caller:
    """A caller of each shell, over the library's own connections."""
    return Caller(request.param)


def leashed(leash: Leash | None = None, prompt: str = "hi") -> Request:
    request = ask(prompt)
    request.call.leash = leash or Leash()
    return request


def stopping(request: Request, after: float = SOON) -> Request:
    """Stop the request's leash soon, from another thread."""
    leash = request.call.leash
    assert leash is not None
    threading.Timer(after, leash.stop).start()
    return request


def ends_at_once(call: Callable[[], object], match: str = STOPPED) -> ProviderError:
    """Check that a call which is stopped soon fails soon. Return its error."""
    began = time.monotonic()
    with pytest.raises(ConnectionFailed, match=match) as caught:
        call()
    assert SOON / 2 < time.monotonic() - began < AT_ONCE
    assert not caught.value.retryable
    assert (caught.value.provider, caught.value.model) == ("tiny", "tiny-1")
    return caught.value


def silent(peer: Peer, request: Received) -> None:
    peer.wait_for_end()


def silent_in_the_body(peer: Peer, request: Received) -> None:
    peer.send(HEAD + b'content-length: 100\r\n\r\n{"text": ')
    peer.wait_for_end()


def silent_before_the_end(peer: Peer, request: Received) -> None:
    """Send all of a body that ends with its connection, and leave the connection open."""
    peer.send(HEAD + b'\r\n{"text": "hello"}')
    peer.wait_for_end()


def byte_by_byte(peer: Peer, request: Received) -> None:
    peer.trickle(HEAD + b"x-a: 1\r\n" * 1_000)


def refused_slowly(peer: Peer, request: Received) -> None:
    peer.send(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 100\r\n\r\n")
    peer.wait_for_end()


@pytest.fixture
def full_backlog() -> Iterator[str]:
    """The URL of a server that accepts no connection, and whose queue of connections is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        waiting: list[socket.socket] = []
        for _ in range(8):
            client = socket.socket()
            client.setblocking(False)  # the standard library's signature
            client.connect_ex(address)
            waiting.append(client)
        time.sleep(0.1)
        yield f"http://127.0.0.1:{address[1]}/v1"
        for client in waiting:
            client.close()


class TestWholeCalls:
    @pytest.mark.parametrize(
        "script", [silent, byte_by_byte, silent_in_the_body, silent_before_the_end, refused_slowly]
    )
    @pytest.mark.parametrize("over_httpx", [False, True])
    def test_every_wait(self, caller: Caller, script: Script, over_httpx: bool) -> None:
        """Whatever the call waits for, a stop ends it, and the server sees its connection closed."""
        if over_httpx and caller.mode == "sync" and script in (silent, byte_by_byte):
            pytest.skip("nothing ends the wait of a sync httpx transport for the head")
        caller.over_httpx = over_httpx
        request = leashed()

        def then_stopped(peer: Peer, received: Received) -> None:
            stopping(request)
            script(peer, received)

        with serve(then_stopped) as server:
            ends_at_once(lambda: caller.complete(server.url, timeout=20, request=request))
            assert server.closed.acquire(timeout=5)
            assert len(server.requests) == 1

    def test_a_reused_connection(self, caller: Caller) -> None:
        """An idle connection that was cut by the stop is not taken for one that the server closed: nothing is sent again."""
        request = leashed()
        answered: list[Received] = []

        def script(peer: Peer, received: Received) -> None:
            if not answered:
                answered.append(received)
                whole(peer, received)
                stopping(request)
            else:
                peer.wait_for_end()

        with serve(script) as server:
            ends_at_once(lambda: caller.complete(server.url, times=2, timeout=20, request=request))
            assert server.closed.acquire(timeout=5)
            assert (server.connections, len(server.requests)) == (1, 2)

    def test_connecting(self, caller: Caller, full_backlog: str) -> None:
        """A stop ends the wait for the connection."""
        ends_at_once(lambda: caller.complete(full_backlog, timeout=20, request=stopping(leashed())))

    def test_a_turn_in_the_pool(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stop ends the wait for a turn, and the next in the queue gets the turn."""
        monkeypatch.setattr(_pool, "MAX_CONNECTIONS", 1)
        answers: list[str] = []
        gate = threading.Event()

        def script(peer: Peer, request: Received) -> None:
            gate.wait(10)
            whole(peer, request)

        def call(prompt: str) -> None:
            answers.append(provider.complete(ask(prompt)).text)

        with serve(script) as server, HTTPProvider(TinyCodec(), SERVICE, config(server.url, timeout=20)) as provider:
            first = threading.Thread(target=call, args=("first",))
            first.start()
            while not server.requests:
                time.sleep(0.01)
            last = threading.Timer(SOON / 2, call, args=("last",))
            last.start()
            ends_at_once(lambda: provider.complete(stopping(leashed(prompt="stopped"))))
            gate.set()
            first.join()
            last.join()
            assert answers == ["first", "last"]
            assert [request.json["prompt"] for request in server.requests] == ["first", "last"]

    def test_a_stop_before_the_call(self, caller: Caller) -> None:
        """Nothing is sent, and no connection is made."""
        request = leashed()
        request.call.leash.stop()  # type: ignore[union-attr]
        with serve(whole) as server:
            with pytest.raises(ConnectionFailed, match=STOPPED):
                caller.complete(server.url, request=request)
            assert (server.connections, server.requests) == (0, [])

    def test_leashes_within(self, caller: Caller) -> None:
        """A stop of the branch's leash ends what waits under the leash of a middleware within."""
        branch = Leash.apart(Leash())
        request = leashed(Leash(Leash(branch, idle=9), deadline=time.monotonic() + 30))
        request.call.clock = time.monotonic
        threading.Timer(SOON, branch.stop).start()
        with serve(silent) as server:
            ends_at_once(lambda: caller.complete(server.url, timeout=20, request=request))

    def test_another_branch_goes_on(self, caller: Caller) -> None:
        """Branches have leashes apart."""
        outer = Leash()
        stopping(leashed(Leash.apart(outer)), 0.02)

        def script(peer: Peer, request: Received) -> None:
            time.sleep(0.2)
            whole(peer, request)

        with serve(script) as server:
            assert caller.complete(server.url, request=leashed(Leash.apart(outer))).text == "hi"

    def test_many_stops_at_once(self, caller: Caller) -> None:
        """Several threads may stop a leash at the same time."""
        request = leashed()
        leash = request.call.leash
        assert leash is not None
        together = threading.Barrier(4)

        def stop() -> None:
            together.wait()
            time.sleep(SOON)
            leash.stop()

        with serve(silent) as server:
            for _ in range(3):
                threading.Thread(target=stop).start()
            threading.Timer(0, together.wait).start()
            ends_at_once(lambda: caller.complete(server.url, timeout=20, request=request))

    def test_what_was_held_is_released(self, caller: Caller) -> None:
        """After a call, whole or failed, the leash holds nothing."""
        for script in (whole, lambda peer, _: peer.reset()):
            request = leashed()
            with serve(script) as server, contextlib.suppress(ProviderError):
                caller.complete(server.url, request=request)
            assert request.call.leash._ends == []  # type: ignore[union-attr]


class TestLateStops:
    """A stop after the end of a call must not reach its connection, which may serve another call."""

    def test_the_next_call(self) -> None:
        """The next call on the connection is answered."""
        request = leashed()
        with serve(slow_whole) as server, HTTPProvider(TinyCodec(), SERVICE, config(server.url)) as provider:
            assert provider.complete(request).text == "hi"
            stopping(request)
            assert provider.complete(ask("next")).text == "next"
            assert (server.connections, len(server.requests)) == (1, 2)

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_the_next_call_on_a_loop(self, backend: str) -> None:
        """The same on event loops."""
        request = leashed()

        async def main() -> None:
            async with AsyncHTTPProvider(TinyCodec(), SERVICE, config(server.url)) as provider:
                assert (await provider.complete(request)).text == "hi"
                stopping(request)
                assert (await provider.complete(ask("next"))).text == "next"

        with serve(slow_whole) as server:
            anyio.run(main, backend=backend)
            assert (server.connections, len(server.requests)) == (1, 2)

    def test_a_stop_that_is_under_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The call ends only after a stop that has begun: the stop would cut the connection under the next call."""
        request = leashed()
        cutting, cut = threading.Event(), _pool.Connection.cut

        def slow_cut(connection: _pool.Connection) -> None:
            cutting.set()
            time.sleep(0.3)
            cut(connection)

        def script(peer: Peer, received: Received) -> None:
            if received.json["prompt"] == "hi":
                threading.Thread(target=request.call.leash.stop).start()  # type: ignore[union-attr]
                cutting.wait(5)
            else:
                time.sleep(0.5)
            whole(peer, received)

        with serve(script) as server, HTTPProvider(TinyCodec(), SERVICE, config(server.url)) as provider:
            monkeypatch.setattr(_pool.Connection, "cut", slow_cut)
            with pytest.raises(ConnectionFailed, match=STOPPED):
                provider.complete(request)
            monkeypatch.setattr(_pool.Connection, "cut", cut)
            assert provider.complete(ask("next")).text == "next"
            assert len(server.requests) == 2

    def test_a_stop_when_the_connection_is_given_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The connection is another call's as soon as the pool has it, before the call that gave it back returns."""
        request = leashed()
        give_back = _pool.Slots.give_back

        def then_stopped(slots: _pool.Slots, connection: _pool.Connection | None, *, reusable: bool) -> None:
            give_back(slots, connection, reusable=reusable)
            request.call.leash.stop()  # type: ignore[union-attr]

        with serve(whole) as server, HTTPProvider(TinyCodec(), SERVICE, config(server.url)) as provider:
            with monkeypatch.context() as patched, contextlib.suppress(ConnectionFailed):
                patched.setattr(_pool.Slots, "give_back", then_stopped)
                provider.complete(request)
            assert provider.complete(ask("next")).text == "next"
            assert (server.connections, len(server.requests)) == (1, 2)

    def test_within_a_signal_handler(self) -> None:
        """A stop may interrupt a stop, or the end of the attempt, in its own thread."""
        leash = Leash()
        limits = HeldLimits(config("http://x").timeouts, leash, total=None, deadline=None)
        limits.hold()
        stops = iter([leash.stop, leash.stop])

        def handler() -> None:
            for stop in stops:
                stop()

        limits.waits(handler)  # it runs while the lock is held
        done = threading.Thread(target=lambda: (leash.stop(), limits.over()), daemon=True)
        done.start()
        done.join(5)
        assert not done.is_alive()
        assert limits.aborted
        assert leash._ends == []


def slow_whole(peer: Peer, request: Received) -> None:
    """Answer at once the prompt "hi", and any other after some time."""
    if request.json["prompt"] != "hi":
        time.sleep(3 * SOON)
    whole(peer, request)


class TestKeys:
    """A function of the user that gives the key runs on in its thread; its caller stops waiting."""

    @pytest.mark.parametrize("method", ["complete", "stream"])
    @pytest.mark.parametrize("deadline", [None, 30.0])
    def test_a_slow_function(self, caller: Caller, method: str, deadline: float | None) -> None:
        """A stop ends the wait for the key, and nothing is sent. The key is for later calls."""
        gate, asked = threading.Event(), threading.Semaphore(0)

        def give() -> str:
            asked.release()
            gate.wait(10)
            return "sk-late"

        request = leashed(Leash(deadline=deadline and time.monotonic() + deadline))
        request.call.clock = time.monotonic
        with serve(whole) as server:
            try:
                call = getattr(caller, method)
                ends_at_once(lambda: call(server.url, timeout=20, key=give, request=stopping(request)))
            finally:
                gate.set()
            assert asked.acquire(timeout=1)
            assert server.requests == []

    def test_a_turn(self) -> None:
        """A stop ends the wait for another call's function."""
        gate, asked = threading.Event(), threading.Event()

        def give() -> str:
            asked.set()
            gate.wait(10)
            return "sk-late"

        answers: list[str] = []
        with serve(whole) as server, HTTPProvider(TinyCodec(), SERVICE, config(server.url, key=give)) as provider:  # type: ignore[arg-type]
            first = threading.Thread(target=lambda: answers.append(provider.complete(ask()).text))
            first.start()
            assert asked.wait(5)
            ends_at_once(lambda: provider.complete(stopping(leashed())))
            gate.set()
            first.join()
            assert answers == ["hi"]

    def test_before_the_call(self, caller: Caller) -> None:
        """The function is not asked."""
        asked: list[int] = []

        def give() -> str:
            asked.append(1)
            return "sk-late"

        request = leashed()
        request.call.leash.stop()  # type: ignore[union-attr]
        with serve(whole) as server, pytest.raises(ConnectionFailed, match=STOPPED):
            caller.complete(server.url, key=give, request=request)
        assert asked == []

    @pytest.mark.parametrize("leash", [None, Leash()])
    def test_errors_of_the_function(self, caller: Caller, leash: Leash | None) -> None:
        """They reach the caller unchanged, whatever they are."""

        def give() -> str:
            raise InterruptedError("mine")

        request = ask()
        request.call.leash = leash
        with serve(whole) as server, pytest.raises(InterruptedError, match="mine"):
            caller.complete(server.url, key=give, request=request)


class Streams:
    """One stream of a provider, read by a thread or on an event loop, and aborted from another thread."""

    def __init__(self, mode: str, url: str) -> None:
        self.mode = mode
        self.url = url

    def run(self, request: Request, abort_after: float | None) -> list[str]:
        """Read the whole stream, which is aborted before, or `abort_after` seconds after its first read began."""
        settings: Any = (TinyCodec(), SERVICE, config(self.url, timeout=20))
        if self.mode == "sync":
            with HTTPProvider(*settings) as provider:
                stream = provider.stream(request)
                self._abort(stream.abort, abort_after)
                return [chunk.text for chunk in stream]

        async def main() -> list[str]:
            async with AsyncHTTPProvider(*settings) as provider:
                stream = provider.stream(request)
                self._abort(stream.abort, abort_after)
                return [chunk.text async for chunk in stream]

        return anyio.run(main, backend=self.mode)

    def _abort(self, abort: Callable[[], object], after: float | None) -> None:
        if after is None:
            abort()
        else:
            threading.Timer(after, abort).start()


@pytest.mark.parametrize("mode", ["sync", "asyncio", "trio"])
class TestStreams:
    """The drivers end streams by `abort`."""

    @pytest.mark.parametrize("script", [silent, byte_by_byte])
    def test_while_it_is_opened(self, mode: str, script: Script) -> None:
        """An abort ends the wait for the head, and the server sees the connection closed."""
        with serve(script) as server:
            ends_at_once(lambda: Streams(mode, server.url).run(leashed(), SOON), "closed while it was being read")
            assert server.closed.acquire(timeout=5)

    def test_while_it_connects(self, mode: str, full_backlog: str) -> None:
        """An abort ends the wait for the connection."""
        ends_at_once(lambda: Streams(mode, full_backlog).run(leashed(), SOON), "closed while it was being read")

    def test_before_it_is_opened(self, mode: str) -> None:
        """A stream that was aborted before its first read sends nothing."""
        with serve(whole) as server:
            with pytest.raises(ConnectionFailed, match="closed while it was being read"):
                Streams(mode, server.url).run(leashed(), None)
            assert (server.connections, server.requests) == (0, [])

    def test_under_a_leash_that_was_stopped(self, mode: str) -> None:
        """Nor does a stream that begins under a leash that was stopped."""

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("hi") + DONE)
            peer.chunk("")

        leash = Leash()
        with serve(script) as server:
            assert Streams(mode, server.url).run(leashed(leash), 5) == ["hi"]
            leash.stop()
            with pytest.raises(ConnectionFailed, match=STOPPED):
                Streams(mode, server.url).run(leashed(leash), 5)
            assert len(server.requests) == 1


def test_without_a_leash() -> None:
    """Calls without a leash have the plain limits, which nothing holds."""
    provider = HTTPProvider(TinyCodec(), SERVICE, config("http://127.0.0.1:1/v1"))
    assert type(provider._endpoint.limits(ask(), stream=False)) is Limits
    assert type(provider._endpoint.limits(leashed(), stream=False)) is HeldLimits
    assert type(provider._endpoint.limits(leashed(), stream=True)) is Limits
    provider.close()
