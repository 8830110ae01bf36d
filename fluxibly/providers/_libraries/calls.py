"""Calls to a library that sends the requests itself, with time limits, and the configuration for the library.

A synchronous call runs in its own thread. When the time is up the caller stops waiting, and the thread ends when the
library returns. An asynchronous call is cancelled.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, TypeVar

import anyio
import attrs

from fluxibly._threads import NotInTime, Worker
from fluxibly.config import identity_of
from fluxibly.errors import AuthenticationError, ConfigError, Phase
from fluxibly.limits import KEEP_ALIVES, ChunkWaits, Leash, Timeouts, time_left
from fluxibly.providers._libraries.services import server_of
from fluxibly.types import ProviderInfo

if TYPE_CHECKING:
    from fluxibly.config import LLMConfig
    from fluxibly.types import CallRecord, Chunk


class LibraryTimeout(Exception):  # it never leaves the providers
    """An expired time limit of fluxibly.

    `phase` names the limit of `seconds`. `kept_alive`: items came, but without output. `strict`: a middleware has set the
    limit, and no item without output restarts it. `leash`: that of the call, which knows who has set the limit.
    """

    def __init__(
        self,
        phase: Phase,
        seconds: float,
        *,
        kept_alive: bool = False,
        strict: bool = False,
        leash: Leash | None = None,
    ) -> None:
        super().__init__(phase, seconds)
        self.phase: Phase = phase
        self.seconds = seconds
        self.kept_alive = kept_alive
        self.strict = strict
        self.leash = leash


_Limit: TypeAlias = tuple[float | None, LibraryTimeout]
"""How long a wait may take, in seconds, and the exception to raise after that. None: no limit."""


def _soonest(limits: Iterable[_Limit]) -> _Limit:
    """Return the limit that ends a wait first.

    Raises:
        LibraryTimeout: it has passed.
    """
    seconds, late = min(limits, key=lambda limit: math.inf if limit[0] is None else limit[0])
    if seconds is not None and seconds <= 0:
        raise late
    return seconds, late


@attrs.frozen(kw_only=True)
class LibraryLimits:
    """The time limits for a library, in seconds: whole call, first chunk of a stream, each next chunk, whole stream.

    `deadline` is a time of `time.monotonic`. `leash` has the limits of middleware on the chunks of a stream.
    """

    call: float | None = None
    first: float | None = None
    idle: float | None = None
    stream: float | None = None
    deadline: float | None = None
    leash: Leash | None = None

    @classmethod
    def of(cls, config: LLMConfig) -> LibraryLimits:
        return cls._of(config.timeouts, config.stream_total)

    @classmethod
    def _of(cls, times: Timeouts, stream_total: float | None) -> LibraryLimits:
        first = None if times.first_byte is None or times.connect is None else times.first_byte + times.connect
        return cls(call=times.total, first=first, idle=times.idle, stream=stream_total)

    def of_call(self, call: CallRecord) -> LibraryLimits:
        """Return the limits of an attempt, which begins now: the call may have others, and middleware tighten them."""
        times, left = call.timeouts, time_left(call.leash, call.clock)
        limits = self if times is None else self._of(times, times.stream_total)
        deadline = None if left is None else time.monotonic() + left
        return attrs.evolve(limits, deadline=deadline, leash=call.leash)

    def for_whole(self) -> _Limit:
        """Return the limit of a whole call.

        Raises:
            LibraryTimeout: the deadline has passed.
        """
        return _soonest([self.for_deadline(time.monotonic()), (self.call, LibraryTimeout("total", self.call or 0.0))])

    def for_deadline(self, now: float) -> _Limit:
        left = None if self.deadline is None else self.deadline - now
        return left, LibraryTimeout("deadline", left or 0.0, leash=self.leash)


class _StreamTime:
    """The time limits of one stream, from now on. `first`: no item has arrived yet."""

    def __init__(self, limits: LibraryLimits) -> None:
        self._limits = limits
        self._started = time.monotonic()
        self._wait_end: float | None = None
        """The end of the wait for output, even if items without output arrive; None after output."""
        self._strict = None if limits.leash is None else ChunkWaits(limits.leash)
        self.first = True

    def next(self) -> _Limit:
        """Return the limit of the next item.

        Raises:
            LibraryTimeout: no time is left.
        """
        limits, now = self._limits, time.monotonic()
        found = [limits.for_deadline(now)]
        if self.first:
            found.append((limits.first, LibraryTimeout("first_byte", limits.first or 0.0)))
        elif limits.idle is not None:
            if self._wait_end is None:
                self._wait_end = now + KEEP_ALIVES * limits.idle
            found.append((limits.idle, LibraryTimeout("idle", limits.idle)))
            kept_alive = LibraryTimeout("idle", KEEP_ALIVES * limits.idle, kept_alive=True)
            found.append((self._wait_end - now, kept_alive))
        if limits.stream is not None:
            found.append((self._started + limits.stream - now, LibraryTimeout("total", limits.stream)))
        if self._strict is not None and (end := self._strict.end(now)) is not None:
            late = LibraryTimeout(self._strict.phase, self._strict.limit or 0.0, strict=True, leash=limits.leash)
            found.append((end - now, late))
        return _soonest(found)

    def came(self, chunks: Collection[Chunk]) -> None:
        """Note the chunks of an item."""
        self.first = False
        if chunks:
            self._wait_end = None
            if self._strict is not None:
                self._strict.came(time.monotonic(), output=any(chunk.has_output for chunk in chunks))


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
        identity=identity_of(f"{framework} {telemetry_name}", None if config is None else config.api_base, config),
    )


T = TypeVar("T")
_END: Final = object()


def call_within(call: Callable[[], T], limits: LibraryLimits) -> T:
    """Return the result of `call`.

    Raises:
        LibraryTimeout: `call` took too long, or the deadline passed before it.
    """
    limit = limits.for_whole()
    if limit[0] is None:
        return call()
    worker = Worker()
    try:
        return _run_within(worker, call, limit)
    finally:
        worker.stop(_nothing)


def _run_within(worker: Worker, call: Callable[[], T], limit: _Limit) -> T:
    seconds, late = limit
    try:
        return worker.run(call, seconds)
    except NotInTime:
        raise late from None


def _nothing() -> None:
    return None


class OpenStream(NamedTuple):
    """A library's stream: its items, a function that releases it, and a function that ends a read in another thread."""

    items: Iterator[Any]
    close: Callable[[], object]
    cut: Callable[[], object]


class LibraryStream:
    """The chunks of a library's own iterator, whose items have time limits. `close` releases the library's stream.

    Args:
        open_stream: starts the call.
        limits: the time limits.
        convert: returns the chunks of an item.
        at_end: returns the chunks after the last item.
        explain: converts an exception to fluxibly's. The second argument says whether an item had arrived.
    """

    def __init__(
        self,
        open_stream: Callable[[], OpenStream],
        limits: LibraryLimits,
        convert: Callable[[Any], Iterable[Chunk]],
        at_end: Callable[[], Iterable[Chunk]],
        explain: Callable[[Exception, bool], Exception],
    ) -> None:
        self._open = open_stream
        self._limits = limits
        self._convert = convert
        self._at_end = at_end
        self._explain = explain
        self._opened: OpenStream | None = None
        self._worker: Worker | None = None
        self._time = _StreamTime(limits)
        self._over = False
        self._waiting: deque[Chunk] = deque()

    def __iter__(self) -> LibraryStream:
        return self

    def __next__(self) -> Chunk:
        while not self._waiting and not self._over:
            self._waiting.extend(self._step())
        if self._waiting:
            return self._waiting.popleft()
        self.close()
        raise StopIteration

    def _step(self) -> Collection[Chunk]:
        if self._worker is None:
            self._worker = Worker()
            self._time = _StreamTime(self._limits)
        try:
            item = _run_within(self._worker, self._read, self._time.next())
            self._over = item is _END
            chunks = list(self._at_end() if self._over else self._convert(item))
        except Exception as error:  # noqa: BLE001  # raised below, without the library's exception as its context
            failure = self._explain(error, not self._time.first)
        else:
            self._time.came(chunks)
            return chunks
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


async def acall_within(call: Callable[[], Awaitable[T]], limits: LibraryLimits) -> T:
    """Return the result of `call`. asyncio only.

    Raises:
        LibraryTimeout: `call` took too long, or the deadline passed before it.
    """
    seconds, late = limits.for_whole()
    return await _awaited(call, seconds, late)


async def _awaited(call: Callable[[], Awaitable[T]], seconds: float | None, late: LibraryTimeout) -> T:
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await call()
    except TimeoutError:
        if limit.expired():
            raise late from None
        raise


async def library_stream(
    open_stream: Callable[[], Awaitable[AsyncIterator[Any]]],
    limits: LibraryLimits,
    convert: Callable[[Any], Iterable[Chunk]],
    at_end: Callable[[], Iterable[Chunk]],
    explain: Callable[[Exception, bool], Exception],
) -> AsyncGenerator[Chunk]:
    """Yield the chunks of an async iterator like `LibraryStream`. asyncio only."""
    source = _AsyncSource(open_stream)
    limit = _StreamTime(limits)
    failure: Exception | None = None
    try:
        while failure is None:
            try:
                seconds, late = limit.next()
                item = await _awaited(source.next, seconds, late)
                over = item is _END
                chunks = list(at_end() if over else convert(item))
            except Exception as error:  # noqa: BLE001  # raised below, without the library's exception as its context
                failure = explain(error, not limit.first)
                break
            limit.came(chunks)
            for chunk in chunks:
                yield chunk
            if over:
                return
        raise failure
    finally:
        await source.release()


class _AsyncSource:
    """A library's asynchronous stream, which the first read opens."""

    def __init__(self, open_stream: Callable[[], Awaitable[AsyncIterator[Any]]]) -> None:
        self._open = open_stream
        self._items: AsyncIterator[Any] | None = None

    async def next(self) -> object:
        if self._items is None:
            self._items = await self._open()
        return await anext(self._items, _END)

    async def release(self) -> None:
        aclose = getattr(self._items, "aclose", None)
        if aclose is not None:
            # A cancelled task must release the stream too, but not wait for long.
            with anyio.move_on_after(1, shield=True):
                await aclose()
