"""A local HTTP server for scripts that break the rules: raw sockets, and a thread for each connection."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import attrs

HEAD = b"HTTP/1.1 200 OK\r\n"


@attrs.define
class Received:
    """A received request. `headers` have lower-case names."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Peer:
    """The server's end of a connection."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self._reader = sock.makefile("rb")

    def receive(self) -> Received | None:
        """Return the next request, or None when the client has closed the connection."""
        line = self._reader.readline()
        if not line:
            return None
        method, target, _ = line.decode().split(" ", 2)
        headers: dict[str, str] = {}
        while (line := self._reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        body = self._reader.read(int(headers.get("content-length", 0)))
        request = Received(method, target, headers, body)
        self.server.requests.append(request)
        return request

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def trickle(self, data: bytes, gap: float = 0.02) -> None:
        """Send byte by byte, `gap` seconds apart."""
        for n in range(len(data)):
            self.send(data[n : n + 1])
            time.sleep(gap)

    def answer(self, body: bytes | str | dict[str, Any], status: str = "200 OK", **headers: str) -> None:
        """Send a whole, valid response."""
        if isinstance(body, dict):
            body = json.dumps(body)
        if isinstance(body, str):
            body = body.encode()
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        head = "\r\n".join([f"HTTP/1.1 {status}", f"content-length: {len(body)}", *lines])
        self.send(head.encode() + b"\r\n\r\n" + body)

    def begin_stream(self, content_type: str = "text/event-stream", **headers: str) -> None:
        """Send the head of a chunked response."""
        lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
        self.send(HEAD + f"content-type: {content_type}\r\ntransfer-encoding: chunked\r\n{''.join(lines)}\r\n".encode())

    def chunk(self, data: bytes | str) -> None:
        """Send an HTTP chunk. An empty chunk ends the response."""
        if isinstance(data, str):
            data = data.encode()
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def wait_for_end(self) -> None:
        """Wait until the client closes the connection, or until the server stops."""
        with contextlib.suppress(OSError, ValueError):
            while not self.server.over.is_set():
                if select.select([self.sock], [], [], 0.02)[0] and not self.sock.recv(4096):
                    return

    def reset(self) -> None:
        """End the connection with a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._reader.close()
        self.sock.close()


Script: TypeAlias = Callable[[Peer, Received], None]


class Server:
    """A running server: its `url`, the `requests` received, and the number of `connections` accepted."""

    def __init__(self, script: Script, context: ssl.SSLContext | None, host: str) -> None:
        self.requests: list[Received] = []
        self.connections = 0
        self.over = threading.Event()
        self.closed = threading.Semaphore(0)
        """Released once for each connection that has ended."""
        self._script = script
        self._context = context
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=2048)
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.port}/v1"
        self._peers: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peers.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            if self._context is not None:
                plain = sock
                sock = self._context.wrap_socket(sock, server_side=True)
                self._peers.discard(plain)
                self._peers.add(sock)
            peer = Peer(self, sock)
            try:
                while (request := peer.receive()) is not None:
                    self._script(peer, request)
            finally:
                peer.close()
        except (OSError, ValueError):
            sock.close()
        finally:
            self._peers.discard(sock)
            self.closed.release()

    def stop(self) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join(5)
        for sock in list(self._peers):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)


@contextlib.contextmanager
def serve(script: Script, context: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> Iterator[Server]:
    """Run a server that calls `script(peer, request)` for each request, until the block ends."""
    server = Server(script, context, host)
    try:
        yield server
    finally:
        server.stop()
