"""Whether an OpenTelemetry SDK can have been set up, told without importing OpenTelemetry."""

from __future__ import annotations

import os
import sys
from functools import cache


def may_have_sdk(api: str, variable: str) -> bool:
    """Whether someone has imported `api`, a module of OpenTelemetry's, as an SDK does, or `variable` names an SDK.

    To import it takes a tenth of a second, which a program without telemetry is spared.
    """
    return api in sys.modules or _is_set(variable)


@cache
def _is_set(variable: str) -> bool:
    """Whether it is in the environment at the first call: to look there costs more than all else that is done then."""
    return variable in os.environ
