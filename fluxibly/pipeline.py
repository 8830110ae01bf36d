"""`Pipeline` and `AsyncPipeline`: a provider with its middleware, and the loops that carry out a whole call."""

from __future__ import annotations

from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any, Literal, overload

from fluxibly import provider as providers
from fluxibly._drivers import stepping
from fluxibly._drivers.diagnosis import explain
from fluxibly._drivers.stack import SYSTEM_CLOCK as SYSTEM_CLOCK, AsyncStack, Clock as Clock, SyncStack
from fluxibly._drivers.streams import AsyncStreamDriver, SyncStreamDriver
from fluxibly._targets import TargetProviders
from fluxibly.flow.effects import Send
from fluxibly.limits import Timeouts
from fluxibly.stream import AsyncStream, Stream
from fluxibly.types import Chunk, Request, Response, Restart

if TYPE_CHECKING:
    from typing import Self

    from fluxibly.explain import Explanation


def _nothing() -> None:
    """Do nothing, where there is nothing to close."""


def _explained(stack: Pipeline | AsyncPipeline) -> Explanation:
    from fluxibly.explain import explain as explained  # late, because no call needs it

    return explained(stack.middleware, provider=stack.provider, info=stack.info)


class Pipeline(SyncStack):
    """A provider behind a stack of middleware. Many threads may use it at once.

    Args:
        provider: a `Provider`.
        middleware: the stack, outermost first.
        framework: the framework's name in logs; by default the name in the provider's `info`, else "custom".
        clock: a clock for tests; see `fluxibly.testing.VirtualClock`.
    """

    def make_targets(self) -> TargetProviders:
        """Return the providers of the targets that requests may name."""
        return TargetProviders(self.info, asynchronous=False)

    def explain(self) -> Explanation:
        """Return what the stack does, what a call may come to, and warnings of orders that hurt. Nothing is sent."""
        return _explained(self)

    def complete(self, request: Request, *, timeout: float | Timeouts | None = None) -> Response:
        """Send a request through the stack to the provider, and return the whole response.

        Args:
            timeout: the time limits of this call, in place of those of the configuration. A number of seconds bounds
                connecting, the first byte and idling of each attempt, and the whole call with its retries and waits
                (`DeadlineExceeded`). `Timeouts` sets the limits of each attempt.

        Raises:
            FluxiblyError: the call failed. Any other exception of the provider or a middleware is raised unchanged.
        """
        request = self.begin(request, timeout=timeout)
        flow = self._run(request)
        error: BaseException | None = None
        try:
            effect = flow.send(None)
            while True:
                outcome: object = None
                try:
                    if type(effect) is Send:
                        asked = effect.request
                        if asked.target is None and asked.call.leash is None:
                            effect.sent = True
                            outcome = self.provider.complete(asked)
                        elif effect.lane is None:
                            outcome = self.whole(effect)
                        else:
                            outcome = self.carry_out(effect, flow, request.call)
                    else:
                        outcome = self.carry_out(effect, flow, request.call)
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
        finally:
            request.call.last_error = None  # its frames refer to the call
            if request.call.endings or request.call.lanes is not None:
                self.clean_up(request.call)

    @overload
    def stream(
        self, request: Request, *, restarts: Literal[False] = False, timeout: float | Timeouts | None = None
    ) -> Stream[Chunk]: ...
    @overload
    def stream(
        self, request: Request, *, restarts: bool, timeout: float | Timeouts | None = None
    ) -> Stream[Chunk | Restart]: ...
    def stream(
        self, request: Request, *, restarts: bool = False, timeout: float | Timeouts | None = None
    ) -> Stream[Any]:
        """Return a stream of the provider's response, through the stack. The first read sends the request.

        Args:
            restarts: also yield `Restart` events, so that `Retry(on_interrupt="restart")` may begin the answer again.
            timeout: the time limits of this call, in place of those of the configuration. A number of seconds bounds
                connecting, the first byte, and idling between chunks; a stream as a whole has no limit then.

        Raises:
            NotImplementedError: the provider has no `stream`.
        """
        return Stream(self.open_stream(request, restarts=restarts, timeout=timeout))

    def open_stream(
        self, request: Request, *, restarts: bool = False, timeout: float | Timeouts | None = None
    ) -> SyncStreamDriver:
        """Return the driver of a stream, for those who make a handle of their own; see `stream`."""
        if not hasattr(self.provider, "stream") and not self.simulates_stream:
            raise providers.no_stream(self.provider)
        request = self.begin(request, streaming=True, restarts=restarts, timeout=timeout)
        return SyncStreamDriver(self, request, self._run(request))

    def close(self) -> None:
        """Close the provider. A second close does nothing; a later call raises a RuntimeError."""
        if not self.closed:
            self.closed = True
            with ExitStack() as closing:  # an error of a provider's close does not keep the other providers open
                for provider in (self.provider, *self.targets.take_all()):
                    closing.callback(getattr(provider, "close", _nothing))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncPipeline(AsyncStack):
    """A `Pipeline` with asynchronous methods, for asyncio and trio. It takes the same middleware.

    A synchronous provider runs in worker threads.
    """

    def make_targets(self) -> TargetProviders:
        """Return the providers of the targets that requests may name."""
        return TargetProviders(self.info, asynchronous=True)

    def explain(self) -> Explanation:
        """Return what the stack does, what a call may come to, and warnings of orders that hurt. Nothing is sent."""
        return _explained(self)

    async def complete(self, request: Request, *, timeout: float | Timeouts | None = None) -> Response:
        """Send a request through the stack to the provider, and return the whole response.

        Args:
            timeout: the time limits of this call, in place of those of the configuration. A number of seconds bounds
                connecting, the first byte and idling of each attempt, and the whole call with its retries and waits
                (`DeadlineExceeded`). `Timeouts` sets the limits of each attempt.

        Raises:
            FluxiblyError: the call failed. Any other exception of the provider or a middleware is raised unchanged.
        """
        request = self.begin(request, timeout=timeout)
        flow = self._run(request)
        error: BaseException | None = None
        try:
            effect = flow.send(None)
            while True:
                outcome: object = None
                try:
                    if type(effect) is Send:
                        asked = effect.request
                        if asked.target is None and asked.call.leash is None:
                            effect.sent = True
                            outcome = await self.provider.complete(asked)
                        elif effect.lane is None:
                            outcome = await self.whole(effect)
                        else:
                            outcome = await self.carry_out(effect, flow, request.call)
                    else:
                        outcome = await self.carry_out(effect, flow, request.call)
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
        finally:
            request.call.last_error = None  # its frames refer to the call
            if request.call.endings or request.call.lanes is not None:
                await self.clean_up(request.call)

    @overload
    def stream(
        self, request: Request, *, restarts: Literal[False] = False, timeout: float | Timeouts | None = None
    ) -> AsyncStream[Chunk]: ...
    @overload
    def stream(
        self, request: Request, *, restarts: bool, timeout: float | Timeouts | None = None
    ) -> AsyncStream[Chunk | Restart]: ...
    def stream(
        self, request: Request, *, restarts: bool = False, timeout: float | Timeouts | None = None
    ) -> AsyncStream[Any]:
        """Return a stream of the provider's response, through the stack. The first read sends the request.

        Args:
            restarts: also yield `Restart` events, so that `Retry(on_interrupt="restart")` may begin the answer again.
            timeout: the time limits of this call, in place of those of the configuration. A number of seconds bounds
                connecting, the first byte, and idling between chunks; a stream as a whole has no limit then.

        Raises:
            NotImplementedError: the provider has no `stream`.
        """
        return AsyncStream(self.open_stream(request, restarts=restarts, timeout=timeout))

    def open_stream(
        self, request: Request, *, restarts: bool = False, timeout: float | Timeouts | None = None
    ) -> AsyncStreamDriver:
        """Return the driver of a stream, for those who make a handle of their own; see `stream`."""
        if not hasattr(self.provider, "stream") and not self.simulates_stream:
            raise providers.no_stream(self.provider)
        request = self.begin(request, streaming=True, restarts=restarts, timeout=timeout)
        return AsyncStreamDriver(self, request, self._run(request))

    async def aclose(self) -> None:
        """Close the provider. A second close does nothing; a later call raises a RuntimeError."""
        if not self.closed:
            self.closed = True
            async with AsyncExitStack() as closing:  # an error of a provider's aclose does not keep the others open
                for provider in (self.provider, *self.targets.take_all()):
                    if hasattr(provider, "aclose"):
                        closing.push_async_callback(provider.aclose)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
