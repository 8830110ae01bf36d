"""Helpers for tests of codecs: streams through a codec without HTTP, and a server of fixed bytes."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio

from fluxibly import LLM, AsyncLLM, LLMConfig
from fluxibly.errors import FluxiblyError
from fluxibly.providers.dialects.codec import Codec
from fluxibly.testing.codec_check import check_cuts, outcome_of
from fluxibly.testing.modes import Mode
from fluxibly.types import Image, Response, Tool

WEATHER = Tool("weather", "The weather in a city.", {"type": "object", "properties": {"city": {"type": "string"}}})
PARAMETERS = {
    "temperature": 0.5,
    "max_tokens": 7,
    "top_p": 0.9,
    "top_k": 40,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.2,
    "seed": 3,
}
PNG = Image(data=b"\x89PNG", media_type="image/png")


def ask(config: LLMConfig, mode: Mode, prompt: Any, **overrides: Any) -> Response:
    """Return the response to a call in a mode, without middleware, and check that a stream's texts add up to it."""

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


def streamed(codec: Codec, *reads: bytes) -> Response:
    """Return the response of a stream, or raise its failure."""
    outcome = outcome_of(codec, reads)
    if outcome.failure is not None:
        raise outcome.failure
    return outcome.response


def recut(codec: Codec, stream: bytes) -> Response:
    """Return the response of a stream, and check that it is the same wherever the reads are cut."""
    outcome = check_cuts(codec, stream)
    assert outcome.failure is None, outcome
    return outcome.response


def interrupted(codec: Codec, *reads: bytes) -> tuple[Response, FluxiblyError]:
    """Return the partial response of a stream that fails, and its error."""
    outcome = outcome_of(codec, reads)
    assert isinstance(outcome.failure, FluxiblyError), outcome
    return outcome.response, outcome.failure


def sse(*events: object, done: bool = False) -> bytes:
    """Return server-sent events with this data, named after their `type` as Anthropic does; with `[DONE]` if `done`."""
    blocks: list[str] = []
    for event in [*events, *["[DONE]"] * done]:
        data = event if isinstance(event, str) else json.dumps(event)
        name = f"event: {event['type']}\n" if isinstance(event, dict) and "type" in event else ""
        blocks.append(f"{name}data: {data}\n\n")
    return "".join(blocks).encode(errors="replace")


@contextlib.contextmanager
def serving(body: bytes, content_type: str) -> Iterator[str]:
    """Run a loopback server that answers every POST with `body`, for any client, and yield its address."""
    with answering(content_type, body) as (address, _):
        yield address


@contextlib.contextmanager
def answering(content_type: str, *bodies: bytes) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Run a loopback server that answers each POST with the next body, and repeats the last body.

    Yields its address, and a list of the paths and decoded bodies of its requests.
    """
    asked: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
            body = bodies[min(len(asked), len(bodies)) - 1]
            self.send_response(200)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Do not log requests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", asked
        finally:
            http.shutdown()
            thread.join()
