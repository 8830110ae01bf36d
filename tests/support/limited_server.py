"""A local HTTP server with a rate limit, whose answers have the headers and the errors of OpenAI's and Anthropic's services."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs


@attrs.define
class LimitedService:
    """A bucket of `capacity` requests, of which `rate` a second come back."""

    capacity: float
    rate: float
    level: float = 0.0
    retry_after: int = 1
    url: str = ""
    answered: list[float] = attrs.Factory(list)
    refused: list[float] = attrs.Factory(list)
    _at: float = attrs.Factory(time.monotonic)
    _lock: threading.Lock = attrs.Factory(threading.Lock)

    def take(self) -> tuple[bool, float]:
        """Take a request, if there is one. Return whether there was, and how much is used."""
        with self._lock:
            now = time.monotonic()
            self.level = max(0.0, self.level - (now - self._at) * self.rate)
            self._at = now
            if self.level + 1 > self.capacity:
                self.refused.append(now)
                return False, self.level
            self.level += 1
            self.answered.append(now)
            return True, self.level


@contextmanager
def limited_server(**settings: Any) -> Iterator[LimitedService]:
    """Run a server on a free port of the loopback interface."""
    service = LimitedService(**settings)

    class Handler(_Handler):
        limited = service

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    limited: LimitedService
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name in the base class
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        passes, used = self.limited.take()
        anthropic = self.path.endswith("/messages")
        headers = (self._anthropic if anthropic else self._openai)(used)
        if passes:
            self._send(200, _ANTHROPIC_ANSWER if anthropic else _OPENAI_ANSWER, headers)
            return
        headers["retry-after"] = str(self.limited.retry_after)
        error = {"type": "rate_limit_error", "message": "This request would exceed your rate limit", "code": None}
        self._send(429, {"type": "error", "error": error} if anthropic else {"error": error}, headers)

    def _openai(self, used: float) -> dict[str, str]:
        limited = self.limited
        return {
            "x-ratelimit-limit-requests": f"{limited.capacity:.0f}",
            "x-ratelimit-remaining-requests": f"{int(limited.capacity - used)}",
            "x-ratelimit-reset-requests": f"{used / limited.rate * 1000:.0f}ms",
        }

    def _anthropic(self, used: float) -> dict[str, str]:
        # Whole seconds, rounded up.
        reset = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=int(used / self.limited.rate) + 1)
        return {
            "anthropic-ratelimit-requests-limit": f"{self.limited.capacity:.0f}",
            "anthropic-ratelimit-requests-remaining": f"{int(self.limited.capacity - used)}",
            "anthropic-ratelimit-requests-reset": reset.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


_OPENAI_ANSWER = {
    "id": "c-1",
    "object": "chat.completion",
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}
_ANTHROPIC_ANSWER = {
    "id": "m-1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "fine"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 3, "output_tokens": 1},
}
