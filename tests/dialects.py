"""What the tests of codecs share: streams through a codec without HTTP, damaged ones, and a server of fixed bytes."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
from hypothesis import HealthCheck, settings

from fluxibly import LLM, AsyncLLM, LLMConfig
from fluxibly.aggregate import Aggregator
from fluxibly.errors import FluxiblyError
from fluxibly.providers.codec import Codec, Event
from fluxibly.providers.framing import make_framing
from fluxibly.testing.modes import Mode
from fluxibly.types import Chunk, Response

fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def ask(config: LLMConfig, mode: Mode, prompt: Any, **overrides: Any) -> Response:
    """The response to a call in a mode, without middleware; a stream's texts have to add up to it."""

    async def ask_async() -> Response:
        async with AsyncLLM(config, middleware=[]) as llm:
            if not mode.streaming:
                return await llm.complete(prompt, **overrides)
            async with llm.stream(prompt, **overrides) as stream:
                texts = [chunk.text async for chunk in stream]
            return _checked(stream.response, texts)

    if mode.backend is not None:
        return anyio.run(ask_async, backend=mode.backend)
    with LLM(config, middleware=[]) as llm:
        if not mode.streaming:
            return llm.complete(prompt, **overrides)
        with llm.stream(prompt, **overrides) as stream:
            texts = [chunk.text for chunk in stream]
        return _checked(stream.response, texts)


def _checked(response: Response | None, texts: list[str]) -> Response:
    assert response is not None
    assert "".join(texts) == response.text
    return response


def chunks_of(codec: Codec, pieces: Iterable[bytes]) -> Iterator[Chunk]:
    """The chunks of a stream that arrives in these pieces, as an HTTP shell reads it."""
    framing = make_framing(codec.framing)
    decoder = codec.decoder()

    def decoded(events: Iterable[Event]) -> Iterator[Chunk]:
        for event in events:
            if decoder.done:
                return
            yield from decoder.decode_event(event)

    for piece in pieces:
        yield from decoded(framing.feed(piece))
    yield from decoded(framing.close())
    yield from decoder.end()


def streamed(codec: Codec, *pieces: bytes) -> Response:
    """The response that a stream comes to."""
    aggregator = Aggregator()
    for chunk in chunks_of(codec, pieces):
        aggregator.add(chunk)
    return aggregator.response()


def interrupted(codec: Codec, *pieces: bytes) -> tuple[Response, FluxiblyError]:
    """What had arrived of a stream that fails, and its error."""
    aggregator = Aggregator()
    try:
        for chunk in chunks_of(codec, pieces):
            aggregator.add(chunk)
    except FluxiblyError as error:
        return aggregator.response(), error
    raise AssertionError(f"the stream did not fail; it came to {aggregator.response()!r}")


def mutated(body: bytes, chance: random.Random) -> bytes:
    """The body with some bytes changed, doubled, cut out or swapped for what may break a reader."""
    data = bytearray(body)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data[at : at + chance.randint(1, 40)] = b""
            case 1:
                data[at:at] = chance.choice(
                    [b"null", b"{}", b"[]", b"-1", b'"', b"\n\n", b"\xff", b"1e999", b"true", b"{"]
                )
            case 2:
                data[at:at] = data[at : at + chance.randint(1, 60)]
            case 3:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case _:
                key = chance.choice(
                    [b'"index"', b'"type"', b'"content"', b'"parts"', b'"name"', b'"usage"', b'"message"']
                )
                data = bytearray(
                    bytes(data).replace(key + b":", key + chance.choice([b":null,", b":[1],", b":7,", b':"x",']), 1)
                )
    return bytes(data)


def answer_or_error(codec: Codec, body: bytes) -> None:
    """Read any bytes as a stream, as a whole body and as an error: no exception but FluxiblyError gets out."""
    for read in (streamed, lambda codec, body: codec.decode(body)):
        with contextlib.suppress(FluxiblyError):
            assert isinstance(read(codec, body), Response)
    assert isinstance(codec.decode_error(500, {}, body), FluxiblyError)


def sse(*events: dict[str, Any] | str) -> bytes:
    """Server-sent events with these data, named after their `type` as Anthropic does."""
    blocks: list[str] = []
    for event in events:
        data = event if isinstance(event, str) else json.dumps(event)
        name = f"event: {event['type']}\n" if isinstance(event, dict) and "type" in event else ""
        blocks.append(f"{name}data: {data}\n\n")
    return "".join(blocks).encode()


@contextlib.contextmanager
def serving(body: bytes, content_type: str) -> Iterator[str]:
    """A server on loopback that answers every POST with `body`, for clients of any make; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()
