"""Calls to a library that sends the requests itself, with time limits, and the configuration for the library.

A synchronous call runs in its own thread. When the time is up the caller stops waiting, and the thread ends when the
library returns. An asynchronous call is cancelled.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextvars import copy_context
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

import anyio
import attrs

from fluxibly.config import KEEP_ALIVES, LLMConfig, Timeouts
from fluxibly.errors import AuthenticationError, ConfigError, Phase
from fluxibly.providers._libraries.services import server_of
from fluxibly.types import ProviderInfo


class LibraryTimeout(Exception):  # it never leaves the providers
    """An expired time limit of fluxibly. `phase` names the limit. `kept_alive`: items came, but without output."""

    def __init__(self, phase: Phase, seconds: float, *, kept_alive: bool = False) -> None:
        super().__init__(phase, seconds)
        self.phase: Phase = phase
        self.seconds = seconds
        self.kept_alive = kept_alive


@attrs.frozen(kw_only=True)
class LibraryLimits:
    """The time limits for a library, in seconds: whole call, first chunk of a stream, each next chunk, whole stream."""

    call: float | None = None
    first: float | None = None
    idle: float | None = None
    stream: float | None = None

    @classmethod
    def of(cls, config: LLMConfig) -> LibraryLimits:
        limits = config.timeouts
        first = None if limits.first_byte is None or limits.connect is None else limits.first_byte + limits.connect
        return cls(call=limits.total, first=first, idle=limits.idle, stream=config.stream_total)


class _StreamTime:
    """The time limits of one stream, from now on.

    `first`: no item has arrived yet. `wait_end`: the end of the wait for output, even if items without output arrive;
    None after output.
    """

    def __init__(self, limits: LibraryLimits) -> None:
        self._limits = limits
        self._started = time.monotonic()
        self.wait_end: float | None = None
        self.first = True

    def next(self) -> tuple[float | None, LibraryTimeout]:
        """Return how long the next item may take, and the exception to raise after that."""
        limits, now = self._limits, time.monotonic()
        seconds = limits.first if self.first else limits.idle
        late = LibraryTimeout("first_byte" if self.first else "idle", seconds or 0.0)
        if not self.first and limits.idle is not None:
            if self.wait_end is None:
                self.wait_end = now + KEEP_ALIVES * limits.idle
            if self.wait_end - now < limits.idle:
                seconds = max(self.wait_end - now, 0.0)
                late = LibraryTimeout("idle", KEEP_ALIVES * limits.idle, kept_alive=True)
        if limits.stream is not None:
            left = self._started + limits.stream - now
            if seconds is None or left < seconds:
                return max(left, 0.0), LibraryTimeout("total", limits.stream)
        return seconds, late


def read_timeout(timeouts: Timeouts) -> float | None:
    """Return the limit for an HTTP client with a single read timeout: the longer of `first_byte` and `idle`."""
    if timeouts.first_byte is None or timeouts.idle is None:
        return None
    return max(timeouts.first_byte, timeouts.idle)


def checked_key(config: LLMConfig) -> str | None:
    """Return the configuration's API key, or None if it has no key.

    Raises:
        AuthenticationError: the key cannot be sent in a header. The message does not show the key.
        ConfigError: a function gives the key.
    """
    if callable(config.api_key):
        raise ConfigError(
            f"api_key: expected a str for {config.framework} ({config.model}), got a function; only OpenAI's models "
            "through LangChain, and the frameworks that speak HTTP themselves, take one"
        )
    key = config.fixed_key
    if key is not None and (not key.isascii() or not key.isprintable() or key != key.strip()):
        raise AuthenticationError(
            "api_key: expected printable ASCII without surrounding white space, got a key with surrounding white "
            "space, control characters (such as a newline) or non-ASCII characters",
            provider=config.framework,
        )
    return key or None


def info_of(config: LLMConfig | None, *, name: str, framework: str, telemetry_name: str) -> ProviderInfo:
    """Return the description of a provider. It includes the server only if the configuration names a server."""
    address, port = server_of(config.api_base if config is not None else None)
    return ProviderInfo(
        name=name,
        framework=framework,
        telemetry_name=telemetry_name,
        server_address=address,
        server_port=port,
    )


T = TypeVar("T")
_END: Final = object()


class _Worker:
    """A thread that makes a single call at a time. Its owner can stop waiting for a call."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[object, BaseException | None] | None] = queue.SimpleQueue()
        self.busy = False
        context = copy_context()
        threading.Thread(target=context.run, args=(self._serve,), name="fluxibly-library", daemon=True).start()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                answer: tuple[object, BaseException | None] = (call(), None)
            except BaseException as error:  # noqa: BLE001  # it is raised where the answer is awaited
                answer = (None, error)
            self._answers.put(answer)
            del call, answer

    def run(self, call: Callable[[], object], seconds: float | None, late: LibraryTimeout) -> object:
        self.busy = True
        self._calls.put(call)
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise late from None
        if answer is None:
            raise InterruptedError("the stream was closed while it was being read")
        self.busy = False
        value, error = answer
        if error is not None:
            raise error
        return value

    def abort(self) -> None:
        """End a `run` in another thread."""
        self._answers.put(None)

    def stop(self, last: Callable[[], object]) -> None:
        """Make a last call after the current call has returned, and end. Wait only if no call is running."""
        if self.busy:
            self._calls.put(last)
            self._calls.put(None)
            return
        try:
            self.run(last, None, LibraryTimeout("total", 0.0))
        finally:
            self._calls.put(None)


def call_within(call: Callable[[], T], seconds: float | None) -> T:
    """Return the result of `call`.

    Raises:
        LibraryTimeout: `call` took longer than `seconds`.
    """
    if seconds is None:
        return call()
    worker = _Worker()
    try:
        return cast("T", worker.run(call, seconds, LibraryTimeout("total", seconds)))
    finally:
        worker.stop(_nothing)


def _nothing() -> None:
    return None


class OpenStream(NamedTuple):
    """A library's stream: its items, a function that releases it, and a function that ends a read in another thread."""

    items: Iterator[Any]
    close: Callable[[], object]
    cut: Callable[[], object]


class LibraryStream(Generic[T]):
    """The items of a library's own iterator, each with a time limit. `close` releases the library's stream.

    Args:
        open_stream: starts the call.
        limits: the time limits.
        convert: converts an item to values of this stream.
        at_end: returns the values after the last item.
        explain: converts an exception to fluxibly's. The second argument says whether an item had arrived.
    """

    def __init__(
        self,
        open_stream: Callable[[], OpenStream],
        limits: LibraryLimits,
        convert: Callable[[Any], Iterable[T]],
        at_end: Callable[[], Iterable[T]],
        explain: Callable[[Exception, bool], Exception],
    ) -> None:
        self._open = open_stream
        self._limits = limits
        self._convert = convert
        self._at_end = at_end
        self._explain = explain
        self._opened: OpenStream | None = None
        self._worker: _Worker | None = None
        self._time = _StreamTime(limits)
        self._over = False
        self._waiting: deque[T] = deque()

    def __iter__(self) -> LibraryStream[T]:
        return self

    def __next__(self) -> T:
        while not self._waiting and not self._over:
            self._waiting.extend(self._step())
        if self._waiting:
            self._time.wait_end = None
            return self._waiting.popleft()
        self.close()
        raise StopIteration

    def _step(self) -> Iterable[T]:
        if self._worker is None:
            self._worker = _Worker()
            self._time = _StreamTime(self._limits)
        seconds, late = self._time.next()
        try:
            item = self._worker.run(self._read, seconds, late)
            self._over = item is _END
            values = self._at_end() if self._over else self._convert(item)
        except Exception as error:  # noqa: BLE001  # raised below, without the library's exception as its context
            failure = self._explain(error, not self._time.first)
        else:
            self._time.first = False
            return values
        self.close()
        raise failure

    def _read(self) -> object:
        if self._opened is None:
            self._opened = self._open()
        return next(self._opened.items, _END)

    def _release(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def abort(self) -> None:
        """End a read in another thread."""
        if self._worker is not None:
            self._worker.abort()

    def close(self) -> None:
        """Release the library's stream. During a read, cut its connection, and release it when the read returns."""
        self._over = True
        self._waiting.clear()
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if worker.busy and self._opened is not None:
            self._opened.cut()  # keep-alives from the server would block that read forever
        worker.stop(self._release)


async def acall_within(call: Awaitable[T], seconds: float | None) -> T:
    """Return the result of `call`. asyncio only.

    Raises:
        LibraryTimeout: `call` took longer than `seconds`.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await call
    except TimeoutError:
        if limit.expired():
            raise LibraryTimeout("total", seconds or 0.0) from None
        raise


async def library_stream(
    open_stream: Callable[[], Awaitable[AsyncIterator[Any]]],
    limits: LibraryLimits,
    convert: Callable[[Any], Iterable[T]],
    at_end: Callable[[], Iterable[T]],
    explain: Callable[[Exception, bool], Exception],
) -> AsyncGenerator[T]:
    """Yield the items of an async iterator like `LibraryStream`. asyncio only."""
    source: AsyncIterator[Any] | None = None
    limit = _StreamTime(limits)
    failure: Exception | None = None
    try:
        while failure is None:
            seconds, late = limit.next()
            try:
                source, item = await _astep(source, open_stream, seconds, late)
                over = item is _END
                values = at_end() if over else convert(item)
            except Exception as error:  # noqa: BLE001  # raised below, without the library's exception as its context
                failure = explain(error, not limit.first)
                break
            limit.first = False
            for value in values:
                limit.wait_end = None
                yield value
            if over:
                return
        raise failure
    finally:
        await _arelease(source)


async def _astep(
    source: AsyncIterator[Any] | None,
    open_stream: Callable[[], Awaitable[AsyncIterator[Any]]],
    seconds: float | None,
    late: LibraryTimeout,
) -> tuple[AsyncIterator[Any], object]:
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            if source is None:
                source = await open_stream()
            return source, await anext(source, _END)
    except TimeoutError:
        if limit.expired():
            raise late from None
        raise


async def _arelease(source: object) -> None:
    aclose = getattr(source, "aclose", None)
    if aclose is not None:
        # A cancelled task must release the stream too, but not wait for long.
        with anyio.move_on_after(1, shield=True):
            await aclose()
