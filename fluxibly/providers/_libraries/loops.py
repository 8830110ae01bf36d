"""Resources that another library ties to an event loop, closed together with the loop.

asyncio's connections can be closed only in their own loop, and a loop that has ended runs nothing more. But at its end
(`asyncio.run`, `asyncio.Runner`, servers) a loop closes the asynchronous generators that were started in it. So a
generator that waits for nothing else learns when its loop ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


def on_asyncio() -> bool:
    """Whether asyncio runs here. The libraries support no other event loop: on trio they are called in threads."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class PerLoop(Generic[T]):
    """A value for each event loop, closed when the loop ends, by `aclose`, or when this object is garbage-collected.

    Args:
        make: creates the value of the running loop.
        close: releases the value, in its loop. If a loop is closed without being shut down, the garbage collector
            releases the value.
    """

    def __init__(self, make: Callable[[], T], close: Callable[[T], Awaitable[None]]) -> None:
        self._make = make
        self._close = close
        self._held: dict[asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[None]]] = {}

    def get(self) -> T:
        """Return the value of the running loop."""
        loop = asyncio.get_running_loop()
        held = self._held.get(loop)
        if held is None:
            for other in [other for other in list(self._held) if other.is_closed()]:
                self._held.pop(other, None)
            value = self._make()
            held = self._held[loop] = (value, _begun(_closing(self._close, value, self._held, loop)))
        return held[0]

    async def aclose(self) -> None:
        """Close the running loop's value, if it has a value."""
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
    """Return the generator after running it to its first `yield`. From then on the running loop knows the generator."""
    with contextlib.suppress(StopIteration):
        generator.asend(None).send(None)
    return generator
