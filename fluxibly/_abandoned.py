"""Streams that the consumer dropped without closing them.

The handle that a consumer holds is apart from its driver, which stays alive here until it has ended. So the garbage
collector only ever finds a handle, and the handle's finalizer does no more than queue the driver. The `finally` blocks of
middleware, which take locks (a telemetry SDK's, for example), never run inside of the collector.
"""

from __future__ import annotations

import atexit
import gc
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol


class Abandonable(Protocol):
    """The driver of a stream."""

    @property
    def ended(self) -> bool: ...
    def abandon(self) -> None:
        """Give the stream up from ordinary code that cannot wait."""
        ...


_open: set[Abandonable] = set()
keep = _open.add
forget = _open.discard
pending: deque[Abandonable] = deque()
"""The drivers that the garbage collector found, until the next call ends them."""
_inherited: set[Abandonable] = set()
"""The drivers of the process that this one was forked from, which alone ends them."""


def install_gc_probe() -> Callable[[], bool]:
    """Watch the garbage collector. Return a function that says whether the collector runs the code that calls it.

    The collector calls the hooks in `gc.callbacks` with a phase, "start" or "stop", and an object made for the occasion.
    """

    # Both phases are names of one slot, so each hook overwrites what the other phase left. The hooks are C functions,
    # because a signal handler can run inside of a Python function: the collector ignores exceptions, and Ctrl-C would be
    # lost there.
    class Phase:
        __slots__ = ("start",)
        start: object

    Phase.stop = Phase.start  # type: ignore[attr-defined,misc]  # pyright: ignore[reportAttributeAccessIssue]  # the slot's other name
    last, here = Phase(), threading.local()
    last.start = None
    gc.callbacks += [partial(setattr, last), partial(setattr, here)]

    def collecting() -> bool:
        # The last event in any thread was a start, and this thread saw it.
        return last.start is not None and last.start is getattr(here, "start", None)

    return collecting


collecting = install_gc_probe()


def abandon(driver: Abandonable) -> None:
    """End a stream that was dropped: now, or inside of the garbage collector at the next call."""
    if driver.ended or driver in _inherited:
        return
    if collecting():
        pending.append(driver)
    else:
        driver.abandon()


def end_pending() -> None:
    """End the streams that the garbage collector found. Every call begins with this."""
    while pending:
        try:
            pending.popleft().abandon()
        except Exception as error:  # noqa: BLE001  # there is no caller to raise it to
            from fluxibly._logs import ERROR, log

            log(
                ERROR,
                "a middleware raised %s while a dropped stream was ended",
                error_type=type(error).__name__,
            )


def end_all() -> None:
    """End the streams that are still open, because the process ends."""
    pending.extend(_open - _inherited)
    end_pending()


def end_all_before() -> None:
    """Run `end_all` at exit before every handler registered so far: before a telemetry SDK that is set up shuts down."""
    atexit.unregister(end_all)
    atexit.register(end_all)


def _after_fork_in_child() -> None:
    _inherited.update(_open)
    pending.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)
end_all_before()
