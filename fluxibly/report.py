"""Telling the operator, once, that something beside the calls is broken: an exporter, a log handler, a redact function.

It goes to stderr and not to a log, because what is broken may be the logging itself, and no handler may get at the
caller's call this way.
"""

from __future__ import annotations

import contextlib
import sys
import threading

_reported: set[str] = set()
_lock = threading.Lock()


def report_once(key: str, message: str) -> None:
    """Print `fluxibly: message` to stderr, the first time that this `key` is reported in the process. Never raises."""
    with _lock:
        if key in _reported:
            return
        _reported.add(key)
    with contextlib.suppress(Exception):  # a closed or missing stderr must not fail a call
        sys.stderr.write(f"fluxibly: {message}\n")


def forget_reports() -> None:
    """Report everything anew; for tests."""
    with _lock:
        _reported.clear()
