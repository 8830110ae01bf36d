"""The logger `fluxibly`, whose failures never end a call, and the reports on stderr of failing logs and telemetry."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from logging import ERROR as ERROR
from typing import Any

from fluxibly._masking import error_message
from fluxibly.errors import error_type
from fluxibly.types import Request

_reported: set[str] = set()
_lock = threading.Lock()


def report_once(key: str, message: str) -> None:
    """Print `fluxibly: message` to stderr, once per `key` in a process. Never raise an exception."""
    with _lock:
        if key in _reported:
            return
        _reported.add(key)
    with contextlib.suppress(Exception):  # a closed or missing stderr must not fail a call
        sys.stderr.write(f"fluxibly: {message}\n")


def forget_reports() -> None:
    """Forget which keys were reported, so that tests start afresh."""
    with _lock:
        _reported.clear()


logger = logging.getLogger("fluxibly")


def log(level: int, template: str, **values: Any) -> None:
    """Log `template`, filled with as many of the `values` as it has placeholders. The record carries all `values`."""
    if not logger.isEnabledFor(level):
        return
    # The frame of the caller, without logging's slow search through the stack.
    caller = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  # logging does the same
    code = caller.f_code
    arguments = tuple(values.values())[: template.count("%")]
    try:
        logger.handle(
            logger.makeRecord(
                logger.name, level, code.co_filename, caller.f_lineno, template, arguments, None, code.co_name, values
            )
        )
    except Exception as error:  # noqa: BLE001  # a log handler that raises must not end the call
        report_once("logging", f"a log handler raised {type(error).__name__}; the call went on without its log line")


def log_retry(request: Request, error: Exception, attempt: int, wait: float, *, change: str = "") -> None:
    """Log that attempt number `attempt` (counted from 0) failed, and that the next follows after `wait` seconds.

    `change` says how the next request differs; empty means that it is the same.
    """
    if logger.isEnabledFor(logging.WARNING):
        template = 'LLM attempt failed, will retry | attempt=%d, wait=%.2fs, error_type=%s, error_message="%s"'
        values: dict[str, Any] = {
            "attempt": attempt + 1,
            "wait": wait,
            "error_type": error_type(error),
            "error_message": one_line(error_message(error, (request,))),
        }
        if change:
            template += ', change="%s"'
            values["change"] = change
        log(logging.WARNING, template, **values)


def log_decision(request: Request, middleware: str, what: str, error: Exception | None = None) -> None:
    """Note a decision for the trace of a call, and log it: as a WARNING if an `error` led to it, else at DEBUG.

    Args:
        middleware: the name of its class.
        what: see `CallRecord.decide`.
        error: the error that led to it.
    """
    request.call.decide(middleware, what)
    level = logging.DEBUG if error is None else logging.WARNING
    if logger.isEnabledFor(level):
        template = 'LLM call decision | middleware=%s, decision="%s"'
        values: dict[str, Any] = {"middleware": middleware, "decision": one_line(what)}
        if error is not None:
            template += ', error_type=%s, error_message="%s"'
            values["error_type"] = error_type(error)
            values["error_message"] = one_line(error_message(error, (request,)))
        log(level, template, **values)


_CONTROLS = re.compile("[\\x00-\\x08\\x0a-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")


def one_line(text: str) -> str:
    """Escape line ends, terminal controls and lone surrogates, so that no text can forge a log line or lose it."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
