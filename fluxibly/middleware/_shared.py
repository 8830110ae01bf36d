"""The state that the calls of a middleware share, in a store, and what happens when that store fails."""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from fluxibly._logs import report_once
from fluxibly._loops import trio_here
from fluxibly.errors import DeadlineExceeded, FluxiblyError, StoreError
from fluxibly.flow import Flow, perform, sleep
from fluxibly.flow.compose import check_deadline
from fluxibly.limits import time_left
from fluxibly.stores import MemoryStore, Turn
from fluxibly.types import CallRecord, Request

if TYPE_CHECKING:
    import asyncio  # late at run time: it takes as long to import as all of fluxibly

T = TypeVar("T")
OnStoreError: TypeAlias = Literal["local", "raise", "open"]
"""How a call goes on when the store of its middleware fails."""
ON_STORE_ERROR = ("local", "raise", "open")
_LONGEST_PAUSE = 30.0
"""The most seconds until a store that has failed is tried again."""
WAITED = "fluxibly.waited"
"""The note of a call that says how many seconds it has waited for its turns. They say nothing about the service."""
_POLL = 0.05
"""The seconds after which the first in a queue asks again for a place, where a store cannot say when that is worth it."""
_LONGEST_POLL = 0.5
"""The same for one with many before it. A store forgets a caller that it has not seen for about a second."""
_SHORTEST_POLL = 0.001
_ROUNDING = 1e-6
"""The seconds by which a difference of two times may be wrong."""
_QUEUES = ("reserve", "lease")
"""The methods of a store that may let a caller wait in a queue."""
_MOST_OWED = 10_000
"""The most releases to keep for a store that has failed."""
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
        """The store that takes the place of one that has failed."""
        self._has_spared = False
        """Whether it ever has."""
        self._owed: dict[tuple[str, str], None] = {}
        """The keys and callers whose release the store has yet to get."""
        self._queued: dict[tuple[str, str], None] = {}
        """The keys and callers who wait in the store, as far as is known."""
        self._trips: dict[tuple[str, str], asyncio.Future[Any]] = {}
        """The trips under way in event loops of asyncio, by key and caller."""
        self._down_until = -math.inf
        self._pause = 0.0

    @property
    def is_down(self) -> bool:
        """Whether the store has failed, and has not worked since."""
        return self._pause > 0

    def ask(self, call: CallRecord, method: str, *args: Any, **options: Any) -> Flow[Any]:
        """Call a method of the store: `turn = yield from shared.ask(call, "lease", key, who, 3)`.

        Raises:
            StoreError: the store has failed, and the user wants that raised.
        """
        if self.local:
            return getattr(self.store, method)(*args, call.clock(), **options)
        return (
            yield from perform(
                partial(self._do, call, method, *args, **options), partial(self._ado, call, method, *args, **options)
            )
        )

    def tell(self, call: CallRecord, method: str, *args: Any, **options: Any) -> Flow[Any]:
        """Do as `ask` after the provider has been asked: a failure of the store changes nothing, and the result is None."""
        try:
            return (yield from self.ask(call, method, *args, **options))
        except StoreError as error:
            self._report_late(error)

    def do(self, call: CallRecord, method: str, *args: Any) -> Any:
        """Do as `ask`, of a store that does no I/O, but may fail."""
        return self._do(call, method, *args)

    def give(self, call: CallRecord, method: str, *args: Any) -> None:
        """Do as `tell` where no flow runs, as in a cleanup."""
        try:
            self._do(call, method, *args)
        except StoreError as error:
            self._report_late(error)

    async def agive(self, call: CallRecord, method: str, *args: Any) -> None:
        """Do as `give`, in an async call."""
        try:
            await self._ado(call, method, *args)
        except StoreError as error:
            self._report_late(error)

    def settled(self, call: CallRecord, calls: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Return which of the calls of `give` are to be made now that a call ends."""
        return calls

    def _do(self, call: CallRecord, method: str, *args: Any, **options: Any) -> Any:
        now, pause = call.clock(), self._pause
        if not self._begin(now):
            return self._instead(method, *args, now, **options)
        try:
            result = getattr(self.store, method)(*args, now, **options)
        except Exception as error:  # noqa: BLE001  # a store is anybody's code
            self._failed(error, call.clock(), pause, method, args)
            return self._instead(method, *args, now, **options)
        except BaseException:
            self._owe(method, args)
            raise
        self._worked(method, args, now, result, **options)
        while (owed := self._next_owed()) is not None:
            try:
                self.store.release(*owed, now)
            except Exception:  # noqa: BLE001  # the next call finds out, and this one has its result
                self._owed[owed] = None
                break
        return result

    async def _ado(self, call: CallRecord, method: str, *args: Any, **options: Any) -> Any:
        now, pause = call.clock(), self._pause
        if not self._begin(now):
            return self._instead(method, *args, now, **options)
        try:
            trip = getattr(self.store, f"a{method}")(*args, now, **options)
            if method in _QUEUES:
                trip = to_end(trip, partial(self._take_off, args))
            elif method == "release":
                await self._landed(args)
            result = await trip
        except Exception as error:  # noqa: BLE001  # as above
            self._failed(error, call.clock(), pause, method, args)
            return self._instead(method, *args, now, **options)
        except BaseException:
            self._owe(method, args)
            raise
        self._worked(method, args, now, result, **options)
        while (owed := self._next_owed()) is not None:
            try:
                await self.store.arelease(*owed, now)
            except Exception:  # noqa: BLE001  # as above
                self._owed[owed] = None
                break
        return result

    def _take_off(self, args: tuple[Any, ...], trip: asyncio.Future[Any]) -> None:
        """Note a trip that is under way, so that the release of what it may get comes after it."""
        place = (args[0], args[1])
        self._trips[place] = trip
        trip.add_done_callback(lambda _: self._trips.pop(place, None))

    async def _landed(self, args: tuple[Any, ...]) -> None:
        """Wait for the end of a trip that goes on although its call was cancelled."""
        trip = self._trips.get((args[0], args[1]))
        if trip is not None:
            import asyncio  # late, as above

            if trip.get_loop() is asyncio.get_running_loop():
                await asyncio.wait([trip])

    def _begin(self, now: float) -> bool:
        """Return whether the store is to be asked now."""
        if self._pause:
            if now < self._down_until:
                return False
            self._down_until = now + self._pause  # this call finds out, and others do not wait for it meanwhile
        return True

    def _worked(
        self, method: str, args: tuple[Any, ...], now: float, result: object, *, wait: bool = True, **_: object
    ) -> None:
        self._pause = 0.0
        if method in _QUEUES and result is not None and wait:
            self._queued[args[0], args[1]] = None
        elif self._queued and method in (*_QUEUES, "release"):
            self._queued.pop((args[0], args[1]), None)
        if self._has_spared and method in ("reserve", "lease", "release"):
            self._spare.release(args[0], args[1], now)  # what the call had, or waited for, while the store was down

    def _owe(self, method: str, args: tuple[Any, ...]) -> None:
        """Keep a release for when the store works again. Otherwise, a place would be lost."""
        if method == "release":
            self._queued.pop((args[0], args[1]), None)
            if len(self._owed) < _MOST_OWED:
                self._owed[args[0], args[1]] = None

    def _next_owed(self) -> tuple[str, str] | None:
        """Take a release that the store has yet to get, now that it works."""
        if not self._owed:
            return None
        with suppress(KeyError):  # another thread has taken the last
            return self._owed.popitem()[0]
        return None

    def _failed(self, error: Exception, now: float, pause: float, method: str, args: tuple[Any, ...]) -> None:
        """Take note of an error of the store, which it raised at `now`, and which was asked when the pause was `pause`.

        Raises:
            StoreError: the user wants it raised.
        """
        self._owe(method, args)
        if method in _QUEUES:
            self._queued[args[0], args[1]] = None  # the store may have done it all the same
        if isinstance(error, DeadlineExceeded):
            raise error
        name, kind = type(self.store).__name__, type(error).__name__
        if self._on_error == "raise":
            raise StoreError(f"{self._middleware}: its store {name} failed with {kind}; see __cause__") from error
        if self._pause == pause:  # many that ask at once make the pause no longer than one does
            self._pause = min(max(1.0, 2 * pause), _LONGEST_PAUSE)
            self._down_until = now + self._pause
        goes_on = "keeps its state in this process" if self._on_error == "local" else "lets calls pass"
        report_once(
            f"store {self._middleware} {name}",
            f"{self._middleware}: its store {name} failed with {kind}; until it works again, {self._middleware} {goes_on}",
        )

    def _report_late(self, error: StoreError) -> None:
        report_once(
            f"late store {self._middleware} {type(self.store).__name__}",
            f"{error} (as a call ended; what the call returns does not change)",
        )

    def _instead(self, method: str, *args: Any, **options: Any) -> Any:
        """Do what the user wants done in place of asking the store."""
        self._owe(method, args)
        result = 0.0 if method == "add" else None
        if self._on_error == "local":
            self._has_spared = True
            result = getattr(self._spare, method)(*args, **options)
        if method in _QUEUES and result is None and (args[0], args[1]) in self._queued:
            self._owe("release", args)  # the call goes on, and others would wait behind it
        return result


async def to_end(work: Awaitable[T], begun: Callable[[asyncio.Future[T]], object] | None = None) -> T:
    """Await some work that no cancellation interrupts. On asyncio it ends the wait, and the work goes on; on trio it waits.

    Args:
        begun: is called with the task of the work.
    """
    if trio := trio_here():
        with trio.CancelScope(shield=True):
            return await work
    import asyncio  # late, as above

    task = asyncio.ensure_future(work)
    task.add_done_callback(_look_at)
    if begun is not None:
        begun(task)
    return await asyncio.shield(task)


def _look_at(task: asyncio.Future[Any]) -> None:
    """Look at the error of a task, because nobody may wait for it any more, and asyncio would complain."""
    if not task.cancelled():
        task.exception()


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
        refuse: makes the error for a wait that would be longer, or end after the deadline of the call: another provider may
            have time for it yet. It gets the turn, and the seconds waited.

    Raises:
        DeadlineExceeded: the deadline of the call has passed.
    """
    call = request.call
    began = call.clock()
    end = began + max_wait
    waiting: Turn | None = turn
    while waiting is not None:
        now = call.clock()
        # The difference of near times is exact, so a clock reaches the end. The rest of `max_wait` may be too little to move it.
        left = end - now
        estimated = 0.0 if waiting.seconds == math.inf else waiting.seconds
        if call.leash is not None:
            check_deadline(call, request.model)
            left = min(left, time_left(call.leash, call.clock) or left)
        if left <= 0 or estimated > left + _ROUNDING:
            raise refuse(waiting, now - began)
        yield from sleep(min(_pause(waiting), left), until=waiting.signal)
        waiting = yield from ask()
    waited = call.clock() - began
    call.notes[WAITED] = call.notes.get(WAITED, 0.0) + waited
    return waited


def _pause(turn: Turn) -> float:
    """Return the seconds after which a call asks again, if nothing wakes it before."""
    if turn.signal is not None:
        # A call that is not first is woken when it is, and asks before only to see whether its wait has grown.
        return turn.seconds if not turn.ahead else max(turn.seconds, 1.0)
    if turn.seconds == math.inf:
        return min(_POLL * (1 + turn.ahead), _LONGEST_POLL)
    return max(turn.seconds, _SHORTEST_POLL) if turn.seconds < 0.02 else min(turn.seconds / 2, 0.25)


class Later:
    """What a call gives back to a store that does I/O when it ends, however it ends.

    Args:
        last: returns calls of `Shared.give`. It is called once.
    """

    def __init__(self, call: CallRecord, shared: Shared, last: Callable[[], list[tuple[Any, ...]]]) -> None:
        self._call = call
        self._shared = shared
        self._last = last
        self._left: list[tuple[Any, ...]] | None = None
        self._ending = call.on_end(self._give, self._agive)

    def run(self) -> Flow[None]:
        """Give it back now, unless that has happened. It takes no time where the store has nothing to do."""
        if self._calls():
            yield from self._ending.run()
        else:
            self._ending.withdraw()

    def _calls(self) -> list[tuple[Any, ...]]:
        if self._left is None:
            self._left = self._shared.settled(self._call, self._last())
        return self._left

    def _give(self) -> None:
        for method, *args in self._calls():
            self._shared.give(self._call, method, *args)

    async def _agive(self) -> None:
        for method, *args in self._calls():
            await self._shared.agive(self._call, method, *args)
