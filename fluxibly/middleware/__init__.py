"""The built-in middleware, a file each. A middleware holds no state of a call: the call's record does (`request.call`).

Imports: `flow`, `telemetry`, data and its helpers; never a provider. Imported by: `llm` (the default stack) and `registry`, by
name.
"""

from fluxibly.middleware.deadline import Deadline
from fluxibly.middleware.logging import Logging
from fluxibly.middleware.metrics import Metrics
from fluxibly.middleware.retry import Retry, RetryBudget
from fluxibly.middleware.stream_meter import StreamMeter
from fluxibly.middleware.stream_timeout import StreamTimeout
from fluxibly.middleware.timing import Timing
from fluxibly.middleware.tracing import Tracing
from fluxibly.middleware.validation import Validation

__all__ = [
    "Deadline",
    "Logging",
    "Metrics",
    "Retry",
    "RetryBudget",
    "StreamMeter",
    "StreamTimeout",
    "Timing",
    "Tracing",
    "Validation",
]
