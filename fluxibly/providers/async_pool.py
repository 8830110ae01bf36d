"""The pool of connections for event loops: one set of connections for each loop that it is used from."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from fluxibly.providers.http1 import Answer
from fluxibly.providers.http_errors import ConnectionLost, NotHTTP
from fluxibly.providers.limits import LimitPassed, Limits
from fluxibly.providers.pool import (
    DRAIN_READS,
    DRAIN_TIME,
    Connection,
    Slots,
    Waiter,
    as_bytes,
    check_tunnel,
    pools,
    stale,
)
from fluxibly.providers.route import Route, tls_context
from fluxibly.providers.sockets import AsyncSocket, TLSSocket, async_connect, on_trio

if TYPE_CHECKING:
    from fluxibly.providers.http_common import Outgoing


class AsyncPooledExchange:
    """A request that was sent on a connection of a pool, and its answer."""

    __slots__ = ("_answer", "_connection", "_limits", "_slots", "headers", "status")

    def __init__(self, slots: LoopSlots, connection: Connection[AsyncSocket], answer: Answer, limits: Limits) -> None:
        self._slots = slots
        self._connection: Connection[AsyncSocket] | None = connection
        self._answer = answer
        self._limits = limits
        self.status = answer.status
        self.headers = answer.headers

    async def read(self) -> bytes:
        """The next bytes of the body, at least one; b"" at its end."""
        answer, connection = self._answer, self._connection
        data = answer.body(b"")
        while not data and not answer.ended and connection is not None:
            received = await connection.sock.receive(self._limits.left())
            if not received:
                answer.eof()
            data = answer.body(received)
        return data

    async def release(self, *, ended: bool) -> None:
        """Give the connection back, for another call if it can carry one. Twice is fine."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        answer = self._answer
        try:
            if ended and not answer.ended:
                await self._drain(connection)
        finally:
            self._slots.give_back(connection, reusable=answer.ended and answer.reusable)

    async def _drain(self, connection: Connection[AsyncSocket]) -> None:
        answer = self._answer
        try:
            for _ in range(DRAIN_READS):
                received = await connection.sock.receive(DRAIN_TIME)
                if not received:
                    answer.eof()
                answer.body(received)
                if answer.ended:
                    return
        except (OSError, LimitPassed, ConnectionLost, NotHTTP):
            answer.reusable = False

    def drop(self) -> None:
        """Close the connection, from ordinary code that cannot wait, on whatever thread."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.cut()
            self._slots.dropped.append(connection)

    __del__ = drop


class LoopSlots(Slots[AsyncSocket]):
    """The connections of one event loop. Only that loop's thread touches them, save for `dropped`."""

    def __init__(self, loop: Any) -> None:
        super().__init__()
        self.loop = loop
        self.dropped: deque[Connection[AsyncSocket]] = deque()

    def give_back(self, connection: Connection[AsyncSocket] | None, *, reusable: bool) -> None:
        """End a call's hold on a connection."""
        if reusable and connection is not None:
            connection.used = True
            self.check_in(connection)
        else:
            self.drop(connection)

    async def wait(self, limits: Limits) -> Connection[AsyncSocket] | None:
        """A connection, or the right to make one (None), when it is this call's turn."""
        import anyio

        waiter: Waiter[AsyncSocket] = Waiter(anyio.Event())
        self.waiters.append(waiter)
        try:
            with anyio.move_on_after(limits.left()):
                await waiter.event.wait()
                return waiter.connection
            raise LimitPassed
        except BaseException:
            if waiter.event.is_set():
                self.drop(waiter.connection)
            else:
                self.waiters.remove(waiter)
            raise

    def over(self) -> bool:
        """Whether the event loop has ended."""
        if isinstance(self.loop, asyncio.AbstractEventLoop):
            return self.loop.is_closed()
        import trio

        try:
            self.loop.run_sync_soon(_nothing)
        except trio.RunFinishedError:
            return True
        return False


def _nothing() -> None:
    return


class AsyncPool:
    """The connections of a provider, on asyncio and trio. A process that was forked starts with none."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._by_loop: dict[Any, LoopSlots] = {}
        pools.add(self)

    def after_fork(self) -> None:
        """Let go of the parent's connections, in the child: closing them there leaves the parent's open."""
        by_loop, self._by_loop = self._by_loop, {}
        for slots in by_loop.values():
            for connection in slots.live:
                connection.close()
            slots.live.clear()

    def _here(self) -> LoopSlots:
        """The connections of the loop that runs."""
        if on_trio():
            import trio

            loop: Any = trio.lowlevel.current_trio_token()
        else:
            loop = asyncio.get_running_loop()
        slots = self._by_loop.get(loop)
        if slots is None:
            for other in [other for other in self._by_loop.values() if other.over()]:
                del self._by_loop[other.loop]
                other.clear()
            slots = self._by_loop[loop] = LoopSlots(loop)
        return slots

    async def send(self, outgoing: Outgoing, limits: Limits) -> AsyncPooledExchange:
        """Send a request, and wait for the head of its answer."""
        data = as_bytes(outgoing, self._route)
        slots = self._here()
        while slots.dropped:
            slots.drop(slots.dropped.popleft())
        admitted, connection = slots.check_out()
        if not admitted:
            connection = await slots.wait(limits)
        try:
            if connection is not None:
                answer = Answer()
                try:
                    await self._ask(connection, data, answer, limits)
                    return AsyncPooledExchange(slots, connection, answer, limits)
                except Exception as error:
                    if not stale(connection, answer, error):
                        raise
                slots.forget(connection)
                connection = None
            connection = await self._connect(slots, limits)
            answer = Answer()
            await self._ask(connection, data, answer, limits)
        except BaseException:
            slots.give_back(connection, reusable=False)
            raise
        return AsyncPooledExchange(slots, connection, answer, limits)

    async def _connect(self, slots: LoopSlots, limits: Limits) -> Connection[AsyncSocket]:
        route = self._route
        limits.connecting()
        sock = await async_connect(route.host, route.port, limits)
        try:
            if route.tunnel:
                await sock.send(route.tunnel, limits.left())
                answer = Answer()
                while not answer.head(received := await sock.receive(limits.left())):
                    if not received:
                        answer.eof()
                check_tunnel(answer)
            if route.server_name is not None:
                sock = secure = TLSSocket(sock, tls_context(), route.server_name)
                await secure.handshake(limits)
        except BaseException:
            sock.close()
            raise
        connection = Connection(sock)
        slots.live.add(connection)
        return connection

    async def _ask(self, connection: Connection[AsyncSocket], data: bytes, answer: Answer, limits: Limits) -> None:
        """Send a request and read the head of its answer."""
        limits.waits(connection.cut)
        limits.sent()
        sock = connection.sock
        unsent: OSError | None = None
        try:
            await sock.send(data, limits.left())
        except ConnectionError as error:
            unsent = error  # a server may refuse a request before it has read it whole: its answer is worth a look
        limits.sent()
        try:
            while not answer.head(received := await sock.receive(limits.left())):
                if not received:
                    answer.eof()
        except (ConnectionLost, OSError):
            if unsent is not None:
                raise unsent from None
            raise
        if unsent is not None:
            answer.reusable = False
        limits.answered()

    async def aclose(self) -> None:
        """Close every connection."""
        for slots in self._by_loop.values():
            slots.clear()
        self._by_loop.clear()
