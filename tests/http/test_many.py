"""A thousand streams on one event loop. All are open at the same time, and their memory does not grow."""

from __future__ import annotations

import asyncio
import gc
import os
import tracemalloc

import pytest
from support.tiny import DONE, SERVICE, TinyCodec, ask, config, event

from fluxibly.providers.http import AsyncHTTPProvider

STREAMS = 1_000
PIECES = 5
"""Number of pieces in a round. There are two rounds; the memory is measured after each."""
TEXT = "x" * 1_000
ALLOWED = 1_000
"""Number of bytes by which a stream may grow in a round: a fifth of the text that it delivers in a round."""


class Meeting:
    """The end of a round. The server starts the next round when all streams have received this round."""

    def __init__(self) -> None:
        self.arrived = 0
        self.all_there = asyncio.Event()
        self.go_on = asyncio.Event()

    def arrive(self) -> None:
        self.arrived += 1
        if self.arrived == STREAMS:
            self.all_there.set()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rounds: list[Meeting]) -> None:
    """Answer a request with two rounds of pieces."""

    async def send(text: str) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(text), text.encode()))
        await writer.drain()

    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.partition(b":")[2]))
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for meeting in rounds:
        for _ in range(PIECES):
            await send(event(TEXT))
        await meeting.go_on.wait()
    await send(DONE)
    writer.write(b"0\r\n\r\n")
    writer.close()


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_a_thousand_streams_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All streams arrive whole, and do not keep the chunks that they have delivered."""
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * STREAMS + 100:
        pytest.skip("this process may not open enough files (ulimit -n)")
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)

    async def main() -> tuple[list[int], list[int]]:
        rounds = [Meeting(), Meeting()]
        server = await asyncio.start_server(
            lambda reader, writer: _answer(reader, writer, rounds), "127.0.0.1", 0, backlog=STREAMS
        )
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with AsyncHTTPProvider(TinyCodec(), SERVICE, config(url, timeout=60.0)) as provider:

            async def one() -> int:
                pieces = 0
                async for chunk in provider.stream(ask()):
                    assert chunk.text == TEXT
                    pieces += 1
                    if pieces % PIECES == 0:
                        rounds[pieces // PIECES - 1].arrive()
                return pieces

            streams = asyncio.gather(*[one() for _ in range(STREAMS)])
            memory: list[int] = []
            for meeting in rounds:
                await asyncio.wait(
                    [asyncio.ensure_future(meeting.all_there.wait()), streams], return_when="FIRST_COMPLETED"
                )
                memory.append(_traced())
                meeting.go_on.set()
            counts = await streams
        server.close()
        return counts, memory

    tracemalloc.start()
    try:
        counts, (first, second) = asyncio.run(main())
    finally:
        tracemalloc.stop()
    assert counts == [2 * PIECES] * STREAMS
    assert second - first < STREAMS * ALLOWED
