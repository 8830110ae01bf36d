"""`Pipeline` and `AsyncPipeline`: a provider with its middleware, and the loops that carry out a whole call."""

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
    """A provider behind a stack of middleware. Many threads may use it at once.

    Args:
        provider: a `Provider`.
        middleware: the stack, outermost first.
        framework: the framework's name in logs; by default the name in the provider's `info`, else "custom".
        clock: a clock for tests; see `fluxibly.testing.VirtualClock`.
    """

    def complete(self, request: Request) -> Response:
        """Send a request through the stack to the provider, and return the whole response.

        Raises:
            FluxiblyError: the call failed. Any other exception of the provider or a middleware is raised unchanged.
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
        """Return a stream of the provider's response, through the stack. The first read sends the request.

        Args:
            restarts: also yield `Restart` events, so that `Retry(on_interrupt="restart")` may begin the answer again.

        Raises:
            NotImplementedError: the provider has no `stream`.
        """
        if not hasattr(self.provider, "stream"):
            raise providers.no_stream(self.provider)
        request = self.begin(request, streaming=True, restarts=restarts)
        return Stream(SyncStreamDriver(self, request, self._run(request)))

    def close(self) -> None:
        """Close the provider. A second close does nothing; a later call raises a RuntimeError."""
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
    """A `Pipeline` with asynchronous methods, for asyncio and trio. It takes the same middleware.

    A synchronous provider runs in worker threads.
    """

    async def complete(self, request: Request) -> Response:
        """Send a request through the stack to the provider, and return the whole response.

        Raises:
            FluxiblyError: the call failed. Any other exception of the provider or a middleware is raised unchanged.
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
        """Return a stream of the provider's response, through the stack. The first read sends the request.

        Args:
            restarts: also yield `Restart` events, so that `Retry(on_interrupt="restart")` may begin the answer again.

        Raises:
            NotImplementedError: the provider has no `stream`.
        """
        if not hasattr(self.provider, "stream"):
            raise providers.no_stream(getattr(self.provider, "wrapped", self.provider))
        request = self.begin(request, streaming=True, restarts=restarts)
        return AsyncStream(AsyncStreamDriver(self, request, self._run(request)))

    async def aclose(self) -> None:
        """Close the provider. A second close does nothing; a later call raises a RuntimeError."""
        if not self.closed:
            self.closed = True
            aclose = getattr(self.provider, "aclose", None)
            if aclose is not None:
                await aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
