"""The connections of the HTTP providers, on real sockets: threads, tasks, event loops, forks and closing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest
from support.misbehaving import Peer, Received, Server, serve
from support.tiny import DONE, KEY, SERVICE, Caller, TinyCodec, ask, config, event, whole

from fluxibly._abandoned import end_pending
from fluxibly.config import LLMConfig, Timeouts
from fluxibly.errors import AuthenticationError, ConfigError, ConnectionFailed, RequestTimeout
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider, _httpx, _pool, _sockets_threads

BACKENDS = ["asyncio", "trio"]


def endless(peer: Peer, request: Received) -> None:
    """Send an event, and then nothing."""
    peer.begin_stream()
    peer.chunk(event("one"))
    peer.wait_for_end()


def provider(server: Server, **settings: Any) -> HTTPProvider:
    return HTTPProvider(TinyCodec(), SERVICE, config(server.url, **settings))


def async_provider(server: Server, **settings: Any) -> AsyncHTTPProvider:
    return AsyncHTTPProvider(TinyCodec(), SERVICE, config(server.url, **settings))


class TestSettings:
    def make(self, url: str | None = "http://localhost/v1", **settings: Any) -> HTTPProvider:
        return HTTPProvider(TinyCodec(), SERVICE, config(url, **settings))

    def test_info_names_the_server(self) -> None:
        """The async provider has the same name, so that logs agree."""
        with self.make("https://api.example.com/v1") as made:
            assert made.info.name == "HTTPProvider"
            assert (made.info.framework, made.info.telemetry_name) == ("tiny", "tiny")
            assert (made.info.server_address, made.info.server_port) == ("api.example.com", 443)
        twin = AsyncHTTPProvider(TinyCodec(), SERVICE, config("https://api.example.com/v1"))
        assert twin.info == made.info

    def test_the_repr_shows_no_key(self) -> None:
        """The repr of a provider does not show the API key."""
        assert KEY not in repr(self.make())

    def test_a_missing_address(self) -> None:
        """The error names the setting."""
        with pytest.raises(ConfigError, match="api_base"):
            self.make(None)

    def test_a_missing_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The environment variable provides a missing key. If it is unset too, the error names it."""
        monkeypatch.delenv("TINY_API_KEY", raising=False)
        with pytest.raises(AuthenticationError, match="TINY_API_KEY"):
            self.make(key=None)
        monkeypatch.setenv("TINY_API_KEY", "from-the-environment")
        with serve(whole) as server:
            with provider(server, key=None) as made:
                made.complete(ask())
            assert server.requests[0].headers["authorization"] == "Bearer from-the-environment"

    @pytest.mark.parametrize("key", ["sk-secret\n", " sk-secret", "sk-\nsecret", "sk-sécret", "sk-secret\x00x"])
    def test_a_malformed_key(self, key: str) -> None:
        """A malformed key is refused before any request, and not shown."""
        with pytest.raises(AuthenticationError) as caught:
            self.make(key=key)
        assert "secret" not in str(caught.value)

    def test_paths_and_queries_are_joined(self, caller: Caller) -> None:
        """The query of `api_base` is part of each request."""
        with serve(whole) as server:
            caller.complete(server.url + "/?api-version=1")
            assert server.requests[0].target == "/v1/chat?api-version=1"


class TestReleasing:
    def test_threads_share_a_pool(self) -> None:
        """Each call has its own connection, and later calls use the connections again."""
        barrier = threading.Barrier(8)
        texts: list[str] = []

        def work(name: str) -> None:
            barrier.wait(5)
            texts.extend([shared.complete(ask(f"{name}-{n}")).text for n in range(20)])

        with serve(whole) as server, provider(server) as shared:
            threads = [threading.Thread(target=work, args=(str(n),)) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
            assert server.connections <= 8
        assert sorted(texts) == sorted(f"{n}-{m}" for n in range(8) for m in range(20))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tasks_share_a_pool(self, backend: str) -> None:
        """Two hundred calls at once get their own responses."""

        async def main(server: Server) -> None:
            texts: list[str] = []

            async def work(name: str) -> None:
                texts.append((await shared.complete(ask(name))).text)

            async with async_provider(server) as shared:
                for _ in range(2):
                    async with anyio.create_task_group() as tasks:
                        for n in range(200):
                            tasks.start_soon(work, str(n))
            assert sorted(texts) == sorted([str(n) for n in range(200)] * 2)
            assert server.connections <= 200

        with serve(whole) as server:
            anyio.run(main, server, backend=backend)

    def test_a_limited_pool_makes_threads_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The threads use the only connection in turn."""
        monkeypatch.setattr(_pool, "MAX_CONNECTIONS", 1)
        with serve(whole) as server, provider(server) as shared:
            threads = [threading.Thread(target=shared.complete, args=(ask(str(n)),)) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
            assert (server.connections, len(server.requests)) == (1, 8)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_limited_pool_makes_tasks_wait(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tasks that are cancelled while they wait are passed over."""
        monkeypatch.setattr(_pool, "MAX_CONNECTIONS", 1)

        async def main(server: Server) -> None:
            async with async_provider(server) as shared:
                held = shared.stream(ask("held"))
                await anext(held)
                async with anyio.create_task_group() as tasks:
                    for n in range(5):
                        tasks.start_soon(shared.complete, ask(str(n)))
                    await anyio.wait_all_tasks_blocked()
                    tasks.cancel_scope.cancel()
                async with anyio.create_task_group() as tasks:
                    for n in range(5):
                        tasks.start_soon(shared.complete, ask(str(n)))
                    await anyio.wait_all_tasks_blocked()
                    await held.aclose()
            assert len(server.requests) == 6

        def script(peer: Peer, request: Received) -> None:
            (endless if request.json["stream"] else whole)(peer, request)

        with serve(script) as server:
            anyio.run(main, server, backend=backend)

    def test_an_idle_connection_expires(self, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        """An expired connection is replaced."""
        monkeypatch.setattr(_pool, "KEEP_IDLE", 0.0)
        with serve(whole) as server:
            caller.complete(server.url, times=3)
            assert server.connections == 3

    def test_a_stream_that_is_closed_early(self) -> None:
        """The stream's connection is closed, and the provider remains usable."""
        with serve(endless) as server, provider(server) as made:
            for _ in range(3):
                stream = made.stream(ask())
                assert next(stream).text == "one"
                stream.close()
                stream.close()
                assert server.closed.acquire(timeout=5)
                assert list(stream) == []

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_an_async_stream_that_is_closed_early(self, backend: str) -> None:
        """The same holds on an event loop."""

        async def main(server: Server) -> None:
            async with async_provider(server) as made:
                for _ in range(3):
                    stream = made.stream(ask())
                    assert (await anext(stream)).text == "one"
                    await stream.aclose()
                    await stream.aclose()
                    assert server.closed.acquire(timeout=5)
                    assert [chunk async for chunk in stream] == []

        with serve(endless) as server:
            anyio.run(main, server, backend=backend)

    def test_a_stream_that_is_dropped(self) -> None:
        """The next call closes the stream's connection."""

        def script(peer: Peer, request: Received) -> None:
            (endless if request.json["stream"] else whole)(peer, request)

        with serve(script) as server, provider(server) as made:
            assert next(made.stream(ask())).text == "one"
            made.complete(ask())
            assert server.closed.acquire(timeout=5)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_cancellation(self, backend: str, method: str) -> None:
        """A cancellation within a read closes the connection. The next call uses a new connection."""

        def script(peer: Peer, request: Received) -> None:
            if len(server.requests) > 1:
                whole(peer, request)
                return
            peer.begin_stream()
            peer.chunk(event("one"))
            began.set()
            peer.wait_for_end()

        async def main() -> None:
            async def work() -> None:
                if method == "complete":
                    await made.complete(ask())
                else:
                    async for _ in made.stream(ask()):
                        pass

            async with async_provider(server) as made:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(work)
                    await anyio.to_thread.run_sync(began.wait, 5)
                    await anyio.wait_all_tasks_blocked()
                    tasks.cancel_scope.cancel()
                assert server.closed.acquire(timeout=5)
                assert (await made.complete(ask("after"))).text == "after"

        began = threading.Event()
        with serve(script) as server:
            anyio.run(main, backend=backend)


@contextlib.contextmanager
def stuck(where: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of a server that is never reached, because of the look-up, of connecting, or of a full pool."""
    if where == "connect" and sys.platform != "linux":
        pytest.skip("a full queue of connections is silent on Linux only")
    over = threading.Event()
    look_up = socket.getaddrinfo

    def endless_look_up(*args: Any, **options: Any) -> Any:
        if not options.get("flags", 0) & socket.AI_NUMERICHOST:
            over.wait(30)
        return look_up(*args, **options)

    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as queue:
        address = full.getsockname()
        host = "127.0.0.1"
        if where == "turn":
            monkeypatch.setattr(_pool, "MAX_CONNECTIONS", 0)
        elif where == "look-up":
            monkeypatch.setattr(socket, "getaddrinfo", endless_look_up)
            host = "models.invalid"
        else:
            for _ in range(4):
                sock = queue.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(address)
        yield f"http://{host}:{address[1]}/v1"
        over.set()


def silent(peer: Peer, request: Received) -> None:
    peer.wait_for_end()


class TestEnding:
    @pytest.mark.parametrize("script", [endless, silent])
    @pytest.mark.parametrize("end", ["abort", "close"])
    def test_a_read_in_another_thread_is_ended(self, script: Callable[[Peer, Received], None], end: str) -> None:
        """The read ends whether the response has begun or not."""
        came = threading.Event()
        ended: list[Exception] = []

        def read(stream: Iterator[Any]) -> None:
            try:
                for _ in stream:
                    came.set()
            except ConnectionFailed as error:
                ended.append(error)

        with serve(script) as server, provider(server, timeout=30) as made:
            stream = made.stream(ask())
            thread = threading.Thread(target=read, args=(stream,))
            thread.start()
            if script is endless:
                assert came.wait(5)
            else:
                while not server.requests:
                    came.wait(0.01)
            getattr(stream, end)()
            thread.join(5)
            assert not thread.is_alive()
        # a close may come between two reads, and then the stream just ends
        assert end == "close" or ended
        assert all("was closed while it was being read" in str(error) for error in ended)

    @pytest.mark.parametrize("end", ["abort", "aclose"])
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("script", [endless, silent])
    def test_a_read_in_another_task_is_ended(
        self, backend: str, script: Callable[[Peer, Received], None], end: str
    ) -> None:
        """The same holds on an event loop."""

        async def main(server: Server) -> None:
            ended: list[Exception] = []

            async def read() -> None:
                try:
                    async for _ in stream:
                        pass
                except ConnectionFailed as error:
                    ended.append(error)

            async with async_provider(server, timeout=30) as made:
                stream = made.stream(ask())
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read)
                    while not server.requests:  # noqa: ASYNC110  # the server's thread appends to them
                        await anyio.sleep(0.01)
                    await anyio.wait_all_tasks_blocked()
                    if end == "abort":
                        stream.abort()
                    else:
                        await stream.aclose()
            assert len(ended) == 1

        with serve(script) as server:
            anyio.run(main, server, backend=backend)

    def test_close_ends_open_streams(self) -> None:
        """Idle streams end too. A second close has no effect, and a later call is an error."""
        with serve(endless) as server:
            made = provider(server)
            stream = made.stream(ask())
            next(stream)
            made.close()
            made.close()
            with pytest.raises(ConnectionFailed):
                next(stream)
            assert server.closed.acquire(timeout=5)
            with pytest.raises(RuntimeError, match="closed"):
                made.complete(ask())
            with pytest.raises(RuntimeError, match="closed"):
                made.stream(ask())

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_aclose_ends_open_streams(self, backend: str) -> None:
        """The same holds on an event loop."""

        async def main(server: Server) -> None:
            made = async_provider(server)
            stream = made.stream(ask())
            await anext(stream)
            await made.aclose()
            await made.aclose()
            with pytest.raises(ConnectionFailed):
                await anext(stream)
            with pytest.raises(RuntimeError, match="closed"):
                await made.complete(ask())

        with serve(endless) as server:
            anyio.run(main, server, backend=backend)
            assert server.closed.acquire(timeout=5)

    @pytest.mark.parametrize("mode", ["sync", *BACKENDS])
    def test_abort_while_the_key_is_asked_for(self, mode: str) -> None:
        """A stream that is given up while a function gives its key sends no request."""

        def key() -> str:
            stream.abort()
            return KEY

        async def main() -> None:
            with pytest.raises(ConnectionFailed, match="was closed"):
                await anext(stream)

        with serve(endless) as server:
            settings = LLMConfig(framework="tiny", model="tiny-1", api_base=server.url, api_key=key)
            stream: Any
            if mode == "sync":
                stream = HTTPProvider(TinyCodec(), SERVICE, settings).stream(ask())
                with pytest.raises(ConnectionFailed, match="was closed"):
                    next(stream)
            else:
                stream = AsyncHTTPProvider(TinyCodec(), SERVICE, settings).stream(ask())
                anyio.run(main, backend=mode)
            assert server.requests == []

    @pytest.mark.parametrize("mode", ["sync", *BACKENDS])
    def test_abort_between_two_waits(self, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """An abort that finds no wait to end, here because it comes within a look-up, ends the next one."""
        look_up = socket.getaddrinfo

        def aborting(*args: Any, **options: Any) -> Any:
            stream.abort()
            return look_up(*args, **options)

        async def main() -> None:
            nonlocal stream
            async with async_provider(server) as made:
                stream = made.stream(ask())
                with pytest.raises(ConnectionFailed, match="was closed"):
                    await anext(stream)

        stream: Any = None
        with serve(endless) as server:
            monkeypatch.setattr(socket, "getaddrinfo", aborting)
            if mode == "sync":
                with provider(server) as made:
                    stream = made.stream(ask())
                    with pytest.raises(ConnectionFailed, match="was closed"):
                        next(stream)
            else:
                anyio.run(main, backend=mode)
            assert server.requests == []

    @pytest.mark.parametrize("where", ["look-up", "connect", "turn"])
    def test_abort_ends_what_comes_before_the_connection(self, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """An abort ends a look-up, connecting, and a wait for a turn, in another thread."""
        waiting = threading.Event()
        ended: list[Exception] = []

        def noting(function: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **options: Any) -> Any:
                waiting.set()
                return function(*args, **options)

            return noted

        def read() -> None:
            try:
                next(stream)
            except ConnectionFailed as error:
                ended.append(error)

        monkeypatch.setattr(_sockets_threads, "ready", noting(_sockets_threads.ready))
        monkeypatch.setattr(_sockets_threads.BlockingEvent, "wait", noting(_sockets_threads.BlockingEvent.wait))
        with stuck(where, monkeypatch) as url, HTTPProvider(TinyCodec(), SERVICE, config(url, timeout=60)) as made:
            stream = made.stream(ask())
            thread = threading.Thread(target=read)
            thread.start()
            assert waiting.wait(5)
            stream.abort()
            thread.join(10)
            assert not thread.is_alive()
        assert "was closed" in str(ended[0])

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("where", ["look-up", "connect", "turn"])
    def test_abort_ends_what_comes_before_it_on_a_loop(
        self, where: str, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same holds in another task."""

        async def main(url: str) -> None:
            ended: list[Exception] = []

            async def read() -> None:
                try:
                    await anext(stream)
                except ConnectionFailed as error:
                    ended.append(error)

            async with AsyncHTTPProvider(TinyCodec(), SERVICE, config(url, timeout=60)) as made:
                stream = made.stream(ask())
                with anyio.fail_after(10):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(read)
                        await anyio.wait_all_tasks_blocked()
                        stream.abort()
            assert "was closed" in str(ended[0])

        with stuck(where, monkeypatch) as url:
            anyio.run(main, url, backend=backend)

    @pytest.mark.parametrize("where", ["look-up", "connect", "turn"])
    def test_what_comes_before_the_connection_is_limited(
        self, caller: Caller, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The limit on connecting applies to a look-up, to connecting, and to a wait for a turn."""
        with stuck(where, monkeypatch) as url, pytest.raises(RequestTimeout) as caught:
            caller.complete(url, timeout=Timeouts(connect=0.1))
        assert caught.value.phase == "connect"

    def test_closing_ends_a_call_that_waits_for_its_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The call gets an error instead of a connection."""

        async def main() -> None:
            made = AsyncHTTPProvider(TinyCodec(), SERVICE, config("http://127.0.0.1:1", timeout=60))

            async def call() -> None:
                with pytest.raises(ConnectionFailed, match="closed"):
                    await made.complete(ask())

            with anyio.fail_after(10):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(call)
                    await anyio.wait_all_tasks_blocked()
                    await made.aclose()

        monkeypatch.setattr(_pool, "MAX_CONNECTIONS", 0)
        anyio.run(main)

    def test_a_provider_on_several_event_loops(self) -> None:
        """A provider serves several event loops in turn, of asyncio and of trio."""
        with serve(whole) as server:
            made = async_provider(server)
            for backend in BACKENDS * 2:
                assert anyio.run(made.complete, ask(backend), backend=backend).text == backend
            anyio.run(made.aclose)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_fork_shares_no_connection(self) -> None:
        """The child makes its own connections, and the parent's stream continues undisturbed."""
        go_on = threading.Event()

        def script(peer: Peer, request: Received) -> None:
            if not request.json["stream"]:
                whole(peer, request)
                return
            peer.begin_stream()
            peer.chunk(event("one "))
            go_on.wait(5)
            peer.chunk(event("two") + DONE)
            peer.chunk("")

        with serve(script) as server, provider(server) as made:
            made.complete(ask("before"))
            stream = made.stream(ask())
            next(stream)
            made.complete(ask("idle"))
            before = server.connections
            child = os.fork()
            if child == 0:
                status = 1
                with contextlib.suppress(BaseException):
                    status = 0 if made.complete(ask("child")).text == "child" else 2
                    with contextlib.suppress(ConnectionFailed):
                        next(stream)
                        status = 3
                os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert server.connections == before + 1
            go_on.set()
            assert [chunk.text for chunk in stream] == ["two"]
            assert made.complete(ask("after")).text == "after"
            assert server.connections == before + 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_fork_shares_no_connection_of_httpx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same holds for httpx's transport, which the provider uses if a program has wrapped it."""
        method = httpx.HTTPTransport.handle_request
        wrapper = functools.wraps(method)(lambda transport, request: method(transport, request))  # noqa: PLW0108  # a wrapper
        monkeypatch.setattr(httpx.HTTPTransport, "handle_request", wrapper)
        with serve(whole) as server, provider(server) as made:
            made.complete(ask())
            child = os.fork()
            if child == 0:
                status = 1
                with contextlib.suppress(BaseException):
                    status = 0 if made.complete(ask("child")).text == "child" else 2
                os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert server.connections == 2
            assert made.complete(ask("parent")).text == "parent"
            assert server.connections == 2

    def test_closing_ends_a_handshake(self) -> None:
        """A close ends a call in another thread whose server does not continue the handshake."""
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
            made = HTTPProvider(
                TinyCodec(), SERVICE, config(f"https://127.0.0.1:{listener.getsockname()[1]}", timeout=30)
            )
            failures: list[BaseException] = []

            def call() -> None:
                try:
                    made.complete(ask())
                except ConnectionFailed as error:
                    failures.append(error)

            thread = threading.Thread(target=call)
            thread.start()
            peer, _ = listener.accept()
            assert peer.recv(1)  # the handshake has begun
            made.close()
            thread.join(10)
            peer.close()
            assert len(failures) == 1


class TestBehindAPipeline:
    def test_a_stream_closed_in_another_thread(self) -> None:
        """The reading thread sees the end of the stream, at once and without an error."""
        came = threading.Event()
        texts: list[str] = []

        def read() -> None:
            for chunk in stream:
                texts.append(chunk.text)
                came.set()
            texts.append("the end")

        with serve(endless) as server, provider(server, timeout=30) as made:
            stream = Pipeline(made).stream(ask())
            thread = threading.Thread(target=read)
            thread.start()
            assert came.wait(5)
            stream.close()
            thread.join(5)
            assert texts == ["one", "the end"]
            assert server.closed.acquire(timeout=5)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_an_async_stream_that_is_dropped(self, backend: str) -> None:
        """The stream's connection is closed without an await."""

        async def main(server: Server) -> None:
            async with async_provider(server, timeout=30) as made:
                stream = AsyncPipeline(made).stream(ask())
                await anext(stream)
                del stream
                end_pending()
                assert server.closed.acquire(timeout=5)

        with serve(endless) as server:
            anyio.run(main, server, backend=backend)


class TestTransports:
    def test_a_mock(self) -> None:
        """`transport=` takes any httpx transport."""

        def answer(request: httpx.Request) -> httpx.Response:
            assert request.headers["authorization"] == f"Bearer {KEY}"
            return httpx.Response(200, json={"text": str(request.url)}, headers={"X-Request-Id": "r"})

        url = "http://models.example/v1"
        with HTTPProvider(TinyCodec(), SERVICE, config(url), transport=httpx.MockTransport(answer)) as made:
            response = made.complete(ask())
        assert (response.text, response.request_id) == ("http://models.example/v1/chat", "r")

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_an_async_mock(self, backend: str) -> None:
        """`transport=` works on an event loop, and for streams."""

        async def main() -> str:
            def answer(request: httpx.Request) -> httpx.Response:
                return httpx.Response(200, text=event("hello") + DONE)

            transport = httpx.MockTransport(answer)
            settings = config("http://models.example/v1")
            async with AsyncHTTPProvider(TinyCodec(), SERVICE, settings, transport=transport) as made:
                return "".join([chunk.text async for chunk in made.stream(ask())])

        assert anyio.run(main, backend=backend) == "hello"

    @pytest.mark.usefixtures("patient")
    @pytest.mark.parametrize("name", ["httpx", "aiohttp"])
    def test_real_ones(self, name: str) -> None:
        """The transports of httpx and aiohttp carry whole and streamed responses, with the usual limits and errors."""
        if name == "aiohttp":
            from httpx_aiohttp import AiohttpTransport as Transport
        else:
            from httpx import AsyncHTTPTransport as Transport

        def script(peer: Peer, request: Received) -> None:
            prompt = request.json["prompt"]
            if prompt == "idle":
                endless(peer, request)
            elif prompt == "cut":
                peer.begin_stream()
                peer.chunk(event("one"))
                peer.close()
            elif prompt == "silent":
                silent(peer, request)
            elif request.json["stream"]:
                peer.begin_stream()
                peer.chunk(event("one ") + event("two") + DONE)
                peer.chunk("")
            else:
                whole(peer, request)

        async def main(server: Server) -> None:
            settings = config(server.url, timeout=Timeouts(connect=0.1, first_byte=0.2, idle=0.2))
            async with AsyncHTTPProvider(TinyCodec(), SERVICE, settings, transport=Transport()) as made:
                for _ in range(3):
                    assert (await made.complete(ask("hello"))).text == "hello"
                    assert "".join([chunk.text async for chunk in made.stream(ask())]) == "one two"
                assert server.connections == 1
                for prompt, error in FAILURES.items():
                    with pytest.raises(error):
                        async for _ in made.stream(ask(prompt)):
                            pass

        with serve(script) as server:
            asyncio.run(main(server))

    @pytest.mark.parametrize("name", ["httpx", "aiohttp"])
    @pytest.mark.parametrize("script", [endless, silent])
    def test_abort_ends_a_read_over_a_transport(self, name: str, script: Callable[[Peer, Received], None]) -> None:
        """An abort in another thread ends the read whether the response has begun or not."""
        if name == "aiohttp":
            from httpx_aiohttp import AiohttpTransport as Transport
        else:
            from httpx import AsyncHTTPTransport as Transport

        async def main(server: Server) -> None:
            settings = config(server.url, timeout=60)
            async with AsyncHTTPProvider(TinyCodec(), SERVICE, settings, transport=Transport()) as made:
                stream = made.stream(ask())

                async def read() -> None:
                    with pytest.raises(ConnectionFailed, match="was closed"):
                        async for _ in stream:
                            pass

                with anyio.fail_after(10):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(read)
                        while not server.requests:  # noqa: ASYNC110  # the server's thread appends to them
                            await anyio.sleep(0.01)
                        await anyio.wait_all_tasks_blocked()
                        await anyio.to_thread.run_sync(stream.abort)
                assert await anyio.to_thread.run_sync(server.closed.acquire, True, 5)

        with serve(script) as server:
            asyncio.run(main(server))

    @pytest.mark.parametrize("method", ["complete", "stream"])
    def test_cancellation_over_a_transport(self, method: str) -> None:
        """A cancellation within a read closes the connection at once, although the provider lives on."""

        async def main(server: Server) -> None:
            async with AsyncHTTPProvider(
                TinyCodec(), SERVICE, config(server.url, timeout=60), transport=httpx.AsyncHTTPTransport()
            ) as made:

                async def call() -> None:
                    if method == "complete":
                        await made.complete(ask())
                    else:
                        async for _ in made.stream(ask()):
                            pass

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(call)
                    while not server.requests:  # noqa: ASYNC110  # the server's thread appends to them
                        await anyio.sleep(0.01)
                    await anyio.sleep(0.1)
                    tasks.cancel_scope.cancel()
                assert await anyio.to_thread.run_sync(server.closed.acquire, True, 5)

        with serve(endless) as server:
            asyncio.run(main(server))

    @pytest.mark.parametrize("name", ["httpx", "aiohttp"])
    def test_closing_ends_an_idle_stream_over_a_transport(self, name: str) -> None:
        """The stream's connection is closed, and the next read reports that."""
        if name == "aiohttp":
            from httpx_aiohttp import AiohttpTransport as Transport
        else:
            from httpx import AsyncHTTPTransport as Transport

        async def main(server: Server) -> None:
            made = AsyncHTTPProvider(TinyCodec(), SERVICE, config(server.url, timeout=60), transport=Transport())
            stream = made.stream(ask())
            assert (await anext(stream)).text == "one"
            await made.aclose()
            assert await anyio.to_thread.run_sync(server.closed.acquire, True, 5)
            with pytest.raises(ConnectionFailed, match="was closed"):
                await anext(stream)

        with serve(endless) as server:
            asyncio.run(main(server))

    def test_abort_ends_a_read_over_a_sync_transport(self) -> None:
        """An abort in another thread ends the read."""
        came = threading.Event()
        ended: list[Exception] = []

        def read() -> None:
            try:
                for _ in stream:
                    came.set()
            except ConnectionFailed as error:
                ended.append(error)

        with serve(endless) as server:
            settings = config(server.url, timeout=60)
            with HTTPProvider(TinyCodec(), SERVICE, settings, transport=httpx.HTTPTransport()) as made:
                stream = made.stream(ask())
                thread = threading.Thread(target=read)
                thread.start()
                assert came.wait(5)
                stream.abort()
                thread.join(10)
                assert not thread.is_alive()
        assert "was closed" in str(ended[0])

    def test_abort_while_a_sync_transport_sends(self) -> None:
        """The response that comes too late is released, so that its connection is closed."""
        go_on = threading.Event()
        ended: list[Exception] = []

        def script(peer: Peer, request: Received) -> None:
            go_on.wait(10)
            endless(peer, request)

        def read() -> None:
            try:
                next(stream)
            except ConnectionFailed as error:
                ended.append(error)

        with serve(script) as server:
            settings = config(server.url, timeout=60)
            with HTTPProvider(TinyCodec(), SERVICE, settings, transport=httpx.HTTPTransport()) as made:
                stream = made.stream(ask())
                thread = threading.Thread(target=read)
                thread.start()
                while not server.requests:
                    thread.join(0.01)
                stream.abort()
                go_on.set()
                thread.join(10)
                assert "was closed" in str(ended[0])
                assert server.closed.acquire(timeout=5)

    def test_a_stream_over_a_sync_transport_that_is_closed_early(self) -> None:
        """Its connection is closed, and the provider remains usable."""
        with serve(endless) as server:
            settings = config(server.url, timeout=60)
            with HTTPProvider(TinyCodec(), SERVICE, settings, transport=httpx.HTTPTransport()) as made:
                for _ in range(2):
                    stream = made.stream(ask())
                    assert next(stream).text == "one"
                    stream.close()
                    assert server.closed.acquire(timeout=5)

    def test_headers_that_are_always_different(self) -> None:
        """They are not all kept, so that a program may make any number of calls."""
        seen: list[str] = []

        def answer(request: httpx.Request) -> httpx.Response:
            seen.append(request.headers["x-trace"])
            return httpx.Response(200, json={"text": "hello"})

        settings = config("http://models.example/v1")
        with HTTPProvider(TinyCodec(), SERVICE, settings, transport=httpx.MockTransport(answer)) as made:
            for n in range(3 * _httpx.KEPT):
                made.complete(ask(headers={"x-trace": str(n)}))
            gc.collect()
            kept = [each for each in gc.get_objects() if isinstance(each, httpx.Headers) and "x-trace" in each]
        assert seen == [str(n) for n in range(3 * _httpx.KEPT)]
        assert len(kept) <= _httpx.KEPT + 1


FAILURES = {"idle": RequestTimeout, "silent": RequestTimeout, "cut": Exception}
