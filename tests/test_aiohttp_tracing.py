"""Trace headers over aiohttp, with and without the instrumentations of aiohttp and httpx: a real client and server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs
import pytest
from tiny import DONE, SERVICE, TinyCodec, config, event
from tracing_tools import Recorder, failed

from fluxibly.errors import ProviderError, ServerError
from fluxibly.middleware import Retry
from fluxibly.pipeline import AsyncPipeline
from fluxibly.providers.http import AsyncHTTPProvider
from fluxibly.types import Request

pytest.importorskip("aiohttp")

from fluxibly.providers.aiohttp_transport import AiohttpTransport  # noqa: E402  # it needs aiohttp

REQUEST = Request(model="tiny-1", messages="Hi")
streamed = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])


@attrs.define
class Server:
    """Answers with what it is asked for. `sent` has each request's `traceparent` headers, repeated ones too."""

    url: str = ""
    sent: list[list[str] | None] = attrs.field(factory=list)
    failures: int = 0
    silent: bool = False
    asked: threading.Event = attrs.field(factory=threading.Event)
    closing: threading.Event = attrs.field(factory=threading.Event)


@pytest.fixture
def server() -> Iterator[Server]:
    orders = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            orders.sent.append(self.headers.get_all("traceparent"))
            orders.asked.set()
            asked = self.rfile.read(int(self.headers["content-length"]))
            if orders.silent:
                orders.closing.wait(20)
                return
            status, kind, body = 200, "application/json", '{"text": "hello"}'
            if orders.failures:
                orders.failures -= 1
                status, body = 500, "busy"
            elif b'"stream": true' in asked:
                kind, body = "text/event-stream", event("hel") + event("lo") + DONE
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    orders.url = f"http://127.0.0.1:{listening.server_port}"
    yield orders
    orders.closing.set()
    listening.shutdown()
    listening.server_close()
    thread.join()


@contextmanager
def instrumented(recorder: Recorder, *, httpx_too: bool = False) -> Iterator[None]:
    """aiohttp's instrumentation, and httpx's if wanted, whose spans go to the recorder."""
    aiohttp_client = pytest.importorskip("opentelemetry.instrumentation.aiohttp_client")
    made = [aiohttp_client.AioHttpClientInstrumentor()]
    if httpx_too:
        made.append(pytest.importorskip("opentelemetry.instrumentation.httpx").HTTPXClientInstrumentor())
    for instrumentor in made:
        instrumentor.instrument(tracer_provider=recorder.tracer_provider)
    try:
        yield
    finally:
        for instrumentor in made:
            instrumentor.uninstrument()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def pipeline(recorder: Recorder, server: Server, **settings: Any) -> AsyncPipeline:
    made = AsyncHTTPProvider(TinyCodec(), SERVICE, config(server.url, **settings), transport=AiohttpTransport())
    return AsyncPipeline(made, [recorder.tracing(), Retry(max_retries=1, base_delay=0)])


async def text(calls: AsyncPipeline, *, streaming: bool) -> str:
    """What a call answers."""
    if not streaming:
        return (await calls.complete(REQUEST)).text
    return "".join([chunk.text async for chunk in calls.stream(REQUEST)])


async def one_call(recorder: Recorder, server: Server, *, streaming: bool) -> str:
    async with pipeline(recorder, server) as calls:
        return await text(calls, streaming=streaming)


def header(span: Any) -> list[str]:
    """The only header that a request from this span has."""
    context = span.context
    return [f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"]


def posts(recorder: Recorder) -> list[Any]:
    """The spans of the instrumentation, in the order they began."""
    return sorted((span for span in recorder.spans if span.name == "POST"), key=lambda span: span.start_time)


def check_below_attempts(recorder: Recorder, server: Server) -> None:
    """Each request went out from a span of the instrumentation, which is below its own attempt's, below the call's."""
    found = posts(recorder)
    assert server.sent == [header(post) for post in found]
    assert [post.parent.span_id for post in found] == [attempt.context.span_id for attempt in recorder.attempts]
    assert {attempt.parent.span_id for attempt in recorder.attempts} == {recorder.call.context.span_id}
    assert len(recorder.spans) == 1 + 2 * len(found)
    assert sorted(recorder.counting.started) == sorted(recorder.counting.ended)


@streamed
def test_without_instrumentation_the_header_is_the_attempts(streaming, recorder, server):
    """One header a request, and no span besides ours."""
    assert asyncio.run(one_call(recorder, server, streaming=streaming)) == "hello"
    (attempt,) = recorder.attempts
    assert server.sent == [header(attempt)]
    assert len(recorder.spans) == 2


@streamed
@pytest.mark.parametrize("httpx_too", [False, True], ids=["aiohttp", "both"])
def test_the_header_of_the_instrumentation_takes_the_place_of_ours(httpx_too, streaming, recorder, server, caplog):
    """Its span is below the attempt's; httpx's makes none, since it is not httpx that sends."""
    with instrumented(recorder, httpx_too=httpx_too):
        assert asyncio.run(one_call(recorder, server, streaming=streaming)) == "hello"
    check_below_attempts(recorder, server)
    assert len(server.sent) == 1
    assert caplog.records == []


@streamed
def test_httpx_instrumentation_alone_changes_nothing(streaming, recorder, server):
    """The transport given is no transport of httpx's, so the header stays the attempt's."""
    httpx_client = pytest.importorskip("opentelemetry.instrumentation.httpx").HTTPXClientInstrumentor()
    httpx_client.instrument(tracer_provider=recorder.tracer_provider)
    try:
        assert asyncio.run(one_call(recorder, server, streaming=streaming)) == "hello"
    finally:
        httpx_client.uninstrument()
    (attempt,) = recorder.attempts
    assert server.sent == [header(attempt)]
    assert len(recorder.spans) == 2


@streamed
def test_each_attempt_has_a_request_of_its_own_below_it(streaming, recorder, server):
    """The one that failed and the one that answered."""
    server.failures = 1
    with instrumented(recorder):
        assert asyncio.run(one_call(recorder, server, streaming=streaming)) == "hello"
    check_below_attempts(recorder, server)
    assert [failed(attempt) for attempt in recorder.attempts] == [True, False]
    assert [post.attributes["http.status_code"] for post in posts(recorder)] == [500, 200]


@streamed
def test_calls_at_once_do_not_get_each_others_spans(streaming, recorder, server):
    """Twenty tasks on one session: every request's span has its own call's trace."""

    async def main() -> None:
        async with pipeline(recorder, server) as calls:
            await asyncio.gather(*[text(calls, streaming=streaming) for _ in range(20)])

    with instrumented(recorder):
        asyncio.run(main())
    attempts = {attempt.context.span_id: attempt for attempt in recorder.attempts}
    found = posts(recorder)
    assert len({post.parent.span_id for post in found}) == 20
    assert all(attempts[post.parent.span_id].context.trace_id == post.context.trace_id for post in found)
    assert sorted(map(str, server.sent)) == sorted(str(header(post)) for post in found)


@streamed
def test_a_call_cancelled_while_it_waits_ends_every_span(streaming, recorder, server, caplog):
    """Also the instrumentation's, which says nothing of a context that it could not leave."""
    server.silent = True

    async def main() -> None:
        async with pipeline(recorder, server, timeout=60) as calls:
            task = asyncio.create_task(text(calls, streaming=streaming))
            await asyncio.to_thread(server.asked.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with instrumented(recorder):
        asyncio.run(main())
    check_below_attempts(recorder, server)
    assert recorder.call.attributes["fluxibly.outcome"] == "cancelled"
    assert caplog.records == []


@streamed
def test_a_failed_call_ends_every_span(streaming, recorder, server):
    """Its last error is the caller's."""
    server.failures = 2
    with instrumented(recorder), pytest.raises(ServerError):
        asyncio.run(one_call(recorder, server, streaming=streaming))
    check_below_attempts(recorder, server)
    assert failed(recorder.call)


@streamed
def test_a_server_that_is_not_there_ends_every_span(streaming, recorder, server):
    """The instrumentation's tell of it too."""
    server.url = "http://127.0.0.1:1"
    with instrumented(recorder), pytest.raises(ProviderError):
        asyncio.run(one_call(recorder, server, streaming=streaming))
    assert [post.parent.span_id for post in posts(recorder)] == [a.context.span_id for a in recorder.attempts]
    assert all(map(failed, [*posts(recorder), *recorder.attempts, recorder.call]))
    assert sorted(recorder.counting.started) == sorted(recorder.counting.ended)


@streamed
def test_uninstrumented_again_the_header_is_the_attempts(streaming, recorder, server):
    """A provider made since then has no part of it, and one made before goes on as it began."""

    async def main() -> None:
        before = pipeline(recorder, server)
        with instrumented(recorder):
            await text(before, streaming=streaming)
        await text(before, streaming=streaming)
        await before.aclose()
        check = posts(recorder)
        assert server.sent == [header(post) for post in check]
        recorder.exporter.clear()
        server.sent.clear()
        await one_call(recorder, server, streaming=streaming)

    asyncio.run(main())
    (attempt,) = recorder.attempts
    assert server.sent == [header(attempt)]
    assert posts(recorder) == []


@streamed
def test_instrumented_later_the_header_goes_out_once_all_the_same(streaming, recorder, server):
    """A session that is open already is not instrumented: the header stays the attempt's."""

    async def main() -> None:
        async with pipeline(recorder, server) as calls:
            await text(calls, streaming=streaming)
            with instrumented(recorder):
                await text(calls, streaming=streaming)

    asyncio.run(main())
    found = sorted((s for s in recorder.spans if s.name == "fluxibly.attempt"), key=lambda span: span.start_time)
    assert server.sent == [header(attempt) for attempt in found]
    assert posts(recorder) == []
