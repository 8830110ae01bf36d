"""A check of whether an OpenTelemetry SDK may be set up, without importing OpenTelemetry."""

from __future__ import annotations

import os
import sys
from functools import cache

UTIL_GENAI = "opentelemetry.util.genai.invocation"
"""The module by which instrumentations of SDKs find out that a call is measured already (see `_claim.py`)."""


def may_have_sdk(api: str, variable: str) -> bool:
    """Whether `api`, a module of OpenTelemetry, is imported (every SDK imports it), or `variable` names an SDK.

    Importing OpenTelemetry takes a tenth of a second, which a program without telemetry should not pay.
    """
    return api in sys.modules or _is_set(variable)


@cache
def _is_set(variable: str) -> bool:
    """Whether `variable` is set. Only the first call looks, because a look-up costs more than the rest of the check."""
    return variable in os.environ
