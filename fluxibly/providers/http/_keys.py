"""Keys that a function of the user or a vendor's library gives, such as tokens, which last an hour."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from copy import copy
from typing import TYPE_CHECKING, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from fluxibly._loops import from_anywhere
from fluxibly._threads import NotInTime, Worker
from fluxibly.errors import AuthenticationError, ConnectionFailed, DeadlineExceeded
from fluxibly.limits import before_the_deadline, time_left
from fluxibly.providers.http._limits import Aborted, LimitPassed
from fluxibly.providers.http._sockets_threads import finished

if TYPE_CHECKING:
    from fluxibly.calls import CallRecord
    from fluxibly.config import KeyFunction
    from fluxibly.limits import Leash
    from fluxibly.providers.http._exchange import Key

T = TypeVar("T")
_locks: RunVar[WeakKeyDictionary[LoopKeys, anyio.Lock]] = RunVar("fluxibly_key_locks")


class HasLock(Protocol):
    """An object with a lock that a thread holds while it fetches keys."""

    def after_fork(self) -> None:
        """Begin with a free lock in a forked process, because the thread that may hold it is not there."""
        ...


_locked: WeakSet[HasLock] = WeakSet()


def free_after_fork(holder: HasLock) -> None:
    """Call the object's `after_fork` in each forked process, as long as the object is in use."""
    _locked.add(holder)


def _after_fork_in_child() -> None:
    for holder in list(_locked):
        holder.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Credentials(Protocol):
    """Credentials that a vendor's library finds and renews. Any thread may use them."""

    def obtain(self) -> Key:
        """Return a key. This may block. Another call returns a newer key if there is any.

        Raises:
            ProviderError: there are no credentials, or they cannot be renewed.
        """
        ...

    def is_fresh(self, key: Key, /) -> bool:
        """Whether a key that was given is still good. This does not block."""
        ...


class Keys:
    """The keys that a function gives. A key serves all calls while it is fresh, until the service refuses it.

    Args:
        give: the function.
        use: receives each key, and raises AuthenticationError if it is none.
        is_fresh: whether a key is still good.
    """

    def __init__(
        self, give: KeyFunction | Callable[[], Key], use: Callable[[object], Key], is_fresh: Callable[[Key], bool]
    ) -> None:
        self._give = give
        self._use = use
        self._is_fresh = is_fresh
        self._key: Key | None = None
        self._asked = 0
        """How often the function was asked. Calls that wait meanwhile share what it said, also if it failed."""
        self._failure: Exception | None = None

    async def find(self, call: CallRecord) -> None:
        """Ask for a key, unless there is a fresh one.

        Raises:
            AuthenticationError: the function did not return a key. Its exceptions reach the caller unchanged.
            DeadlineExceeded: no key came before the call's deadline.
            Aborted: the call's leash was stopped.
        """
        if self._key is None or not self._is_fresh(self._key):
            await self.renew(self._key, call)

    async def renew(self, refused: Key | None, call: CallRecord) -> bool:
        """Ask for another key than `refused`, unless another call has done so. Return whether there is one.

        Raises:
            DeadlineExceeded: no key came before the call's deadline.
            Aborted: the call's leash was stopped.
        """
        leash = call.leash
        if leash is None:
            return await self._renew(refused)
        left = time_left(leash, call.clock)
        with suppress(LimitPassed):
            if left is None or left > 0:
                return await self._renew_under(leash, refused, left)
        raise DeadlineExceeded(f"no key came {before_the_deadline(leash)}; give the call more time")

    async def _renew_under(self, leash: Leash, refused: Key | None, seconds: float | None) -> bool:
        """Do the work of `_renew`. Raise LimitPassed if it takes longer than `seconds`, Aborted if the leash was stopped."""
        raise NotImplementedError

    async def _renew(self, refused: Key | None) -> bool:
        asked = self._asked
        async with self._turn():
            said = self._said(refused, asked)
            if said is not None:
                return said
            try:
                return self._take(await self._ask(), refused)
            except Exception as error:
                self._note(error)
                raise

    def _turn(self) -> AbstractAsyncContextManager[object]:
        """Return a lock, so that concurrent calls ask for one key."""
        raise NotImplementedError

    async def _ask(self) -> object:
        """Call the function, and return its result."""
        raise NotImplementedError

    def _said(self, refused: Key | None, asked: int) -> bool | None:
        """Return whether another call has got another key; None if none has asked since the function was `asked` so often.

        Raises:
            Exception: what the function raised at that call.
        """
        if self._key is not None and self._key != refused:
            return True
        if self._asked == asked:
            return None
        if self._failure is not None:
            raise _for_another_call(self._failure)
        return False

    def _take(self, key: object, refused: Key | None) -> bool:
        """Use a key from now on. Return whether it is another key than the one that was refused."""
        self._key = self._use(key)
        self._note(None)
        return key != refused

    def _note(self, failure: Exception | None) -> None:
        self._failure = failure and _for_another_call(failure)
        self._asked += 1


def _for_another_call(failure: Exception) -> Exception:
    """Return the failure for another call, which completes an error of fluxibly with its own model."""
    return copy(failure) if type(failure) in {AuthenticationError, ConnectionFailed} else failure


class ThreadKeys(Keys):
    """Keys for threads. A coroutine function runs in an event loop of its own."""

    def __init__(
        self, give: KeyFunction | Callable[[], Key], use: Callable[[object], Key], is_fresh: Callable[[Key], bool]
    ) -> None:
        super().__init__(give, use, is_fresh)
        self._lock = threading.Lock()
        free_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        with self._lock:
            yield

    async def _renew_under(self, leash: Leash, refused: Key | None, seconds: float | None) -> bool:
        # In a thread of its own, because nothing can end the function. The key that it returns later is kept.
        return _in_own_thread(lambda: finished(self._renew(refused)), leash, seconds)

    async def _ask(self) -> object:
        key = self._give()
        return _in_own_loop(key) if inspect.isawaitable(key) else key


class LoopKeys(Keys):
    """Keys for event loops. A function that is not asynchronous runs in a worker thread, because it may block."""

    def _turn(self) -> anyio.Lock:
        """Return the lock of the running event loop."""
        locks = _locks.get(None)
        if locks is None:
            locks = WeakKeyDictionary[LoopKeys, anyio.Lock]()
            _locks.set(locks)
        return locks.setdefault(self, anyio.Lock())

    async def _renew_under(self, leash: Leash, refused: Key | None, seconds: float | None) -> bool:
        with anyio.move_on_after(seconds) as scope:
            end = from_anywhere(scope.cancel)
            leash.hold(end)
            try:
                if leash.stopped:
                    raise Aborted
                return await self._renew(refused)
            finally:
                leash.release(end)
        raise Aborted if leash.stopped else LimitPassed

    async def _ask(self) -> object:
        give = self._give
        call: object = getattr(give, "__call__", None)  # noqa: B004  # to look at the method of an object, not to call it
        if inspect.iscoroutinefunction(give) or inspect.iscoroutinefunction(call):
            key = give()
        else:
            # In a list, because trio refuses a function that returns a coroutine. A cancelled call does not wait for it,
            # and a limiter of its own leaves the program's threads to the program.
            alone = anyio.CapacityLimiter(1)
            (key,) = await anyio.to_thread.run_sync(lambda: [give()], abandon_on_cancel=True, limiter=alone)
        return await key if inspect.isawaitable(key) else key


def _in_own_loop(awaitable: Awaitable[T]) -> T:
    """Return the result of an awaitable, from an event loop in a thread: this thread may have a running loop."""

    async def wait() -> T:
        return await awaitable

    return _in_own_thread(lambda: anyio.run(wait))


def _in_own_thread(call: Callable[[], T], leash: Leash | None = None, seconds: float | None = None) -> T:
    """Return the result of `call` in a thread, in which it runs on if this raises LimitPassed or Aborted.

    Raises:
        LimitPassed: it took longer than `seconds`.
        Aborted: the leash was stopped.
    """
    worker = Worker()
    if leash is not None:
        leash.hold(worker.abort)
    try:
        return worker.run(call, seconds)
    except NotInTime:
        raise LimitPassed from None
    except InterruptedError:
        if leash is None or not leash.stopped:
            raise  # the function's own
        raise Aborted from None
    finally:
        if leash is not None:
            leash.release(worker.abort)
        worker.stop(_nothing)


def _nothing() -> None:
    """Do nothing, where there is nothing to close."""
