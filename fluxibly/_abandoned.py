"""Streams that were given up without being closed.

The handle that a consumer holds is apart from its driver, which is kept alive here until it has ended. So the garbage
collector only ever finds a handle, whose finalizer does no more than queue the driver: the `finally` blocks of
middleware, which take locks (a telemetry SDK's, say), never run inside of the collector.
"""

from __future__ import annotations

import atexit
import gc
import os
import threading
from collections import deque
from functools import partial
from typing import Protocol


class Abandonable(Protocol):
    """A stream's driver."""

    ended: bool

    def abandon(self) -> None:
        """Give the stream up from ordinary code that cannot wait."""
        ...


_open: set[Abandonable] = set()
keep = _open.add
forget = _open.discard
pending: deque[Abandonable] = deque()


class _Phase:
    """What the collector told last, in either phase: `start` and `stop` are the same slot."""

    __slots__ = ("start",)
    start: object


_Phase.stop = _Phase.start  # type: ignore[attr-defined,misc]  # pyright: ignore[reportAttributeAccessIssue]  # as above
_last = _Phase()
_here = threading.local()
_last.start = None
# The collector calls these with a phase, "start" or "stop", and an object made for the occasion. They are C: into a
# Python function a signal handler could get, and Ctrl-C would be lost there, since the collector ignores exceptions.
gc.callbacks += [partial(setattr, _last), partial(setattr, _here)]


def collecting() -> bool:
    """Whether this code is run by the garbage collector, as finalizers are: the last it told is a start, told here."""
    return _last.start is not None and _last.start is getattr(_here, "start", None)


def abandon(driver: Abandonable) -> None:
    """End a stream that was dropped: now, or from inside of the garbage collector at the next call."""
    if driver.ended:
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
    """End the streams that are still open, because the process ends. Those of the process that it was forked from stay."""
    pending.extend(_open - _inherited)
    end_pending()


def end_all_before() -> None:
    """At exit, do so before whatever has registered until now: before a telemetry SDK that was set up shuts down."""
    atexit.unregister(end_all)
    atexit.register(end_all)


_inherited: set[Abandonable] = set()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=lambda: _inherited.update(_open))
end_all_before()
