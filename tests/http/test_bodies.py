"""The bytes of bodies: invalid UTF-8, and compressed bodies that expand to more than fits in memory."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.dialects import sse
from support.misbehaving import Peer, Received, serve
from support.ollama import last, line, ndjson
from support.tiny import Caller

from fluxibly.errors import ServerError
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.providers.dialects.ollama import OllamaCodec
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_responses import ResponsesCodec

# "#" stands for a byte that is no UTF-8.
BAD = b"\xff"
TEXT = "caf\ufffd au lait\ufffd"
PIECES = ("caf#", " au lait#")
WHOLE = "".join(PIECES)


def chat() -> tuple[Any, bytes]:
    """Return a whole answer and a stream of OpenAI's chat."""
    choice = {"index": 0, "message": {"role": "assistant", "content": WHOLE}, "finish_reason": "stop"}
    deltas = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in PIECES]
    return {"choices": [choice]}, sse(*deltas, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})


def responses() -> tuple[Any, bytes]:
    """Return a whole answer and a stream of OpenAI's Responses."""
    part = {"type": "output_text", "text": WHOLE, "annotations": []}
    item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]}
    whole = {"id": "resp_1", "status": "completed", "output": [item]}
    place = {"output_index": 0, "content_index": 0, "item_id": "msg_1"}
    return whole, sse(
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
        *[{"type": "response.output_text.delta", "delta": piece, **place} for piece in PIECES],
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": whole},
        done=False,
    )


def anthropic() -> tuple[Any, bytes]:
    """Return a whole answer and a stream of Anthropic's."""
    base = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m"}
    usage = {"input_tokens": 1, "output_tokens": 1}
    whole = {**base, "content": [{"type": "text", "text": WHOLE}], "stop_reason": "end_turn", "usage": usage}
    deltas = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}} for piece in PIECES
    ]
    return whole, sse(
        {"type": "message_start", "message": {**base, "content": [], "usage": usage}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *deltas,
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
        {"type": "message_stop"},
        done=False,
    )


def gemini() -> tuple[Any, bytes]:
    """Return a whole answer and a stream of Gemini's."""

    def said(text: str, **more: str) -> dict[str, Any]:
        return {"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}, **more}]}

    events = [said(PIECES[0]), said(PIECES[1], finishReason="STOP")]
    return said(WHOLE, finishReason="STOP"), sse(*events, done=False)


def ollama() -> tuple[Any, bytes]:
    """Return a whole answer and a stream of Ollama's."""
    return {**last(), "message": {"role": "assistant", "content": WHOLE}}, ndjson(*map(line, PIECES), last())


DIALECTS = {
    "chat": (OpenAICodec, chat),
    "responses": (ResponsesCodec, responses),
    "anthropic": (AnthropicCodec, anthropic),
    "gemini": (GeminiCodec, gemini),
    "ollama": (OllamaCodec, ollama),
}


def answering(whole: bytes, stream: bytes, media_type: str) -> Any:
    """Return a script that answers with bytes."""

    def script(peer: Peer, request: Received) -> None:
        streamed = request.json.get("stream") or "stream" in request.target
        peer.answer(stream if streamed else whole, content_type=media_type if streamed else "application/json")

    return script


@pytest.mark.parametrize("name", DIALECTS)
class TestInvalidUTF8:
    def test_the_text_is_the_same_and_is_logged_once(
        self, caller: Caller, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Whole and streamed, U+FFFD stands for what is no UTF-8, and one warning per answer names the service."""
        make, example = DIALECTS[name]
        whole, stream = example()
        media_type = "application/x-ndjson" if name == "ollama" else "text/event-stream"
        script = answering(json.dumps(whole).encode().replace(b"#", BAD), stream.replace(b"#", BAD), media_type)
        with serve(script) as server, caplog.at_level(logging.WARNING, "fluxibly"):
            assert caller.complete(server.url, codec=make(), times=2).text == TEXT
            assert len(caplog.records) == 2
            assert caller.stream(server.url, codec=make(), times=2) == TEXT
        assert len(caplog.records) == 4
        expected = f"LLM answer had invalid UTF-8, replaced by U+FFFD | framework=tiny, server=127.0.0.1:{server.port}"
        assert {record.getMessage() for record in caplog.records} == {expected}

    def test_valid_text_is_not_logged(self, caller: Caller, name: str, caplog: pytest.LogCaptureFixture) -> None:
        """U+FFFD may be what the model wrote, and a lone surrogate is no invalid UTF-8."""
        make, example = DIALECTS[name]
        whole, stream = example()
        media_type = "application/x-ndjson" if name == "ollama" else "text/event-stream"
        said = [json.dumps(whole).encode(), stream]
        script = answering(
            *[each.replace(b"#", "\ufffd".encode(), 1).replace(b"#", b"\\ud800") for each in said], media_type
        )
        with serve(script) as server, caplog.at_level(logging.WARNING, "fluxibly"):
            assert caller.complete(server.url, codec=make()).text == TEXT
            assert caller.stream(server.url, codec=make()) == TEXT
        assert caplog.records == []

    def test_an_error(self, caller: Caller, name: str, caplog: pytest.LogCaptureFixture) -> None:
        """Invalid UTF-8 in an error's body does no harm."""

        def script(peer: Peer, request: Received) -> None:
            peer.answer(b'{"error": {"message": "caf\xff is closed"}}', "500 No")

        with serve(script) as server, caplog.at_level(logging.WARNING, "fluxibly"):
            for method in (caller.complete, caller.stream):
                with pytest.raises(ServerError, match="caf\ufffd is closed"):
                    method(server.url, codec=DIALECTS[name][0]())
        assert caplog.records == []


def test_another_stream_with_invalid_utf8(caplog: pytest.LogCaptureFixture) -> None:
    """Of two streams at once, only the one with invalid UTF-8 is logged, and once."""
    _, stream = chat()
    caller = Caller("sync")
    inner = Caller("sync")
    with (
        serve(answering(b"", stream.replace(b"#", BAD), "text/event-stream")) as bad,
        serve(answering(b"", stream.replace(b"#", b"!"), "text/event-stream")) as good,
        caplog.at_level(logging.WARNING, "fluxibly"),
    ):

        class During(list[Any]):
            def append(self, item: Any) -> None:
                inner.stream(bad.url, codec=OpenAICodec())
                super().append(item)

        caller.got = During()
        assert caller.stream(good.url, codec=OpenAICodec()) == "caf! au lait!"
    assert inner.text == TEXT
    assert {record.port for record in caplog.records} == {bad.port}  # type: ignore[attr-defined]  # of `extra`


BOMB = """
import asyncio, gzip, resource, sys, zlib
import brotli, httpx
from support.misbehaving import serve
from support.tiny import SERVICE, TinyCodec, ask, config
from fluxibly.errors import StreamProtocolError
from fluxibly.providers.http import AsyncHTTPProvider, HTTPProvider

encoding, method, mode, line = sys.argv[1:]
SIZE = 200_000_000
MEGABYTE = bytes(1_000_000) if line == "zeros" else b'data: {"text": "a"}\\n\\n' * 47_619


def packed():
    packer = brotli.Compressor(quality=1) if encoding == "br" else zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
    add = packer.process if encoding == "br" else packer.compress
    parts = [add(b"data: " if line == "zeros" else b"")]
    parts += [add(MEGABYTE) for _ in range(SIZE // len(MEGABYTE))]
    return b"".join([*parts, packer.finish() if encoding == "br" else packer.flush()])


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read(url):
    httpx_ = mode.endswith("httpx")
    got = 0
    with HTTPProvider(TinyCodec(), SERVICE, config(url), transport=httpx.HTTPTransport() if httpx_ else None) as provider:
        if method == "complete":
            provider.complete(ask())
            return
        for chunk in provider.stream(ask()):
            got += 1
            if got == 10_000:
                return


async def aread(url):
    httpx_ = mode.endswith("httpx")
    got = 0
    transport = httpx.AsyncHTTPTransport() if httpx_ else None
    async with AsyncHTTPProvider(TinyCodec(), SERVICE, config(url), transport=transport) as provider:
        if method == "complete":
            await provider.complete(ask())
            return
        async for chunk in provider.stream(ask()):
            got += 1
            if got == 10_000:
                return


def call(url):
    try:
        read(url) if mode.startswith("sync") else asyncio.run(aread(url))
    except StreamProtocolError as error:
        print(error, file=sys.stderr)
    else:
        assert line == "events", "the bomb passed"


small = b'{"text": "x"}' if method == "complete" else b'data: {"text": "x"}\\n\\ndata: [DONE]\\n\\n'
body = [gzip.compress(small)]
headers = {"content_encoding": encoding, "content_type": "text/event-stream"}
with serve(lambda peer, request: peer.answer(body[0], **headers)) as server:
    headers["content_encoding"] = "gzip"
    (read(server.url) if mode.startswith("sync") else asyncio.run(aread(server.url)))
    body[0], headers["content_encoding"] = packed(), encoding
    before = peak()
    call(server.url)
print(peak() - before)
"""
"""It prints by how many bytes a call raised the highest memory use of the process."""
MORE = 8 * 1024 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="other systems measure memory in other units")
@pytest.mark.parametrize(
    ("encoding", "mode"),
    [
        ("gzip", "sync"),
        ("deflate", "sync"),
        ("br", "sync"),
        ("gzip", "async"),
        ("br", "sync httpx"),
        ("gzip", "async httpx"),
    ],
)
@pytest.mark.parametrize(
    ("method", "line", "limit"),
    [("complete", "zeros", 64 * 1024 * 1024), ("stream", "zeros", 16 * 1024 * 1024), ("stream", "events", 0)],
)
def test_a_bomb_takes_little_memory(encoding: str, method: str, line: str, limit: int, mode: str) -> None:
    """A body that expands to 200 MB raises the memory use by the limit and 8 MB at most."""
    done = subprocess.run(
        [sys.executable, "-c", BOMB, encoding, method, mode, line],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= limit + MORE
