"""A call that is made in a mode: sync or async, whole or streamed, on asyncio or trio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextvars import copy_context
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import attrs

from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing.scripted import VirtualClock
from fluxibly.types import Chunk, Request, Response, Restart

T = TypeVar("T")


@attrs.frozen
class Mode:
    """The way in which a call is made. `backend` is None for sync."""

    streaming: bool
    backend: Literal["asyncio", "trio"] | None = None

    def __str__(self) -> str:
        return f"{'async' if self.backend else 'sync'} {'stream' if self.streaming else 'whole'}" + (
            f" on {self.backend}" if self.backend else ""
        )


BACKENDS: tuple[Literal["asyncio", "trio"], ...] = ("asyncio", "trio") if find_spec("trio") else ("asyncio",)
MODES: tuple[Mode, ...] = tuple(
    Mode(streaming, backend) for streaming in (False, True) for backend in (None, *BACKENDS)
)
"""All modes; the modes on trio only if trio is installed."""


@attrs.define
class Ran:
    """The result of a call: a `response` or an `error`, or neither if the consumer stopped early."""

    events: list[Chunk | Restart] = attrs.field(factory=list[Chunk | Restart])
    """The events that a stream delivered."""
    response: Response | None = None
    error: BaseException | None = None
    leaks: list[str] = attrs.field(factory=list[str])
    """The names of context variables that the call changed, each once."""

    @property
    def text(self) -> str:
        """The joined texts of the delivered chunks since the last `Restart`, or since the last message began."""
        texts: list[str] = []
        for event in self.events:
            if isinstance(event, Restart) or event.added:
                texts.clear()
            if isinstance(event, Chunk):
                texts.append(event.text)
        return "".join(texts)


def run(
    mode: Mode,
    provider: Any,
    middleware: Sequence[Any],
    request: Request,
    *,
    clock: VirtualClock | None = None,
    stop_after: int | None = None,
    restarts: bool = False,
    watch: Callable[[Chunk | Restart], object] | None = None,
) -> Ran:
    """Make a call and return its result, even if that is a BaseException. `provider` must suit the mode.

    Args:
        stop_after: the number of events after which to close a stream.
        restarts: whether the consumer takes `Restart` events.
        watch: a function that gets each event as it arrives.
    """
    clock = clock or VirtualClock()
    ran = Ran()
    before = dict(copy_context())

    def look() -> None:
        after = dict(copy_context())
        for var in before.keys() | after.keys():
            if before.get(var) is not after.get(var) and var.name not in ran.leaks:
                ran.leaks.append(var.name)

    def take(event: Chunk | Restart) -> bool:
        ran.events.append(event)
        if watch is not None:
            watch(event)
        look()
        return len(ran.events) == stop_after

    def call() -> None:
        pipeline = Pipeline(provider, middleware, clock=clock)
        if not mode.streaming:
            ran.response = pipeline.complete(request)
            return
        with pipeline.stream(request, restarts=restarts) as stream:
            if stop_after == 0:
                return
            for event in stream:
                if take(event):
                    return
            ran.response = stream.response

    async def acall() -> None:
        pipeline = AsyncPipeline(provider, middleware, clock=clock)
        if not mode.streaming:
            ran.response = await pipeline.complete(request)
            return
        async with pipeline.stream(request, restarts=restarts) as stream:
            if stop_after == 0:
                return
            async for event in stream:
                if take(event):
                    return
            ran.response = stream.response

    async def aguarded() -> None:
        nonlocal before
        before = dict(copy_context())
        try:
            await acall()
        except BaseException as error:  # noqa: BLE001  # whatever the caller gets is the result
            ran.error = error
        look()

    if mode.backend is None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  # as above
            ran.error = error
        look()
    else:
        run_async(aguarded, mode.backend)
    return ran


def run_async(function: Callable[[], Awaitable[T]], backend: str = "asyncio") -> T:
    """Run a coroutine function to its end; if an event loop is running, in a thread of its own."""
    import anyio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return anyio.run(function, backend=backend)
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(anyio.run(function, backend=backend)))
    thread.start()
    thread.join()
    return results[0]
