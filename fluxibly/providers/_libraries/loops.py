"""What another library ties to an event loop, closed together with it.

Connections of asyncio can be closed in their own loop alone, and a loop that has ended runs nothing more. But at its
end (`asyncio.run`, `asyncio.Runner`, servers) a loop closes the asynchronous generators that were begun in it; so a
generator that waits for nothing else is how to be told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


def on_asyncio() -> bool:
    """Whether asyncio runs here. The libraries know of no other event loop: on trio they are called in threads."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class PerLoop(Generic[T]):
    """A value for each event loop, closed when the loop ends, when it is asked for, or once nobody holds this.

    Args:
        make: makes the value of the running loop.
        close: releases it, in its loop. A loop that was closed without being shut down leaves that to the garbage
            collector.
    """

    def __init__(self, make: Callable[[], T], close: Callable[[T], Awaitable[None]]) -> None:
        self._make = make
        self._close = close
        self._held: dict[asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[None]]] = {}

    def get(self) -> T:
        """The value of the running loop."""
        loop = asyncio.get_running_loop()
        held = self._held.get(loop)
        if held is None:
            for other in [other for other in list(self._held) if other.is_closed()]:
                self._held.pop(other, None)
            value = self._make()
            held = self._held[loop] = (value, _begun(_closing(self._close, value, self._held, loop)))
        return held[0]

    async def aclose(self) -> None:
        """Close the running loop's value, if there is one."""
        held = self._held.get(asyncio.get_running_loop())
        if held is not None:
            await held[1].aclose()


async def _closing(
    close: Callable[[T], Awaitable[None]],
    value: T,
    held: dict[asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[None]]],
    loop: asyncio.AbstractEventLoop,
) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        held.pop(loop, None)
        await close(value)


def _begun(generator: AsyncGenerator[None]) -> AsyncGenerator[None]:
    """The generator, at its first `yield`; the running loop knows of it from here on."""
    with contextlib.suppress(StopIteration):
        generator.asend(None).send(None)
    return generator
