"""A pool of our own connections to one server, and its books: who has which, who waits, and which are idle."""

from __future__ import annotations

import os
import ssl
import threading
from collections import deque
from collections.abc import Hashable
from time import monotonic
from typing import TYPE_CHECKING
from weakref import WeakSet

from fluxibly.errors import ConnectionFailed
from fluxibly.providers.http._http1 import Answer, request_bytes
from fluxibly.providers.http._limits import DRAIN_TIME, ConnectionLost, LimitPassed, Limits, NotHTTP
from fluxibly.providers.http._route import Route, tls_context
from fluxibly.providers.http._sockets import TLSSocket, shut_down

if TYPE_CHECKING:
    from fluxibly.providers.http._exchange import Outgoing
    from fluxibly.providers.http._limits import Limits
    from fluxibly.providers.http._sockets import Event, Network, Socket


# Books


MAX_CONNECTIONS = 1000
"""Connections that a pool has at most; more calls wait their turn."""
KEEP_IDLE = 30.0
"""Seconds after which an idle connection is not used again: less than what servers and firewalls commonly allow."""


class Connection:
    """A connection, and what its pool knows of it."""

    __slots__ = ("idle_since", "sock", "used")

    def __init__(self, sock: Socket) -> None:
        self.sock = sock
        self.used = False
        """Whether it has carried a call, so that the server may have closed it since."""
        self.idle_since = 0.0

    def usable(self, now: float) -> bool:
        """Whether an idle connection can carry a call, as far as one can see from here."""
        return now - self.idle_since < KEEP_IDLE and self.sock.quiet()

    def cut(self) -> None:
        """End a read in another thread or task."""
        shut_down(self.sock.raw)

    def close(self) -> None:
        self.sock.close()

    def __del__(self) -> None:
        # Whoever forgot to close the provider need not be told by a warning for each of its sockets.
        self.sock.close()


class _Waiter:
    """A call that waits its turn. Once it is admitted it has a connection, or the right to make one (None)."""

    __slots__ = ("admitted", "connection", "event")

    def __init__(self, event: Event) -> None:
        self.event = event
        self.admitted = False
        self.connection: Connection | None = None


class Slots:
    """The connections of one place: of all threads, or of one event loop.

    A call that was let in holds a slot, with or without a connection in it, until it calls `give_back`.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._lock = threading.Lock()
        self._idle: deque[Connection] = deque()
        self._live: set[Connection] = set()
        self._count = 0
        self._waiters: deque[_Waiter] = deque()
        self._closed = False
        self.dropped: deque[Connection] = deque()
        """Connections of calls that were dropped, put here without the lock, which a finalizer must not take."""

    async def check_out(self, limits: Limits) -> Connection | None:
        """An idle connection, or None: the right to make one. With too many in use, it waits its turn.

        Raises:
            LimitPassed: it did not come in time.
            ConnectionFailed: the pool was closed meanwhile.
        """
        with self._lock:
            while self.dropped:
                self._drop(self.dropped.popleft())
            while self._idle:
                connection = self._idle.pop()
                if connection.usable(monotonic()):
                    return connection
                self._forget(connection)
                self._count -= 1
            if self._count < MAX_CONNECTIONS:
                self._count += 1
                return None
            waiter = _Waiter(self._network.event())
            self._waiters.append(waiter)
        try:
            limits.waits(waiter.event.set)
            await waiter.event.wait(limits.left())
            limits.waits(None)
            if not waiter.admitted:
                self._check_open()
                raise LimitPassed
        except BaseException:
            with self._lock:
                if waiter.admitted:
                    self._drop(waiter.connection)
                else:
                    self._waiters.remove(waiter)
            raise
        return waiter.connection

    def enter(self, connection: Connection) -> None:
        """Take in a connection that a call is making: it is cut when the pool closes, and not kept by a fork.

        Raises:
            ConnectionFailed: the pool was closed meanwhile.
        """
        with self._lock:
            self._check_open()
            self._live.add(connection)

    def forget(self, connection: Connection) -> None:
        """Close a connection; its call keeps the slot."""
        with self._lock:
            self._forget(connection)

    def give_back(self, connection: Connection | None, *, reusable: bool) -> None:
        """End a call's hold on a slot, and on the connection in it."""
        with self._lock:
            if not reusable or connection is None or connection not in self._live or self._closed:
                self._drop(connection)
                return
            connection.used = True
            now = connection.idle_since = monotonic()
            if self._waiters:
                self._admit(connection)
                return
            idle = self._idle
            idle.append(connection)
            while idle and now - idle[0].idle_since >= KEEP_IDLE:
                self._forget(idle.popleft())
                self._count -= 1

    def close(self) -> None:
        """Close every connection. Those in use are cut, and closed by the calls that use them."""
        with self._lock:
            self._closed = True
            while self._idle:
                self._forget(self._idle.pop())
            for connection in self._live:
                connection.cut()
            for waiter in self._waiters:
                waiter.event.set()

    def after_fork(self) -> None:
        """Let go of the parent's connections, in the child: closing them there leaves the parent's open."""
        live, self._live = self._live, set()
        self._lock = threading.Lock()
        self._waiters = deque()
        self._closed = True
        for connection in live:
            connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionFailed("the provider was closed meanwhile", retryable=False)

    def _forget(self, connection: Connection) -> None:
        self._live.discard(connection)
        connection.close()

    def _drop(self, connection: Connection | None) -> None:
        if connection is not None:
            self._forget(connection)
        if self._waiters:
            self._admit(None)
        else:
            self._count -= 1

    def _admit(self, connection: Connection | None) -> None:
        waiter = self._waiters.popleft()
        waiter.admitted = True
        waiter.connection = connection
        waiter.event.set()


# The pool


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
        home = self._network.home()
        slots = self._slots.get(home)
        if slots is None:
            for other in list(self._slots):
                if self._network.is_gone(other) and (gone := self._slots.pop(other, None)):
                    gone.close()
            slots = self._slots.setdefault(home, Slots(self._network))
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
