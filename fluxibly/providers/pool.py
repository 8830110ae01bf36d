"""Connections to one server, each for one call at a time: what both pools share, and the one for threads.

A list of idle connections, the last used on top, makes checking one out a pop. httpcore's pool looks at all of its
connections at every request, which is what makes two hundred calls at once slow.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakSet

from fluxibly.errors import ConnectionFailed
from fluxibly.providers.http1 import Answer
from fluxibly.providers.http_errors import ConnectionLost, NotHTTP
from fluxibly.providers.limits import LimitPassed, Limits
from fluxibly.providers.route import Route, tls_context
from fluxibly.providers.sockets import BlockingSocket, connect, readable, shut_down

if TYPE_CHECKING:
    from fluxibly.providers.http_common import Outgoing

MAX_CONNECTIONS = 1000
"""Connections that a pool has at most; more calls wait their turn."""
KEEP_IDLE = 30.0
"""Seconds after which an idle connection is not used again: less than what servers and firewalls commonly allow."""
DRAIN_TIME = 0.01
"""Seconds to wait for the end of a body whose stream is over, so that its connection can be used again."""
DRAIN_READS = 8

S = TypeVar("S", bound="Any")


class Connection(Generic[S]):
    """A connection, and what its pool knows of it."""

    __slots__ = ("__weakref__", "idle_since", "sock", "used")

    def __init__(self, sock: S) -> None:
        self.sock = sock
        self.used = False
        """Whether it has carried a call, so that the server may have closed it since."""
        self.idle_since = 0.0

    def usable(self, now: float) -> bool:
        """Whether an idle connection can carry a call, as far as one can see from here."""
        return now - self.idle_since < KEEP_IDLE and not readable(self.sock.raw)

    def cut(self) -> None:
        """End a read in another thread or task."""
        shut_down(self.sock.raw)

    def close(self) -> None:
        self.sock.close()

    def __del__(self) -> None:
        # Whoever forgot to close the provider need not be told by a warning for each of its sockets.
        self.sock.close()


class Waiter(Generic[S]):
    """A call that waits its turn; it is handed a connection, or the right to make one (None)."""

    __slots__ = ("connection", "event")

    def __init__(self, event: Any) -> None:
        self.event = event
        self.connection: Connection[S] | None = None


class Slots(Generic[S]):
    """The bookkeeping of a pool: who has what. It neither waits nor locks.

    A call that was let in (`check_out`, or a `Waiter` whose event is set) holds a slot, with or without a connection
    in it, until it calls `check_in` or `drop`.
    """

    def __init__(self) -> None:
        self.idle: deque[Connection[S]] = deque()
        self.live: set[Connection[S]] = set()
        self.count = 0
        self.waiters: deque[Waiter[S]] = deque()
        self.closed = False

    def check_out(self) -> tuple[bool, Connection[S] | None]:
        """Whether there is room, and an idle connection if there is one."""
        idle = self.idle
        if idle:
            now = monotonic()
            while idle:
                connection = idle.pop()
                if connection.usable(now):
                    return True, connection
                self.forget(connection)
                self.count -= 1
        if self.count < MAX_CONNECTIONS:
            self.count += 1
            return True, None
        return False, None

    def forget(self, connection: Connection[S]) -> None:
        """Close a connection; its slot remains."""
        self.live.discard(connection)
        connection.close()

    def check_in(self, connection: Connection[S]) -> None:
        """Take back a connection that can be used again."""
        if connection not in self.live or self.closed:
            self.drop(connection)
            return
        now = connection.idle_since = monotonic()
        if self.waiters:
            self._admit(connection)
            return
        idle = self.idle
        idle.append(connection)
        while idle and now - idle[0].idle_since >= KEEP_IDLE:
            self.forget(idle.popleft())
            self.count -= 1

    def drop(self, connection: Connection[S] | None) -> None:
        """Take back a slot, and close the connection that was in it."""
        if connection is not None:
            if connection not in self.live:
                connection.close()
                return  # it is from before a fork, or the pool was closed meanwhile: its slot is gone already
            self.forget(connection)
        if self.waiters:
            self._admit(None)
        else:
            self.count -= 1

    def _admit(self, connection: Connection[S] | None) -> None:
        waiter = self.waiters.popleft()
        waiter.connection = connection
        waiter.event.set()

    def clear(self) -> None:
        """Close every connection. Those in use are cut: closed by the call that uses them, when its wait returns."""
        self.closed = True
        while self.idle:
            self.forget(self.idle.pop())
        for connection in list(self.live):
            connection.cut()
        while self.waiters:
            self._admit(None)


def stale(connection: Connection[S], answer: Answer, error: Exception) -> bool:
    """Whether the server closed an idle connection just when we used it: then nothing of an answer has come."""
    ended = isinstance(error, (ConnectionLost, ConnectionError, ssl.SSLEOFError))
    return ended and connection.used and answer.silent


def as_bytes(outgoing: Outgoing, route: Route) -> bytes:
    """A request on the wire."""
    extra = b"".join([b"%b: %b\r\n" % header for header in route.headers]) if route.headers else b""
    return b"POST %b%b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n%b" % (
        route.prefix,
        outgoing.target,
        outgoing.block,
        extra,
        len(outgoing.body),
        outgoing.body,
    )


def check_tunnel(answer: Answer) -> None:
    """Raise ConnectionFailed unless a proxy opened the tunnel that it was asked for."""
    if not 200 <= answer.status < 300:
        hint = ": check the user name and password in its URL" if answer.status == 407 else ""
        raise ConnectionFailed(f"the proxy refused the connection with status {answer.status}{hint}", retryable=False)


class PooledExchange:
    """A request that was sent on a connection of a pool, and its answer."""

    __slots__ = ("_answer", "_connection", "_limits", "_pool", "headers", "status")

    def __init__(self, pool: Pool, connection: Connection[BlockingSocket], answer: Answer, limits: Limits) -> None:
        self._pool = pool
        self._connection: Connection[BlockingSocket] | None = connection
        self._answer = answer
        self._limits = limits
        self.status = answer.status
        self.headers = answer.headers

    def read(self) -> bytes:
        """The next bytes of the body, at least one; b"" at its end."""
        answer, connection = self._answer, self._connection
        data = answer.body(b"")
        while not data and not answer.ended and connection is not None:
            received = connection.sock.receive(self._limits.left())
            if not received:
                answer.eof()
            data = answer.body(received)
        return data

    def release(self, *, ended: bool) -> None:
        """Give the connection back, for another call if it can carry one. Twice is fine."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            if ended and not self._answer.ended:
                self._drain(connection)
        finally:
            self._pool.give_back(connection, reusable=self._answer.ended and self._answer.reusable)

    def _drain(self, connection: Connection[BlockingSocket]) -> None:
        answer = self._answer
        try:
            for _ in range(DRAIN_READS):
                received = connection.sock.receive(DRAIN_TIME)
                if not received:
                    answer.eof()
                answer.body(received)
                if answer.ended:
                    return
        except (OSError, LimitPassed, ConnectionLost, NotHTTP):
            answer.reusable = False

    def __del__(self) -> None:
        # Dropped without a release: no lock may be taken here, inside of the garbage collector.
        if self._connection is not None:
            self._connection.cut()
            self._pool.dropped.append(self._connection)


class Pool:
    """The connections of a provider. Safe for threads; a process that was forked starts with none."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self.dropped: deque[Connection[BlockingSocket]] = deque()
        self._start()
        pools.add(self)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._slots: Slots[BlockingSocket] = Slots()

    def after_fork(self) -> None:
        """Let go of the parent's connections, in the child: closing them there leaves the parent's open."""
        live = self._slots.live
        self._start()
        for connection in live:
            connection.close()

    def send(self, outgoing: Outgoing, limits: Limits) -> PooledExchange:
        """Send a request, and wait for the head of its answer."""
        data = as_bytes(outgoing, self._route)
        connection = self._check_out(limits)
        try:
            if connection is not None:
                answer = Answer()
                try:
                    self._ask(connection, data, answer, limits)
                    return PooledExchange(self, connection, answer, limits)
                except Exception as error:
                    if not stale(connection, answer, error):
                        raise
                with self._lock:
                    self._slots.forget(connection)
                connection = None
            connection = self._connect(limits)
            answer = Answer()
            self._ask(connection, data, answer, limits)
        except BaseException:
            self.give_back(connection, reusable=False)
            raise
        return PooledExchange(self, connection, answer, limits)

    def _check_out(self, limits: Limits) -> Connection[BlockingSocket] | None:
        """A connection, or the right to make one (None)."""
        while self.dropped:
            self.give_back(self.dropped.popleft(), reusable=False)
        with self._lock:
            admitted, connection = self._slots.check_out()
            if admitted:
                return connection
            waiter: Waiter[BlockingSocket] = Waiter(threading.Event())
            self._slots.waiters.append(waiter)
        try:
            if not waiter.event.wait(limits.left()):
                raise LimitPassed
        except BaseException:
            with self._lock:
                if waiter.event.is_set():
                    self._slots.drop(waiter.connection)
                else:
                    self._slots.waiters.remove(waiter)
            raise
        return waiter.connection

    def _connect(self, limits: Limits) -> Connection[BlockingSocket]:
        route = self._route
        limits.connecting()
        sock = connect(route.host, route.port, limits)
        try:
            if route.tunnel:
                sock.send(route.tunnel, limits.left())
                answer = Answer()
                while not answer.head(received := sock.receive(limits.left())):
                    if not received:
                        answer.eof()
                check_tunnel(answer)
            if route.server_name is not None:
                sock.start_tls(tls_context(), route.server_name, limits)
        except BaseException:
            sock.close()
            raise
        connection = Connection(sock)
        with self._lock:
            self._slots.live.add(connection)
        return connection

    def _ask(self, connection: Connection[BlockingSocket], data: bytes, answer: Answer, limits: Limits) -> None:
        """Send a request and read the head of its answer."""
        limits.waits(connection.cut)
        limits.sent()
        sock = connection.sock
        unsent: OSError | None = None
        try:
            sock.send(data, limits.left())
        except ConnectionError as error:
            unsent = error  # a server may refuse a request before it has read it whole: its answer is worth a look
        limits.sent()
        try:
            while not answer.head(received := sock.receive(limits.left())):
                if not received:
                    answer.eof()
        except (ConnectionLost, OSError):
            if unsent is not None:
                raise unsent from None
            raise
        if unsent is not None:
            answer.reusable = False
        limits.answered()

    def give_back(self, connection: Connection[BlockingSocket] | None, *, reusable: bool) -> None:
        """End a call's hold on a connection."""
        with self._lock:
            if reusable and connection is not None:
                connection.used = True
                self._slots.check_in(connection)
            else:
                self._slots.drop(connection)

    def close(self) -> None:
        """Close every connection."""
        with self._lock:
            self._slots.clear()


pools: WeakSet[Any] = WeakSet()


def _after_fork_in_child() -> None:
    for pool in list(pools):
        pool.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
