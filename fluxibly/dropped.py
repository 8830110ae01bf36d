"""Streams that were given up without being closed.

The handle that a consumer holds is apart from its driver, which is kept alive here until it has ended. So the garbage
collector only ever finds a handle, whose finalizer does no more than queue the driver: the `finally` blocks of
middleware, which take locks (a telemetry SDK's, say), never run inside of the collector.
"""

from __future__ import annotations

import atexit
import gc
import threading
from collections import deque
from typing import Protocol


class Droppable(Protocol):
    """A stream's driver."""

    ended: bool

    def let_go(self) -> None:
        """Give the stream up from ordinary code that cannot wait."""
        ...


_open: set[Droppable] = set()
keep = _open.add
forget = _open.discard
orphans: deque[Droppable] = deque()
_collector: int | None = None


def _note_collection(phase: str, _: object) -> None:
    global _collector  # noqa: PLW0603  # the one garbage collector's state
    _collector = threading.get_ident() if phase == "start" else None


def let_go(driver: Droppable) -> None:
    """End a stream that was dropped: now, or from inside of the garbage collector at the next call."""
    if driver.ended:
        return
    if _collector == threading.get_ident():
        orphans.append(driver)
    else:
        driver.let_go()


def end_orphans() -> None:
    """End the streams that the garbage collector found. Every call begins with this, and the process ends with it."""
    while orphans:
        try:
            orphans.popleft().let_go()
        except Exception as error:  # noqa: BLE001  # there is no caller to raise it to
            from fluxibly.logs import ERROR, log

            log(
                ERROR,
                "a middleware raised %s while a dropped stream was ended",
                error_type=type(error).__name__,
            )


gc.callbacks.append(_note_collection)
atexit.register(end_orphans)
