"""The logger `fluxibly`, and a way to use it that cannot end a call."""

from __future__ import annotations

import logging
import re
import sys
from logging import ERROR as ERROR
from typing import Any

from fluxibly.masking import error_message
from fluxibly.outcome import error_type
from fluxibly.report import report_once
from fluxibly.types import Request

logger = logging.getLogger("fluxibly")


def log(level: int, template: str, **values: Any) -> None:
    """Log `template` with as many of the values, in order, as it has places; all of them go onto the record."""
    if not logger.isEnabledFor(level):
        return
    # The caller, without logging's search for it through the stack.
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


def log_retry(request: Request, error: Exception, attempt: int, wait: float) -> None:
    """Log that attempt number `attempt` (from 0) failed, and that another follows after `wait` seconds."""
    if logger.isEnabledFor(logging.WARNING):
        log(
            logging.WARNING,
            'LLM attempt failed, will retry | attempt=%d, wait=%.2fs, error_type=%s, error_message="%s"',
            attempt=attempt + 1,
            wait=wait,
            error_type=error_type(error),
            error_message=one_line(error_message(error, (request,))),
        )


_CONTROLS = re.compile("[\\x00-\\x08\\x0a-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")


def one_line(text: str) -> str:
    """Line ends, terminal controls and what no file takes escaped, so that no text can forge a log line or lose it."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
