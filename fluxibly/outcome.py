"""How a call ended, told alike by logs, metrics and spans."""

from __future__ import annotations

from fluxibly.errors import StreamStalled, root_cause
from fluxibly.types import Outcome


def outcome_of(error: BaseException | None) -> Outcome:
    """The outcome of a call that raised `error` (None: it returned).

    `GeneratorExit` is how a flow learns that its consumer stopped early. Any other `BaseException` that is no
    `Exception` (asyncio's and trio's cancellation, Ctrl-C) arrived while the call was waited for: it is cancelled.
    """
    if error is None:
        return "completed"
    if isinstance(error, GeneratorExit):
        return "abandoned"
    if not isinstance(error, Exception):
        return "cancelled"
    return "stalled" if isinstance(root_cause(error), StreamStalled) else "failed"


def error_type(error: BaseException) -> str:
    """A name of low cardinality for an error: its class, and `CancelledError` for trio's `Cancelled` as well."""
    name = type(root_cause(error)).__name__
    return "CancelledError" if name == "Cancelled" else name
