"""The event loop that runs this code: asyncio's or trio's. Neither is imported here before code runs on it."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from typing import Any


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
