"""Providers that answer from a script, and a clock whose waits take no time."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import attrs

from fluxibly._threads import NotInTime
from fluxibly.aggregate import Aggregator, as_chunks
from fluxibly.errors import StreamProtocolError
from fluxibly.flow.verbs import check_seconds
from fluxibly.limits import least
from fluxibly.types import Chunk, ProviderInfo, Request, Response

if TYPE_CHECKING:
    from fluxibly.pipeline import Clock
    from fluxibly.testing._lanes import LaneTime


T = TypeVar("T")


class VirtualClock:
    """A `fluxibly.pipeline.Clock` for tests: `Pipeline(provider, middleware, clock=VirtualClock())`.

    Its time starts at 0, and each sleep advances it at once, so that nothing waits. `sleeps` lists the seconds of each
    sleep. Time limits hold in its time: a sleep of a provider ends when the limit of its call has passed. What `race` and
    `gather` do at the same time takes the same time of this clock: without threads, and always in the same order.
    """

    def __init__(self) -> None:
        self.sleeps: list[float] = []
        self._time = 0.0
        # Calls of several threads and tasks each have a limit of their own.
        self._limits: ContextVar[_Limit | None] = ContextVar("limits", default=None)
        """The innermost limit of the call under way."""
        self._lock = threading.Lock()
        self.lane: ContextVar[LaneTime | None] = ContextVar("lane", default=None)
        """The time of the lane that the code runs in."""

    def now(self) -> float:
        """Return the time, in seconds."""
        lane = self._busy_lane()
        return self._time if lane is None or lane.now is None else lane.now

    def go_on_to(self, time: float) -> None:
        """Let time pass until `time`, without recording a sleep."""
        lane = self._busy_lane()
        if lane is None or lane.now is None:
            self._time = max(self._time, time)
        else:
            lane.now = max(lane.now, time)

    def _busy_lane(self) -> LaneTime | None:
        """Return the innermost lane with a time of its own that the code runs in."""
        lane = self.lane.get()
        while lane is not None and lane.now is None:
            lane = lane.outer
        return lane

    def advance(self, seconds: float) -> None:
        """Let time pass without recording a sleep."""
        with self._lock:
            self.go_on_to(self.now() + seconds)

    def sleep(self, seconds: float, /) -> None:
        """Record a sleep and let its time pass.

        Raises:
            TypeError: `seconds` is not a number.
            ValueError: `seconds` is negative, infinite or NaN.
        """
        check_seconds(seconds)
        limit = self._limits.get()
        end = None if limit is None else limit.soonest()
        with self._lock:
            self.sleeps.append(seconds)
            now = self.now()
            if end is not None and now + seconds > end:
                self.go_on_to(end)
                raise _TimeUp
            self.go_on_to(now + seconds)

    async def asleep(self, seconds: float, /) -> None:
        """Do as `sleep`, for async pipelines. Other tasks get a turn, and a cancellation is noticed."""
        from anyio.lowlevel import checkpoint

        check_seconds(seconds)
        await checkpoint()
        self.sleep(seconds)

    def within(self, seconds: float | None, call: Callable[[], T]) -> T:
        """Return the result of a call that may take `seconds` of this clock.

        Raises:
            NotInTime: the time is up.
        """
        with self._limit(seconds):
            return call()

    async def awithin(self, seconds: float, call: Callable[[], Awaitable[T]]) -> T:
        """Do as `within`, for an async call."""
        with self._limit(seconds):
            return await call()

    def lanes(self, stack: object) -> object:
        """Return the lanes of a synchronous call, for the drivers."""
        from fluxibly.testing._lanes import VirtualLanes

        return VirtualLanes(self, stack)

    def alanes(self, stack: object) -> object:
        """Return the lanes of an asynchronous call, for the drivers."""
        from fluxibly.testing._lanes import AsyncVirtualLanes

        return AsyncVirtualLanes(self, stack)

    @contextmanager
    def _limit(self, seconds: float | None) -> Generator[None]:
        outer = self._limits.get()
        end = None if seconds is None else self.now() + seconds
        limit = _Limit(end, outer)
        soonest = limit.soonest()
        self._limits.set(limit)
        try:
            if seconds is not None and seconds <= 0:
                raise _TimeUp
            yield
            if end is not None and self.now() > end:
                raise _TimeUp
        except _TimeUp:
            if soonest is not end:
                raise  # an outer limit has passed
            raise NotInTime from None
        finally:
            limit.end = None
            self._limits.set(outer)


class _Limit:
    """A time limit, and those around it. Copies of a context share it, so that none of them keeps it when it is over."""

    def __init__(self, end: float | None, outer: _Limit | None) -> None:
        self.end = end
        """The time at which it passes, or None when it is over."""
        self.outer = outer

    def soonest(self) -> float | None:
        """Return the time at which the first of these limits passes."""
        return self.end if self.outer is None else least(self.end, self.outer.soonest())


class _TimeUp(BaseException):
    """A time limit has passed. Like a cancellation, it passes the code of a provider."""


@attrs.frozen
class Delay:
    """A step of a script: time passes on the provider's clock. Without a clock, the step is skipped."""

    seconds: float


@attrs.frozen
class Cut:
    """A step of a script: the connection ends before the answer does, which raises `StreamProtocolError`."""


Step: TypeAlias = str | Chunk | BaseException | Delay | Cut
Answer: TypeAlias = str | Response | BaseException | Sequence[Step]
"""An answer of a scripted provider: a text, a response, an error to raise, or the steps of a stream."""

INFO = ProviderInfo(name="ScriptedProvider", framework="scripted", telemetry_name="scripted", in_process=True)


class _Scripted:
    """The script, and the calls that were made.

    Attributes:
        requests: the requests that the provider got, in order.
        opened, closed: how many streams were opened and closed; equal when no stream is open.
        shut: whether the provider was closed.

    """

    info = INFO

    def __init__(self, *answers: Answer, clock: Clock | None = None) -> None:
        self.requests: list[Request] = []
        self.opened = self.closed = 0
        self.shut = False
        self._answers = deque(answers)
        self._clock = clock
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        """The number of answers that were not taken."""
        return len(self._answers)

    def _next_steps(self, request: Request) -> Iterator[Step]:
        """Return the steps of the next answer."""
        with self._lock:
            self.requests.append(request)
            if not self._answers:
                raise AssertionError(
                    f"{type(self).__name__}: expected an answer for each call, got {len(self.requests)} calls and "
                    f"{len(self.requests) - 1} answers; add an answer for each call, retries included"
                )
            answer = self._answers.popleft()
        return iter(to_steps(answer))

    def _take(self, step: Step) -> Chunk | str:
        """Return a step's chunk, or raise its error."""
        if isinstance(step, BaseException):
            raise step
        if isinstance(step, Cut):
            raise StreamProtocolError("the scripted stream was cut off before its end", provider=self.info.name)
        return step  # type: ignore[return-value]  # never a Delay; other values pass, so that tests can try wrong types

    def _count(self, *, opened: int = 0, closed: int = 0) -> None:
        with self._lock:
            self.opened += opened
            self.closed += closed


class ScriptedProvider(_Scripted):
    """A `Provider` whose calls take the answers in turn, streamed or whole::

        provider = ScriptedProvider(RateLimitError("slow down"), ["Hello, ", Delay(2), "world"])
        pipeline = Pipeline(provider, [Retry(max_retries=1)], clock=VirtualClock())
        assert pipeline.complete(request).text == "Hello, world"
        assert len(provider.requests) == 2

    An answer is a str (streamed word by word), a `Response`, an exception, or a list of steps: texts, chunks,
    exceptions, `Delay(seconds)` and `Cut()`. A whole call gets the response that the same steps add up to. Pass the
    pipeline's `clock`, so that delays count.
    """

    def complete(self, request: Request) -> Response:
        """Return the next answer, whole."""
        answer = Aggregator()
        for item in self._items(self._next_steps(request)):
            answer.add(Chunk(item) if isinstance(item, str) else item)
        return answer.response()

    def stream(self, request: Request) -> Generator[Chunk | str, None, None]:
        """Yield the next answer, step by step."""
        self._count(opened=1)
        try:
            yield from self._items(self._next_steps(request))
        finally:
            self._count(closed=1)

    def _items(self, steps: Iterator[Step]) -> Iterator[Chunk | str]:
        for step in steps:
            if not isinstance(step, Delay):
                yield self._take(step)
            elif self._clock is not None:
                self._clock.sleep(step.seconds)

    def close(self) -> None:
        """Record that the provider was closed."""
        self.shut = True


class AsyncScriptedProvider(_Scripted):
    """`ScriptedProvider` as an `AsyncProvider`."""

    async def complete(self, request: Request) -> Response:
        """Return the next answer, whole."""
        answer = Aggregator()
        for step in self._next_steps(request):
            if isinstance(step, Delay):
                await self._wait(step)
            else:
                item = self._take(step)
                answer.add(Chunk(item) if isinstance(item, str) else item)
        return answer.response()

    async def stream(self, request: Request) -> AsyncGenerator[Chunk | str, None]:
        """Yield the next answer, step by step."""
        self._count(opened=1)
        try:
            for step in self._next_steps(request):
                if isinstance(step, Delay):
                    await self._wait(step)
                else:
                    yield self._take(step)
        finally:
            self._count(closed=1)

    async def _wait(self, delay: Delay) -> None:
        if self._clock is not None:
            await self._clock.asleep(delay.seconds)

    async def aclose(self) -> None:
        """Record that the provider was closed."""
        self.shut = True


def to_steps(answer: Answer) -> Sequence[Step]:
    """Return the steps of an answer as a stream."""
    if isinstance(answer, str):
        return [*_words(answer)]
    if isinstance(answer, Response):
        return [step for chunk in as_chunks(answer) for step in _steps_of(chunk)]
    if isinstance(answer, BaseException):
        return [answer]
    return answer


def _steps_of(chunk: Chunk) -> list[Step]:
    """Return the steps of a chunk: its reasoning and parts, its text word by word, and the rest."""
    before: list[Step] = [Chunk(reasoning=chunk.reasoning, parts=chunk.parts)] if chunk.reasoning or chunk.parts else []
    return [*before, *_words(chunk.text), attrs.evolve(chunk, text="", reasoning="", parts=())]


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+", text)
