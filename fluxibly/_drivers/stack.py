"""A provider with its middleware and a clock: how a call begins and ends, and what a driver asks for meanwhile."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Iterable
from typing import Any, Protocol, cast

from fluxibly import provider as providers
from fluxibly._abandoned import end_pending, pending
from fluxibly._checks import kind_of
from fluxibly._drivers.diagnosis import raise_not_a_response, unknown_effect
from fluxibly.flow.compose import compose
from fluxibly.flow.effects import AttemptEnd, Effect, Flow, Middleware, Perform, Sleep
from fluxibly.provider import AsyncProvider, Provider, Threaded, in_thread
from fluxibly.types import CallRecord, Chunk, ProviderInfo, Request, Response


class Clock(Protocol):
    """Where a pipeline's time comes from. Times are seconds of a monotonic clock."""

    def now(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...
    async def asleep(self, seconds: float, /) -> None: ...


class SystemClock:
    """The real time."""

    now = staticmethod(time.perf_counter)
    sleep = staticmethod(time.sleep)

    async def asleep(self, seconds: float, /) -> None:
        """Wait, on asyncio or trio."""
        import anyio

        await anyio.sleep(seconds)


SYSTEM_CLOCK = SystemClock()

# How `begin` and `finish` copy a frozen object with one field changed: a fifth of what attrs.evolve costs.
_new = object.__new__
_set_state = object.__setattr__


class Stack:
    """A provider behind its middleware, and the beginning and the end of a call."""

    def __init__(
        self,
        provider: object,
        middleware: Iterable[Middleware] = (),
        *,
        framework: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        providers.check(provider)
        self.provider: Any = provider
        self.middleware: tuple[Middleware, ...] = tuple(middleware)
        self.info: ProviderInfo = providers.info_of(provider, framework)
        self.clock = clock
        self._now = clock.now
        self.closed = False
        for layer in self.middleware:
            if not callable(layer):
                raise TypeError(f"a middleware is a generator function or an object with __call__, not {layer!r}")
            if isinstance(layer, type):
                raise TypeError(f"a middleware is an object; {layer.__name__} is a class: write {layer.__name__}()")
        self._run = compose(self.middleware)

    def __repr__(self) -> str:
        layers = ", ".join(map(repr, self.middleware))
        return f"{type(self).__name__}({self.info.name}, [{layers}])"

    def begin(self, request: Request, *, streaming: bool = False, restarts: bool = False) -> Request:
        """The request of one call: a shallow copy with a record of its own."""
        if self.closed:
            raise RuntimeError(f"this {type(self).__name__} is closed; make a new one")
        if not isinstance(request, Request):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected a Request, got {kind_of(request)}; LLM takes prompts")
        if pending:
            end_pending()
        call = CallRecord()
        call.provider = self.info
        call.clock = self._now
        call.started_at = self._now()
        if streaming:
            call.streaming = True
            call.restarts = restarts
        state = request.__dict__.copy()
        name, value = state.popitem()  # CPython then gives the copy a table of its own, in which lookups are fast
        state[name] = value
        state["call"] = call
        copy = _new(request.__class__)
        _set_state(copy, "__dict__", state)
        return copy

    def finish(self, value: object, call: CallRecord) -> Response:
        """The response of a call that succeeded."""
        if not isinstance(value, Response):
            raise_not_a_response(value, self.middleware)
        elapsed = call.clock() - call.started_at
        if value.elapsed is None:  # fresh from the provider: nobody else has it yet
            _set_state(value, "elapsed", elapsed)
            if call.stats is not None:
                _set_state(value, "stats", call.stats)
            return value
        return value.evolve(elapsed=elapsed, stats=call.stats)


class SyncStack(Stack):
    """A stack whose provider blocks."""

    def __init__(
        self,
        provider: Provider,
        middleware: Iterable[Middleware] = (),
        *,
        framework: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(provider, middleware, framework=framework, clock=clock)
        if providers.is_async(provider):
            raise TypeError(f"the provider {type(provider).__name__} is asynchronous; use AsyncPipeline or AsyncLLM")

    def open(self, request: Request) -> Iterable[Chunk | str]:
        """The provider's own stream."""
        stream = self.provider.stream(request)
        if not isinstance(stream, Iterable) or isinstance(stream, str):
            raise TypeError(f"the stream() of {self.info.name} returned {kind_of(stream)}; make it a generator")
        return cast("Iterable[Chunk | str]", stream)

    def carry_out(self, effect: Effect, flow: Flow[Response]) -> object:
        """Do what an effect asks for, other than to ask the provider."""
        if isinstance(effect, AttemptEnd):  # there is nothing to do: the layers have seen it
            return None
        if isinstance(effect, Sleep):
            self.clock.sleep(effect.seconds)
            return None
        if isinstance(effect, Perform):
            return effect.call()
        raise unknown_effect(flow, effect)


class AsyncStack(Stack):
    """A stack whose provider is awaited. A synchronous one is run in worker threads."""

    def __init__(
        self,
        provider: AsyncProvider | Provider,
        middleware: Iterable[Middleware] = (),
        *,
        framework: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(provider, middleware, framework=framework, clock=clock)
        if not providers.is_async(provider):
            self.provider = Threaded(cast("Provider", provider))

    def open(self, request: Request) -> AsyncIterable[Chunk | str]:
        """The provider's own stream."""
        stream = self.provider.stream(request)
        if not isinstance(stream, AsyncIterable):
            raise TypeError(f"the stream() of {self.info.name} returned {kind_of(stream)}; make it an async generator")
        return cast("AsyncIterable[Chunk | str]", stream)

    async def carry_out(self, effect: Effect, flow: Flow[Response]) -> object:
        """Do what an effect asks for, other than to ask the provider."""
        if isinstance(effect, AttemptEnd):  # there is nothing to do: the layers have seen it
            return None
        if isinstance(effect, Sleep):
            await self.clock.asleep(effect.seconds)
            return None
        if isinstance(effect, Perform):
            if effect.acall is not None:
                return await effect.acall()
            return await in_thread(effect.call)
        raise unknown_effect(flow, effect)
