"""A real Redis server, which tests start, pause, kill and start again."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

_ENOUGH = 30.0


def need_redis() -> None:
    """Skip a test where there is no server program, and say so."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (apt install redis-server)")


class RedisServer:
    """A server on a free port of this machine. With `data`, it writes every change to a file before it answers."""

    def __init__(self, *, data: bool = False) -> None:
        need_redis()
        self._folder = Path(tempfile.mkdtemp(prefix="fluxibly-redis-"))
        self._data = data
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def patient_url(self) -> str:
        """The same, for clients that wait longer for a busy machine than they usually do."""
        return f"{self.url}?socket_timeout={_ENOUGH}&socket_connect_timeout={_ENOUGH}"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        self._process = subprocess.Popen(
            [
                *("redis-server", "--port", f"{self.port}", "--bind", "127.0.0.1", "--dir", f"{self._folder}"),
                *("--save", "", "--appendonly", "yes" if self._data else "no", "--appendfsync", "always"),
            ],
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + _ENOUGH
        while True:
            try:
                with self.client() as client:
                    assert client.info("server")["process_id"] == self._process.pid, "another server has the port"
                return
            except Exception:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise
                time.sleep(0.02)

    def client(self) -> Any:
        """Return a client of the library. Close it, or use it in a `with` statement."""
        import redis

        return redis.Redis(port=self.port, decode_responses=True)

    def kill(self) -> None:
        """End the server at once, as a crash does."""
        self._process.kill()
        self._process.wait(_ENOUGH)

    def freeze(self) -> None:
        """Let the server answer nobody, and keep its connections open."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the server, and remove its files."""
        self.thaw()
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
