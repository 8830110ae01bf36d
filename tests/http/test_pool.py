"""What a pool keeps: each slot that a call gives up serves another call, and no socket stays open unseen."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import anyio
import pytest
from support.misbehaving import HEAD, Peer, Received, serve
from support.tiny import DONE, SERVICE, Caller, TinyCodec, ask, config, event, whole

from fluxibly.config import Timeouts
from fluxibly.errors import ConnectionFailed, ProviderError, RequestTimeout
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider, _limits, _pool, _sockets_threads

BACKENDS = ["asyncio", "trio"]


def provider(url: str, **settings: Any) -> HTTPProvider:
    return HTTPProvider(TinyCodec(), SERVICE, config(url, **settings))


def async_provider(url: str, **settings: Any) -> AsyncHTTPProvider:
    return AsyncHTTPProvider(TinyCodec(), SERVICE, config(url, **settings))


def open_sockets() -> list[socket.socket]:
    """Return the open sockets of this process."""
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, socket.socket) and each.fileno() != -1]


@pytest.fixture
def kept() -> Iterator[list[object]]:
    """A list for providers. When the test is over they still exist, but none of their sockets may be open."""
    before = open_sockets()
    providers: list[object] = []
    yield providers
    assert [each for each in open_sockets() if each not in before] == []


@pytest.fixture
def one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool for a single connection: if a call does not give its slot back, no other call gets a turn."""
    monkeypatch.setattr(_pool, "MAX_CONNECTIONS", 1)


def mixed(peer: Peer, request: Received) -> None:
    """Stream without an end, and answer other requests at once."""
    if not request.json["stream"]:
        whole(peer, request)
        return
    peer.begin_stream()
    peer.chunk(event("one"))
    peer.wait_for_end()


@pytest.mark.usefixtures("one_slot")
class TestSlots:
    """A slot that is lost would make all later calls wait in vain, once every slot of the pool is lost."""

    def test_a_connection_that_the_server_closed(self, caller: Caller) -> None:
        """The slot of an idle connection that has ended is free for a new connection."""

        def script(peer: Peer, request: Received) -> None:
            whole(peer, request)
            peer.close()

        with serve(script) as server:
            caller.between = lambda: server.closed.acquire(timeout=5)
            assert caller.complete(server.url, times=3, timeout=Timeouts(connect=5)).text == "hi"
            assert server.connections == 3

    def test_a_connection_that_expired(self, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        """So is that of a connection that was idle for too long, whether a call finds it or not."""
        with serve(whole) as server:
            caller.between = lambda: monkeypatch.setattr(_pool, "KEEP_IDLE", 0.0)
            assert caller.complete(server.url, times=3, timeout=Timeouts(connect=5)).text == "hi"
            assert server.connections == 3

    def test_a_connection_that_is_refused(self, caller: Caller) -> None:
        """A failure to connect costs no slot."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        for _ in range(2):
            with pytest.raises(ConnectionFailed):
                caller.complete(url, timeout=Timeouts(connect=5))

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("stage", ["head", "body"])
    def test_a_call_that_is_cancelled(self, backend: str, stage: str) -> None:
        """A cancellation gives the slot back, while the call waits for the head and while it reads the body."""

        def script(peer: Peer, request: Received) -> None:
            if len(server.requests) > 1:
                whole(peer, request)
                return
            if stage == "body":
                peer.send(HEAD + b"content-length: 100\r\n\r\n{")
            peer.wait_for_end()

        async def main() -> None:
            async with async_provider(server.url) as made:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(made.complete, ask())
                    while not server.requests:  # noqa: ASYNC110  # the server's thread appends to them
                        await anyio.sleep(0.01)
                    await anyio.wait_all_tasks_blocked()
                    tasks.cancel_scope.cancel()
                assert (await made.complete(ask("after"))).text == "after"

        with serve(script) as server:
            anyio.run(main, backend=backend)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_call_that_is_cancelled_when_its_turn_comes(self, backend: str) -> None:
        """A waiting call that got the slot, and is cancelled before it runs again, passes the slot on."""

        async def main(url: str) -> None:
            async with async_provider(url) as made:
                held = made.stream(ask())
                await anext(held)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(made.complete, ask("never sent"))
                    await anyio.wait_all_tasks_blocked()
                    await held.aclose()
                    tasks.cancel_scope.cancel()
                assert (await made.complete(ask("after"))).text == "after"

        with serve(mixed) as server:
            anyio.run(main, server.url, backend=backend)
            assert [request.json["prompt"] for request in server.requests] == ["hi", "after"]

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_turns_are_taken_in_order(self, backend: str) -> None:
        """The call that has waited longest is the next."""

        async def main(url: str) -> None:
            async with async_provider(url) as made:
                held = made.stream(ask())
                await anext(held)
                async with anyio.create_task_group() as tasks:
                    for n in range(4):
                        tasks.start_soon(made.complete, ask(str(n)))
                        await anyio.wait_all_tasks_blocked()
                    await held.aclose()

        with serve(mixed) as server:
            anyio.run(main, server.url, backend=backend)
            assert [request.json["prompt"] for request in server.requests] == ["hi", "0", "1", "2", "3"]

    @pytest.mark.parametrize("reusable", [True, False])
    def test_a_thread_waits_for_its_turn(self, reusable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """The thread has its turn at once when a stream ends, whether the connection can be used again or not."""
        waiting = threading.Event()
        wait = _sockets_threads.BlockingEvent.wait

        def noted(event: Any, seconds: float | None) -> Any:
            waiting.set()
            return wait(event, seconds)

        monkeypatch.setattr(_sockets_threads.BlockingEvent, "wait", noted)
        texts: list[str] = []
        script = to_the_end if reusable else mixed
        with serve(script) as server, provider(server.url, timeout=Timeouts(connect=30)) as made:
            stream = made.stream(ask())
            next(stream)
            thread = threading.Thread(target=lambda: texts.append(made.complete(ask("after")).text))
            thread.start()
            assert waiting.wait(5)
            stream.close()
            thread.join(10)
            assert (texts, server.connections) == (["after"], 1 if reusable else 2)


def to_the_end(peer: Peer, request: Received) -> None:
    """Stream to the end, so that the connection can be used again, and answer other requests at once."""
    if not request.json["stream"]:
        whole(peer, request)
        return
    peer.begin_stream()
    peer.chunk(event("one") + DONE)
    peer.chunk("")


class TestIdle:
    def test_an_expired_connection_is_not_used(self, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        """Firewalls forget connections that were idle for long, and a request on such a connection gets no answer."""
        with serve(whole) as server:
            caller.between = lambda: monkeypatch.setattr(_pool, "KEEP_IDLE", 0.0)
            caller.complete(server.url, times=2)
            assert server.connections == 2

    def test_the_connection_that_was_used_last_is_used_next(self) -> None:
        """So a quieter program lets the connections that it does not need expire."""
        served: list[Peer] = []

        def script(peer: Peer, request: Received) -> None:
            served.append(peer)
            to_the_end(peer, request)

        with serve(script) as server, provider(server.url) as made:
            streams = [made.stream(ask(str(n))) for n in range(3)]
            for stream in streams:
                next(stream)
            for stream in streams:
                assert list(stream) == []
            assert made.complete(ask("next")).text == "next"
            assert [served.index(peer) for peer in served] == [0, 1, 2, 2]

    def test_a_server_that_goes_on_after_the_end(self, caller: Caller) -> None:
        """A body that goes on after the last event of a stream holds nobody for long: its connection is given up."""
        sent: list[str] = []

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("one") + DONE)
            for _ in range(2000):
                peer.chunk(": more\n\n")
                time.sleep(0.001)
            sent.append("all")

        with serve(script) as server:
            assert caller.stream(server.url) == "one"
            assert sent == []

    def test_a_dropped_stream_ends_its_connection_at_once(self) -> None:
        """The server learns that nobody reads on, also if no other call is made."""
        with serve(mixed) as server, provider(server.url) as made:
            assert next(made.stream(ask())).text == "one"
            gc.collect()
            assert server.closed.acquire(timeout=5)

    def test_closed_connections_are_forgotten(self) -> None:
        """A provider that has made many connections keeps none of those that have ended in memory."""

        def script(peer: Peer, request: Received) -> None:
            peer.answer({"text": "hello"}, connection="close")

        with serve(script) as server, provider(server.url) as made:
            for _ in range(5):
                made.complete(ask())
            gc.collect()
            assert server.connections == 5
            assert [each for each in gc.get_objects() if isinstance(each, _pool.Connection)] == []


class TestSockets:
    """A provider that is closed, or whose calls have ended, holds no socket, although it still exists."""

    def test_a_provider_that_is_closed(self, kept: list[object]) -> None:
        """Its idle connections are closed."""
        with serve(to_the_end) as server:
            made = provider(server.url)
            kept.append(made)
            streams = [made.stream(ask()) for _ in range(3)]
            for stream in streams:
                next(stream)
            for stream in streams:
                assert list(stream) == []
            made.close()

    def test_a_stream_that_ends_after_its_provider_was_closed(self, kept: list[object]) -> None:
        """Its connection does not become idle again in a pool that nobody will close."""
        with serve(to_the_end) as server:
            made = provider(server.url)
            kept.append(made)
            stream = made.stream(ask())
            assert next(stream).text == "one"
            made.close()
            assert list(stream) == []

    def test_a_call_that_connects_while_its_provider_is_closed(
        self, kept: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A connection that is made too late is closed, and the request is not sent."""
        began, go_on = threading.Event(), threading.Event()
        look_up = socket.getaddrinfo
        failures: list[ConnectionFailed] = []

        def slow(host: str, *args: Any, **options: Any) -> Any:
            if host == "models.invalid" and not options.get("flags"):
                began.set()
                go_on.wait(10)
                host = "127.0.0.1"
            return look_up(host, *args, **options)

        def call() -> None:
            try:
                made.complete(ask())
            except ConnectionFailed as error:
                failures.append(error)

        monkeypatch.setattr(socket, "getaddrinfo", slow)
        with serve(whole) as server:
            made = provider(server.url.replace("127.0.0.1", "models.invalid"), timeout=30)
            kept.append(made)
            thread = threading.Thread(target=call)
            thread.start()
            assert began.wait(5)
            made.close()
            go_on.set()
            thread.join(10)
            assert server.requests == []
        assert "the provider was closed during the call" in str(failures[0])

    def test_stale_connections(self, kept: list[object]) -> None:
        """A connection that ended under a request is closed before the request is sent again."""

        def script(peer: Peer, request: Received) -> None:
            if len(server.requests) % 3 == 2:
                peer.close()
            else:
                whole(peer, request)

        with serve(script) as server:
            made = provider(server.url)
            kept.append(made)
            for _ in range(4):
                made.complete(ask())
            assert len(server.requests) > 4
            assert [peer_of(each) for each in open_sockets()].count(server.port) == 1
            made.close()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_call_that_is_cancelled_in_a_handshake(self, backend: str, kept: list[object]) -> None:
        """Its connection is closed."""

        async def main(url: str) -> None:
            made = async_provider(url, timeout=60)
            kept.append(made)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(made.complete, ask())
                peer, _ = await anyio.to_thread.run_sync(listener.accept)
                with peer:
                    assert await anyio.to_thread.run_sync(peer.recv, 1)  # the handshake has begun
                    await anyio.wait_all_tasks_blocked()
                    tasks.cancel_scope.cancel()

        with socket.create_server(("127.0.0.1", 0)) as listener:
            anyio.run(main, f"https://127.0.0.1:{listener.getsockname()[1]}", backend=backend)

    def test_a_provider_whose_loop_has_ended(self, kept: list[object]) -> None:
        """The connections of a loop that has ended are closed when the provider is used on another."""
        with serve(whole) as server:
            made = async_provider(server.url)
            kept.append(made)
            for backend in BACKENDS * 2:
                anyio.run(made.complete, ask(), backend=backend)
            assert server.connections == 4
            assert [peer_of(each) for each in open_sockets()].count(server.port) == 1
            anyio.run(made.aclose)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_fork_while_another_thread_uses_the_pool(self) -> None:
        """The child can close the streams that it has inherited, although that thread, and its lock, are not there."""
        with serve(mixed) as server, provider(server.url) as made:
            stream = made.stream(ask())
            next(stream)
            with made._sender._slots[None]._lock:  # type: ignore[attr-defined]  # a pool's
                child = os.fork()
                if child == 0:
                    signal.alarm(5)
                    stream.close()
                    os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_process(self) -> None:
        """The child closes its copies, so that the end of a connection reaches the server while the child lives."""
        with serve(mixed) as server, provider(server.url) as made:
            stream = made.stream(ask())
            next(stream)
            made.complete(ask("idle"))
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(writing)
                os.read(reading, 1)  # until the parent has seen what it waits for
                os._exit(0)
            os.close(reading)
            stream.close()
            made.close()
            try:
                assert server.closed.acquire(timeout=5)
                assert server.closed.acquire(timeout=5)
            finally:
                os.close(writing)
                os.waitpid(child, 0)


def peer_of(sock: socket.socket) -> int | None:
    """Return the port that a socket is connected to."""
    try:
        return int(sock.getpeername()[1])
    except (OSError, IndexError):
        return None


@contextlib.contextmanager
def slow_reader(go_on: Callable[[], object]) -> Generator[str]:
    """Yield the URL of a server that takes a little of a request, calls `go_on`, takes the rest, and answers."""
    over = threading.Event()

    def run() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(1)
            go_on()
            left = None
            data = b""
            while left is None or left > 0:
                data = data[-1000:] + (received := peer.recv(1 << 20))
                if not received:
                    return
                if left is None and (at := data.find(b"\r\n\r\n")) >= 0:
                    head = data[:at].lower()
                    left = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]) - len(data) + at + 4
                elif left is not None:
                    left -= len(received)
            peer.sendall(HEAD + b'content-length: 17\r\n\r\n{"text": "hello"}')
            over.wait(30)

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        over.set()
        thread.join(5)


LARGE = "x" * (16 * 1024 * 1024)
"""More than the buffers of two sockets hold, so that a server must take it before it is sent."""


@pytest.fixture
def two_addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of the host models.invalid, which a test may change."""
    addresses = ["127.0.0.1", "127.0.0.1"]
    look_up = socket.getaddrinfo

    def names(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host == "models.invalid" and not options.get("flags"):
            return [found for address in addresses for found in look_up(address, port, *args, **options)]
        return look_up(host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", names)
    return addresses


class TestConnecting:
    @pytest.mark.skipif(sys.platform != "linux", reason="a full queue of connections is silent on Linux only")
    def test_an_address_that_is_silent(self, caller: Caller, two_addresses: list[str]) -> None:
        """It leaves time for the next address of the host."""
        two_addresses[0] = "127.0.0.2"
        with serve(whole) as server, contextlib.ExitStack() as queue:
            full = queue.enter_context(socket.create_server(("127.0.0.2", server.port), backlog=0))
            for _ in range(4):
                sock = queue.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(full.getsockname())
            url = server.url.replace("127.0.0.1", "models.invalid")
            assert caller.complete(url, timeout=Timeouts(connect=2)).text == "hi"


class TestUploads:
    def test_the_answer_has_the_whole_limit_after_a_long_upload(
        self, caller: Caller, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The time of the first byte begins when the request has been sent."""
        now = [100.0]
        monkeypatch.setattr(_limits, "monotonic", lambda: now[0])

        def pass_time() -> None:
            now[0] += 12

        with slow_reader(pass_time) as url:
            answer = caller.complete(url, request=ask(LARGE), timeout=Timeouts(first_byte=10))
        assert answer.text == "hello"

    @pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio, about httpcore's generators
    @pytest.mark.parametrize("over_httpx", [False, True])
    def test_an_upload_that_the_server_does_not_take(self, caller: Caller, over_httpx: bool) -> None:
        """The limit of the first byte ends it, and not that of connecting, which has passed by then."""
        over = threading.Event()
        caller.over_httpx = over_httpx
        with slow_reader(lambda: over.wait(30)) as url:
            with pytest.raises(RequestTimeout) as caught:
                caller.complete(url, request=ask(LARGE), timeout=Timeouts(connect=0.5, first_byte=0.2))
            over.set()
        assert caught.value.phase == "first_byte"

    def test_a_refusal_before_the_whole_upload(self, caller: Caller) -> None:
        """The server's words are the error, although the connection ends before the request is sent."""
        refusal = b"HTTP/1.1 413 No\r\ncontent-length: 9\r\n\r\ntoo large"
        with ending(refusal) as url, pytest.raises(ProviderError, match="status 413: too large"):
            caller.complete(url, request=ask(LARGE))

    def test_a_reset_before_the_whole_upload(self, caller: Caller) -> None:
        """The error says that the connection was reset, rather than that no answer came."""
        with ending(b"") as url, pytest.raises(ConnectionFailed, match="reset the connection"):
            caller.complete(url, request=ask(LARGE))


@contextlib.contextmanager
def ending(answer: bytes) -> Generator[str]:
    """Yield the URL of a server that takes a little of a request, answers, and resets the connection."""

    def run() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(1000)
            peer.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        thread.join(5)
