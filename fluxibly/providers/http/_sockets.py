"""The common parts of the sockets for threads and for event loops: their protocols, name look-up, and TLS.

All of them are coroutines. An event loop awaits them; in threads they block and never suspend (`_sockets_threads.py`).
So the code on top of them (pools, senders, providers) is written once.
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
"""Maximum number of bytes that a read returns."""


class Socket(Protocol):
    """A socket with a time limit on each wait. Closing it never waits, and does not need an event loop."""

    raw: socket.socket

    async def receive(self, seconds: float | None, /) -> bytes:
        """Return the next bytes; b"" at the end. Raises LimitPassed."""
        ...

    async def send(self, data: bytes, seconds: float | None, /) -> None:
        """Send all of `data`. Raises LimitPassed."""
        ...

    def quiet(self) -> bool:
        """Whether there is nothing to read. If there is, the server has closed an idle connection, or sent too much."""
        ...

    def close(self) -> None: ...


class PlainSocket:
    """The common part of sockets without TLS."""

    raw: socket.socket

    def quiet(self) -> bool:
        return not ready(self.raw)

    def close(self) -> None:
        self.raw.close()


class Event(Protocol):
    """An event that a call waits for. Any thread may set it."""

    def set(self) -> None: ...
    async def wait(self, seconds: float | None, /) -> None:
        """Wait until the event is set, or until the time has passed."""
        ...


class Network(Protocol):
    """The sockets for threads, or for event loops."""

    def home(self) -> Hashable:
        """Return a key for the place where a socket made now can be used: the running loop, or all threads."""
        ...

    def is_gone(self, home: Any, /) -> bool:
        """Whether the event loop of a home has ended."""
        ...

    def event(self) -> Event: ...
    async def connect(self, host: str, port: int, limits: Limits, /) -> Socket: ...


def ready(sock: socket.socket, *, to_write: bool = False, seconds: float | None = 0) -> bool:
    """Whether a read (or a write) would return within `seconds`. A read of a closed connection would."""
    # `poll` where it exists, because `select` fails for descriptors above 1023.
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLOUT if to_write else select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))
    socks = [sock]
    return any(select.select([] if to_write else socks, socks if to_write else [], socks, seconds))


def shut_down(sock: socket.socket) -> None:
    """End both directions of a connection, so that a read in another thread or task returns."""
    # The connection may have ended already, or may not be connected yet.
    with contextlib.suppress(OSError):
        # SSLSocket's own method would drop the TLS object that a read still uses.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def as_limit(error: TimeoutError) -> Exception:
    """Return `LimitPassed` for a time limit of the library, and the error itself for a timeout of the network."""
    # Only a timeout of the network (ETIMEDOUT) has a number.
    return error if error.errno is not None else LimitPassed()


def with_address(error: Exception, address: Any) -> Exception:
    """Return `error` with the address that refused the connection, or did not accept it."""
    if isinstance(error, OSError):
        error.filename = address[0]
    return error


def main_failure(failures: list[Exception], host: str) -> Exception:
    """Return the failure to report if no address of a host accepted a connection."""
    # A refusal says most: another address may have failed only because this machine has no IPv6.
    refused = [failure for failure in failures if isinstance(failure, ConnectionRefusedError)]
    return [*refused, *failures, OSError(f"{host} has no address")][0]


async def resolve(host: str, port: int, limits: Limits, over: Event) -> list[Any]:
    """Return the addresses of a host."""
    # An address needs no look-up, and so no thread.
    try:
        with contextlib.suppress(socket.gaierror):
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except UnicodeError:  # a part of the name is empty, or longer than 63 characters
        raise socket.gaierror(socket.EAI_NONAME, "the name is not a valid host name") from None
    found: list[Any] = []
    failures: list[Exception] = []

    def look_up() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # noqa: BLE001  # the waiting call raises it
            failures.append(error)
        over.set()

    # A look-up cannot be ended, so a look-up that takes too long is left to its thread, a daemon that does not keep the
    # process alive.
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
    """TLS over a socket."""

    def __init__(self, inner: Socket, context: ssl.SSLContext, server_name: str) -> None:
        self.raw = inner.raw
        self._inner = inner
        # TLS in memory, because that works alike over the sockets of threads, asyncio and trio.
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)

    async def handshake(self, limits: Limits) -> None:
        """Agree on keys, and verify the server's certificate."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                # Sent first, because the server waits for the client's part before it sends its own.
                await self._flush(limits.left())
                await self._fill(limits.left())
            except ssl.SSLError:
                with contextlib.suppress(OSError, LimitPassed):
                    await self._flush(limits.left())  # the alert, so that the server learns the reason
                raise
            else:
                await self._flush(limits.left())
                return

    async def receive(self, seconds: float | None) -> bytes:
        """Return the next bytes; b"" at the end.

        Raises:
            ConnectionResetError: the connection ended without TLS's close_notify, so the data may be cut short.
        """
        # The limit applies to all reads of the socket together, because a record may take several.
        end = None if seconds is None else monotonic() + seconds
        while True:
            try:
                return self._tls.read(READ_SIZE)
            except ssl.SSLWantReadError:
                left = None if end is None else max(0.0, end - monotonic())
                # TLS may have something to send before it can read, such as a key update.
                await self._flush(left)
                await self._fill(left)
            except ssl.SSLZeroReturnError:
                return b""
            # Anybody on the way can end a TCP connection, but only the server can send close_notify (RFC 9112 §9.8).
            except ssl.SSLEOFError:
                raise ConnectionResetError("the connection ended without TLS's close_notify") from None

    async def send(self, data: bytes, seconds: float | None) -> None:
        """Send all of `data`."""
        self._tls.write(data)
        await self._flush(seconds)

    def quiet(self) -> bool:
        """Whether there is nothing to read, in memory or in the socket."""
        if ready(self.raw):
            return False
        # A record that was received together with another waits in memory, where `ready` does not see it. The byte read
        # here is lost, which is harmless: the connection is not used again.
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
