"""API keys that a function of the user gives, such as the tokens of Entra ID, which last an hour."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from fluxibly._checks import kind_of
from fluxibly.errors import AuthenticationError

if TYPE_CHECKING:
    from fluxibly.config import KeyFunction

T = TypeVar("T")
_locks: RunVar[WeakKeyDictionary[LoopKeys, anyio.Lock]] = RunVar("fluxibly_key_locks")


class Keys:
    """The keys that a function gives. A key serves all calls until the service refuses it (401).

    Args:
        give: the function.
        use: receives each key.
    """

    def __init__(self, give: KeyFunction, use: Callable[[str], None]) -> None:
        self._give = give
        self._use = use
        self._key: str | None = None
        self._asked = 0
        """How often the function was asked. Calls that wait meanwhile share what it said, also if it failed."""
        self._failure: Exception | None = None

    async def find(self) -> None:
        """Ask for a key, unless there is one.

        Raises:
            AuthenticationError: the function did not return a key. Its exceptions reach the caller unchanged.
        """
        if self._key is None:
            await self.renew(None)

    async def renew(self, refused: str | None) -> bool:
        """Ask for another key than `refused`, unless another call has done so. Return whether there is one."""
        raise NotImplementedError

    def _said(self, refused: str | None, asked: int) -> bool | None:
        """Return whether another call has got another key; None if none has asked since the function was `asked` so often.

        Raises:
            Exception: what the function raised at that call.
        """
        if self._key is not None and self._key != refused:
            return True
        if self._asked == asked:
            return None
        if self._failure is not None:
            raise self._failure
        return False

    def _take(self, key: object, refused: str | None) -> bool:
        """Use a key from now on. Return whether it is another key than the one that was refused."""
        if not isinstance(key, str) or not key:
            got = "an empty str" if key == "" else kind_of(key)
            raise AuthenticationError(f"api_key: expected the function to return a non-empty str, got {got}")
        self._use(key)
        self._key = key
        self._note(None)
        return key != refused

    def _note(self, failure: Exception | None) -> None:
        self._failure = failure
        self._asked += 1


class ThreadKeys(Keys):
    """Keys for threads. A coroutine function runs in an event loop of its own."""

    def __init__(self, give: KeyFunction, use: Callable[[str], None]) -> None:
        super().__init__(give, use)
        self._lock = threading.Lock()

    async def renew(self, refused: str | None) -> bool:
        asked = self._asked
        with self._lock:
            said = self._said(refused, asked)
            if said is not None:
                return said
            try:
                key = self._give()
                return self._take(_in_own_loop(key) if inspect.isawaitable(key) else key, refused)
            except Exception as error:
                self._note(error)
                raise


class LoopKeys(Keys):
    """Keys for event loops. A function that is not asynchronous runs in a worker thread, because it may block."""

    async def renew(self, refused: str | None) -> bool:
        asked = self._asked
        async with self._lock():
            said = self._said(refused, asked)
            if said is not None:
                return said
            try:
                key = await self._ask()
                return self._take(await key if inspect.isawaitable(key) else key, refused)
            except Exception as error:
                self._note(error)
                raise

    async def _ask(self) -> str | Awaitable[str]:
        give = self._give
        if inspect.iscoroutinefunction(give) or inspect.iscoroutinefunction(getattr(give, "__call__", None)):  # noqa: B004  # the method itself
            return give()
        # In a list, because trio refuses a function that returns a coroutine. A call that is cancelled does not wait for it.
        (key,) = await anyio.to_thread.run_sync(lambda: [give()], abandon_on_cancel=True)
        return key

    def _lock(self) -> anyio.Lock:
        """Return the running event loop's lock, so that concurrent calls ask for one key."""
        locks = _locks.get(None)
        if locks is None:
            locks = WeakKeyDictionary[LoopKeys, anyio.Lock]()
            _locks.set(locks)
        if self not in locks:
            locks[self] = anyio.Lock()
        return locks[self]


def _in_own_loop(awaitable: Awaitable[T]) -> T:
    """Return the result of an awaitable, from an event loop in a thread: this thread may have a running loop."""
    results: list[T] = []
    errors: list[BaseException] = []

    async def wait() -> T:
        return await awaitable

    def run() -> None:
        try:
            results.append(anyio.run(wait))
        except BaseException as error:  # noqa: BLE001  # raised in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="fluxibly-key", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
