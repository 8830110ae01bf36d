"""A local HTTP server that answers in OpenAI's format, and counts who asked for what. It runs in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs

Reply = tuple[int, dict[str, str], float]
"""A status, headers, and the seconds until it is sent."""


def usual(prompt: str) -> Reply:
    """Answer at once."""
    return 200, {}, 0.0


@attrs.define
class CountingServer:
    """What the server has seen, and how it replies to a prompt."""

    reply: Callable[[str], Reply] = usual
    asked: Counter[str] = attrs.Factory(Counter)
    """How often each prompt has arrived."""
    answered: Counter[str] = attrs.Factory(Counter)
    """How often each prompt has been answered with 200."""
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""

    @property
    def requests(self) -> int:
        return sum(self.asked.values())


@contextmanager
def counting_server(reply: Callable[[str], Reply] = usual) -> Iterator[CountingServer]:
    """Run a server on a free port of the loopback interface."""
    service = CountingServer(reply)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(
        loop.create_server(lambda: _Connection(service, loop), "127.0.0.1", 0, backlog=1024)
    )
    service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()


class _Connection(asyncio.Protocol):
    def __init__(self, service: CountingServer, loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._loop = loop
        self._data = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._data) < end + 4 + length:
                return
            body = self._data[end + 4 : end + 4 + length]
            self._data = self._data[end + 4 + length :]
            self._arrived(json.loads(body)["messages"][-1]["content"])

    def _arrived(self, prompt: str) -> None:
        service = self._service
        service.asked[prompt] += 1
        service.at_once += 1
        service.most_at_once = max(service.most_at_once, service.at_once)
        status, headers, delay = service.reply(prompt)
        if delay:
            self._loop.call_later(delay, self._send, prompt, status, headers)
        else:
            self._send(prompt, status, headers)

    def _send(self, prompt: str, status: int, headers: dict[str, str]) -> None:
        self._service.at_once -= 1
        if self._transport.is_closing():
            return
        if status == 200:
            self._service.answered[prompt] += 1
        data = _answer(prompt) if status == 200 else _error(status)
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._transport.write("\r\n".join([*lines, "", ""]).encode() + data)


def _answer(prompt: str) -> bytes:
    message = {"role": "assistant", "content": f"re: {prompt}"}
    return json.dumps(
        {
            "id": "c-1",
            "object": "chat.completion",
            "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }
    ).encode()


def _error(status: int) -> bytes:
    return json.dumps({"error": {"message": "no", "type": "error", "code": None}}).encode()
