"""A pool of the library's own connections to one server.

`Slots` does the bookkeeping: the calls that hold a connection, the calls that wait, and the idle connections.
"""

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
from fluxibly.providers.http._network_errors import refused_here
from fluxibly.providers.http._route import Route, tls_context
from fluxibly.providers.http._sockets import TLSSocket, shut_down

if TYPE_CHECKING:
    from fluxibly.providers.http._exchange import FileBody, Outgoing
    from fluxibly.providers.http._sockets import Event, Network, Socket


# Bookkeeping


MAX_CONNECTIONS = 1000
"""Maximum number of connections of a `Slots`. Further calls wait their turn."""
KEEP_IDLE = 30.0
"""Seconds after which an idle connection is not used again. Servers and firewalls commonly allow longer idle times."""


class Connection:
    """A connection and its pool's notes about it."""

    __slots__ = ("idle_since", "sock")

    def __init__(self, sock: Socket) -> None:
        self.sock = sock
        self.idle_since = 0.0

    def usable(self, now: float) -> bool:
        """Whether an idle connection can carry a call, as far as the client can see."""
        # If there is something to read, the server closed the connection, or sent bytes that belong to no request.
        return now - self.idle_since < KEEP_IDLE and self.sock.quiet()

    def cut(self) -> None:
        """End a read in another thread or task."""
        shut_down(self.sock.raw)

    def close(self) -> None:
        self.sock.close()

    def __del__(self) -> None:
        # A provider that was never closed would otherwise cause a ResourceWarning for each of its sockets.
        self.sock.close()


class _Waiter:
    """A call that waits its turn. An admitted call has a connection, or None: the right to make a connection."""

    __slots__ = ("admitted", "connection", "event")

    def __init__(self, event: Event) -> None:
        self.event = event
        self.admitted = False
        self.connection: Connection | None = None


class Slots:
    """The connections of all threads, or of one event loop.

    A call holds a slot, with or without a connection in it, from `check_out` to `give_back`.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._lock = threading.Lock()
        self._idle: deque[Connection] = deque()
        """The idle connections, the longest idle leftmost, because connections become idle under the lock."""
        self._live: set[Connection] = set()
        """All connections that are open, idle or in use."""
        # An idle connection keeps its slot, so that the limit applies to all open connections, in use or not.
        self._count = 0
        """The number of slots taken."""
        self._waiters: deque[_Waiter] = deque()
        self._closed = False
        # Queued without the lock, because the finalizer that queues may run in a thread that holds the lock, and would
        # wait for itself. An append to a deque is atomic.
        self.dropped: deque[Connection] = deque()
        """The connections of dropped calls. The next call closes them."""

    async def check_out(self, limits: Limits) -> Connection | None:
        """Return an idle connection, or None: the right to make a connection. If all slots are taken, wait for a slot.

        Raises:
            LimitPassed: no slot was free in time.
            ConnectionFailed: the pool was closed meanwhile.
        """
        with self._lock:
            # First of all, because a dropped call still holds its slot.
            while self.dropped:
                self._drop(self.dropped.popleft())
            # Last in, first out: the most recently used connection is the least likely to be closed by the server, and
            # the connections that a quieter pool does not need stay idle until they expire.
            while self._idle:
                connection = self._idle.pop()
                # Checked before reuse, because a server may close an idle connection at any time.
                if connection.usable(monotonic()):
                    return connection
                self._forget(connection)
                self._count -= 1
            # The slot is taken before the connection is made, because other calls may connect at the same time.
            if self._count < MAX_CONNECTIONS:
                self._count += 1
                return None
            # Queued under the same lock, so that a slot that is given back from now on finds the waiter.
            waiter = _Waiter(self._network.event())
            self._waiters.append(waiter)
        try:
            limits.waits(waiter.event.set)
            await waiter.event.wait(limits.left())
            limits.waits(None)
            # The event alone does not mean admission, because an abort and a close of the pool set it too.
            if not waiter.admitted:
                self._check_open()
                raise LimitPassed
        except BaseException:
            with self._lock:
                # Checked with the lock, because a waiter may be admitted just now, and its slot must be passed on.
                if waiter.admitted:
                    self._drop(waiter.connection)
                else:
                    self._waiters.remove(waiter)
            raise
        return waiter.connection

    def enter(self, connection: Connection) -> None:
        """Register a connection that a call is making.

        Raises:
            ConnectionFailed: the pool was closed meanwhile.
        """
        # Before the TLS handshake, so that a close of the pool can cut the connection, and a fork can close its copy.
        with self._lock:
            self._check_open()
            self._live.add(connection)

    def forget(self, connection: Connection) -> None:
        """Close a connection. Its call keeps the slot."""
        with self._lock:
            self._forget(connection)

    def give_back(self, connection: Connection | None, *, reusable: bool) -> None:
        """Give back a call's slot and the connection in it."""
        with self._lock:
            if not reusable or connection is None or self._closed:
                self._drop(connection)
                return
            now = connection.idle_since = monotonic()
            # Handed to the waiter within the lock, so that no later call can take the connection first.
            if self._waiters:
                self._admit(connection)
                return
            idle = self._idle
            idle.append(connection)
            # Expired connections are closed here, because last in, first out hardly ever reaches them.
            while idle and now - idle[0].idle_since >= KEEP_IDLE:
                self._forget(idle.popleft())
                self._count -= 1

    def close(self) -> None:
        """Close every connection. A connection in use is cut, and closed by the call that uses it."""
        with self._lock:
            self._closed = True
            while self._idle:
                self._forget(self._idle.pop())
            # Cut rather than closed, because closing a socket does not wake a read in another thread, and frees the
            # number of its descriptor for another file while the read still uses it.
            for connection in self._live:
                connection.cut()
            # Each waiter sees that it was not admitted, and raises.
            for waiter in self._waiters:
                waiter.event.set()

    def after_fork(self) -> None:
        """Let go of the parent's connections, in the child."""
        live, self._live = self._live, set()
        # A new lock, because a thread of the parent, which the child does not have, may hold the old lock.
        self._lock = threading.Lock()
        self._waiters = deque()
        # Closed, so that a stream of the parent's that ends in the child does not make its connection idle here.
        self._closed = True
        # This closes the child's copies of the descriptors only, and sends nothing: the parent's connections stay open.
        for connection in live:
            connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionFailed("the provider was closed during the call", retryable=False)

    # The lock is held by the callers of the methods below.

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
        # First in, first out, so that no call waits while later calls are served.
        waiter = self._waiters.popleft()
        waiter.admitted = True
        waiter.connection = connection
        waiter.event.set()


# The pool


DRAIN_READS = 8
"""Maximum number of reads for the rest of a body."""


class PooledExchange:
    """A request that was sent on a connection of a pool, and its response."""

    __slots__ = ("_answer", "_connection", "_limits", "_slots", "headers", "status")

    def __init__(self, slots: Slots, connection: Connection, answer: Answer, limits: Limits) -> None:
        self._slots = slots
        self._connection: Connection | None = connection
        self._answer = answer
        self._limits = limits
        self.status = answer.status
        self.headers = answer.headers

    async def read(self) -> bytes:
        """Return the next bytes of the body, at least one byte; b"" at its end."""
        answer, connection = self._answer, self._connection
        # The read that completed the head may have received a part of the body as well.
        data = answer.body(b"")
        # No read after the end of the body: the server keeps the connection open, so the read would block.
        while not data and not answer.ended and connection is not None:
            received = await connection.sock.receive(self._limits.left())
            if not received:
                answer.eof()
            data = answer.body(received)
        return data

    async def release(self, *, ended: bool) -> None:
        """Give the connection back, for another call if possible. A second call has no effect."""
        # Taken out first, because a connection given back twice would serve two calls at once.
        connection, self._connection = self._connection, None
        if connection is None:
            return
        answer = self._answer
        try:
            # The last event of a stream comes before the end of its body; only a connection that was read to the end of
            # the body can carry another request.
            if ended and not answer.ended:
                await _drain(connection.sock, answer)
        finally:
            self._slots.give_back(connection, reusable=answer.ended and answer.reusable)

    def __del__(self) -> None:
        # The exchange was dropped without a release. A finalizer must not take the lock (see `Slots.dropped`).
        if self._connection is not None:
            self._connection.cut()
            self._slots.dropped.append(self._connection)


class Pool:
    """The connections of a provider, for threads or for event loops. A forked process starts without connections."""

    obeys = True

    def __init__(self, route: Route, network: Network) -> None:
        self._route = route
        self._network = network
        self._slots: dict[Hashable, Slots] = {}
        _pools.add(self)

    async def send(self, outgoing: Outgoing, limits: Limits) -> PooledExchange:
        """Send a request and wait for the head of its response."""
        data = request_bytes(outgoing, self._route)
        slots = self._here()
        connection = await slots.check_out(limits)
        try:
            if connection is not None and outgoing.once:
                # Whether a reused connection ended before or after the server has acted, nobody can tell.
                slots.forget(connection)
                connection = None
            if connection is not None:
                answer = Answer()
                try:
                    await _ask(connection, data, answer, limits, outgoing.file)
                    return PooledExchange(slots, connection, answer, limits)
                except Exception as error:
                    # Resent only if a reused connection ended before the first byte of a response: then the server most
                    # likely closed an idle connection. In any other case it may have run the request.
                    if not _stale(answer, error):
                        raise
                # The second attempt takes a new connection, because other idle connections may be stale as well.
                slots.forget(connection)
                connection = None
            connection = await self._connect(slots, limits)
            answer = Answer()
            await _ask(connection, data, answer, limits, outgoing.file)
        except BaseException:
            # A cancelled call gives its slot back too, or the pool would run out of slots.
            slots.give_back(connection, reusable=False)
            raise
        return PooledExchange(slots, connection, answer, limits)

    def _here(self) -> Slots:
        """Return the slots of the running event loop, or of all threads."""
        home = self._network.home()
        slots = self._slots.get(home)
        if slots is None:
            # No call on a loop that has ended will give its connections back, so the pool closes them. `pop` and
            # `setdefault` are atomic, because a call in another thread may do the same at the same time.
            for other in list(self._slots):
                if self._network.is_gone(other) and (gone := self._slots.pop(other, None)):
                    gone.close()
            slots = self._slots.setdefault(home, Slots(self._network))
        return slots

    async def _connect(self, slots: Slots, limits: Limits) -> Connection:
        route = self._route
        limits.connecting()
        limits.waits(None)  # an abort may be the reason why a connection ended, and a new one is needed
        try:
            connection = Connection(await self._network.connect(route.host, route.port, limits))
        except OSError as error:
            if route.through_proxy:
                raise ConnectionFailed(
                    f"no connection to the proxy {route.host}:{route.port}, which the environment sets: "
                    f"{error.strerror or error}",
                    retryable=not refused_here(error, route.host, route.port),
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
            # TLS starts after the tunnel, so the proxy sees neither the headers nor the API key.
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
        # A copy, because a call in another thread may add the slots of its event loop meanwhile.
        for slots in list(self._slots.values()):
            slots.close()

    def after_fork(self) -> None:
        """Start again without connections, in the child."""
        parents, self._slots = self._slots, {}
        for slots in parents.values():
            slots.after_fork()


async def _ask(
    connection: Connection, data: bytes, answer: Answer, limits: Limits, file: FileBody | None = None
) -> None:
    """Send a request and read the head of its response."""
    limits.waits(connection.cut)
    # The limit applies to sending, and starts again afterwards, so that an upload does not shorten the server's time.
    limits.sent()
    unsent: OSError | None = None
    try:
        await connection.sock.send(data, limits.left())
        if file is not None:
            await _send_file(connection, file, limits)
    except ConnectionError as error:
        unsent = error  # a server may refuse a request before it has read all of it, and its response says why
    limits.sent()
    try:
        await _read_head(connection.sock, answer, limits)
    except (ConnectionLost, OSError):
        if unsent is not None:
            raise unsent from None
        raise
    # The server has not received all of the request, so it would take a second request for the rest of the first.
    if unsent is not None:
        answer.reusable = False
    limits.answered()


async def _send_file(connection: Connection, file: FileBody, limits: Limits) -> None:
    """Send a body piece by piece. The limit applies to each piece."""
    for piece in file.pieces():
        limits.sent()
        await connection.sock.send(piece, limits.left())


async def _read_head(sock: Socket, answer: Answer, limits: Limits) -> None:
    while not answer.head(received := await sock.receive(limits.left())):
        if not received:
            answer.eof()


async def _drain(sock: Socket, answer: Answer) -> None:
    """Read the rest of a body, if it arrives soon."""
    # Bounded in time and in reads, because a new connection is cheaper than a long wait.
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


def _stale(answer: Answer, error: Exception) -> bool:
    """Whether the server closed the idle connection just before this call used it, so that no response has begun."""
    return isinstance(error, (ConnectionLost, ConnectionError, ssl.SSLEOFError)) and answer.silent


def _check_tunnel(answer: Answer) -> None:
    """Raise ConnectionFailed unless the proxy has opened the tunnel."""
    if not 200 <= answer.status < 300:
        hint = ": check the user name and password in its URL" if answer.status == 407 else ""
        raise ConnectionFailed(f"the proxy refused the connection with status {answer.status}{hint}", retryable=False)


# Weak, because the hook below must not keep the pool of a dropped provider alive.
_pools: WeakSet[Pool] = WeakSet()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
