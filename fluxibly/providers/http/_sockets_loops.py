"""Sockets for asyncio and trio.

They are raw sockets rather than transports: a raw socket can be closed without an event loop, so a provider that
outlives a loop can still close its connections.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from fluxibly._loops import from_anywhere, trio_here
from fluxibly.providers.http._limits import LimitPassed
from fluxibly.providers.http._sockets import READ_SIZE, PlainSocket, as_limit, main_failure, resolve, with_address

if TYPE_CHECKING:
    import anyio

    from fluxibly.providers.http._limits import Limits

HEAD_START = 0.25
"""Seconds before the next address is tried as well (RFC 8305)."""
READY_READS = 32
"""Maximum number of reads without a wait before other tasks get their turn."""


class LoopEvent:
    """An event that a task waits for."""

    def __init__(self) -> None:
        import anyio

        self._event = anyio.Event()
        self.set = from_anywhere(self._event.set)

    async def wait(self, seconds: float | None) -> None:
        import anyio

        with anyio.move_on_after(seconds):
            await self._event.wait()


class AsyncioSocket(PlainSocket):
    """A socket for asyncio."""

    def __init__(self, sock: socket.socket) -> None:
        self.raw = sock
        self._loop = asyncio.get_running_loop()
        self._ready = 0
        """The number of reads since the last wait."""

    async def receive(self, seconds: float | None) -> bytes:
        # Tried at once, because data that is there needs neither a timer nor a registration with the loop.
        try:
            data = self.raw.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            self._ready = 0
        else:
            self._ready += 1
            # A fast server must not keep the other tasks from running.
            if self._ready >= READY_READS:
                self._ready = 0
                await asyncio.sleep(0)
            return data
        try:
            async with asyncio.timeout(seconds):
                return await self._loop.sock_recv(self.raw, READ_SIZE)
        except TimeoutError as error:
            raise as_limit(error) from None

    async def send(self, data: bytes, seconds: float | None) -> None:
        # Tried at once, because the socket's buffer has room for most requests.
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
            raise as_limit(error) from None

    @staticmethod
    async def connect(sock: socket.socket, address: Any) -> AsyncioSocket:
        """Connect a new socket."""
        await asyncio.get_running_loop().sock_connect(sock, address)
        return AsyncioSocket(sock)


class TrioSocket(PlainSocket):
    """A socket for trio."""

    def __init__(self, sock: socket.socket) -> None:
        import trio

        self.raw = sock
        self._sock = trio.socket.from_stdlib_socket(sock)

    async def receive(self, seconds: float | None) -> bytes:
        import trio

        with trio.move_on_after(float("inf") if seconds is None else seconds):
            return await self._sock.recv(READ_SIZE)
        raise LimitPassed

    async def send(self, data: bytes, seconds: float | None) -> None:
        import trio

        rest = memoryview(data)
        with trio.move_on_after(float("inf") if seconds is None else seconds):
            while rest:
                rest = rest[await self._sock.send(rest) :]
            return
        raise LimitPassed

    @staticmethod
    async def connect(sock: socket.socket, address: Any) -> TrioSocket:
        """Connect a new socket."""
        connected = TrioSocket(sock)
        await connected._sock.connect(address)  # a method of the same class
        return connected


class Loops:
    """The network for event loops. Each loop has its own sockets."""

    def home(self) -> Any:
        if trio := trio_here():
            return trio.lowlevel.current_trio_token()
        return asyncio.get_running_loop()

    def is_gone(self, home: Any) -> bool:
        if isinstance(home, asyncio.AbstractEventLoop):
            return home.is_closed()
        # A token of trio offers no other way to ask whether its run has ended.
        try:
            home.run_sync_soon(_nothing)
        except RuntimeError:  # trio.RunFinishedError
            return True
        return False

    def event(self) -> LoopEvent:
        return LoopEvent()

    async def connect(self, host: str, port: int, limits: Limits) -> AsyncioSocket | TrioSocket:
        """Connect to the first of the host's addresses that accepts a connection."""
        import anyio

        infos = await resolve(host, port, limits, LoopEvent())
        race = _Race()
        try:
            with anyio.move_on_after(limits.left()) as scope:
                limits.waits(from_anywhere(scope.cancel))
                await race.run(infos)
            limits.waits(None)
        except BaseException:
            # A cancelled call must not leave a connection open.
            for sock in race.connected:
                sock.close()
            raise
        # Two attempts may succeed before the race is cancelled.
        for loser in race.connected[1:]:
            loser.close()
        if race.connected:
            return race.connected[0]
        if scope.cancelled_caught:
            raise LimitPassed
        raise main_failure(race.failures, host)


class _Race:
    """Attempts to connect. Each begins when the attempt before it has failed, or has had its head start."""

    def __init__(self) -> None:
        self.connected: list[AsyncioSocket | TrioSocket] = []
        self.failures: list[Exception] = []

    async def run(self, infos: list[Any]) -> None:
        """Try each address until an attempt succeeds."""
        import anyio

        async with anyio.create_task_group() as tasks:
            for info in infos:
                over = anyio.Event()
                tasks.start_soon(self._attempt, info, tasks.cancel_scope, over)
                with anyio.move_on_after(HEAD_START):
                    await over.wait()

    async def _attempt(self, info: Any, race: anyio.CancelScope, over: anyio.Event) -> None:
        sock = socket.socket(info[0], info[1], info[2])
        sock.setblocking(False)  # the standard library's signature
        try:
            # A part of a request must not wait until the server has acknowledged the part before it.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            kind: type[AsyncioSocket | TrioSocket] = TrioSocket if trio_here() else AsyncioSocket
            self.connected.append(await kind.connect(sock, info[4]))
        except OSError as error:
            failure = as_limit(error) if isinstance(error, TimeoutError) else error
            self.failures.append(with_address(failure, info[4]))
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            race.cancel()
        over.set()


def _nothing() -> None:
    return
