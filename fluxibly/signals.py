"""`Signal`: something that happens once, and that threads and tasks of any event loop wait for."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX

from fluxibly._loops import from_anywhere, wait_for


class Signal:
    """Something that happens once. Threads, and tasks of any event loop, wait for it, as many as like at the same time.

    In a middleware, `yield from perform(signal.wait, signal.await_)` waits for it in sync and async calls alike. An async
    call that waits takes no thread. `yield from sleep(seconds, until=signal)` waits at most so long.
    """

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = False
        # In order, and without a lock: a signal handler may call `set` while its own thread is within any method. Every
        # change of the dictionary is atomic.
        self._waiters: dict[Callable[[], object], None] = {}
        """The functions that wake those who wait."""

    @property
    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._is_set

    def set(self) -> None:
        """Say that it has happened. Any thread, task or signal handler may call this, and more than once."""
        # The flag is set before the waiters are read, and a waiter does the reverse, so at least one sees the other.
        self._is_set = True
        for wake in self._waiters.copy():
            wake()

    def wait(self, seconds: float | None = None, /) -> bool:
        """Wait in a thread until it has happened, at most for `seconds`. Return whether it has. Ctrl-C interrupts the wait."""
        if self._is_set:
            return True
        # A queue, because its `put` may interrupt its `get` in the same thread, unlike the methods of an event or a lock.
        woken: SimpleQueue[None] = SimpleQueue()

        def wake() -> None:
            woken.put(None)

        try:
            self._waiters[wake] = None
            if not self._is_set:
                with suppress(Empty):
                    woken.get(timeout=None if seconds is None or seconds > TIMEOUT_MAX else seconds)
        finally:
            self.detach(wake)
        return self._is_set

    async def await_(self, seconds: float | None = None, /) -> bool:
        """Wait in a task of asyncio or trio until it has happened, at most for `seconds`. Return whether it has."""
        if self._is_set:
            return True
        import anyio  # late, to keep `import fluxibly` fast

        woken = anyio.Event()
        wake = from_anywhere(woken.set)
        try:
            self._waiters[wake] = None
            if not self._is_set:
                await wait_for(woken, math.inf if seconds is None else seconds)
        finally:
            self.detach(wake)
        return self._is_set

    def attach(self, wake: Callable[[], object], /) -> None:
        """Let `set` call a function, or call it now if it has happened. The function returns at once and raises nothing."""
        self._waiters[wake] = None
        if self._is_set:
            wake()

    def detach(self, wake: Callable[[], object], /) -> None:
        """Forget a function that was attached."""
        self._waiters.pop(wake, None)

    def __repr__(self) -> str:
        return f"Signal(is_set={self._is_set})"
