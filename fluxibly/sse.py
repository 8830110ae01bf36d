"""Streams as server-sent events, for the streaming responses of web frameworks.

Starlette, FastAPI and Litestar take `events(stream)` as the body of a response::

    @app.post("/ask")
    async def ask(question: str) -> StreamingResponse:
        body = fluxibly.sse.events(llm.stream(question))
        return StreamingResponse(body, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias
from weakref import ref

from fluxibly._checks import kind_of, one_of
from fluxibly._loops import trio_here
from fluxibly._masking import error_message
from fluxibly.errors import FluxiblyError, error_type
from fluxibly.providers.dialects.openai_answers import INTERNAL, ChunkWriter, error_body, failure_of
from fluxibly.stream import AsyncStream, request_of
from fluxibly.types import Chunk, Request, Response, Restart

if TYPE_CHECKING:
    from asyncio import Task
    from typing import Self

__all__ = ["HEADERS", "MEDIA_TYPE", "Events", "Shape", "events"]

Shape: TypeAlias = Literal["text", "openai"]
MEDIA_TYPE: Final = "text/event-stream"
HEADERS: Final[Mapping[str, str]] = MappingProxyType({"cache-control": "no-cache", "x-accel-buffering": "no"})
"""Headers for the response: caches keep nothing of it, and nginx passes each event on at once."""

GIVE_WAY: Final = 32
"""The number of events after which other tasks get a turn. A stream that never waits, such as one from a cache, would keep
the event loop to itself, and nobody would notice that the client has left."""


def events(
    stream: AsyncStream[Chunk] | AsyncStream[Chunk | Restart], shape: Shape = "text", *, usage: bool = True
) -> Events:
    """Return a stream as server-sent events: an async iterator of bytes, for the body of a streaming response.

    With the shape "text", each text is an event without a name. The others have a name, and JSON as data:

    - `turn`: a message has ended, its tools (`{"tools": ["clock"]}`) have run, and the next message begins;
    - `restart`: the answer begins again, and what came before is void (only of a stream with `restarts=True`);
    - `done`: the answer is complete (`{"finish_reason": "stop"}`);
    - `error`: the answer has failed (`{"type": "RateLimitError", "message": "…"}`).

    One of the last two always comes last, unless the client has left. With the shape "openai", the events are those of
    OpenAI's chat completions, for its clients: `chat.completion.chunk` objects of a single message, and `[DONE]`. Calls of
    tools that middleware runs are left out. An error is an event `error` in OpenAI's shape, and no `[DONE]` follows.

    Errors have their class and their message, in which texts of the request and the answer are masked. Of an exception that
    is no `FluxiblyError`, only the class is told. An error before the answer is an event, too, because the head of the response
    has gone out by then; `begin` raises it in time.

    The events own the stream. When the client leaves, the framework cancels or drops them, and the stream ends as cancelled
    or abandoned: its connection is closed at once.

    Args:
        stream: the stream, from `AsyncLLM.stream` or `AsyncPipeline.stream`.
        shape: the form of the events.
        usage: for the shape "openai", whether an object with the token counts (and without a choice) comes before `[DONE]`.

    Raises:
        TypeError: `stream` is no `AsyncStream`.
        ValueError: there is no such shape, or it has no event for the restarts of this stream.
    """
    if not isinstance(stream, AsyncStream):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise TypeError(f"events: expected an AsyncStream, got {kind_of(stream)}; write events(async_llm.stream(…))")
    if found := one_of("shape", shape, ("text", "openai")):
        raise ValueError(f"events: {found}")
    request = request_of(stream)
    if shape == "openai" and request.call.restarts:
        raise ValueError('events: the shape "openai" has no event for a restart; leave restarts=True out')
    return Events(stream, _Texts() if shape == "text" else _OpenAI(request, usage=usage))


class Events:
    """A stream as server-sent events. `events` makes it, and describes it."""

    def __init__(self, stream: AsyncStream[Any], writer: Writer) -> None:
        self._stream = stream
        self._writer = writer
        self._ready: deque[bytes] = deque()
        """The events that were not taken yet."""
        self._taken = 0
        self._reader: Task[Any] | None = None
        self._over = False

    @property
    def request(self) -> Request:
        """The request of the stream."""
        return request_of(self._stream)

    async def begin(self) -> Self:
        """Wait until the answer begins, and return the events. A handler that awaits this can answer an error with a status::

            body = await sse.events(llm.stream(question)).begin()

        Raises:
            FluxiblyError: the call failed before there was any answer. Any other exception of the provider or a middleware
                is raised unchanged.
        """
        failure = None
        while not self._ready and not self._over and failure is None:
            failure = await self._read()
        if failure is not None:
            raise failure
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if not trio_here():
            self._follow_task()
        while not self._ready:
            if self._over:
                raise StopAsyncIteration
            await self._read()
        self._taken += 1
        if self._taken % GIVE_WAY == 0:
            from anyio.lowlevel import checkpoint

            await checkpoint()
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Abandon the stream, unless it has ended. A second close does nothing."""
        self._over = True
        self._ready.clear()
        await self._stream.aclose()

    def _follow_task(self) -> None:
        """Have the stream closed when the task that reads it is cancelled, also while that sends an event.

        Most frameworks then drop the events, but leave them in a reference cycle, which the garbage collector finds much
        later. (On trio there is no such cycle.)
        """
        import asyncio

        task = asyncio.current_task()
        if task is not None and task is not self._reader:
            self._reader = task
            task.add_done_callback(partial(_close_if_cancelled, ref(self)))

    async def _read(self) -> Exception | None:
        """Read from the stream, and write what comes as events. Return the error of a stream that has failed."""
        try:
            event = await anext(self._stream, None)
            if event is not None:
                self._ready += self._writer.write(event)
                return None
            self._over = True
            self._ready += self._writer.finish(self._stream.response)
        except Exception as error:  # noqa: BLE001  # whatever it is, the client must not wait for more
            self._over = True
            self._ready += self._writer.fail(error, self.request)
            await self._stream.aclose()  # it is open if its events could not be written
            return error
        return None


_closing: set[Task[None]] = set()
"""The tasks that close streams: an event loop keeps none alive."""


def _close_if_cancelled(reference: ref[Events], task: Task[Any]) -> None:
    body = reference()
    if body is not None and task.cancelled():
        closing = task.get_loop().create_task(body.aclose())
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)


class Writer(Protocol):
    """Writes the events of a shape."""

    def write(self, event: Chunk | Restart) -> Iterable[bytes]:
        """Return the events for a chunk or a restart."""
        ...

    def finish(self, response: Response) -> Iterable[bytes]:
        """Return the events that end a complete answer."""
        ...

    def fail(self, error: Exception, request: Request) -> Iterable[bytes]:
        """Return the events that end an answer that has failed."""
        ...


class _Texts:
    """The shape "text"."""

    def __init__(self) -> None:
        self._cr = False
        """Whether the last text ended with a carriage return, so that a line feed belongs to the same line end."""

    def write(self, event: Chunk | Restart) -> Iterator[bytes]:
        if isinstance(event, Restart):
            self._cr = False  # another text begins
            yield _event(_json({"reason": event.reason}), "restart")
            return
        if event.added:
            self._cr = False
            tools = [call.name for message in event.added for call in message.tool_calls]
            yield _event(_json({"tools": tools}), "turn")
        text = event.text.removeprefix("\n") if self._cr else event.text
        if event.text:
            self._cr = event.text.endswith("\r")
        if text:
            yield _event(text)

    def finish(self, response: Response) -> Iterator[bytes]:
        yield _event(_json({"finish_reason": response.finish_reason}), "done")

    def fail(self, error: Exception, request: Request) -> Iterator[bytes]:
        yield _event(_json({"type": error_type(error), "message": public_message(error, request)}), "error")


class _OpenAI:
    """The shape "openai"."""

    def __init__(self, request: Request, *, usage: bool) -> None:
        self._chunks = ChunkWriter(request, usage=usage)

    def write(self, event: Chunk | Restart) -> Iterator[bytes]:
        if isinstance(event, Chunk):  # `events` refuses streams with restarts
            for body in self._chunks.write(event):
                yield _event(_json(body))

    def finish(self, response: Response) -> Iterator[bytes]:
        for body in self._chunks.finish(response):
            yield _event(_json(body))
        yield _event("[DONE]")

    def fail(self, error: Exception, request: Request) -> Iterator[bytes]:
        yield openai_event(openai_error(error, request))


def openai_event(error: Mapping[str, Any]) -> bytes:
    """Return the event of an error in OpenAI's shape."""
    return _event(_json(error), "error")


def openai_error(error: BaseException, request: Request) -> dict[str, Any]:
    """Return an error in OpenAI's shape, with its message masked."""
    failure = failure_of(error)
    return error_body(public_message(error, request), failure.type, failure.code)


def public_message(error: BaseException, request: Request) -> str:
    """Return the message of an error for a client: without keys and texts, and of our own errors alone."""
    failure = failure_of(error)
    if failure.message is not None:
        return failure.message
    return error_message(error, (request,)) if isinstance(error, FluxiblyError) else str(INTERNAL.message)


_LINE_END: Final = re.compile("\r\n|\r|\n")


def _event(data: str, name: str | None = None) -> bytes:
    """Return an event as the WHATWG describes it. A client gets the lines of its data back, joined by line feeds."""
    lines = _LINE_END.split(data) if "\n" in data or "\r" in data else [data]
    fields = [*([] if name is None else [f"event: {name}"]), *[f"data: {line}" for line in lines]]
    # A lone surrogate cannot be encoded, and must not end the answer.
    return ("\n".join(fields) + "\n\n").encode(errors="replace")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
