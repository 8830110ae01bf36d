"""The limits of a call, kept for providers that do not keep them by themselves.

A synchronous provider runs in a thread, and its caller stops waiting on time. An asynchronous provider is cancelled.
A test's clock may have `within` and `awithin`, which do the same in its own time.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from fluxibly._threads import NotInTime as NotInTime, Worker
from fluxibly.aggregate import pieces_of
from fluxibly.errors import Phase, ProviderError, RequestTimeout, StreamStalled
from fluxibly.flow.compose import deadline_exceeded
from fluxibly.limits import ChunkWaits, Leash, Timeouts, who_limits
from fluxibly.types import Request

T = TypeVar("T")
_NO_LIMITS = Timeouts(None, None, None, total=None)


class _Limit(NamedTuple):
    """A limit on a wait, as it was set and as a time of the call's clock, at which it passes.

    `strict`: a middleware has set it.
    """

    end: float
    phase: Phase
    seconds: float | None
    strict: bool = False

    @classmethod
    def of(cls, seconds: float | None, phase: Phase, start: float) -> _Limit:
        return cls(math.inf if seconds is None else start + seconds, phase, seconds)


class CallLimits:
    """The limits of one attempt at a provider."""

    def __init__(self, request: Request, *, streaming: bool) -> None:
        call = request.call
        self._request = request
        self._clock = call.clock
        self._times = call.timeouts or _NO_LIMITS
        leash = self._leash = call.leash or Leash()
        self._deadline = _Limit.of(leash.deadline, "deadline", 0.0)
        total = self._times.stream_total if streaming else self._times.total
        self._total = _Limit.of(total, "total", self._clock())
        self._waits = ChunkWaits(leash) if streaming else None
        self._first = True
        self._next = self._deadline
        """The limit of the wait under way."""

    def left(self) -> float | None:
        """Return the seconds that the next wait may take; None is no limit."""
        now, waits = self._clock(), self._waits
        limits = [self._deadline, self._total]
        if waits is not None:
            end = waits.end(now)
            limits.append(_Limit(math.inf if end is None else end, waits.phase, waits.limit, strict=True))
            times = self._times
            limits.append(
                _Limit.of(times.first_byte, "first_byte", now) if self._first else _Limit.of(times.idle, "idle", now)
            )
        self._next = min(limits)
        return None if self._next.end == math.inf else self._next.end - now

    def came(self, item: object) -> None:
        """Note that an item of a stream came, and that the consumer has its turn."""
        self._first = False
        waits = self._waits
        if waits is not None:
            output = waits.phase == "idle" or any(piece.has_output for piece in pieces_of(item) or ())
            waits.came(self._clock(), output=output)

    def error(self) -> ProviderError:
        """Return the error for the limit of the last wait, which has passed."""
        request, call = self._request, self._request.call
        _, phase, seconds, strict = self._next
        if phase == "deadline":
            return deadline_exceeded(call, request.model)
        kind = StreamStalled if phase == "idle" else RequestTimeout
        which = f"the limit {phase} of {who_limits(self._leash, phase)}" if strict else phase
        error = kind(
            f"{request.model} at {call.provider.name} took longer than {seconds:g} s ({which}); allow more time, or ask "
            "for less",
            provider=call.provider.framework,
            model=request.model,
        )
        error.phase = phase
        return error


def call_in_time(clock: object, request: Request, call: Callable[[], T]) -> T:
    """Return the result of a call of a synchronous provider that does not keep the limits of the request's call.

    Raises:
        RequestTimeout: a limit has passed. The provider runs on in its thread.
    """
    limits = CallLimits(request, streaming=False)
    if limits.left() is None:
        return call()
    waiter = _Waiter(clock, limits)
    try:
        return waiter.run(call)
    finally:
        waiter.stop(_nothing)


async def acall_in_time(clock: object, request: Request, call: Callable[[], Awaitable[T]]) -> T:
    """Do as `call_in_time` for an asynchronous provider, which is cancelled when a limit has passed."""
    return await _in_time(clock, CallLimits(request, streaming=False), call)


async def _in_time(clock: object, limits: CallLimits, call: Callable[[], Awaitable[T]]) -> T:
    try:
        return await awithin(clock, limits.left(), call)
    except NotInTime:
        raise limits.error() from None


async def awithin(clock: object, seconds: float | None, call: Callable[[], Awaitable[T]]) -> T:
    """Return the result of an asynchronous call.

    Raises:
        NotInTime: it took longer than `seconds`, and was cancelled.
    """
    if seconds is None:
        return await call()
    hook: Any = getattr(clock, "awithin", None)
    if hook is not None:
        result: T = await hook(seconds, call)
        return result
    import anyio  # late, to keep `import fluxibly` fast

    if seconds > 0:
        with anyio.move_on_after(seconds) as scope:
            result = await call()
            if not scope.cancel_called:  # else the call did not let itself be cancelled, or never waited
                return result
    raise NotInTime


class _Waiter:
    """Runs calls one at a time, in a thread or in the time of a test's clock, and stops waiting for them on time."""

    def __init__(self, clock: object, limits: CallLimits) -> None:
        self._limits = limits
        self._hook: Any = getattr(clock, "within", None)
        # The thread exists before the first call, so that an abort always finds it.
        self._worker = Worker() if self._hook is None else None

    def run(self, call: Callable[[], T]) -> T:
        """Return the result of a call.

        Raises:
            RequestTimeout: a limit has passed.
        """
        seconds = self._limits.left()
        try:
            if self._worker is None:
                result: T = self._hook(seconds, call)
                return result
            if seconds is not None and seconds <= 0:
                raise NotInTime
            return self._worker.run(call, seconds)
        except NotInTime:
            raise self._limits.error() from None

    def abort(self) -> None:
        """End a `run` in another thread."""
        if self._worker is not None:
            self._worker.abort()

    def stop(self, last: Callable[[], object]) -> None:
        """Make a last call, once the call under way has returned."""
        if self._worker is None:
            last()
        else:
            self._worker.stop(last)


def _nothing() -> None:
    """Do nothing, where there is nothing to close."""


class LimitedStream:
    """A stream of a synchronous provider, each chunk of which is awaited in time. The first wait includes the opening."""

    def __init__(self, clock: object, request: Request, open_stream: Callable[[], Iterable[Any]]) -> None:
        self._limits = CallLimits(request, streaming=True)
        self._waiter = _Waiter(clock, self._limits)
        self._open = open_stream
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> LimitedStream:
        return self

    def __next__(self) -> Any:
        item = self._waiter.run(self._read)
        if item is _END:
            raise StopIteration
        self._limits.came(item)
        return item

    def _read(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._open())
        return next(self._iterator, _END)

    def abort(self) -> None:
        """End a read in another thread."""
        getattr(self._iterator, "abort", _nothing)()
        self._waiter.abort()

    def close(self) -> None:
        """Close the provider's stream, as soon as a read under way has returned."""
        self._waiter.stop(self._close)

    def _close(self) -> None:
        getattr(self._iterator, "close", _nothing)()


_END = object()


class AsyncLimitedStream:
    """A stream of an asynchronous provider, each chunk of which is awaited in time."""

    def __init__(self, clock: object, request: Request, stream: AsyncIterable[Any]) -> None:
        self._limits = CallLimits(request, streaming=True)
        self._clock = clock
        self._iterator = aiter(stream)
        for name in ("abort", "aclose"):
            if hasattr(self._iterator, name):
                setattr(self, name, getattr(self._iterator, name))

    def __aiter__(self) -> AsyncLimitedStream:
        return self

    async def __anext__(self) -> Any:
        item = await _in_time(self._clock, self._limits, self._read)
        if item is _END:
            raise StopAsyncIteration
        self._limits.came(item)
        return item

    async def _read(self) -> Any:
        return await anext(self._iterator, _END)
