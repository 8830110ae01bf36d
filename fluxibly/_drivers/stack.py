"""A provider with its middleware and a clock: the beginning and the end of a call, and the effects in between."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Iterable
from functools import partial
from typing import Any, Protocol, cast

from fluxibly import provider as providers
from fluxibly._abandoned import end_pending, pending
from fluxibly._checks import kind_of
from fluxibly._drivers.diagnosis import raise_not_a_response, unknown_effect
from fluxibly.flow.compose import compose
from fluxibly.flow.effects import AttemptEnd, Effect, Flow, Middleware, Perform, Sleep
from fluxibly.flow.verbs import await_, run
from fluxibly.provider import AsyncProvider, Provider, Threaded, in_thread
from fluxibly.types import CallRecord, Chunk, ProviderInfo, Request, Response


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


SYSTEM_CLOCK = SystemClock()

# `begin` and `finish` copy a frozen object with a changed field this way, at a fifth of the cost of attrs.evolve.
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
                raise TypeError(
                    f"a middleware: expected a generator function or an object with __call__, got {layer!r}"
                )
            if isinstance(layer, type):
                raise TypeError(f"a middleware is an object; {layer.__name__} is a class: write {layer.__name__}()")
        self._run = compose(self.middleware)

    def __repr__(self) -> str:
        layers = ", ".join(map(repr, self.middleware))
        return f"{type(self).__name__}({self.info.name}, [{layers}])"

    def begin(self, request: Request, *, streaming: bool = False, restarts: bool = False) -> Request:
        """Return the request of one call: a shallow copy with its own record."""
        if self.closed:
            raise RuntimeError(f"this {type(self).__name__} is closed; make a new one")
        if not isinstance(request, Request):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected a Request, got {kind_of(request)}; LLM takes prompts")
        if pending:
            end_pending()
        call = CallRecord()
        call.provider = self.info
        call.layers = self.middleware
        call.clock = self._now
        call.started_at = self._now()
        if streaming:
            call.streaming = True
            call.restarts = restarts
        state = request.__dict__.copy()
        name, value = state.popitem()  # CPython then gives the copy its own table of keys, in which lookups are fast
        state[name] = value
        state["call"] = call
        copy = _new(request.__class__)
        _set_state(copy, "__dict__", state)
        return copy

    def finish(self, value: object, call: CallRecord) -> Response:
        """Return the response of a successful call, with its elapsed time and statistics."""
        if not isinstance(value, Response):
            raise_not_a_response(value, self.middleware)
        elapsed = call.clock() - call.started_at
        if value.elapsed is None:  # fresh from the provider, so no other code refers to it yet
            _set_state(value, "elapsed", elapsed)
            if call.stats is not None:
                _set_state(value, "stats", call.stats)
            return value
        return value.evolve(elapsed=elapsed, stats=call.stats)


class SyncStack(Stack):
    """A stack with a provider that blocks."""

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
        """Return the provider's own stream."""
        stream = self.provider.stream(request)
        if not isinstance(stream, Iterable) or isinstance(stream, str):
            raise TypeError(f"the stream() of {self.info.name} returned {kind_of(stream)}; make it a generator")
        return cast("Iterable[Chunk | str]", stream)

    def carry_out(self, effect: Effect, flow: Flow[Response]) -> object:
        """Carry out an effect, other than a call of the provider, and return its outcome."""
        if isinstance(effect, AttemptEnd):  # nothing to do, because the layers have seen it
            return None
        if isinstance(effect, Sleep):
            self.clock.sleep(effect.seconds)
            return None
        if isinstance(effect, Perform):
            return run(effect)
        raise unknown_effect(flow, effect)


class AsyncStack(Stack):
    """A stack with a provider that is awaited. A synchronous provider runs in worker threads."""

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
        """Return the provider's own stream."""
        stream = self.provider.stream(request)
        if not isinstance(stream, AsyncIterable):
            raise TypeError(f"the stream() of {self.info.name} returned {kind_of(stream)}; make it an async generator")
        return cast("AsyncIterable[Chunk | str]", stream)

    async def carry_out(self, effect: Effect, flow: Flow[Response]) -> object:
        """Carry out an effect, other than a call of the provider, and return its outcome."""
        if isinstance(effect, AttemptEnd):  # nothing to do, because the layers have seen it
            return None
        if isinstance(effect, Sleep):
            await self.clock.asleep(effect.seconds)
            return None
        if isinstance(effect, Perform):
            if effect.acall is not None:
                return await await_(effect.acall)
            return await in_thread(partial(run, effect))
        raise unknown_effect(flow, effect)
