"""A local server that answers like OpenAI's chat API, as fast as one asyncio process can.

`python -m benchmarks.server [SECONDS]` prints its port, and exits when its standard input is closed. A whole answer takes that many
seconds, by default none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys

CHUNKS = 200
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: "


def _event(value: object) -> bytes:
    data = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, object]:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}


WHOLE_BODY = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The capital of France is Paris."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 14, "completion_tokens": 8, "total_tokens": 22},
    }
).encode()
WHOLE = HEAD + b"application/json\r\ncontent-length: %d\r\n\r\n" % len(WHOLE_BODY) + WHOLE_BODY
STREAM_HEAD = HEAD + b"text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PIECES = [_event(_chunk({"content": f" word{n}"})) for n in range(CHUNKS)]  # numbered: litellm rejects repeated chunks
STREAM_END = _event(_chunk({}, "stop")) + _event(b"[DONE]") + b"0\r\n\r\n"
STREAM = STREAM_HEAD + b"".join(PIECES) + STREAM_END
SHORT_STREAM = STREAM_HEAD + PIECES[0] + STREAM_END


class Answers(asyncio.Protocol):
    """The protocol of a connection. A request's body selects a whole answer, a stream or a short stream."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length].replace(b" ", b"")
            self.buffer = self.buffer[end + 4 + length :]
            if b'"stream":true' not in body:
                if self.seconds:
                    asyncio.get_running_loop().call_later(self.seconds, self.transport.write, WHOLE)
                else:
                    self.transport.write(WHOLE)
            elif b"one-word" in body:
                self.transport.write(SHORT_STREAM)
            else:
                self.transport.write(STREAM)


async def serve(seconds: float) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Answers(seconds), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(float(sys.argv[1]) if len(sys.argv) > 1 else 0.0))
