"""A provider with its middleware and a clock: the beginning and the end of a call, and the effects in between."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from fluxibly import provider as providers
from fluxibly._abandoned import end_pending, pending
from fluxibly._checks import kind_of
from fluxibly._drivers.diagnosis import raise_not_a_response, unknown_effect
from fluxibly._drivers.endings import arun, arun_endings, arun_now, run_endings
from fluxibly.calls import UNKNOWN, Cleanup, Targets
from fluxibly.flow.compose import compose, deadline_exceeded, to_response
from fluxibly.flow.effects import (
    Adopt,
    AskEnd,
    Awaited,
    Drop,
    Effect,
    Flow,
    Middleware,
    More,
    Perform,
    Send,
    Sleep,
    Start,
    Wait,
)
from fluxibly.flow.shown import repr_of_layer
from fluxibly.flow.verbs import run
from fluxibly.limits import Leash, Timeouts, time_left, timeouts_of_call
from fluxibly.provider import AsyncProvider, Provider, StreamingProvider
from fluxibly.types import CallRecord, Chunk, ProviderInfo, Request, Response, Usage

if TYPE_CHECKING:
    from typing import Self


class Clock(Protocol):
    """The source of a pipeline's time. Times are seconds of a monotonic clock."""

    def now(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...
    async def asleep(self, seconds: float, /) -> None: ...


class SystemClock:
    """The clock of the operating system."""

    now = staticmethod(time.perf_counter)
    sleep = staticmethod(time.sleep)

    async def asleep(self, seconds: float, /) -> None:
        """Wait, on asyncio or trio."""
        import anyio

        await anyio.sleep(seconds)

    def pause(self, seconds: float, until: Awaited, /) -> None:
        """Wait, at most until a signal is set."""
        until.wait(seconds)

    async def apause(self, seconds: float, until: Awaited, /) -> None:
        """Do as `pause`, on asyncio or trio."""
        await until.await_(seconds)


SYSTEM_CLOCK = SystemClock()

# `begin` and `finish` copy a frozen object with a changed field this way, at a fifth of the cost of attrs.evolve.
_new = object.__new__
_set_state = object.__setattr__
_NOTHING_SPENT = Usage(input_tokens=0, output_tokens=0)


class TargetProviders(Targets, Protocol):
    """The providers of a pipeline's targets. The class itself stands further out, because it makes providers by name."""

    def provider_of(self, target: object, /) -> Any: ...
    def take_all(self) -> Iterable[Any]: ...


class Stack:
    """A provider behind its middleware, and the beginning and the end of a call."""

    asynchronous: bool
    targets: TargetProviders

    def __init__(
        self,
        provider: object,
        middleware: Iterable[Middleware] = (),
        *,
        framework: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        providers.check(provider)
        self.provider: Any = providers.for_pipeline(provider, asynchronous=self.asynchronous)
        self.info: ProviderInfo = providers.info_of(provider, framework)
        self.targets = self.make_targets()
        self.clock = clock
        self._now = clock.now
        self.closed = False
        self._set_middleware(middleware)

    def _set_middleware(self, middleware: Iterable[Middleware]) -> None:
        self.middleware: tuple[Middleware, ...] = tuple(middleware)
        for layer in self.middleware:
            if not callable(layer):
                raise TypeError(
                    f"a middleware: expected a generator function or an object with __call__, got {layer!r}"
                )
            if isinstance(layer, type):
                raise TypeError(f"a middleware is an object; {layer.__name__} is a class: write {layer.__name__}()")
        self._run = compose(self.middleware)
        self.counts_spent = any(getattr(layer, "counts_spent", False) is True for layer in self.middleware)
        """Whether a layer counts what every attempt spends, of other layers too."""
        self.simulates_stream = any(getattr(layer, "simulates_stream", False) is True for layer in self.middleware)
        """Whether a provider without `stream` answers a stream with its whole answer, because a layer asks for that."""

    def make_targets(self) -> TargetProviders:
        """Return the providers of the targets that requests may name."""
        raise NotImplementedError

    def with_middleware(self, middleware: Iterable[Middleware]) -> Self:
        """Return a pipeline with another stack before the same provider, which belongs to this pipeline: close this."""
        other = copy(self)
        other._set_middleware(middleware)
        return other

    def __repr__(self) -> str:
        layers = ", ".join(map(repr_of_layer, self.middleware))
        return f"{type(self).__name__}({self.info.name}, [{layers}])"

    def begin(
        self,
        request: Request,
        *,
        streaming: bool = False,
        restarts: bool = False,
        timeout: float | Timeouts | None = None,
    ) -> Request:
        """Return the request of one call: a shallow copy with its own record."""
        if self.closed:
            raise RuntimeError(f"this {type(self).__name__} is closed; make a new one")
        if not isinstance(request, Request):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected a Request, got {kind_of(request)}; LLM takes prompts")
        if pending:
            end_pending()
        call = CallRecord()
        call.provider = self.info
        call.targets = self.targets
        call.layers = self.middleware
        call.clock = self._now
        call.started_at = self._now()
        if self.counts_spent:
            call.when_spent = []
        if streaming:
            call.streaming = True
            call.restarts = restarts
        if timeout is not None:
            call.timeouts = timeouts_of_call(timeout, streaming=streaming)
            if streaming or isinstance(timeout, Timeouts):
                call.leash = Leash()  # without a limit of its own, but it says that the call has limits (`timeouts`)
            else:
                call.leash = Leash(deadline=call.started_at + timeout, by=f"timeout={timeout:g}")
        state = request.__dict__.copy()
        name, value = state.popitem()  # CPython then gives the copy its own table of keys, in which lookups are fast
        state[name] = value
        state["call"] = call
        if request.target is not None and request.call.provider is not UNKNOWN:
            state["target"] = None  # it was for the pipeline around this one, from which the request comes
        copy = _new(request.__class__)
        _set_state(copy, "__dict__", state)
        return copy

    def finish(self, value: object, call: CallRecord) -> Response:
        """Return the response of a successful call, with the measurements of the call."""
        if not isinstance(value, Response):
            raise_not_a_response(value, self.middleware)
        if value.elapsed is not None:  # only if it is fresh from the provider, no other code refers to it yet
            value = value.evolve(stats=None)
        state = value.__dict__
        state["elapsed"] = call.clock() - call.started_at
        if call.stats is not None:
            state["stats"] = call.stats
        if call.cost is not None:
            state["cost"] = call.cost
        if value.provider is None:
            state["provider"] = call.provider.telemetry_name
        spent = call.spent
        if len(spent) == 1:
            state["total_usage"] = spent[0].usage
        else:
            state["total_usage"] = Usage.sum([each.usage for each in spent]) if spent else _NOTHING_SPENT
        return value

    def provider_of(self, request: Request) -> Any:
        """Return the provider that a request goes to."""
        return self.provider if request.target is None else self.targets.provider_of(request.target)

    def stream_of(self, request: Request) -> Any:
        """Return the function of a request's provider that opens a stream."""
        provider = self.provider_of(request)
        if hasattr(provider, "stream"):
            return provider.stream
        if self.simulates_stream:
            return partial(self.whole_stream, provider)
        raise providers.no_stream(provider)

    def whole_stream(self, provider: Any, request: Request) -> Any:
        """Return the whole answer of a provider as a stream of one item."""
        raise NotImplementedError

    def make_lanes(self) -> Any:
        """Return the lanes of a call, in which its branches go on."""
        raise NotImplementedError

    def lanes_of(self, call: CallRecord) -> Any:
        """Return the lanes of a call, which are made when it first needs them. A test's clock may have lanes of its own."""
        if call.lanes is None:
            of_clock: Any = getattr(self.clock, "alanes" if self.asynchronous else "lanes", None)
            call.lanes = self.make_lanes() if of_clock is None else of_clock(self)
        return call.lanes

    def _until_deadline(self, seconds: float, call: CallRecord) -> tuple[float, bool]:
        """Return how long a wait may take, and whether the deadline of the call then ends it."""
        left = time_left(call.leash, call.clock)
        return (seconds, False) if left is None or seconds < left else (max(left, 0.0), True)

    def _slept(self, until: Awaited | None, call: CallRecord, *, late: bool) -> bool:
        """Return whether the signal of a wait that is over is set."""
        woken = until is not None and until.is_set
        if late and not woken:
            raise deadline_exceeded(call, call.sent_model)
        return woken

    @contextmanager
    def own_io(self, call: CallRecord) -> Generator[None]:
        """Run a middleware's own I/O, which is not part of the attempt that may be under way."""
        claim = call.claim
        if claim is None:
            yield
            return
        token = claim.suspend()
        try:
            yield
        finally:
            claim.leave(token)


class SyncStack(Stack):
    """A stack with a provider that blocks."""

    asynchronous = False

    def __init__(
        self,
        provider: Provider | StreamingProvider,
        middleware: Iterable[Middleware] = (),
        *,
        framework: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(provider, middleware, framework=framework, clock=clock)

    def whole(self, effect: Send) -> object:
        """Ask a provider for a whole answer, within the limits of the call, and return it."""
        request = effect.request
        provider = self.provider_of(request)
        effect.sent = True
        if request.call.leash is None or providers.obeys(provider):
            return provider.complete(request)
        from fluxibly._drivers.limited import call_in_time  # late, because few calls have limits

        return call_in_time(self.clock, request, lambda: provider.complete(request))

    def open(self, effect: Send) -> Iterable[Chunk | str]:
        """Return the provider's own stream, within the limits of the call."""
        request = effect.request
        stream = self.stream_of(request)
        effect.sent = True

        def opened() -> Iterable[Chunk | str]:
            items: Iterable[Chunk | str] = providers.items_of(stream(request), request.call.provider.name)
            return items

        if request.call.leash is None or providers.obeys(self.provider_of(request)):
            return opened()
        from fluxibly._drivers.limited import LimitedStream  # late, as above

        return LimitedStream(self.clock, request, opened)

    def whole_stream(self, provider: Any, request: Request) -> Generator[object]:
        yield to_response(provider.complete(request), f"the provider {request.call.provider.name}")

    def carry_out(self, effect: Effect, flow: Flow[Response], call: CallRecord) -> object:
        """Carry out an effect, other than a call of the provider, and return its outcome."""
        if isinstance(effect, More):  # nothing to do: a whole call has no chunks
            return None
        if isinstance(effect, Sleep):
            return self.sleep(effect, effect.within or call)
        if isinstance(effect, Perform):
            with self.own_io(effect.within or call):
                return run(effect)
        if isinstance(effect, AskEnd):
            run_endings(effect.request.call)
            return None
        if isinstance(effect, (Send, Start, Wait, Drop)):
            return self.lanes_of(call).carry_out(effect)
        if isinstance(effect, Adopt):
            self.lanes_of(call).adopt(effect)
            return None
        raise unknown_effect(flow, effect)

    def make_lanes(self) -> Any:
        """Return the lanes of a call."""
        from fluxibly._drivers.sync_lanes import SyncLanes  # late, because few calls have several branches

        return SyncLanes(self)

    def clean_up(self, call: CallRecord) -> None:
        """End the branches that are left of a call, and run its cleanups."""
        try:
            if call.lanes is not None:
                call.lanes.end()
        finally:
            call.lanes = None  # it holds the provider, and the record may be part of a cycle
            if call.endings:
                run_endings(call)

    def sleep(self, effect: Sleep, call: CallRecord) -> bool:
        """Wait, at most until the deadline of the call. Return whether the signal that the wait is for is set.

        Raises:
            DeadlineExceeded: the deadline has passed.
        """
        until = effect.until
        seconds, late = self._until_deadline(effect.seconds, call)
        pause: Any = getattr(self.clock, "pause", None)
        if until is not None and pause is not None:
            pause(seconds, until)
        elif until is None or not until.is_set:
            self.clock.sleep(seconds)  # in a test's time, all of it passes at once
        return self._slept(until, call, late=late)


class AsyncStack(Stack):
    """A stack with a provider that is awaited. A synchronous provider runs in worker threads."""

    asynchronous = True

    def __init__(
        self,
        provider: AsyncProvider | Provider | StreamingProvider,
        middleware: Iterable[Middleware] = (),
        *,
        framework: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(provider, middleware, framework=framework, clock=clock)

    async def whole(self, effect: Send) -> object:
        """Ask a provider for a whole answer, within the limits of the call, and return it."""
        request = effect.request
        provider = self.provider_of(request)
        effect.sent = True
        if request.call.leash is None or providers.obeys(provider):
            return await provider.complete(request)
        from fluxibly._drivers.limited import acall_in_time  # late, as above

        return await acall_in_time(self.clock, request, lambda: provider.complete(request))

    def open(self, effect: Send) -> AsyncIterable[Chunk | str]:
        """Return the provider's own stream, within the limits of the call."""
        request = effect.request
        open_stream = self.stream_of(request)
        effect.sent = True
        stream = open_stream(request)
        if not isinstance(stream, AsyncIterable):
            name = request.call.provider.name
            raise TypeError(f"the stream() of {name} returned {kind_of(stream)}; make it an async generator")
        items = cast("AsyncIterable[Chunk | str]", stream)
        if request.call.leash is None or providers.obeys(self.provider_of(request)):
            return items
        from fluxibly._drivers.limited import AsyncLimitedStream  # late, as above

        return AsyncLimitedStream(self.clock, request, items)

    async def whole_stream(self, provider: Any, request: Request) -> AsyncGenerator[object]:
        yield to_response(await provider.complete(request), f"the provider {request.call.provider.name}")

    async def carry_out(self, effect: Effect, flow: Flow[Response], call: CallRecord) -> object:
        """Carry out an effect, other than a call of the provider, and return its outcome."""
        if isinstance(effect, More):  # nothing to do: a whole call has no chunks
            return None
        if isinstance(effect, Sleep):
            return await self.sleep(effect, effect.within or call)
        if isinstance(effect, Perform):
            with self.own_io(effect.within or call):
                return await self.perform(effect, effect.within or call)
        if isinstance(effect, AskEnd):
            await arun_endings(effect.request.call)
            return None
        if isinstance(effect, (Send, Start, Wait, Drop)):
            return await self.lanes_of(call).carry_out(effect)
        if isinstance(effect, Adopt):
            await self.lanes_of(call).adopt(effect)
            return None
        raise unknown_effect(flow, effect)

    def make_lanes(self) -> Any:
        """Return the lanes of a call."""
        from fluxibly._drivers.async_lanes import AsyncLanes  # late, as above

        return AsyncLanes(self)

    async def clean_up(self, call: CallRecord) -> None:
        """End the branches that are left of a call, and run its cleanups."""
        try:
            if call.lanes is not None:
                await call.lanes.end()
        finally:
            call.lanes = None  # it holds the provider, and the record may be part of a cycle
            if call.endings:
                await arun_endings(call)

    async def sleep(self, effect: Sleep, call: CallRecord) -> bool:
        """Wait, at most until the deadline of the call; see `SyncStack.sleep`."""
        until = effect.until
        seconds, late = self._until_deadline(effect.seconds, call)
        pause: Any = getattr(self.clock, "apause", None)
        if until is not None and pause is not None:
            await pause(seconds, until)
        elif until is None or not until.is_set:
            await self.clock.asleep(seconds)  # as there
        return self._slept(until, call, late=late)

    async def perform(self, effect: Perform, call: CallRecord) -> object:
        """Do a middleware's own I/O, at most until the deadline of the call."""
        if isinstance(effect, Cleanup):
            await arun_now(effect)
            return None
        left = time_left(call.leash, call.clock)
        if left is None:
            return await arun(effect, call)
        from fluxibly._drivers.limited import NotInTime, awithin  # late, as above

        try:
            return await awithin(self.clock, left, partial(arun, effect, call))
        except NotInTime:
            raise deadline_exceeded(call, call.sent_model) from call.last_error
