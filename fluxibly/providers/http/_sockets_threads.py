"""Sockets for threads. Every wait blocks the thread, so their coroutines never suspend, and `finished` runs them."""

from __future__ import annotations

import errno
import functools
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from fluxibly.providers.http._limits import LimitPassed
from fluxibly.providers.http._sockets import (
    READ_SIZE,
    PlainSocket,
    as_limit,
    main_failure,
    ready,
    resolve,
    shut_down,
    with_address,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from fluxibly.providers.http._limits import Limits

T = TypeVar("T")


def finished(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, and return its result."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # the coroutine's type
    coroutine.close()
    raise RuntimeError("expected a coroutine that never suspends, got a coroutine that awaits an event loop")


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
        """The timeout that is set; -1 before the first wait."""

    def _limit(self, seconds: float | None) -> None:
        if seconds == 0.0:  # to a socket, no time at all means not to block
            raise LimitPassed
        # Set only if it changes, because that costs a system call.
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
    """The network for threads. All threads share its sockets."""

    def home(self) -> None:
        return

    def is_gone(self, _home: Any) -> bool:
        return False

    def event(self) -> BlockingEvent:
        return BlockingEvent()

    async def connect(self, host: str, port: int, limits: Limits) -> BlockingSocket:
        """Connect to the first of the host's addresses that accepts a connection."""
        # Each address has its share of the remaining time, so that an address that is silent does not use up all of it.
        infos = await resolve(host, port, limits, BlockingEvent())
        failures: list[Exception] = []
        for tried, (family, kind, protocol, _, address) in enumerate(infos):
            left = limits.left()
            sock = socket.socket(family, kind, protocol)
            try:
                _connect(sock, address, limits, None if left is None else left / (len(infos) - tried))
                # A part of a request must not wait until the server has acknowledged the part before it.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return BlockingSocket(sock)
            except (OSError, LimitPassed) as error:
                failures.append(with_address(error, address))
                sock.close()
            except BaseException:
                sock.close()
                raise
        raise main_failure(failures, host)


def _connect(sock: socket.socket, address: Any, limits: Limits, seconds: float | None) -> None:
    """Connect a socket. An abort in another thread ends the wait (at once on Linux, elsewhere with the limit)."""
    # Not blocking, so that an abort can be set once connecting has begun: before that, a shutdown has no effect.
    sock.setblocking(False)  # the standard library's signature
    code = sock.connect_ex(address)
    if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
        limits.waits(functools.partial(shut_down, sock))
        if not ready(sock, to_write=True, seconds=seconds):
            raise LimitPassed
        limits.waits(None)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
