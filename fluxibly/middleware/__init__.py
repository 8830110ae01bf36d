"""The built-in middleware, one file for each."""

from fluxibly.middleware.logging import Logging
from fluxibly.middleware.metrics import Metrics
from fluxibly.middleware.retry import Retry
from fluxibly.middleware.stream_meter import StreamMeter
from fluxibly.middleware.timing import Timing
from fluxibly.middleware.tracing import Tracing
from fluxibly.middleware.validation import Validation

__all__ = ["Logging", "Metrics", "Retry", "StreamMeter", "Timing", "Tracing", "Validation"]
