"""`Pipeline` and `AsyncPipeline`: a provider with its middleware, and the loops that carry a whole call out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from fluxibly import provider as providers
from fluxibly._drivers import stepping
from fluxibly._drivers.diagnosis import explain
from fluxibly._drivers.stack import SYSTEM_CLOCK as SYSTEM_CLOCK, AsyncStack, Clock as Clock, SyncStack
from fluxibly._drivers.streams import AsyncStreamDriver, SyncStreamDriver
from fluxibly.flow.effects import Send
from fluxibly.stream import AsyncStream, Stream
from fluxibly.types import Chunk, Request, Response, Restart

if TYPE_CHECKING:
    from typing import Self


class Pipeline(SyncStack):
    """A provider behind a stack of middleware, the first outermost. Safe for use from many threads at once.

    Args:
        provider: a `Provider`.
        middleware: the stack.
        framework: its name in logs; by default what the provider's `info` says, else "custom".
        clock: for tests; see `fluxibly.testing.VirtualClock`.
    """

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
                    effect = flow.send(outcome) if error is None else stepping.throw(flow, error)
                finally:
                    error = None  # it refers to this frame
        except StopIteration as stop:
            return self.finish(stop.value, request.call)
        except Exception as failure:
            explain(failure, self.middleware)
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
        return Stream(SyncStreamDriver(self, request, self._run(request)))

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


class AsyncPipeline(AsyncStack):
    """A `Pipeline` with the same methods as coroutines, on asyncio and trio. Takes the same middleware.

    A synchronous provider is run in worker threads.
    """

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
                    effect = flow.send(outcome) if error is None else stepping.throw(flow, error)
                finally:
                    error = None  # it refers to this frame
        except StopIteration as stop:
            return self.finish(stop.value, request.call)
        except Exception as failure:
            explain(failure, self.middleware)
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
        return AsyncStream(AsyncStreamDriver(self, request, self._run(request)))

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
