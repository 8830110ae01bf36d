"""The concurrent loops of `llm.map`: they work on many items at once, bounded, and yield what comes of each.

Imports: data and its helpers, flow. Imported by: `llm`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Generator, Iterable
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import attrs

from fluxibly._checks import kind_of, whole
from fluxibly._loops import trio_here
from fluxibly.errors import ConfigError
from fluxibly.flow import CallNext, Flow
from fluxibly.limits import Leash, Timeouts, timeouts_of_call
from fluxibly.types import Request, Response

T = TypeVar("T")
R = TypeVar("R")

_AHEAD, _AHEAD_IN_ORDER = 2, 10
"""How many times `concurrency` items may be begun and not yet delivered.

So results do not pile up without end behind a consumer that is slow, or behind one slow item where order is kept.
"""


@attrs.frozen
class Answer:
    """The outcome of one prompt of `llm.map`: a response, or an error.

    Args:
        row: the place of the prompt among the prompts, from 0.
        response: the model's answer; None if the call failed.
        error: what the call raised, such as a `FluxiblyError`; None if it was answered.
    """

    row: int
    response: Response | None = None
    error: Exception | None = None

    @property
    def text(self) -> str:
        """The text of the answer.

        Raises:
            Exception: the `error`, if the call failed.
        """
        if self.response is None:
            raise self.error or ValueError(f"row {self.row} has no response")
        return self.response.text


def check_mapping(prompts: object, concurrency: int, timeout: float | Timeouts | None, *, asynchronous: bool) -> None:
    """Check the arguments of a `map`.

    Raises:
        TypeError: the prompts are not several.
        ConfigError: `concurrency` is no whole number from 1 up, or `timeout` is no time limit.
    """
    several = isinstance(prompts, (Iterable, AsyncIterable) if asynchronous else Iterable)
    if isinstance(prompts, (str, bytes)) or not several:
        raise TypeError(f"map: expected several prompts, like a list of texts, got {kind_of(prompts)}")
    wrong = whole("concurrency", concurrency, low=1)
    if wrong is not None:
        raise ConfigError(wrong)
    if timeout is not None:
        timeouts_of_call(timeout, streaming=False)


class _Results(Generic[R]):
    """The results that are there, in the order in which they are delivered, and how many items may be begun."""

    def __init__(self, concurrency: int, *, ordered: bool) -> None:
        self._most = concurrency * (_AHEAD_IN_ORDER if ordered else _AHEAD)
        self._ready: deque[R] = deque()
        self._early: dict[int, R] | None = {} if ordered else None
        self._begun = self._delivered = 0

    @property
    def has_room(self) -> bool:
        """Whether another item may be begun."""
        return self._begun - self._delivered < self._most

    def begin(self) -> int:
        """Return the number of another item, from 0."""
        self._begun += 1
        return self._begun - 1

    def add(self, number: int, result: R) -> None:
        early = self._early
        if early is None:
            self._ready.append(result)
            return
        early[number] = result
        while (due := self._delivered + len(self._ready)) in early:
            self._ready.append(early.pop(due))

    def __bool__(self) -> bool:
        return bool(self._ready)

    def take(self) -> R:
        """Return the next result."""
        self._delivered += 1
        return self._ready.popleft()


# Tasks


class _Tasks(Protocol):
    """The tasks of one map. They are in no task group, which a generator could not hold open while its consumer works."""

    left: int
    """The number of tasks that have not ended."""

    def start(self, serve: Callable[[], Coroutine[Any, Any, None]]) -> None: ...
    def cancel(self) -> None: ...


class _AsyncioTasks:
    def __init__(self, ended: Callable[[], object]) -> None:
        self.left = 0
        self._tasks: set[Any] = set()
        self._ended = ended

    def start(self, serve: Callable[[], Coroutine[Any, Any, None]]) -> None:
        import asyncio  # late: it takes as long to import as all of fluxibly

        task = asyncio.get_running_loop().create_task(serve())
        task.add_done_callback(self._done)  # a task that is cancelled before its first step runs no code
        self._tasks.add(task)
        self.left += 1

    def _done(self, task: Any) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # `map_in_tasks` raises it
        self.left -= 1
        self._ended()

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


class _TrioTasks:
    def __init__(self, ended: Callable[[], object]) -> None:
        self.left = 0
        self._scopes: set[Any] = set()
        self._ended = ended

    def start(self, serve: Callable[[], Coroutine[Any, Any, None]]) -> None:
        import trio

        scope = trio.CancelScope()
        trio.lowlevel.spawn_system_task(self._run, serve, scope, context=copy_context())
        self._scopes.add(scope)
        self.left += 1

    async def _run(self, serve: Callable[[], Coroutine[Any, Any, None]], scope: Any) -> None:
        try:
            with scope:
                await serve()
        finally:
            self._scopes.discard(scope)
            self.left -= 1
            self._ended()

    def cancel(self) -> None:
        for scope in [*self._scopes]:
            scope.cancel()


async def map_in_tasks(
    items: Iterable[T] | AsyncIterable[T],
    work: Callable[[int, T], Coroutine[Any, Any, R]],
    *,
    concurrency: int,
    ordered: bool = False,
) -> AsyncGenerator[R]:
    """Yield what comes of each item as it comes, or in the order of the items, on asyncio or trio.

    An exception of the items or of `work` is raised when all that was under way is delivered. If the generator is closed or
    cancelled, what is under way is cancelled, and has ended when the generator has.

    Args:
        items: asked for the next by one task at a time, when there is room for it.
        work: called with the number of an item, from 0, and the item.
        concurrency: the most items to work on at once.
    """
    import anyio  # late, to keep `import fluxibly` fast

    results: _Results[R] = _Results(concurrency, ordered=ordered)
    errors: list[BaseException] = []
    is_over = False  # nothing more is begun
    is_left = False  # the consumer has gone
    changed, room = anyio.Event(), anyio.Event()
    turn = anyio.Lock()
    later = aiter(items) if isinstance(items, AsyncIterable) else None
    now = iter(()) if isinstance(items, AsyncIterable) else iter(items)

    def begin_no_more(error: BaseException | None = None) -> None:
        nonlocal is_over
        is_over = True
        if error is not None and not is_left:
            errors.append(error)
        room.set()

    async def has_room() -> bool:
        """Wait until another item may be begun. Return whether one is wanted."""
        while not (results.has_room or is_over):
            await room.wait()
        return not is_over

    async def serve() -> None:
        try:
            while await has_room():
                if later is None:
                    item = next(now)
                else:
                    async with turn:
                        if not await has_room():
                            break
                        item = await anext(later)
                number = results.begin()
                if tasks.left < concurrency:
                    tasks.start(serve)
                results.add(number, await work(number, item))
                changed.set()
        except (StopIteration, StopAsyncIteration):
            begin_no_more()
        except (
            BaseException
        ) as error:  # an interrupt, too, is raised by the consumer; in a task it would end the event loop
            begin_no_more(error)
            if isinstance(error, anyio.get_cancelled_exc_class()):
                raise

    def wake() -> None:
        changed.set()

    tasks: _Tasks = _AsyncioTasks(wake) if trio_here() is None else _TrioTasks(wake)
    tasks.start(serve)
    try:
        while True:
            while results:
                yield results.take()
                if not room.is_set():
                    room.set()
                    room = anyio.Event() if not is_over else room
            if not tasks.left:
                break
            changed = anyio.Event()
            await changed.wait()
    finally:
        is_left = True
        begin_no_more()
        tasks.cancel()
        cancelled: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while tasks.left:
                changed = anyio.Event()
                try:
                    await changed.wait()
                except anyio.get_cancelled_exc_class() as error:  # asyncio's own cancellation passes every shield
                    cancelled = error
        if cancelled is not None:
            raise cancelled
    if errors:
        raise errors[0]


# Threads


class Stops:
    """A middleware, outermost in its stack, that lets `stop` end the calls under way from another thread."""

    def __init__(self) -> None:
        self._leashes: set[Leash] = set()
        self._stopped = False

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        outer = call.leash
        leash = call.leash = Leash() if outer is None else outer
        # The leash is noted before the flag is read, and `stop` does the reverse, so at least one sees the other.
        self._leashes.add(leash)
        if self._stopped:
            leash.stop()
        try:
            return (yield from call_next(request))
        finally:
            call.leash = outer
            self._leashes.discard(leash)

    def stop(self) -> None:
        """End the calls that are under way, and those that begin later."""
        self._stopped = True
        for leash in self._leashes.copy():
            leash.stop()


def map_in_threads(
    items: Iterable[T],
    work: Callable[[int, T], R],
    *,
    concurrency: int,
    ordered: bool = False,
    stop: Callable[[], object] | None = None,
) -> Generator[R]:
    """Yield what comes of each item as it comes, or in the order of the items.

    An exception of the items or of `work` is raised when all that was under way is delivered.

    Args:
        items: read in the thread of the consumer, some ahead.
        work: called with the number of an item, from 0, and the item, in threads of their own.
        concurrency: the most items to work on at once.
        stop: ends the work that is under way, which is waited for. Without it, work that is under way when the generator is
            closed goes on in the background, and nobody waits for it.
    """
    results: _Results[R] = _Results(concurrency, ordered=ordered)
    errors: list[BaseException] = []
    given: SimpleQueue[tuple[int, T] | None] = SimpleQueue()
    ended: SimpleQueue[tuple[int, R | None, BaseException | None]] = SimpleQueue()
    threads: list[threading.Thread] = []
    is_over = False
    is_left = threading.Event()
    under_way = 0

    def serve() -> None:
        while (item := given.get()) is not None and not is_left.is_set():
            number = item[0]
            try:
                ended.put((number, work(*item), None))
            except BaseException as error:  # noqa: BLE001  # the consumer raises it
                ended.put((number, None, error))
            del item

    def collect(number: int, result: R | None, error: BaseException | None) -> None:
        nonlocal is_over, under_way
        under_way -= 1
        if error is None:
            results.add(number, result)  # type: ignore[arg-type]  # R may be None
        else:
            errors.append(error)
            is_over = True

    following = iter(items)
    try:
        while True:
            while not is_over and results.has_room and under_way < concurrency * _AHEAD:
                try:
                    item = next(following)
                except StopIteration:
                    is_over = True
                    break
                except Exception as error:  # noqa: BLE001  # it is raised when all is delivered
                    errors.append(error)
                    is_over = True
                    break
                given.put((results.begin(), item))
                under_way += 1
                if len(threads) < min(under_way, concurrency):
                    context = copy_context()
                    thread = threading.Thread(target=context.run, args=(serve,), name="fluxibly-map", daemon=True)
                    threads.append(thread)
                    thread.start()
            try:
                while under_way:
                    collect(*ended.get_nowait())
            except Empty:
                if not results:
                    collect(*ended.get())
            if results:
                yield results.take()
            elif not under_way and is_over:
                break
    finally:
        is_left.set()
        for _ in threads:
            given.put(None)
        if stop is not None:
            stop()
            for thread in threads:
                thread.join()
    if errors:
        raise errors[0]
