"""A provider with its middleware, and the drivers of whole calls: they carry out what a flow asks for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, overload

from fluxibly import driving, provider as providers
from fluxibly._abandoned import end_orphans, orphans
from fluxibly._checks import shown
from fluxibly.async_driver import AsyncDriver
from fluxibly.effects import AttemptEnd, Effect, Flow, Middleware, Perform, Send, Sleep
from fluxibly.flow import compose
from fluxibly.stream import AsyncStream, Stream
from fluxibly.sync_driver import SyncDriver
from fluxibly.types import CallRecord, Chunk, ProviderInfo, Request, Response, Restart

if TYPE_CHECKING:
    from typing import Self

    from fluxibly.provider import AsyncProvider, Provider


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


class _Pipeline:
    """What both pipelines share: the stack, and the beginning and the end of a call."""

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
            raise TypeError(f"a Request is due here, not {shown(request)}; LLM takes prompts")
        if orphans:
            end_orphans()
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
            driving.raise_not_a_response(value, self.middleware)
        elapsed = call.clock() - call.started_at
        if value.elapsed is None:  # fresh from the provider: nobody else has it yet
            _set_state(value, "elapsed", elapsed)
            if call.stats is not None:
                _set_state(value, "stats", call.stats)
            return value
        return value.evolve(elapsed=elapsed, stats=call.stats)


class Pipeline(_Pipeline):
    """A provider behind a stack of middleware, the first outermost. Safe for use from many threads at once.

    Args:
        provider: a `Provider`.
        middleware: the stack.
        framework: its name in logs; by default what the provider's `info` says, else "custom".
        clock: for tests; see `fluxibly.testing.VirtualClock`.
    """

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

    def complete(self, request: Request) -> Response:
        """Ask the provider, through the stack, for its whole response.

        Raises:
            FluxiblyError: or whatever the provider or a middleware raised.
        """
        request = self.begin(request)
        flow = self._run(request)
        error: BaseException | None = None
        try:
            effect = flow.send(None)
            while True:
                outcome: object = None
                try:
                    if type(effect) is Send:
                        outcome = self.provider.complete(effect.request)
                    else:
                        outcome = self.carry_out(effect, flow)
                except BaseException as raised:  # noqa: BLE001  # it goes into the flow
                    error = raised
                try:
                    effect = flow.send(outcome) if error is None else driving.throw(flow, error)
                finally:
                    error = None  # it refers to this frame
        except StopIteration as stop:
            return self.finish(stop.value, request.call)
        except Exception as failure:
            driving.explain(failure, self.middleware)
            raise

    @overload
    def stream(self, request: Request, *, restarts: Literal[False] = False) -> Stream[Chunk]: ...
    @overload
    def stream(self, request: Request, *, restarts: bool) -> Stream[Chunk | Restart]: ...
    def stream(self, request: Request, *, restarts: bool = False) -> Stream[Any]:
        """Ask the provider, through the stack, for a stream. Nothing is sent before the first read.

        Args:
            restarts: also take `Restart` events, so that `Retry(on_interrupt="restart")` may begin the answer anew.

        Raises:
            NotImplementedError: the provider has no `stream`.
        """
        if not hasattr(self.provider, "stream"):
            raise providers.no_stream(self.provider)
        request = self.begin(request, streaming=True, restarts=restarts)
        return Stream(SyncDriver(self, request, self._run(request)))

    def open(self, request: Request) -> Iterable[Chunk | str]:
        """The provider's own stream."""
        stream = self.provider.stream(request)
        if not isinstance(stream, Iterable) or isinstance(stream, str):
            raise TypeError(f"the stream() of {self.info.name} returned {shown(stream)}; make it a generator")
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
        raise driving.unknown_effect(flow, effect)

    def close(self) -> None:
        """Close the provider. Twice is fine; a call after it is a RuntimeError."""
        if not self.closed:
            self.closed = True
            close = getattr(self.provider, "close", None)
            if close is not None:
                close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncPipeline(_Pipeline):
    """A `Pipeline` with the same methods as coroutines, on asyncio and trio. Takes the same middleware.

    A synchronous provider is run in worker threads.
    """

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
            from fluxibly.provider import Threaded

            self.provider = Threaded(cast("Provider", provider))

    async def complete(self, request: Request) -> Response:
        """Ask the provider, through the stack, for its whole response.

        Raises:
            FluxiblyError: or whatever the provider or a middleware raised.
        """
        request = self.begin(request)
        flow = self._run(request)
        error: BaseException | None = None
        try:
            effect = flow.send(None)
            while True:
                outcome: object = None
                try:
                    if type(effect) is Send:
                        outcome = await self.provider.complete(effect.request)
                    else:
                        outcome = await self.carry_out(effect, flow)
                except BaseException as raised:  # noqa: BLE001  # it goes into the flow
                    error = raised
                try:
                    effect = flow.send(outcome) if error is None else driving.throw(flow, error)
                finally:
                    error = None  # it refers to this frame
        except StopIteration as stop:
            return self.finish(stop.value, request.call)
        except Exception as failure:
            driving.explain(failure, self.middleware)
            raise

    @overload
    def stream(self, request: Request, *, restarts: Literal[False] = False) -> AsyncStream[Chunk]: ...
    @overload
    def stream(self, request: Request, *, restarts: bool) -> AsyncStream[Chunk | Restart]: ...
    def stream(self, request: Request, *, restarts: bool = False) -> AsyncStream[Any]:
        """Ask the provider, through the stack, for a stream. Nothing is sent before the first read.

        Args:
            restarts: also take `Restart` events, so that `Retry(on_interrupt="restart")` may begin the answer anew.

        Raises:
            NotImplementedError: the provider has no `stream`.
        """
        if not hasattr(self.provider, "stream"):
            raise providers.no_stream(getattr(self.provider, "wrapped", self.provider))
        request = self.begin(request, streaming=True, restarts=restarts)
        return AsyncStream(AsyncDriver(self, request, self._run(request)))

    def open(self, request: Request) -> AsyncIterable[Chunk | str]:
        """The provider's own stream."""
        stream = self.provider.stream(request)
        if not isinstance(stream, AsyncIterable):
            raise TypeError(f"the stream() of {self.info.name} returned {shown(stream)}; make it an async generator")
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
            from fluxibly.provider import in_thread

            return await in_thread(effect.call)
        raise driving.unknown_effect(flow, effect)

    async def aclose(self) -> None:
        """Close the provider. Twice is fine; a call after it is a RuntimeError."""
        if not self.closed:
            self.closed = True
            aclose = getattr(self.provider, "aclose", None)
            if aclose is not None:
                await aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
