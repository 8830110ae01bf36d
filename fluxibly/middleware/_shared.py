"""The state that the calls of a middleware share, in a store, and what happens when that store fails."""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count
from typing import Any, Literal, TypeAlias

from fluxibly._logs import report_once
from fluxibly.errors import DeadlineExceeded, FluxiblyError, StoreError
from fluxibly.flow import Flow, perform, sleep
from fluxibly.flow.compose import check_deadline
from fluxibly.stores import MemoryStore, Turn
from fluxibly.types import CallRecord, Request

OnStoreError: TypeAlias = Literal["local", "raise", "open"]
"""What happens to a call when the store of its middleware fails."""
ON_STORE_ERROR = ("local", "raise", "open")
_LONGEST_PAUSE = 30.0
"""The most seconds until a store that has failed is tried again."""
_POLL = 0.05
_numbers = count()


def new_name() -> str:
    """Return a name that no other call has, in this process or another."""
    return f"{_process.name}{next(_numbers)}"


class _Process:
    """The part of a name that no other process has. A forked process gets its own."""

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.name = f"{os.urandom(8).hex()}."


_process = _Process()


class Shared:
    """The store of one middleware.

    Args:
        store: the store.
        on_error: "local" keeps the state in this process until the store works again, "raise" raises `StoreError`, and
            "open" lets calls pass.
        middleware: the name of its class.
    """

    def __init__(self, store: Any, on_error: OnStoreError, middleware: str) -> None:
        self.store = store
        self.local: bool = getattr(store, "local", False) is True
        """Whether the methods do no I/O, so that they are called where the call is."""
        self._on_error = on_error
        self._middleware = middleware
        self._spare = MemoryStore()
        """What takes the place of a store that has failed."""
        self._down_until = -math.inf
        self._pause = 0.0

    def ask(self, call: CallRecord, method: str, *args: Any, **options: Any) -> Flow[Any]:
        """Call a method of the store: `turn = yield from shared.ask(call, "lease", key, who, 3)`."""
        if self.local:
            return getattr(self.store, method)(*args, call.clock(), **options)
        return (
            yield from perform(
                partial(self.do, call, method, *args, **options), partial(self.ado, call, method, *args, **options)
            )
        )

    def do(self, call: CallRecord, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the store from where no flow runs, as in a cleanup."""
        now = call.clock()
        if self.local or now >= self._down_until:
            try:
                result = getattr(self.store, method)(*args, now, **options)
            except Exception as error:  # noqa: BLE001  # a store is anybody's code
                self._failed(error, now)
            else:
                self._pause = 0.0
                return result
        return self._instead(method, *args, now, **options)

    async def ado(self, call: CallRecord, method: str, *args: Any, **options: Any) -> Any:
        """Do as `do`, in an async call."""
        now = call.clock()
        if now >= self._down_until:
            try:
                result = await getattr(self.store, f"a{method}")(*args, now, **options)
            except Exception as error:  # noqa: BLE001  # as above
                self._failed(error, now)
            else:
                self._pause = 0.0
                return result
        return self._instead(method, *args, now, **options)

    def _failed(self, error: Exception, now: float) -> None:
        """Take note of an error of the store.

        Raises:
            StoreError: the user wants it raised.
        """
        if isinstance(error, DeadlineExceeded):
            raise error
        name, kind = type(self.store).__name__, type(error).__name__
        if self._on_error == "raise":
            raise StoreError(f"{self._middleware}: its store {name} failed with {kind}; see __cause__") from error
        self._pause = min(max(1.0, 2 * self._pause), _LONGEST_PAUSE)
        self._down_until = now + self._pause
        goes_on = "keeps its state in this process" if self._on_error == "local" else "lets calls pass"
        report_once(
            f"store {self._middleware} {name}",
            f"{self._middleware}: its store {name} failed with {kind}; until it works again, {self._middleware} {goes_on}",
        )

    def _instead(self, method: str, *args: Any, **options: Any) -> Any:
        if self._on_error == "local":
            return getattr(self._spare, method)(*args, **options)
        return 0.0 if method == "add" else None


def wait_for_turn(
    request: Request,
    ask: Callable[[], Flow[Turn | None]],
    turn: Turn,
    max_wait: float,
    refuse: Callable[[Turn, float], FluxiblyError],
) -> Flow[float]:
    """Wait until a call has got what it asked a store for, and return the seconds that it has waited.

    Args:
        ask: asks the store again.
        turn: what the store said at first.
        max_wait: the most seconds to wait.
        refuse: makes the error for a wait that would be longer. It gets the turn, and the seconds waited.

    Raises:
        DeadlineExceeded: the wait would end after the deadline of the call.
    """
    call = request.call
    began = call.clock()
    waiting: Turn | None = turn
    while waiting is not None:
        waited = call.clock() - began
        left = max_wait - waited
        estimated = 0.0 if waiting.seconds == math.inf else waiting.seconds
        if left <= 0 or estimated > left:
            raise refuse(waiting, waited)
        if call.leash is not None:
            check_deadline(call, request.model, estimated)
        yield from sleep(min(_pause(waiting), left), until=waiting.signal)
        waiting = yield from ask()
    return call.clock() - began


def _pause(turn: Turn) -> float:
    """Return the seconds after which a call asks again, if nothing wakes it before."""
    if turn.signal is not None:
        # Whoever is not first is woken when it is, and asks before only to see whether its wait has grown.
        return turn.seconds if not turn.ahead else max(turn.seconds, 1.0)
    if turn.seconds == math.inf:
        return _POLL
    return turn.seconds if turn.seconds < 0.02 else min(turn.seconds / 2, 0.25)


def run_later(call: CallRecord, shared: Shared, last: Callable[[], list[tuple[Any, ...]]]) -> Any:
    """Register what a call gives back to a store that does I/O when it ends: `last` returns calls of `Shared.do`."""

    def give_back() -> None:
        for method, *args in last():
            shared.do(call, method, *args)

    async def agive_back() -> None:
        for method, *args in last():
            await shared.ado(call, method, *args)

    acall: Callable[[], Awaitable[object]] = agive_back
    return call.on_end(give_back, acall)
