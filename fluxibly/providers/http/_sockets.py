"""What the sockets of threads and of event loops have in common: how they are called, name look-up, and TLS.

All of it is written as coroutines. On an event loop they are awaited; in threads they block and never suspend
(`blocking.py`), so that what is written on top of them (pools, transports, shells) is written once.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from fluxibly.providers.http._limits import LimitPassed

if TYPE_CHECKING:
    from collections.abc import Hashable

    from fluxibly.providers.http._limits import Limits

READ_SIZE = 64 * 1024


class Socket(Protocol):
    """A socket with a time limit on each wait. Closing it never waits, and needs no event loop."""

    raw: socket.socket

    async def receive(self, seconds: float | None, /) -> bytes:
        """The next bytes; b"" at the end. Raises LimitPassed."""
        ...

    async def send(self, data: bytes, seconds: float | None, /) -> None:
        """Send all of `data`. Raises LimitPassed."""
        ...

    def quiet(self) -> bool:
        """Whether nothing waits to be read: an idle connection that is not quiet was closed, or says too much."""
        ...

    def close(self) -> None: ...


class PlainSocket:
    """What sockets without TLS have in common."""

    raw: socket.socket

    def quiet(self) -> bool:
        return not ready(self.raw)

    def close(self) -> None:
        self.raw.close()


class Event(Protocol):
    """Something to wait for. Any thread may set it."""

    def set(self) -> None: ...
    async def wait(self, seconds: float | None, /) -> None:
        """Wait until it is set, or the time is over."""
        ...


class Network(Protocol):
    """Sockets of threads, or of event loops."""

    def home(self) -> Hashable:
        """Where the sockets that are made now can be used: on the loop that runs, or in all threads."""
        ...

    def is_gone(self, home: Any, /) -> bool:
        """Whether a home is gone, with its loop."""
        ...

    def event(self) -> Event: ...
    async def connect(self, host: str, port: int, limits: Limits, /) -> Socket: ...


def ready(sock: socket.socket, *, to_write: bool = False, seconds: float | None = 0) -> bool:
    """Whether a read (or a write) would return within so many seconds; an idle connection's would if it was closed."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLOUT if to_write else select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))
    socks = [sock]
    return any(select.select([] if to_write else socks, socks if to_write else [], socks, seconds))


def shut_down(sock: socket.socket) -> None:
    """End both directions, so that a read in another thread or task returns."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not SSLSocket's own, which pulls TLS from under a read


def as_limit(error: TimeoutError) -> Exception:
    """A time limit of ours; the network's own has a number."""
    return error if error.errno is not None else LimitPassed()


async def resolve(host: str, port: int, limits: Limits, over: Event) -> list[Any]:
    """The addresses of a host. A look-up cannot be ended, so one that takes too long is left to its thread."""
    try:
        with contextlib.suppress(socket.gaierror):
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except UnicodeError:  # a part of it is empty, or longer than 63 characters
        raise socket.gaierror(socket.EAI_NONAME, "no host can have that name") from None
    found: list[Any] = []
    failures: list[Exception] = []

    def look_up() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # noqa: BLE001  # it is raised where the answer is waited for
            failures.append(error)
        over.set()

    limits.waits(over.set)
    threading.Thread(target=look_up, name="fluxibly getaddrinfo", daemon=True).start()
    await over.wait(limits.left())
    limits.waits(None)
    if failures:
        raise failures[0]
    if not found:
        raise LimitPassed
    return found


class TLSSocket:
    """TLS on top of a socket."""

    def __init__(self, inner: Socket, context: ssl.SSLContext, server_name: str) -> None:
        self.raw = inner.raw
        self._inner = inner
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)

    async def handshake(self, limits: Limits) -> None:
        """Agree on keys, and check the server's certificate."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush(limits.left())
                await self._fill(limits.left())
            except ssl.SSLError:
                with contextlib.suppress(OSError, LimitPassed):
                    await self._flush(limits.left())  # the alert that tells the server why
                raise
            else:
                await self._flush(limits.left())
                return

    async def receive(self, seconds: float | None) -> bytes:
        """The next bytes; b"" at the end.

        Raises:
            ConnectionResetError: the connection ended without TLS's own end, so what came may be cut short.
        """
        end = None if seconds is None else monotonic() + seconds
        while True:
            try:
                return self._tls.read(READ_SIZE)
            except ssl.SSLWantReadError:
                left = None if end is None else max(0.0, end - monotonic())
                await self._flush(left)
                await self._fill(left)
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLEOFError:
                raise ConnectionResetError("the connection ended without TLS's own end") from None

    async def send(self, data: bytes, seconds: float | None) -> None:
        """Send all of `data`."""
        self._tls.write(data)
        await self._flush(seconds)

    def quiet(self) -> bool:
        """Whether nothing waits to be read, here or in the socket."""
        if ready(self.raw):
            return False
        try:
            self._tls.read(1)
        except ssl.SSLWantReadError:
            return True
        except ssl.SSLError:
            pass
        return False

    async def _flush(self, seconds: float | None) -> None:
        if self._outgoing.pending:
            await self._inner.send(self._outgoing.read(), seconds)

    async def _fill(self, seconds: float | None) -> None:
        data = await self._inner.receive(seconds)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def close(self) -> None:
        self._inner.close()
