"""Many calls at once on one event loop."""

from __future__ import annotations

import asyncio
import os
import resource

import pytest
from tiny import DONE, SERVICE, TinyCodec, ask, config, event

from fluxibly.providers.http import AsyncHTTPProvider

STREAMS = 1_000


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests on one connection with a stream of two events, until the client closes it."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for text in (event("one "), event("two") + DONE):
                writer.write(b"%x\r\n%b\r\n" % (len(text), text.encode()))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def test_a_thousand_streams_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond the pool's size wait for their turn; all come whole."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)

    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * STREAMS + 100:
        pytest.skip("this process may not open enough files (ulimit -n)")

    async def main() -> list[str]:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0, backlog=STREAMS)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with AsyncHTTPProvider(TinyCodec(), SERVICE, config(url, timeout=60.0)) as provider:

            async def one() -> str:
                return "".join([chunk.text async for chunk in provider.stream(ask())])

            texts = await asyncio.gather(*[one() for _ in range(STREAMS)])
        server.close()
        return texts

    assert asyncio.run(main()) == ["one two"] * STREAMS
