"""The logger `fluxibly`, and a way to use it that cannot end a call."""

from __future__ import annotations

import logging
from typing import Any

from fluxibly.report import report_once

logger = logging.getLogger("fluxibly")


def log(level: int, template: str, **values: Any) -> None:
    """Log `template` with as many of the values, in order, as it has places; all of them go onto the record."""
    if not logger.isEnabledFor(level):
        return
    try:
        logger.log(level, template, *list(values.values())[: template.count("%")], extra=values, stacklevel=2)
    except Exception as error:  # noqa: BLE001  # a log handler that raises must not end the call
        report_once("logging", f"a log handler raised {type(error).__name__}; the call went on without its log line")


def one_line(text: str) -> str:
    """Line ends escaped, so that no text can forge a log line."""
    return text.replace("\r", "\\r").replace("\n", "\\n")
