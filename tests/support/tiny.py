"""A tiny dialect, and a caller of both HTTP providers, so that their tests do not need a real codec."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import anyio
import attrs
import httpx

from fluxibly.config import LLMConfig, Timeouts
from fluxibly.errors import (
    AuthenticationError,
    FluxiblyError,
    ProviderError,
    RateLimitError,
    ServerError,
    StreamProtocolError,
)
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.providers.dialects.codec import Encoded, Event, Framing, Service
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider
from fluxibly.testing.modes import Mode, Ran
from fluxibly.types import Chunk, Request, Response
from support.misbehaving import Peer, Received, Script

KEY = "sk-tiny-0123456789"
SERVICE = Service(framework="tiny", telemetry_name="tiny", base_url=None, env_var="TINY_API_KEY")
DONE = "data: [DONE]\n\n"


def event(text: str) -> str:
    """Return an event of the tiny dialect."""
    return f"data: {json.dumps({'text': text})}\n\n"


def whole(peer: Peer, request: Received) -> None:
    """Answer with the prompt. A script for a server."""
    peer.answer({"text": request.json["prompt"]})


def for_ever(piece: str, *before: str) -> Script:
    """Return a script that streams the texts `before`, and then `piece` again and again."""

    def script(peer: Peer, request: Received) -> None:
        peer.begin_stream()
        for text in before:
            peer.chunk(text)
        while not peer.server.over.is_set():
            peer.chunk(piece)
            time.sleep(0.01)

    return script


def silent_after(*before: str) -> Script:
    """Return a script that streams the texts `before`, and then nothing."""

    def script(peer: Peer, request: Received) -> None:
        peer.begin_stream()
        for text in before:
            peer.chunk(text)
        peer.wait_for_end()

    return script


def silent(peer: Peer, request: Received) -> None:
    peer.wait_for_end()


class TinyDecoder:
    """A decoder of events `{"text": …}` or `{"error": …}`. The last event is [DONE]."""

    done = False

    def decode_event(self, event: Event) -> Iterable[Chunk]:
        if event.data == b"[DONE]":
            self.done = True
            return
        data = json.loads(event.data)
        if "error" in data:
            raise ServerError(data["error"])
        yield Chunk(data["text"])

    def end(self) -> Iterable[Chunk]:
        if not self.done:
            raise StreamProtocolError("the stream was cut off")
        return ()


@attrs.frozen
class TinyCodec:
    framing: Framing = "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        body = {"prompt": request.messages[-1].text, "stream": stream}
        return Encoded("/chat", json.dumps(body).encode())

    def decode(self, body: bytes, /) -> Response:
        try:
            return Response(json.loads(body)["text"])
        except (ValueError, KeyError, TypeError):
            raise StreamProtocolError("expected a JSON object with a text", body=body.decode("latin-1")) from None

    def decoder(self) -> TinyDecoder:
        return TinyDecoder()

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        text = body.decode("utf-8", "replace")
        kind = {401: AuthenticationError, 429: RateLimitError}.get(status, ServerError)
        return kind(f"status {status}: {text}", status=status, body=text)


def config(url: str | None, *, timeout: float | Timeouts = 5.0, key: str | None = KEY) -> LLMConfig:
    return LLMConfig(framework="tiny", model="tiny-1", api_key=key, api_base=url, timeout=timeout)


def ask(prompt: str = "hi", **fields: Any) -> Request:
    return Request(model="tiny-1", messages=prompt, **fields)


class Caller:
    """A caller of the sync provider, or of the async provider on asyncio or trio. `got` has a stream's chunks.

    `over_httpx`: the providers use a transport of httpx's, not their own connections.
    """

    def __init__(self, mode: str, *, over_httpx: bool = False) -> None:
        self.mode = mode
        self.over_httpx = over_httpx
        self.got: list[Chunk] = []
        self.between: Callable[[], object] = lambda: None
        """Called between two calls of a provider."""

    def complete(self, url: str, times: int = 1, request: Request | None = None, **settings: Any) -> Response:
        """Make `times` calls, one after the other with the same provider. Return the last response."""
        return self._call(url, "complete", times, request or ask(), settings)

    def stream(self, url: str, times: int = 1, request: Request | None = None, **settings: Any) -> str:
        """Read `times` streams, one after the other with the same provider. Return the text of the last stream."""
        self._call(url, "stream", times, request or ask(), settings)
        return self.text

    @property
    def text(self) -> str:
        return "".join([chunk.text for chunk in self.got])

    def _call(self, url: str, method: str, times: int, request: Request, settings: dict[str, Any]) -> Any:
        codec = settings.pop("codec", TinyCodec())
        if self.mode == "sync":
            transport = httpx.HTTPTransport() if self.over_httpx else None
            with HTTPProvider(codec, SERVICE, config(url, **settings), transport=transport) as provider:
                for n in range(times):
                    if n:
                        self.between()
                    result = self._once(provider, method, request)
                return result

        async def main() -> Any:
            transport = httpx.AsyncHTTPTransport() if self.over_httpx else None
            async with AsyncHTTPProvider(codec, SERVICE, config(url, **settings), transport=transport) as provider:
                for n in range(times):
                    if n:
                        self.between()
                    result = await self._async_once(provider, method, request)
                return result

        return anyio.run(main, backend=self.mode)

    def _once(self, provider: HTTPProvider, method: str, request: Request) -> Any:
        if method == "complete":
            return provider.complete(request)
        self.got.clear()
        for chunk in provider.stream(request):
            self.got.append(chunk)
        return self.got

    async def _async_once(self, provider: AsyncHTTPProvider, method: str, request: Request) -> Any:
        if method == "complete":
            return await provider.complete(request)
        self.got.clear()
        async for chunk in provider.stream(request):
            self.got.append(chunk)
        return self.got


def over_http(mode: Mode, url: str, middleware: list[Any]) -> tuple[Ran, float]:
    """Make a call through middleware over real connections, and return its result and its seconds."""
    ran = Ran()
    settings = config(url, timeout=60)

    def call() -> None:
        with Pipeline(HTTPProvider(TinyCodec(), SERVICE, settings), middleware) as pipeline:
            if mode.streaming:
                ran.events.extend(pipeline.stream(ask()))
            else:
                ran.response = pipeline.complete(ask())

    async def acall() -> None:
        async with AsyncPipeline(AsyncHTTPProvider(TinyCodec(), SERVICE, settings), middleware) as pipeline:
            if not mode.streaming:
                ran.response = await pipeline.complete(ask())
                return
            async for chunk in pipeline.stream(ask()):
                ran.events.append(chunk)

    begun = time.monotonic()
    try:
        if mode.backend is None:
            call()
        else:
            anyio.run(acall, backend=mode.backend)
    except FluxiblyError as error:
        ran.error = error
    return ran, time.monotonic() - begun
