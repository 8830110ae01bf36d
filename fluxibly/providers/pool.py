"""A provider's own connections: HTTP/1.1 over sockets, each connection for one call at a time."""

from __future__ import annotations

import os
import ssl
from collections.abc import Hashable
from typing import TYPE_CHECKING
from weakref import WeakSet

from fluxibly.errors import ConnectionFailed
from fluxibly.providers.http1 import Answer, request_bytes
from fluxibly.providers.http_errors import ConnectionLost, NotHTTP
from fluxibly.providers.limits import DRAIN_TIME, LimitPassed, Limits
from fluxibly.providers.route import Route, tls_context
from fluxibly.providers.slots import Connection, Slots
from fluxibly.providers.sockets import TLSSocket

if TYPE_CHECKING:
    from fluxibly.providers.http_common import Outgoing
    from fluxibly.providers.sockets import Network, Socket

DRAIN_READS = 8


class PooledExchange:
    """A request that was sent on a connection of a pool, and its answer."""

    __slots__ = ("_answer", "_connection", "_limits", "_slots", "headers", "status")

    def __init__(self, slots: Slots, connection: Connection, answer: Answer, limits: Limits) -> None:
        self._slots = slots
        self._connection: Connection | None = connection
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
                await _drain(connection.sock, answer)
        finally:
            self._slots.give_back(connection, reusable=answer.ended and answer.reusable)

    def __del__(self) -> None:
        # Dropped without a release: no lock may be taken here, inside of the garbage collector.
        if self._connection is not None:
            self._connection.cut()
            self._slots.dropped.append(self._connection)


class Pool:
    """The connections of a provider, in threads or on event loops. A process that was forked starts with none."""

    def __init__(self, route: Route, network: Network) -> None:
        self._route = route
        self._network = network
        self._slots: dict[Hashable, Slots] = {}
        _pools.add(self)

    async def send(self, outgoing: Outgoing, limits: Limits) -> PooledExchange:
        """Send a request, and wait for the head of its answer."""
        data = request_bytes(outgoing, self._route)
        slots = self._here()
        connection = await slots.check_out(limits)
        try:
            if connection is not None:
                answer = Answer()
                try:
                    await _ask(connection, data, answer, limits)
                    return PooledExchange(slots, connection, answer, limits)
                except Exception as error:
                    if not _stale(connection, answer, error):
                        raise
                slots.forget(connection)
                connection = None
            connection = await self._connect(slots, limits)
            answer = Answer()
            await _ask(connection, data, answer, limits)
        except BaseException:
            slots.give_back(connection, reusable=False)
            raise
        return PooledExchange(slots, connection, answer, limits)

    def _here(self) -> Slots:
        place = self._network.place()
        slots = self._slots.get(place)
        if slots is None:
            for other in list(self._slots):
                if self._network.over(other) and (gone := self._slots.pop(other, None)):
                    gone.close()
            slots = self._slots.setdefault(place, Slots(self._network))
        return slots

    async def _connect(self, slots: Slots, limits: Limits) -> Connection:
        route = self._route
        limits.connecting()
        try:
            connection = Connection(await self._network.connect(route.host, route.port, limits))
        except OSError as error:
            if route.through_proxy:
                raise ConnectionFailed(
                    f"no connection to the proxy {route.host}:{route.port}, which the environment names: "
                    f"{error.strerror or error}"
                ) from error
            raise
        try:
            slots.enter(connection)
            limits.waits(connection.cut)
            if route.tunnel:
                await connection.sock.send(route.tunnel, limits.left())
                answer = Answer()
                await _read_head(connection.sock, answer, limits)
                _check_tunnel(answer)
            if route.server_name is not None:
                secure = TLSSocket(connection.sock, tls_context(), route.server_name)
                await secure.handshake(limits)
                connection.sock = secure
        except BaseException:
            slots.forget(connection)
            raise
        return connection

    async def close(self) -> None:
        """Close every connection."""
        for slots in list(self._slots.values()):
            slots.close()

    def after_fork(self) -> None:
        """Start anew, in the child."""
        parents, self._slots = self._slots, {}
        for slots in parents.values():
            slots.after_fork()


async def _ask(connection: Connection, data: bytes, answer: Answer, limits: Limits) -> None:
    """Send a request and read the head of its answer."""
    limits.waits(connection.cut)
    limits.sent()
    unsent: OSError | None = None
    try:
        await connection.sock.send(data, limits.left())
    except ConnectionError as error:
        unsent = error  # a server may refuse a request before it has read it whole: its answer is worth a look
    limits.sent()
    try:
        await _read_head(connection.sock, answer, limits)
    except (ConnectionLost, OSError):
        if unsent is not None:
            raise unsent from None
        raise
    if unsent is not None:
        answer.reusable = False
    limits.answered()


async def _read_head(sock: Socket, answer: Answer, limits: Limits) -> None:
    while not answer.head(received := await sock.receive(limits.left())):
        if not received:
            answer.eof()


async def _drain(sock: Socket, answer: Answer) -> None:
    """Read the end of a body, if it is there."""
    try:
        for _ in range(DRAIN_READS):
            received = await sock.receive(DRAIN_TIME)
            if not received:
                answer.eof()
            answer.body(received)
            if answer.ended:
                return
    except (OSError, LimitPassed, ConnectionLost, NotHTTP):
        answer.reusable = False


def _stale(connection: Connection, answer: Answer, error: Exception) -> bool:
    """Whether the server closed an idle connection just when we used it: then nothing of an answer has come."""
    ended = isinstance(error, (ConnectionLost, ConnectionError, ssl.SSLEOFError))
    return ended and connection.used and answer.silent


def _check_tunnel(answer: Answer) -> None:
    """Raise ConnectionFailed unless a proxy opened the tunnel that it was asked for."""
    if not 200 <= answer.status < 300:
        hint = ": check the user name and password in its URL" if answer.status == 407 else ""
        raise ConnectionFailed(f"the proxy refused the connection with status {answer.status}{hint}", retryable=False)


_pools: WeakSet[Pool] = WeakSet()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
