"""Sockets for threads: every wait blocks, so a coroutine made of them never suspends, and `finished` runs it."""

from __future__ import annotations

import errno
import functools
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from fluxibly.providers.http._limits import LimitPassed
from fluxibly.providers.http._sockets import READ_SIZE, PlainSocket, as_limit, ready, resolve, shut_down

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from fluxibly.providers.http._limits import Limits

T = TypeVar("T")


def finished(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # the coroutine's own type
    coroutine.close()
    raise RuntimeError("code that runs in a thread awaited an event loop")


class BlockingEvent:
    """An event that a thread waits for."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.set = self._event.set

    async def wait(self, seconds: float | None) -> None:
        self._event.wait(seconds)


class BlockingSocket(PlainSocket):
    """A socket for threads."""

    def __init__(self, sock: socket.socket) -> None:
        self.raw = sock
        self._timeout: float | None = -1.0

    def _limit(self, seconds: float | None) -> None:
        if seconds != self._timeout:
            self.raw.settimeout(seconds)
            self._timeout = seconds

    async def receive(self, seconds: float | None) -> bytes:
        self._limit(seconds)
        try:
            return self.raw.recv(READ_SIZE)
        except TimeoutError as error:
            raise as_limit(error) from None

    async def send(self, data: bytes, seconds: float | None) -> None:
        self._limit(seconds)
        try:
            self.raw.sendall(data)
        except TimeoutError as error:
            raise as_limit(error) from None


class Threads:
    """The network for threads, which share all of it."""

    def home(self) -> None:
        return

    def is_gone(self, _home: Any) -> bool:
        return False

    def event(self) -> BlockingEvent:
        return BlockingEvent()

    async def connect(self, host: str, port: int, limits: Limits) -> BlockingSocket:
        """Connect to the first of the host's addresses that answers; each has its share of the time that is left."""
        infos = await resolve(host, port, limits, BlockingEvent())
        failure: Exception | None = None
        for tried, (family, kind, protocol, _, address) in enumerate(infos):
            left = limits.left()
            sock = socket.socket(family, kind, protocol)
            try:
                _connect(sock, address, limits, None if left is None else left / (len(infos) - tried))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return BlockingSocket(sock)
            except (OSError, LimitPassed) as error:
                failure = error
                sock.close()
            except BaseException:
                sock.close()
                raise
        raise failure or OSError(f"{host} has no address")


def _connect(sock: socket.socket, address: Any, limits: Limits, seconds: float | None) -> None:
    """Connect a socket. A close from elsewhere ends it (at once on Linux, else with the limit)."""
    sock.setblocking(False)  # the standard library's own signature
    code = sock.connect_ex(address)
    if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
        limits.waits(functools.partial(shut_down, sock))
        if not ready(sock, to_write=True, seconds=seconds):
            raise LimitPassed
        limits.waits(None)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
