"""The bookkeeping of a pool: which connections there are, who has one, and who waits for one.

A list of idle connections, the last used on top, makes checking one out a pop. httpcore's pool looks at all of its
connections at every request, which is what makes two hundred calls at once slow.
"""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING

from fluxibly.errors import ConnectionFailed
from fluxibly.providers.limits import LimitPassed
from fluxibly.providers.sockets import shut_down

if TYPE_CHECKING:
    from fluxibly.providers.limits import Limits
    from fluxibly.providers.sockets import Event, Network, Socket

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
