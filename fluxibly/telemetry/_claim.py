"""The claim to a call: a mark by which instrumentations of SDKs know that its attempts are measured already.

Instrumentations that are built on opentelemetry-util-genai record neither a span nor metrics for a call of their SDK if
the current context holds an `InferenceData` under their key. They would count the tokens a second time.
"""

from __future__ import annotations

import sys
from typing import cast

from opentelemetry.context import get_value

from fluxibly._logs import report_once
from fluxibly.telemetry._propagation import Entry
from fluxibly.telemetry._sdk import UTIL_GENAI
from fluxibly.types import CallRecord


class InferenceClaim:
    """A claim to the attempts of one call, but not to the I/O of middleware between them or during them.

    Args:
        key: the key of the context.
        data: the `InferenceData`, to which the instrumentations add what they have seen.
    """

    def __init__(self, key: str, data: object) -> None:
        self.key = key
        self.data = data
        self.outer = get_value(key)
        """The value outside of the call."""

    def enter(self) -> Entry:
        return Entry(self.key, self.data)

    def suspend(self) -> Entry:
        return Entry(self.key, self.outer)

    def leave(self, token: object) -> None:
        cast("Entry", token).leave()


def claim(call: CallRecord) -> None:
    """Claim the attempts of a call that no layer further out has claimed. The module `UTIL_GENAI` must be loaded."""
    util = sys.modules[UTIL_GENAI]
    key = getattr(util, "CLIENT_INFERENCE_CONTEXT_KEY", None)
    make = getattr(util, "InferenceData", None)
    if key is None or make is None:
        return
    try:
        call.claim = InferenceClaim(key, make())
    except Exception as problem:  # noqa: BLE001  # perhaps another release of that package
        why = f"opentelemetry-util-genai raised {type(problem).__name__}"
        report_once("claim", f"{why}; instrumentations that use it may measure calls a second time")
