"""The answers to clients: the calls behind them, whole and streamed, and their errors in OpenAI's shape.

While a call is under way, a task waits for the client to leave, and then cancels the call.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from fluxibly import sse
from fluxibly.errors import FluxiblyError, ProviderError, root_cause
from fluxibly.providers.dialects.openai_answers import completion, error_body, failure_of
from fluxibly.types import Request

if TYPE_CHECKING:
    from anyio import CancelScope
    from opentelemetry.context import Context
    from starlette.types import Message as Event, Receive, Scope, Send

    from fluxibly.flow import CallNext, Flow
    from fluxibly.pipeline import AsyncPipeline
    from fluxibly.serve._requests import Refused
    from fluxibly.types import CallRecord, Response

KEEP_ALIVE: Final = 15.0
"""Seconds of silence after which a stream sends a comment, so that no proxy ends the connection."""
SHUTDOWN_TIME: Final = 1.0
"""Seconds in which an answer that the server's end cuts off may tell its client."""


def json_response(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Any:
    """Return a response of JSON. What UTF-8 cannot say is replaced."""
    from starlette.responses import Response as HTTPResponse

    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=str).encode(errors="replace")
    return HTTPResponse(data, status, {**(headers or {}), "cache-control": "no-store"}, "application/json")


def refusal(refused: Refused) -> Any:
    """Return the response to a request that is refused."""
    body = error_body(str(refused), "invalid_request_error", refused.code, refused.param)
    return json_response(body, refused.status, refused.headers)


def failed(error: BaseException, request: Request) -> Any:
    """Return the response to a call that has failed before there was any answer."""
    failure = failure_of(error)
    return json_response(sse.openai_error(error, request), failure.status, _advice(error, failure.status))


def _advice(error: BaseException, status: int) -> dict[str, str]:
    """Return the headers that say when to ask again, or not to do so. (OpenAI's clients ask again by themselves.)"""
    cause = root_cause(error)
    after = getattr(cause, "retry_after", None)
    transient = isinstance(cause, ProviderError) and (cause.retryable or after is not None)
    if status in (429, 503) and (transient or not isinstance(cause, FluxiblyError)):
        return {"retry-after": str(max(1, math.ceil(after or 1)))}
    if status == 400 or transient:
        return {}
    return {"x-should-retry": "false"}


_calls: ContextVar[list[CallRecord] | None] = ContextVar("calls", default=None)
"""The record of the call that this context makes, once it has begun. Its errors are masked against what it has sent."""


def note_call(request: Request, call_next: CallNext) -> Flow[Response]:
    """Note the record of a call for the code that makes the call. A middleware, outside of all others."""
    calls = _calls.get()
    if calls is not None:
        calls.append(request.call)
    return (yield from call_next(request))


@contextmanager
def _caller(context: Context | None) -> Generator[None]:
    """Make the client's span current, if it has sent one, so that the span of the call becomes its child."""
    if context is None:
        yield
        return
    from opentelemetry.context import attach, detach

    token = attach(context)
    try:
        yield
    finally:
        detach(token)


async def _until_gone(receive: Receive, scope: CancelScope) -> None:
    """Wait for the client to leave, then cancel what is done for it."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


class _Answer:
    """An ASGI application that makes a call and sends its answer."""

    def __init__(self, pipeline: AsyncPipeline, request: Request, context: Context | None) -> None:
        self.pipeline = pipeline
        self.request = request
        self.context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        import anyio

        respond = None
        async with anyio.create_task_group() as group:
            group.start_soon(_until_gone, receive, group.cancel_scope)
            respond = await self.answer(send, group.cancel_scope)
            group.cancel_scope.cancel()
        if respond is not None:
            await respond(scope, receive, send)

    async def answer(self, send: Send, scope: CancelScope) -> Callable[[Scope, Receive, Send], Awaitable[None]] | None:
        """Make the call. Return the response, or None if it was sent."""
        raise NotImplementedError


class Whole(_Answer):
    """A whole answer."""

    async def answer(self, send: Send, scope: CancelScope) -> Any:
        """Make the call. Return the response."""
        calls: list[CallRecord] = []
        token = _calls.set(calls)
        try:
            with _caller(self.context):
                response = await self.pipeline.complete(self.request)
            return json_response(completion(response, self.request.model))
        except Exception as error:  # noqa: BLE001  # whatever it is, the client gets an answer
            request = self.request.evolve(call=calls[0]) if calls else self.request
            return failed(error, request)
        finally:
            _calls.reset(token)


class Streamed(_Answer):
    """A streamed answer. An error before any output has a status of its own, unless it takes too long to come."""

    def __init__(
        self, pipeline: AsyncPipeline, request: Request, context: Context | None, *, usage: bool, keep_alive: float
    ) -> None:
        super().__init__(pipeline, request, context)
        self.usage = usage
        self.keep_alive = keep_alive

    async def answer(self, send: Send, scope: CancelScope) -> Any:
        """Make the call and send its events. Return the response if it fails before there is any output."""
        import anyio

        try:
            with _caller(self.context):
                stream = self.pipeline.stream(self.request)
        except Exception as error:  # noqa: BLE001  # such as a provider without streams
            return failed(error, self.request)
        body = _Body(send)
        events = sse.events(stream, "openai", usage=self.usage)
        async with anyio.create_task_group() as group:
            group.start_soon(self._keep_alive, body)
            try:
                return await _send_all(events, body)
            except anyio.get_cancelled_exc_class():
                if body.begun and not scope.cancel_called:  # the client is still there
                    with anyio.move_on_after(SHUTDOWN_TIME, shield=True):
                        told = error_body("the server is ending", "server_error", "shutdown")
                        await body.put(sse.openai_event(told), more=False)
                raise
            finally:
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await events.aclose()

    async def _keep_alive(self, body: _Body) -> None:
        import anyio

        while True:
            await anyio.sleep(self.keep_alive)
            if anyio.current_time() - body.last >= self.keep_alive:
                await body.put(b": keep-alive\n\n")


async def _send_all(events: sse.Events, body: _Body) -> Any:
    try:
        await events.begin()
    except Exception as error:  # noqa: BLE001  # the events have it as well
        if not body.begun:
            return failed(error, events.request)
    async for event in events:
        await body.put(event)
    await body.put(b"", more=False)
    return None


class _Body:
    """The body of a streamed response, whose head goes out with its first bytes. Two tasks send."""

    def __init__(self, send: Send) -> None:
        import anyio

        self._send = send
        self._lock = anyio.Lock()
        self.begun = False
        self.last = anyio.current_time()
        """When something was sent last."""

    async def put(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece."""
        import anyio

        async with self._lock:
            if not self.begun:
                self.begun = True
                await self._send(_head())
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
            self.last = anyio.current_time()


def _head() -> Event:
    headers = {"content-type": f"{sse.MEDIA_TYPE}; charset=utf-8", **sse.HEADERS}
    pairs = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": 200, "headers": pairs}
