"""Sockets with a time limit on each wait: blocking ones, and those of asyncio and trio.

Each has `receive(seconds)` and `send(data, seconds)`, which raise `LimitPassed`, and `close()`, which never waits. The
async ones are raw sockets, not transports: closing one needs no event loop, so that a provider that outlived a loop
can still let its connections go.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import select
import socket
import ssl
import sys
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from fluxibly.providers.limits import LimitPassed

if TYPE_CHECKING:
    from fluxibly.providers.limits import Limits

READ_SIZE = 64 * 1024
HEAD_START = 0.25
"""Seconds that an address has before the next one is tried as well (RFC 8305)."""
READY_READS = 32
"""Reads that need no wait before other tasks get their turn."""


def readable(sock: socket.socket) -> bool:
    """Whether a read would return now: for an idle connection, that the other side has closed it."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([sock], [], [], 0)[0])


def shut_down(sock: socket.socket) -> None:
    """End both directions, so that a read in another thread returns."""
    with contextlib.suppress(OSError):
        # Not SSLSocket's own method, which pulls TLS from under a read.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


# Blocking


class BlockingSocket:
    """A socket for threads."""

    def __init__(self, sock: socket.socket) -> None:
        self.raw = sock
        self._timeout: float | None = -1.0

    def _limit(self, seconds: float | None) -> None:
        if seconds != self._timeout:
            self.raw.settimeout(seconds)
            self._timeout = seconds

    def receive(self, seconds: float | None) -> bytes:
        """The next bytes; b"" at the end."""
        self._limit(seconds)
        try:
            return self.raw.recv(READ_SIZE)
        except TimeoutError as error:
            raise _late(error) from None

    def send(self, data: bytes, seconds: float | None) -> None:
        """Send all of `data`."""
        self._limit(seconds)
        try:
            self.raw.sendall(data)
        except TimeoutError as error:
            raise _late(error) from None

    def start_tls(self, context: ssl.SSLContext, server_name: str, limits: Limits) -> None:
        """Speak TLS from here on, with a server that proves its name."""
        secure = context.wrap_socket(self.raw, server_hostname=server_name, do_handshake_on_connect=False)
        self.raw = secure
        limits.waits(functools.partial(shut_down, secure))
        self._limit(limits.left())
        try:
            secure.do_handshake()
        except TimeoutError as error:
            raise _late(error) from None

    def close(self) -> None:
        self.raw.close()


def _late(error: TimeoutError) -> Exception:
    """A time limit of ours; the network's own has a number."""
    return error if error.errno is not None else LimitPassed()


def connect(host: str, port: int, limits: Limits) -> BlockingSocket:
    """Connect to the first of the host's addresses that answers; each has its share of the time that is left."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failure: Exception | None = None
    for tried, (family, kind, protocol, _, address) in enumerate(infos):
        left = limits.left()
        sock = socket.socket(family, kind, protocol)
        try:
            limits.waits(functools.partial(shut_down, sock))
            sock.settimeout(None if left is None else left / (len(infos) - tried))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return BlockingSocket(sock)
        except OSError as error:
            failure = _late(error) if isinstance(error, TimeoutError) else error
            sock.close()
        except BaseException:
            sock.close()
            raise
    raise failure or OSError(f"{host} has no address")


# On an event loop


class AsyncSocket(Protocol):
    """A socket of an event loop."""

    raw: socket.socket

    async def receive(self, seconds: float | None, /) -> bytes: ...
    async def send(self, data: bytes, seconds: float | None, /) -> None: ...
    def close(self) -> None: ...


class AsyncioSocket:
    """A socket of asyncio."""

    def __init__(self, sock: socket.socket) -> None:
        self.raw = sock
        self._loop = asyncio.get_running_loop()
        self._ready = 0

    async def receive(self, seconds: float | None) -> bytes:
        """The next bytes; b"" at the end."""
        try:
            data = self.raw.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            self._ready = 0
        else:
            self._ready += 1
            if self._ready >= READY_READS:
                self._ready = 0
                await asyncio.sleep(0)
            return data
        try:
            async with asyncio.timeout(seconds):
                return await self._loop.sock_recv(self.raw, READ_SIZE)
        except TimeoutError as error:
            raise _late(error) from None

    async def send(self, data: bytes, seconds: float | None) -> None:
        """Send all of `data`."""
        try:
            sent = self.raw.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent == len(data):
            return
        try:
            async with asyncio.timeout(seconds):
                await self._loop.sock_sendall(self.raw, data[sent:])
        except TimeoutError as error:
            raise _late(error) from None

    def close(self) -> None:
        self.raw.close()

    @staticmethod
    async def resolve(host: str, port: int) -> list[Any]:
        return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)

    @staticmethod
    async def connect(sock: socket.socket, address: Any) -> AsyncioSocket:
        """Connect a new socket."""
        await asyncio.get_running_loop().sock_connect(sock, address)
        return AsyncioSocket(sock)


class TrioSocket:
    """A socket of trio."""

    def __init__(self, sock: socket.socket) -> None:
        import trio

        self.raw = sock
        self._sock = trio.socket.from_stdlib_socket(sock)

    async def receive(self, seconds: float | None) -> bytes:
        """The next bytes; b"" at the end."""
        import trio

        with trio.move_on_after(float("inf") if seconds is None else seconds):
            return await self._sock.recv(READ_SIZE)
        raise LimitPassed

    async def send(self, data: bytes, seconds: float | None) -> None:
        """Send all of `data`."""
        import trio

        rest = memoryview(data)
        with trio.move_on_after(float("inf") if seconds is None else seconds):
            while rest:
                rest = rest[await self._sock.send(rest) :]
            return
        raise LimitPassed

    def close(self) -> None:
        self.raw.close()

    @staticmethod
    async def resolve(host: str, port: int) -> list[Any]:
        import trio

        return await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

    @staticmethod
    async def connect(sock: socket.socket, address: Any) -> TrioSocket:
        """Connect a new socket."""
        connected = TrioSocket(sock)
        await connected._sock.connect(address)  # its own class
        return connected


def on_trio() -> bool:
    """Whether the code that runs is a task of trio's; of asyncio's if not."""
    trio = sys.modules.get("trio")
    return trio is not None and trio.lowlevel.in_trio_task()


async def async_connect(host: str, port: int, limits: Limits) -> AsyncSocket:
    """Connect to the first of the host's addresses that answers, trying them with a head start each."""
    import anyio

    kind: type[AsyncioSocket | TrioSocket] = TrioSocket if on_trio() else AsyncioSocket
    connected: list[AsyncSocket] = []
    failures: list[OSError] = []

    async def attempt(info: Any, over: anyio.Event) -> None:
        sock = socket.socket(info[0], info[1], info[2])
        sock.setblocking(False)  # the standard library's own signature
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            won = await kind.connect(sock, info[4])
        except OSError as error:
            failures.append(error)
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            connected.append(won)
            tasks.cancel_scope.cancel()
        over.set()

    try:
        with anyio.fail_after(limits.left()):
            infos = await kind.resolve(host, port)
            async with anyio.create_task_group() as tasks:
                for info in infos:
                    over = anyio.Event()
                    tasks.start_soon(attempt, info, over)
                    with anyio.move_on_after(HEAD_START):
                        await over.wait()
    except TimeoutError as error:
        if not connected:
            raise _late(error) from None
    except BaseException:
        for late in connected:
            late.close()
        raise
    for loser in connected[1:]:
        loser.close()
    if connected:
        return connected[0]
    raise failures[0] if failures else OSError(f"{host} has no address")


class TLSSocket:
    """TLS on top of a socket of an event loop."""

    def __init__(self, inner: AsyncSocket, context: ssl.SSLContext, server_name: str) -> None:
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
        """The next bytes; b"" at the end."""
        end = None if seconds is None else monotonic() + seconds
        while True:
            try:
                return self._tls.read(READ_SIZE)
            except ssl.SSLWantReadError:
                left = None if end is None else max(0.0, end - monotonic())
                await self._flush(left)
                await self._fill(left)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    async def send(self, data: bytes, seconds: float | None) -> None:
        """Send all of `data`."""
        self._tls.write(data)
        await self._flush(seconds)

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
