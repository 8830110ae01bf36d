"""The event loop that runs this code, asyncio's or trio's, and a loop for code that has none.

Neither library is imported here before it is needed.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import Any, TypeVar

T = TypeVar("T")


def trio_here() -> Any:
    """Return the module `trio` if this code runs in a task of trio, else None."""
    # If nobody has imported trio, this is not a task of trio. That trio runs in this thread does not say enough: as the
    # guest of another loop it does so while that loop's tasks run.
    trio = sys.modules.get("trio")
    # Another thread may be in the middle of the first import of trio, and then no code runs on it yet.
    in_trio_task = getattr(getattr(trio, "lowlevel", None), "in_trio_task", None)
    return trio if in_trio_task is not None and in_trio_task() else None


async def wait_for(event: Any, seconds: float) -> None:
    """Wait for an anyio event, at most for a number of seconds, which may be infinite."""
    if seconds == math.inf:
        await event.wait()
    elif trio := trio_here():
        with trio.move_on_after(seconds):
            await event.wait()
    else:
        import asyncio  # late: it takes as long to import as all of fluxibly

        # A coroutine that is closed, or that the end of its event loop leaves behind, could not leave a cancel scope.
        timer = asyncio.get_running_loop().call_later(seconds, event.set)
        try:
            await event.wait()
        finally:
            timer.cancel()


def from_anywhere(callback: Callable[[], object]) -> Callable[[], None]:
    """Return a function for any thread to call. The loop that runs now then calls `callback`, unless it has ended."""
    soon: Callable[[Callable[[], object]], object]
    if trio := trio_here():
        soon = trio.lowlevel.current_trio_token().run_sync_soon
    else:
        import asyncio  # late: it takes as long to import as all of fluxibly

        soon = asyncio.get_running_loop().call_soon_threadsafe

    def call() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, so there is no wait to end
            soon(callback)

    return call


def run_to_end(function: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
    """Run an async function to its end, for a caller that is not async, in an event loop of asyncio of its own.

    A thread runs one loop at a time. So if one runs here already, as in a notebook, the function runs in another thread.
    An exception that ends the wait, such as Ctrl-C, cancels the function.

    Raises:
        NotInTime: the function took longer than `seconds`, and was cancelled.
    """
    import asyncio  # late, as above

    if asyncio._get_running_loop() is None and trio_here() is None:  # documented for this purpose
        # With a factory, the loop that the caller may have set for this thread stays.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(_awaited(function, seconds))
    return _run_in_thread(function, seconds)


async def _awaited(function: Callable[[], Awaitable[T]], seconds: float | None) -> T:
    # The context may be that of a task of trio, and anyio then takes this loop for trio's.
    sniffio = sys.modules.get("sniffio")
    if sniffio is not None:
        sniffio.current_async_library_cvar.set("asyncio")  # in the context of this task alone
    if seconds is None:
        return await function()
    import asyncio

    from fluxibly._threads import NotInTime

    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await function()
    except TimeoutError:
        if limit.expired():
            raise NotInTime from None
        raise  # it is the function's own


def _run_in_thread(function: Callable[[], Awaitable[T]], seconds: float | None) -> T:
    import asyncio
    from concurrent.futures import Future
    from threading import Thread

    done: Future[T] = Future()
    cancels: list[Callable[[], object]] = []

    async def cancellable() -> T:
        task = asyncio.current_task()
        if task is not None:
            cancels.append(from_anywhere(task.cancel))
        return await function()

    def run() -> None:
        try:
            done.set_result(run_to_end(cancellable, seconds))
        except BaseException as error:  # noqa: BLE001  # it is raised where the result is awaited
            done.set_exception(error)

    Thread(target=copy_context().run, args=(run,), name="fluxibly-loop", daemon=True).start()
    try:
        return done.result()
    except BaseException:
        for cancel in cancels:
            cancel()
        raise
