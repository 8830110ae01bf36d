"""What calls have left behind, and Ctrl-C during a call."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AT_LEAST = 0.1
"""Seconds between the beginning of a wait and Ctrl-C."""


def eventually(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Wait until a condition is true. Return whether that happened within `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def threads() -> list[str]:
    """Return the names of the threads of the drivers that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fluxibly-")]


def open_files() -> int:
    """Return the number of open files and sockets of this process, or 0 where that cannot be known."""
    files = Path("/proc/self/fd")
    return len([*files.iterdir()]) if files.exists() else 0


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that the block leaves no thread of the drivers and no open file or socket."""
    before = open_files()
    yield
    assert eventually(lambda: not threads()), threads()
    assert eventually(lambda: open_files() <= before), (before, open_files())


def left_in(store: Any) -> dict[str, list[str]]:
    """Return the calls that a memory store, or one around a memory store, still has a place or a wait of, by key."""
    kept = getattr(store, "inner", store)
    found: dict[str, list[str]] = {}
    for key, places in kept._places.items():
        found[key] = [*places.held, *places.waiting, *places.signals]
    for key, rates in kept._rates.items():
        found[key] = [*rates.waiting, *rates.signals, *[name for name, units in rates.queued.items() if units]]
    return {key: left for key, left in found.items() if left}


def interrupt_until(over: threading.Event) -> None:
    """Send Ctrl-C to the main thread, and again after a while, because a signal just before a wait does not end it."""
    for seconds in (AT_LEAST, 3.0, 3.0):
        if over.wait(seconds):
            return
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
